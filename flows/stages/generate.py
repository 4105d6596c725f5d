"""Stage generate: images of the held-out prompts by every arm, from the same seeds, with network evaluations counted.

sage/evaluation/arms.py describes the arms: model, steps and sharing.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import sage.torchvision_ops  # noqa: F401

import torch
import typer
from PIL import Image

from flows.drawing import first_predictions, image_steps, open_pipeline
from flows.preflight import check
from flows.report.sheet import opened, sheet
from flows.terminal import progress, run
from flows.tracking.runs import stage_run
from sage.config import Generate, load_params
from sage.data.dataset import Example, read_split
from sage.data.groups import read_groups
from sage.errors import ConfigurationError, PlanError
from sage.evaluation.arms import INDEPENDENT, SAGE, SAME_NFE, SHARED
from sage.evaluation.manifest import image_path, write_manifest
from sage.files import new_folder, sha256_tree, write_json
from sage.sampling.plan import Plan, fewer_steps
from sage.sampling.seeds import prompt_seed

GRID_COLUMNS = 12
Made = tuple[str, Plan, int]


@dataclass(frozen=True)
class Arm:
    """One way to generate the images; arms with equal `made` give the same images.

    The plan is for the prompts; the images of a prompt share `image_steps` steps. `predicts`: the groups are by first
    prediction, which costs an evaluation a prompt; `reuses`: first steps are taken from it.
    """

    name: str
    model: Path
    model_hash: str
    steps: int
    plan: Plan
    share_ratio: float
    image_steps: int
    predicts: int = 0  # prompts of different texts
    reuses: bool = False

    @property
    def made(self) -> Made:
        """Hash of the weights, plan and shared steps of a prompt's images, which together determine the images."""
        return self.model_hash, self.plan, self.image_steps

    def seeds(self, seeds: list[int]) -> list[list[int]]:
        """Return the seeds in the lists that are drawn together: all, if their images share, else one at a time."""
        return [seeds] if self.image_steps else [[seed] for seed in seeds]

    def nfe(self, seeds: int, guided: bool) -> int:
        """Return the network evaluations of all images of this many seeds."""
        plan = self.plan.repeat(seeds, self.image_steps)
        known = len(plan.roots) if self.reuses else 0
        return (2 if guided else 1) * (plan.nfe(guidance=False) + self.predicts - known)


def main(
    base: Annotated[Path, typer.Option(exists=True, help="The base model: a folder, a .safetensors file or a pin.")],
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="The fine-tuned model.")],
    data: Annotated[Path, typer.Option(help="Prepared data.")],
    groups: Annotated[Path, typer.Option(help="Folder with a JSON file of groups for each split.")],
    out: Annotated[Path, typer.Option(help="Folder to write: ARM/seed-SEED/ID.png and manifest.jsonl.")],
    metrics: Annotated[Path, typer.Option(help="JSON file of figures to write.")],
    only: Annotated[str | None, typer.Option(help="Generate only this arm.")] = None,
) -> None:
    """Generate the images of every arm; write and print the cost of each arm."""
    params = load_params()
    settings = params.generate
    examples = read_split(data, settings.split)
    members, _ = read_groups(groups / f"{settings.split}.json", examples)
    pipe = open_pipeline(base, scheduler=settings.scheduler)
    check(pipe, params, data, groups)
    predicts = len({example.text for example in examples}) if params.group.by == "prediction" else 0
    arms = plan_arms(
        base,
        model,
        members,
        settings,
        pipe.evaluations,
        image_steps(pipe, settings.model_dump()),
        predicts,
        reuses=bool(predicts and pipe.safe_image_steps(settings.steps, 1.0)),
    )
    if only is not None and only not in (names := [arm.name for arm in arms]):
        raise ConfigurationError(f"--only {only} is no arm; the arms are {', '.join(names)}")
    arms = [arm for arm in arms if only in (None, arm.name)]
    made: dict[Made, dict[str, Any]] = {}
    first: dict[Made, str] = {}
    figures: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    images = len(examples) * len(settings.seeds)
    different = len({arm.made for arm in arms})

    with stage_run("generate", settings.model_dump()) as record, new_folder(out) as folder:
        record.dataset("prepared", sha256_tree(data), "generation")
        with progress(images * different, "generating") as advance:
            for arm in arms:
                if arm.made in made:
                    shutil.copytree(folder / first[arm.made], folder / arm.name)
                else:
                    made[arm.made], seconds[arm.name] = make(arm, examples, settings, folder / arm.name, advance)
                    first[arm.made] = arm.name
                figures[arm.name] = {
                    "model": str(arm.model),
                    "steps": arm.steps,
                    "share_ratio": arm.share_ratio,
                    **({"image_steps": arm.image_steps} if arm.image_steps else {}),
                    "prompts": len(examples),
                    "images": images,
                    **made[arm.made],
                }
        ids = [example.id for example in examples]
        write_manifest(folder, [arm.name for arm in arms], ids, members, settings.seeds)
        for arm in arms:
            record.metrics(
                {f"{arm.name}.{name}": v for name, v in figures[arm.name].items() if isinstance(v, (int, float))}
            )
        record.image(grid(folder, [arm.name for arm in arms], examples, members, settings.seeds[0]), "arms")
        # Durations differ from run to run, so they are tracked and printed, but not written to the result file.
        record.metrics({f"{arm}.seconds_per_image": value for arm, value in seconds.items()})
        write_json(metrics, {"arms": figures, "split": settings.split, "seeds": settings.seeds})
        record.result(metrics)
    for name, value in seconds.items():
        typer.echo(f"{name:<22} {figures[name]['nfe_per_image']:6.2f} NFE  {value:8.3f} s per image")


