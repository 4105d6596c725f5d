"""What MLflow keeps: runs with parameters, metrics and images, and the registry of models.

The only package that imports mlflow, and it does so late: with tracking off nothing of it is loaded.
"""
