"""What MLflow keeps: runs with parameters, metrics and pictures, and the registry of models.

The only package that imports mlflow, and it does so late: with tracking off nothing of it is loaded.
"""

from flows.tracking.runs import Run as Run
from flows.tracking.runs import stage_run as stage_run
