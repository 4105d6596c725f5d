"""MLflow tracking: runs with parameters, metrics and images, and the model registry.

Only this package imports mlflow, and only inside functions, so mlflow is not loaded if tracking is off.
"""
