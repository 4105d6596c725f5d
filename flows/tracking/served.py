"""The MLflow model of a registered version: it takes a list of prompts and returns images.

MLflow stores this file as code, so no pickle is needed. Prompts share steps only within one request. The answer has an
item for each prompt, in the order of the prompts: an image or an error. An invalid prompt gets an error and does not
affect the others. The whole request is refused with status 400 if it exceeds the limits or a parameter is out of range.
"""

import base64
import io
import threading
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import mlflow.models
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext

from flows.drawing import draw, first_predictions, open_pipeline
from flows.tracking.content import check_loaded
from sage.data.captions import clean_caption
from sage.data.images import is_blank
from sage.data.rows import Rejected
from sage.errors import ConfigurationError, RegistryError
from sage.files import sha256_tree
from sage.grouping.boilerplate import distinct
from sage.grouping.distilled import Distilled, read_distilled
from sage.grouping.embedding import embed
from sage.grouping.policy import Policy
from sage.numbers import whole
from sage.sampling.first_prediction import FirstPredictions
from sage.sampling.plan import Plan
from sage.sampling.seeds import image_seeds

_LARGEST_SEED = 2**63 - 1

Answer = dict[str, str | int | float | list[int]]


class SharedSampling(PythonModel):  # type: ignore[misc]  # mypy does not follow mlflow
    """MLflow model that groups the prompts of a request and computes the first steps once for each group."""

    _distilled: Distilled | None = None

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights of the version; raise RegistryError if a hash differs."""
        folder = Path(context.artifacts["model"])
        check_loaded(folder.parents[1])
        found, wanted = sha256_tree(folder), context.model_config["model_sha256"]
        if found != wanted:
            raise RegistryError(f"the weights are damaged: SHA-256 {found[:12]}, not {wanted[:12]}.")
        if context.model_config["group"].get("by") == "distilled":
            self._distilled = read_distilled(folder)
        self._pipeline = open_pipeline(folder)
        # A server calls from several threads, but the pipeline has only one scheduler, which holds state.
        self._alone = threading.Lock()

    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> list[Answer]:
        """Return an item for each prompt; one without a good image has only the key `error`, others these:

        prompt               the cleaned prompt
        png                  the image in base64
        seed                 its seed
        group, shared_with   number of its group, and positions of the other prompts in it
        truncated_tokens     tokens cut off at the text encoder's limit
        network_evaluations  evaluations of its group divided by the size of the group
        independent          evaluations that the prompt would need alone

        Raises MlflowException if the request exceeds the limits or a parameter is out of range.
        """
        config = context.model_config
        settings = config["sampling"] | {"seed": 0, "seeds": [], "negative_prompt": ""}
        settings |= {name: value for name, value in (params or {}).items() if value is not None}
        _check(settings, len(model_input), config["limits"])
        items = [_item(prompt, config["limits"]["characters"]) for prompt in model_input]
        drawn = [number for number, item in enumerate(items) if "error" not in item]
        if not drawn:
            return items
        texts = [str(items[number]["prompt"]) for number in drawn]
        seeds = image_seeds(settings["seed"], texts)
        if settings["seeds"]:
            seeds = [settings["seeds"][number] for number in drawn]
        with self._alone:
            steps = self._pipeline.evaluations(settings["steps"])
            policy, first = Policy(**config["group"]), None
            if policy.by == "prediction":
                first = first_predictions(self._pipeline, texts, settings)
            embeddings = self._embedded(texts, settings) if first is None else first.embeddings()
            groups = policy.form(texts, embeddings, config["group"]["threshold"])
            of = {member: place for place, members in enumerate(groups) for member in members}
            for member, result, truncated in draw(self._pipeline, texts, seeds, groups, settings, predictions=first):
                if isinstance(result, str):
                    items[drawn[member]] = {"error": result}
                    continue
                if is_blank(result.image):
                    items[drawn[member]] = {"error": "blank: the model gave an image of a single colour"}
                    continue
                items[drawn[member]] |= {
                    "png": _png(result.image),
                    "seed": result.seed,
                    "group": of[member],
                    "shared_with": [drawn[other] for other in groups[of[member]] if other != member],
                    "truncated_tokens": truncated,
                    **_cost(steps, len(groups[of[member]]), settings, first),
                }
        return items

    def _embedded(self, texts: list[str], settings: dict[str, Any]) -> np.ndarray:
        """Return what prompts are grouped by; raise MlflowException if the distilled encoder is for other settings."""
        if self._distilled is None:
            return embed(distinct(texts))
        try:
            self._distilled.check(self._pipeline.made_for(settings["steps"], settings["guidance_scale"]))
        except ConfigurationError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return self._distilled.embed(texts)


def _check(settings: dict[str, Any], prompts: int, limits: dict[str, int]) -> None:
    """Raise MlflowException if a request exceeds the limits or a parameter is out of range."""
    steps, seeds = settings["steps"], settings["seeds"]
    problems = {
        f"{prompts} prompts were given; give 1 to {limits['prompts']}": not 1 <= prompts <= limits["prompts"],
        f"{prompts} prompts of {steps} steps are more than {limits['steps']} steps": prompts * steps > limits["steps"],
        f"steps is {steps}; give 1 to 1000": not 1 <= steps <= 1000,
        f"share_ratio is {settings['share_ratio']}; give 0 to below 1": not 0 <= settings["share_ratio"] < 1,
        f"guidance_scale is {settings['guidance_scale']}; give 0 to 100": not 0 <= settings["guidance_scale"] <= 100,
        f"{len(seeds)} seeds were given for {prompts} prompts": bool(seeds) and len(seeds) != prompts,
        f"a seed is below 0 or above {_LARGEST_SEED}": not all(_is_seed(seed) for seed in (*seeds, settings["seed"])),
        f"negative_prompt has more than {limits['characters']} characters": (
            len(settings["negative_prompt"]) > limits["characters"]
        ),
    }
    if wrong := [problem for problem, found in problems.items() if found]:
        raise MlflowException.invalid_parameter_value("; ".join(wrong))


def _is_seed(value: Any) -> bool:
    try:
        return 0 <= whole("seed", value) <= _LARGEST_SEED
    except ConfigurationError:
        return False


def _item(prompt: str, characters: int) -> Answer:
    """Return an item with the cleaned prompt, or with an error if the prompt is invalid."""
    try:
        if len(prompt) > characters:
            raise Rejected("too_long", f"the prompt has {len(prompt)} characters; at most {characters} are drawn")
        return {"prompt": clean_caption(prompt)}
    except Rejected as error:
        return {"error": f"{error.reason}: {error.detail}"}


def _cost(steps: int, size: int, settings: dict[str, Any], first: FirstPredictions | None = None) -> dict[str, float]:
    """Return network evaluations per prompt of a group of `size` prompts, and of sampling a prompt alone.

    With first predictions, those of the group count, and its first step does not if it is taken from them.
    """
    each = 2 if settings["guidance_scale"] > 1 else 1
    plan = Plan.shared([list(range(size))], steps, settings["share_ratio"])
    nfe = each * plan.nfe(guidance=False)
    if first is not None:
        nfe += each * (size - len(plan.roots) if first.reusable else size)
    return {"network_evaluations": nfe / size, "independent": steps * each}


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


mlflow.models.set_model(SharedSampling())
