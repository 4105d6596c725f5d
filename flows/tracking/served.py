"""What a registered version runs: a list of prompts in, pictures out. MLflow keeps this file as code, so no pickle."""

import base64
import io
from pathlib import Path
from typing import Any

import mlflow.models
from mlflow.pyfunc import PythonModel, PythonModelContext

from sage.errors import RegistryError
from sage.files import sha256_tree


class SharedSampling(PythonModel):  # type: ignore[misc]  # mypy does not follow mlflow
    """Groups the prompts, samples each group's early steps once, and answers in the order of the prompts."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights that the version carries; raise RegistryError where their hash does not fit."""
        from sage.pipeline import SharedSamplingPipeline

        folder = Path(context.artifacts["model"])
        found, wanted = sha256_tree(folder), context.model_config["model_sha256"]
        if found != wanted:
            raise RegistryError(f"the weights are damaged: SHA-256 {found[:12]}, not {wanted[:12]}.")
        self._pipeline: Any = SharedSamplingPipeline.from_pretrained(folder)

    def predict(self, context: PythonModelContext, model_input: list[str]) -> list[dict[str, str]]:
        """Return for each prompt its text and its picture, a PNG in base64."""
        from sage.embedding import embed
        from sage.grouping import group

        groups = group(embed(model_input), *context.model_config["group"])
        images = self._pipeline(model_input, groups=groups, seed=0, **context.model_config["sampling"]).images
        return [{"prompt": prompt, "png": _png(image)} for prompt, image in zip(model_input, images, strict=True)]


def _png(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


mlflow.models.set_model(SharedSampling())
