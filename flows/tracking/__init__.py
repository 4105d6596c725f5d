"""What MLflow keeps: runs with parameters, metrics and pictures, and the registry of models.

The only package that imports mlflow, and it does so late: with tracking off nothing of it is loaded.
"""

from flows.tracking.promotion import promote as promote
from flows.tracking.promotion import rollback as rollback
from flows.tracking.recorded import Recorded as Recorded
from flows.tracking.recorded import recorded as recorded
from flows.tracking.registry import Registration as Registration
from flows.tracking.registry import fetch as fetch
from flows.tracking.registry import register as register
from flows.tracking.registry import versions as versions
from flows.tracking.runs import Pipeline as Pipeline
from flows.tracking.runs import Run as Run
from flows.tracking.runs import address as address
from flows.tracking.runs import check as check
from flows.tracking.runs import pipeline_run as pipeline_run
from flows.tracking.runs import stage_run as stage_run