def plan_arms(
    base: Path,
    model: Path,
    groups: list[list[int]],
    settings: Generate,
    evaluations: Callable[[int], int],
    image_steps: int,
    predicts: int = 0,
    reuses: bool = False,
) -> list[Arm]:
    """Return the four arms.

    base, model  folders of the base model and of the fine-tuned model
    groups       groups of prompts
    settings     the section generate of params.yaml
    evaluations  how often the sampler evaluates the network in a number of steps
    image_steps  first steps that the images of a prompt share in the arms that share
    predicts     first predictions that these arms need for their groups
    reuses       whether they take first steps from these
    """
    count, seeds = sum(map(len, groups)), len(settings.seeds)
    whole = Plan.independent(count, evaluations(settings.steps))
    shared = Plan.shared(groups, evaluations(settings.steps), settings.share_ratio)
    base_hash, model_hash = sha256_tree(base), sha256_tree(model)
    sharing = (settings.steps, shared, settings.share_ratio, image_steps, predicts, reuses)
    shares = Arm(SHARED, base, base_hash, *sharing)
    # At least as many evaluations as sharing needs, so that the baseline never gets fewer.
    fewer = fewer_steps(settings.steps, evaluations, count * seeds, shares.nfe(seeds, guided=False))
    same_nfe = Plan.independent(count, evaluations(fewer))
    return [
        Arm(INDEPENDENT, base, base_hash, settings.steps, whole, 0.0, 0),
        Arm(SAME_NFE, base, base_hash, fewer, same_nfe, 0.0, 0),
        shares,
        Arm(SAGE, model, model_hash, *sharing),
    ]


def make(
    arm: Arm, examples: list[Example], settings: Generate, folder: Path, advance: Callable[[int], None]
) -> tuple[dict[str, Any], float]:
    """Write one arm's images; return its cost and the seconds per image.

    Raises PlanError if the number of rows that the network evaluated differs from the plan.
    """
    pipe = open_pipeline(arm.model, scheduler=settings.scheduler)
    seconds = 0.0
    texts = [example.text for example in examples]
    with counted(pipe._network) as evaluations:
        first = first_predictions(pipe, texts, settings.model_dump()) if arm.predicts else None
        for seeds in arm.seeds(settings.seeds):
            for seed in seeds:
                (folder / f"seed-{seed}").mkdir(parents=True)
            stream = pipe.stream(
                texts,
                plan=arm.plan,
                predictions=first,
                num_inference_steps=arm.steps,
                guidance_scale=settings.guidance_scale,
                branch_noise=settings.branch_noise,
                num_images_per_prompt=len(seeds),
                image_steps=arm.image_steps,
                # Depends only on the run's seed and the prompt's id, so it is the same in every arm.
                seed=[prompt_seed(seed, example.id) for example in examples for seed in seeds],
                batch_size=settings.batch_size,
            )
            for result in stream:
                number, place = divmod(result.index, len(seeds))
                result.image.save(folder / f"seed-{seeds[place]}" / f"{examples[number].id}.png")
                advance(1)
            seconds += stream.cost.seconds
    images = len(examples) * len(settings.seeds)
    nfe, independent = arm.nfe(len(settings.seeds), settings.guidance_scale > 1), images * arm.plan.steps
    if sum(evaluations) != nfe:
        raise PlanError(f"arm {arm.name} evaluated the network {sum(evaluations)} times, but its plan says {nfe}")
    return {
        "nfe": nfe,
        "nfe_per_image": nfe / images,
        "saving": 1 - arm.nfe(len(settings.seeds), guided=False) / independent
        if arm.image_steps or arm.predicts
        else arm.plan.saving,
    }, seconds / images


@contextmanager
def counted(network: torch.nn.Module) -> Iterator[list[int]]:
    """Yield a list to which each call of a network appends its number of rows."""
    rows: list[int] = []
    handle = network.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    try:
        yield rows
    finally:
        handle.remove()


def grid(folder: Path, arms: list[str], examples: list[Example], groups: list[list[int]], seed: int) -> Image.Image:
    """Return a sheet with one row per arm; the columns are members of the largest groups."""
    chosen = [member for group in sorted(groups, key=len, reverse=True) for member in group][:GRID_COLUMNS]
    return sheet([[opened(image_path(folder, arm, seed, examples[i].id)) for i in chosen] for arm in arms])


if __name__ == "__main__":
    run(main)
