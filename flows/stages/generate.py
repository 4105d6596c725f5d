"""Stage generate: images of the held-out prompts by every arm, from the same seeds, with network evaluations counted.

sage/evaluation/arms.py describes the arms: model, steps and sharing.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import sage.torchvision_ops  # noqa: F401

import torch
import typer
from PIL import Image

from flows import packs
from flows.drawing import first_predictions, image_steps, open_pipeline
from flows.machine import device
from flows.preflight import check
from flows.report.sheet import opened, sheet
from flows.terminal import progress, run
from flows.tracking.runs import stage_run
from sage.config import Generate, load_params
from sage.data.dataset import Example, load_pixels, read_split
from sage.data.groups import read_groups
from sage.errors import ConfigurationError, PlanError
from sage.evaluation.arms import INDEPENDENT, SAGE, SAME_NFE, SHARED
from sage.evaluation.manifest import image_path, write_manifest, write_unread
from sage.files import digest, new_folder, sha256, sha256_tree, write_json
from sage.sampling import adapters
from sage.sampling.first_prediction import FirstPredictions
from sage.sampling.loop import first_packs
from sage.sampling.plan import Block, Plan, fewer_steps
from sage.sampling.seeds import prompt_seed

GRID_COLUMNS = 12
Made = tuple[str, Plan, int]
# What the images depend on besides the settings, so that none of an older code is kept.
CODE = Path(__file__).parents[2] / "sage"
PACKAGES = ("torch", "diffusers", "transformers")


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

    def packs(self, seeds: int, batch_size: int) -> list[tuple["Arm", list[int]]]:
        """Return this arm for each pack of prompts that is drawn alone, with the prompts; `seeds` are drawn together.

        First predictions are made for all prompts before, so they are not a pack's.
        """
        found = []
        for roots in first_packs(self.plan.repeat(seeds, self.image_steps), batch_size):
            plan, prompts = self.plan.part(roots)
            found.append((replace(self, plan=plan, predicts=0), prompts))
        return found

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
    work: Annotated[Path, typer.Option(help="Folder for what a killed run keeps, emptied at the end.")] = Path(
        "work/generate"
    ),
) -> None:
    """Generate the images of every arm, going on where a killed run stopped; write and print the cost of each arm."""
    params = load_params()
    settings = params.generate
    examples = read_split(data, settings.split)
    members, _ = read_groups(groups / f"{settings.split}.json", examples)
    pipe = open_pipeline(base, scheduler=settings.scheduler, precision=settings.precision)
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
    figures: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    unread: dict[str, int] = {}
    images = len(examples) * len(settings.seeds)
    guided = pipe.evaluations_a_step(settings.guidance_scale) == 2
    states = {arm.made: work / digest(identity(arm, examples, settings))[:16] for arm in arms}

    with stage_run("generate", settings.model_dump()) as record, new_folder(out) as folder:
        record.dataset("prepared", sha256_tree(data), "generation")
        with progress(images * len(states), "generating") as advance:
            for arm in arms:
                if arm.made not in made:
                    made[arm.made], drawn = make(arm, base, guided, examples, settings, states[arm.made], advance)
                    seconds[arm.name] = sum(pack.seconds for pack in drawn) / images
                    unread |= {id: tokens for pack in drawn for id, tokens in pack.unread.items()}
                collect(states[arm.made], folder / arm.name)
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
        write_unread(folder, {id: unread[id] for id in ids if id in unread})
        for arm in arms:
            record.metrics(
                {f"{arm.name}.{name}": v for name, v in figures[arm.name].items() if isinstance(v, (int, float))}
            )
        record.image(grid(folder, [arm.name for arm in arms], examples, members, settings.seeds[0]), "arms")
        # Durations differ from run to run, so they are tracked and printed, but not written to the result file.
        record.metrics({f"{arm}.seconds_per_image": value for arm, value in seconds.items()})
        write_json(metrics, {"arms": figures, "split": settings.split, "seeds": settings.seeds})
        record.result(metrics)
    for state in states.values():
        shutil.rmtree(state)
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


def identity(arm: Arm, examples: list[Example], settings: Generate) -> dict[str, Any]:
    """Return all that an arm's images depend on, as JSON values; a killed run's images of another one are not kept."""
    nodes = [root.flat() if isinstance(root, Block) else root for root in arm.plan.roots]
    return {
        "model": arm.model_hash,
        "plan": [arm.plan.steps, nodes],
        "steps": [arm.steps, arm.image_steps],
        "predictions": [arm.predicts, arm.reuses],
        "prompts": [[example.id, example.text] for example in examples],
        "settings": settings.model_dump(),
        "device": device(),
        "packages": [version(name) for name in PACKAGES],
        "code": [[path.relative_to(CODE).as_posix(), sha256(path)] for path in sorted(CODE.rglob("*.py"))],
    }


def make(
    arm: Arm,
    base: Path,
    guided: bool,
    examples: list[Example],
    settings: Generate,
    state: Path,
    advance: Callable[[int], None],
) -> tuple[dict[str, Any], list[packs.Drawn]]:
    """Draw the packs of one arm that are not in the folder `state` yet; return the arm's cost and its packs.

    arm       the arm
    base      the base model, beside which an adapter is loaded (`opened_model`)
    guided    whether a step evaluates the network twice
    examples  the prompts
    settings  the section generate of params.yaml
    state     folder of the packs
    advance   called for each image

    Raises PlanError if the number of rows that the network evaluated differs from the plan.
    """
    images = len(examples) * len(settings.seeds)
    waiting: list[tuple[Arm, list[int], list[int], Path]] = []
    finished: list[packs.Drawn] = []
    for seeds in arm.seeds(settings.seeds):
        for number, (part, prompts) in enumerate(arm.packs(len(seeds), settings.batch_size)):
            folder = state / f"seed-{seeds[0]}-pack-{number:05}"
            if (found := packs.kept(folder)) is None:
                waiting.append((part, prompts, seeds, folder))
            else:
                finished.append(found)
                advance(len(prompts) * len(seeds))
    if waiting:
        pipe = opened_model(arm.model, base, settings)
        texts = [example.text for example in examples]
        with counted(pipe._network) as rows:
            first = first_predictions(pipe, texts, settings.model_dump(), size_of(examples)) if arm.predicts else None
        check_count(arm, sum(rows), (2 if guided else 1) * arm.predicts)
        for part, prompts, seeds, folder in waiting:
            some = None if first is None else first.of(prompts)
            with counted(pipe._network) as rows:
                chosen = [examples[prompt] for prompt in prompts]
                finished.append(draw(part, pipe, chosen, seeds, settings, some, folder, advance))
            check_count(arm, sum(rows), part.nfe(len(seeds), guided))
    nfe, independent = arm.nfe(len(settings.seeds), guided), images * arm.plan.steps
    saving = 1 - arm.nfe(len(settings.seeds), guided=False) / independent
    cost = {"nfe": nfe, "nfe_per_image": nfe / images}
    return cost | {"saving": saving if arm.image_steps or arm.predicts else arm.plan.saving}, finished


def draw(
    arm: Arm,
    pipe: Any,
    examples: list[Example],
    seeds: list[int],
    settings: Generate,
    first: FirstPredictions | None,
    folder: Path,
    advance: Callable[[int], None],
) -> packs.Drawn:
    """Draw one pack of an arm into a folder.

    arm       the arm for this pack's prompts
    pipe      the arm's pipeline
    examples  the prompts of the pack
    seeds     seeds that are drawn together
    settings  the section generate of params.yaml
    first     first predictions of the prompts, or None
    folder    the folder of the pack, which is made anew
    advance   called for each image
    """
    stream = pipe.stream(
        [example.text for example in examples],
        plan=arm.plan,
        predictions=first,
        num_inference_steps=arm.steps,
        guidance_scale=settings.guidance_scale,
        **size_of(examples),
        branch_noise=settings.branch_noise,
        num_images_per_prompt=len(seeds),
        image_steps=arm.image_steps,
        # Depends only on the run's seed and the prompt's id, so it is the same in every arm.
        seed=[prompt_seed(seed, example.id) for example in examples for seed in seeds],
        batch_size=settings.batch_size,
    )
    packs.begin(folder)
    for result in stream:
        number, place = divmod(result.index, len(seeds))
        packs.add(folder, seeds[place], examples[number].id, result.image)
        advance(1)
    ids = [example.id for example in examples]
    unread = {id: tokens for id, tokens in zip(ids, stream.truncated_tokens, strict=True) if tokens}
    return packs.end(folder, stream.cost.seconds, unread)


def check_count(arm: Arm, found: int, planned: int) -> None:
    """Raise PlanError if the network was not evaluated as often as the plan says."""
    if found != planned:
        raise PlanError(f"arm {arm.name} evaluated the network {found} times, but its plan says {planned}")


def collect(state: Path, folder: Path) -> None:
    """Copy the images of an arm's packs into its folder."""
    for pack in sorted(state.iterdir()):
        for name, path in packs.images(pack):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def size_of(examples: list[Example]) -> dict[str, int]:
    """Return the height and width of the images in pixels."""
    return dict(zip(("height", "width"), load_pixels(examples[:1]).shape[1:3], strict=True))


def opened_model(model: Path, base: Path, settings: Generate) -> Any:
    """Return the pipeline of an arm.

    In less than float32 an adapter is loaded beside the base: merged, small changes of a weight would be rounded away.
    """
    adapter = model / adapters.FILE
    if settings.precision == "fp32" or not adapter.exists():
        return open_pipeline(model, scheduler=settings.scheduler, precision=settings.precision)
    return open_pipeline(base, scheduler=settings.scheduler, precision=settings.precision, lora=adapter)


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
