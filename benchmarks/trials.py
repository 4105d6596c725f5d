"""Trials: models trained by one recipe or another, and the features of pictures that they draw by one plan or another.

Both are kept in a work folder under a name that hashes everything they depend on, the code included, so a command that
was killed goes on, and nothing that changed is taken for what it was.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sage.torchvision_ops

import numpy as np
import yaml

import sage
from benchmarks.judged import JUDGE, Seen, as_features
from flows.drawing import open_pipeline
from flows.terminal import progress
from sage.config import Finetune, Params
from sage.data.dataset import read_split
from sage.data.groups import read_groups
from sage.evaluation.figures import ImageFeatures
from sage.files import digest, new_file, sha256, sha256_tree, write_text
from sage.grouping.cost import model_digest
from sage.grouping.embedding import embed
from sage.grouping.groups import tree
from sage.sampling.budget import Cluster, clusters, plan_for_budget
from sage.sampling.plan import Plan
from sage.sampling.seeds import prompt_seed

BASE = "base"
# The modules of sage that decide what is learned, and what is drawn and seen.
TRAINS = (
    *("training/finetuning", "training/loss", "training/loop", "training/denoiser", "sampling/loop", "diffusion"),
    *("training/optimizers", "training/timesteps"),
)
DRAWS = (
    *("sampling/plan", "sampling/loop", "sampling/stream", "sampling/pipeline", "diffusion"),
    *("evaluation/extractors", "evaluation/attributes"),
)


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning: what differs from section finetune of params.yaml, weights by name, and the training seed."""

    changes: tuple[tuple[str, Any], ...] = ()
    weights: tuple[tuple[str, float], ...] = ()
    seed: int = 0

    def settings(self, shipped: Finetune) -> Finetune:
        """Return the whole configuration."""
        values = shipped.model_dump()
        changes = {name: _plain(value) for name, value in self.changes}
        values |= changes | {"weights": values["weights"] | dict(self.weights), "seed": self.seed}
        return Finetune.model_validate(values)


def _plain(value: Any) -> Any:
    """Return what a configuration takes: a recipe is hashable, so its lists are tuples, its sections pairs."""
    if not isinstance(value, tuple):
        return value
    return dict(value) if all(isinstance(part, tuple) for part in value) else list(value)


@dataclass(frozen=True)
class Point:
    """One way to draw a split's pictures: a model, a number of steps, what is shared, and a solver.

    `share`: a share ratio for all groups; or "adaptive" or "tree", plans that cost what the shipped ratio does.
    `solver`: "dpm++", that of section generate (the shipped base's own), or "ddim".
    """

    model: Recipe | None
    steps: int
    share: float | str = 0.0
    solver: str = "dpm++"


