"""Versions of models that group by their distilled encoder: it is one of their files."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tracked
from encoders import random_encoder
from mlflow.exceptions import MlflowException
from tracked import database, project, weights  # noqa: F401

from flows.drawing import open_pipeline
from flows.prompts import generate
from flows.tracking import content, registry
from sage.config import Params
from sage.errors import ConfigurationError
from sage.grouping.distilled import kept_at, write_distilled
from sage.grouping.groups import group

pytestmark = pytest.mark.slow

PROMPTS = ["a red cat", "a red cat on a mat", "stock market", "tall tree", "an old house", "old houses"]


@pytest.mark.filterwarnings("ignore:.*type hint is inferred as AnyType:UserWarning")  # of mlflow's own classes
def test_a_version_holds_its_encoder_and_groups_by_it(project, weights, monkeypatch):
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project / 'mlflow.db'}")
    model = Path("models/sage")
    shutil.copytree(weights, model)
    values = tracked.params().model_dump()
    params = Params.model_validate(values | {"group": values["group"] | {"by": "distilled", "threshold": 0.9}})
    results = tracked.write_results(model)

    def register():
        return registry.register(model, results, Path("groups"), params)

    with pytest.raises(ConfigurationError, match="models/sage has no distilled encoder"):
        register()
    encoder = random_encoder(open_pipeline(model).made_for(2, 3.0))
    write_distilled(model, encoder, {})
    assert register().version == "1"

    shutil.rmtree("models")
    opened = generate.open_model("models:/sage@challenger")
    assert opened[3].by == "distilled" and opened[4].sha256 == encoder.sha256
    with_encoder = registry.fetch("1", project / "fetched")
    assert kept_at(with_encoder.weights).is_file() and content.draws(with_encoder)

    import mlflow.pyfunc

    served = mlflow.pyfunc.load_model("models:/sage@challenger")
    threshold = opened[3].threshold
    rows = encoder.embed(PROMPTS)
    assert np.isfinite(rows).all()
    wanted = group(rows, threshold, opened[3].max_size, opened[3].near_duplicate)
    answers = served.predict(PROMPTS)
    found = {frozenset({place, *answer["shared_with"]}) for place, answer in enumerate(answers)}
    assert found == set(map(frozenset, wanted)) and len(wanted) < len(PROMPTS)
    with pytest.raises(MlflowException, match=r"guidance scale 3\.0, not 1\.0"):
        served.predict(PROMPTS, params={"guidance_scale": 1.0})