class Trials:
    """Trained models and drawn pictures of one split, made when first asked for."""

    def __init__(self, params: Params, split: str, work: Path) -> None:
        """Read the split; nothing is trained or drawn yet."""
        self.params, self.split, self.work = params, split, work
        self.base, self.data, self.group_files = Path("models/base"), Path("data/prepared"), Path("data/groups")
        self.examples = read_split(self.data, split)
        self.groups, self.similarity = read_groups(self.group_files / f"{split}.json", self.examples)
        self.texts = [example.text for example in self.examples]

    @cached_property
    def embeddings(self) -> np.ndarray:
        """The prompts' embeddings, that groups and trees come from."""
        return embed(self.texts)

    @cached_property
    def real(self) -> ImageFeatures:
        """The split's own pictures."""
        return as_features(self._see.real(self.examples)[:, None])

    @cached_property
    def _see(self) -> Seen:
        return Seen()

    def plan(self, point: Point) -> Plan:
        """Return which steps are shared."""
        if not isinstance(point.share, str):
            return Plan.shared(self.groups, point.steps, point.share)
        saving = Plan.shared(self.groups, point.steps, self.params.generate.share_ratio).saving
        if point.share == "adaptive":
            pairs = zip(self.groups, self.similarity, strict=True)
            nested = [Cluster(s, tuple(group)) if len(group) > 1 else group[0] for group, s in pairs]
        else:
            settings = self.params.group
            found = tree(self.embeddings, 0.5, 2 * settings.max_size, settings.near_duplicate)
            nested = clusters(found.size, found.merges)
        return plan_for_budget(nested, point.steps, saving, most=0.75).plan

    def nfe(self, point: Point) -> float:
        """Return the network evaluations per image, guidance counted."""
        return self.plan(point).nfe(self.params.generate.guidance_scale > 1) / len(self.examples)

    def model(self, recipe: Recipe | None) -> Path:
        """Return the folder of a trained model, after training it where it is not there."""
        if recipe is None:
            return self.base
        settings = recipe.settings(self.params.finetune)
        sources = {"base": model_digest(self.base), "data": sha256_tree(self.data / "train")}
        sources |= {"groups": sha256(self.group_files / "train.json")}
        identity = settings.model_dump() | sources
        identity |= {"drawing": [self.params.generate.steps, self.params.generate.scheduler]}
        name = digest(identity | {"code": _code(*TRAINS)})[:16]
        folder = self.work / "models" / name
        if not folder.exists():
            self._train(settings, self.work / "training" / name, folder)
        return folder

    def images(self, point: Point) -> ImageFeatures:
        """Return what the extractors see in a point's pictures, after drawing them where they are not kept."""
        return as_features(np.stack([self._seen(point, seed) for seed in self.params.generate.seeds], axis=1))

    def _seen(self, point: Point, seed: int) -> np.ndarray:
        """Return what is seen in one seed's pictures, (prompts, width + 1); kept seed by seed, so that more can follow.

        The last column is the share of what a prompt asks for that its picture shows.
        """
        settings = self.params.generate
        identity = {
            "model": model_digest(self.model(point.model)),
            "steps": point.steps,
            "solver": point.solver,
            "plan": repr(self.plan(point)),
            "split": [self.split, sha256_tree(self.data / self.split)],
            "settings": [settings.scheduler, settings.guidance_scale, settings.branch_noise, seed],
            "code": _code(*DRAWS),
            "judge": sha256(JUDGE / "model.safetensors"),
        }
        kept = self.work / "features" / f"{digest(identity)[:16]}.npy"
        if not kept.exists():
            rows = self._see(self.examples, self.draw(point, seed))
            with new_file(kept) as temporary, temporary.open("wb") as file:
                np.save(file, rows)
        return np.asarray(np.load(kept))

    def draw(self, point: Point, seed: int) -> list[np.ndarray]:
        """Return a picture (height, width, 3) of every prompt."""
        settings = self.params.generate
        scheduler = "DDIMScheduler" if point.solver == "ddim" else settings.scheduler
        pipe = open_pipeline(self.model(point.model), scheduler=scheduler)
        drawn: dict[int, np.ndarray] = {}
        stream = pipe.stream(
            self.texts,
            plan=self.plan(point),
            num_inference_steps=point.steps,
            guidance_scale=settings.guidance_scale,
            branch_noise=settings.branch_noise,
            seed=[prompt_seed(seed, example.id) for example in self.examples],
            batch_size=settings.batch_size,
        )
        what = f"{point.steps} steps, {point.solver}, share {point.share}, seed {seed}"
        with progress(len(self.texts), what) as advance:
            for result in stream:
                drawn[result.index] = np.asarray(result.image)
                advance(1)
        return [drawn[place] for place in range(len(self.texts))]

    def _train(self, settings: Finetune, state: Path, out: Path) -> None:
        """Run the stage itself, under these settings."""
        state.mkdir(parents=True, exist_ok=True)
        sections = self.params.model_dump(mode="json") | {"finetune": settings.model_dump(mode="json")}
        write_text(state / "params.yaml", yaml.safe_dump(sections))
        paths = {"base": self.base, "data": self.data, "groups": self.group_files, "out": out}
        paths |= {"metrics": state / "finetune.json", "work": state}
        options = [text for name, path in paths.items() for text in (f"--{name}", str(path.resolve()))]
        environment = os.environ | {"SAGE_TRACKING_URI": "off"}
        subprocess.run(
            [sys.executable, "-m", "flows.stages.finetune", *options], cwd=state, env=environment, check=True
        )


def _code(*modules: str) -> dict[str, str]:
    """Return the hashes of modules of sage: what they computed is not theirs any more once they change."""
    return {module: sha256(Path(sage.__file__).parent / f"{module}.py") for module in modules}


def standard(weights: Mapping[str, float], seed: int) -> Recipe:
    """Return standard fine-tuning: plain diffusion on the same pictures, as often and with as many evaluations."""
    return Recipe(weights=tuple((name, float(name == "diffusion")) for name in weights), seed=seed)
