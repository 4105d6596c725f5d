"""`sage generate`: images for a list of prompts; similar prompts share their early steps.

    sage generate prompts.txt --out images          one prompt per line; also .jsonl, .csv, .tsv, -
    sage generate prompts.txt --out images --plan   only print the cost

The metadata of each PNG holds prompt, seed, group and plan, and `parameters` as web UIs do; `manifest.jsonl` has
a line for every prompt, with its image or its error, and marks images of a single colour as `blank`. `contact.jpg` is a
sheet of the first images. A killed run continues when it is started again and gives the same bytes, because batches of
whole groups do not depend on which images exist already.
"""

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flows.machine import embedding_cache
from flows.prompts import infotext
from flows.prompts.files import Item, read_prompts
from flows.report.sheet import in_rows, opened, sheet
from flows.terminal import finite, progress, run
from flows.versioning import integrity
from sage.config import Group, load_params
from sage.data.images import is_blank
from sage.errors import ConfigurationError, DataError
from sage.files import digest, new_file, sha256, sha256_tree, write_json, write_text
from sage.grouping.boilerplate import distinct
from sage.grouping.doubts import doubts
from sage.grouping.embedding import embed
from sage.grouping.policy import ENCODER, Policy
from sage.sampling.partition import equal
from sage.sampling.plan import Plan, shared_steps
from sage.sampling.seeds import image_seeds

if TYPE_CHECKING:
    from sage.sampling.first_prediction import FirstPredictions

KEY = "sage"  # text chunk of a PNG that holds its metadata
CONTACT = "contact.jpg"  # never the image of a prompt, which ends in .png
TILE, TILES, COLUMNS = 128, 240, 12


@dataclass(frozen=True)
class Job:
    """One run of `sage generate`; `groups` partition the prompts that can be drawn, by their index among them."""

    items: list[Item]
    groups: Sequence[Sequence[int]]
    plan: Plan
    settings: dict[str, Any]
    model: str
    pipe: Any
    first: "FirstPredictions | None" = None

    @property
    def cost(self) -> str:
        """A sentence on the cost of the run, compared with independent sampling."""
        return cost_line(self.plan, len(self.groups), self.settings["guidance_scale"] > 1, self.first)

    @property
    def drawn(self) -> list[Item]:
        """The prompts without an error, in order."""
        return [item for item in self.items if item.error is None]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the images depend on; a folder holds images of one identity only."""
        prompts = digest([asdict(item) for item in self.items])
        return self.settings | {"model": self.model, "prompts": prompts, "device": str(self.pipe.device)}


def main(
    prompts: Annotated[
        str, typer.Argument(help="A list of prompts: .txt, .jsonl, .csv, .tsv, or - for standard input.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the images.")],
    model: Annotated[
        str, typer.Option(help="Pipeline folder, hub name or registered model (models:/sage@champion).")
    ] = "models/sage",
    plan: Annotated[bool, typer.Option("--plan", help="Only show groups and cost.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same pictures.")] = 0,
    # Without it, and the same for the next five: how a registered model was judged; for another model, params.yaml.
    steps: Annotated[int | None, typer.Option(min=1, help="Inference steps; else the model's, or params.yaml.")] = None,
    share_ratio: Annotated[
        float | None, typer.Option(min=0, max=1, callback=finite, help="Fraction of the steps that a group shares.")
    ] = None,
    branch_noise: Annotated[
        float | None,
        typer.Option(min=0, max=1, callback=finite, help="Amount of fresh noise per image at a branch: 0 none, 1 all."),
    ] = None,
    image_steps: Annotated[
        int | None,
        typer.Option(
            min=0, help="First steps that images of one prompt share, if it is repeated in the list; 0: none."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(min=0, callback=finite, help="Above 1, each step needs two network evaluations."),
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What the images should not show.")] = "",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Maximum prompts per network call.")] = None,
) -> None:
    """Generate images for a list of prompts, sharing early steps among similar ones; print the cost first."""
    given = {"steps": steps, "share_ratio": share_ratio, "branch_noise": branch_noise, "batch_size": batch_size}
    given |= {"guidance_scale": guidance_scale, "image_steps": image_steps}
    job = prepare(prompts, model, given, negative_prompt, seed)
    typer.echo(job.cost)
    refused = [item for item in job.items if item.error is not None]
    for item in refused:
        typer.echo(f"not drawn: {item.id}: {item.error}", err=True)
    if plan:
        return

    begin(out, job.identity)
    for _ in drawn(job.pipe, job.drawn, job.groups, job.plan.steps, job.settings, job.model, out, first=job.first):
        pass
    report_blank(manifest(out, job.items))
    contact_sheet(out, [item.id for item in job.drawn], job.groups)
    typer.echo(f"{len(job.drawn)} images in {out}" + (f"; {len(refused)} prompts were not drawn" if refused else ""))


def prepare(source: str, model: str, given: Mapping[str, Any], negative_prompt: str, seed: int) -> Job:
    """Return the run for a list of prompts; settings in `given` that are not None override the model's.

    Raises DataError if no prompt can be drawn, RegistryError for a registered model that is damaged or unknown.
    """
    from flows import drawing

    items = read_prompts(source)
    texts = [item.prompt for item in items if item.error is None]
    keys = [item.share_key for item in items if item.error is None]
    if not texts:
        raise DataError(f"{source} has no prompt that can be drawn" + (f": {items[0].error}" if items else ""))
    pipe, name, settings, grouping = open_model(model)
    settings |= {key: value for key, value in given.items() if value is not None}
    settings |= {"negative_prompt": negative_prompt, "seed": seed, "group": grouping.model_dump()}
    settings["image_steps"] = drawing.image_steps(pipe, settings)
    # The images of one prompt are grouped as one if they share steps; else no group has a prompt twice.
    alike = list(zip(texts, keys, strict=True))
    images = equal(alike) if settings["image_steps"] else [[number] for number in range(len(texts))]
    prompts, prompt_keys = ([column[numbers[0]] for numbers in images] for column in (texts, keys))
    policy, first = Policy(**grouping.model_dump()), None
    steps = pipe.evaluations(settings["steps"])
    if policy.by != "prediction":
        with progress(len(prompts), "embedding") as advance:
            embeddings = embed(distinct(prompts), ENCODER, cache=embedding_cache(), progress=advance)
    elif settings["share_ratio"]:
        first = drawing.first_predictions(pipe, texts, settings)
        embeddings = first.of([numbers[0] for numbers in images]).embeddings()
    groups = [[number] for number in range(len(prompts))]
    if policy.by != "prediction" or first is not None:
        ratio = shared_steps(settings["share_ratio"], steps) / steps
        threshold = policy.choose_threshold(embeddings, ratio, Path(model), prompts, prompt_keys)
        for doubt in doubts(prompts, embeddings, threshold, policy.by):
            typer.echo(doubt, err=True)
        groups = policy.form(prompts, embeddings, threshold, prompt_keys)
    groups = [sorted(image for prompt in members for image in images[prompt]) for members in groups]
    whole = drawing.planned(groups, texts, steps, settings["share_ratio"], settings["image_steps"])
    return Job(items, groups, whole, settings, name, pipe, first)


def open_model(model: str) -> tuple[Any, str, dict[str, Any], Group]:
    """Return a pipeline, the hash or name of its weights, its sampling settings and its grouping settings.

    A registered model contains both settings, and its files are verified before one is read; for other models the
    settings come from params.yaml. Raises RegistryError if a version is damaged or unknown, DataError if an output of
    the graph is damaged.
    """
    from flows import drawing

    if model.startswith("models:/"):
        from flows.tracking import registry

        with tempfile.TemporaryDirectory() as folder:
            version = registry.fetch(model, Path(folder))
            return drawing.open_pipeline(version.weights), *version.settings()
    params = load_params()
    settings = params.generate.sampling()
    integrity.check_output(Path(model))
    name = sha256_tree(Path(model)) if Path(model).is_dir() else model
    return drawing.open_pipeline(model, scheduler=params.generate.scheduler), name, settings, params.group


def cost_line(plan: Plan, groups: int, guided: bool, first: "FirstPredictions | None" = None) -> str:
    """Return a sentence on the cost of a plan, and of the first predictions, compared with independent sampling."""
    alone = Plan.independent(plan.prompts, plan.steps).nfe(guided)
    nfe = plan.nfe(guided)
    if first is not None:
        nfe += first.network_evaluations - (len(plan.roots) * (2 if guided else 1) if first.reusable else 0)
    predicted = f", {first.network_evaluations} of them first predictions" if first is not None else ""
    return (
        f"{plan.prompts} prompts in {groups} groups; {nfe} network evaluations instead of {alone}{predicted}, "
        f"{1 - nfe / alone:.1%} saved"
    )


def begin(out: Path, identity: dict[str, Any]) -> None:
    """Start or continue a run in a folder; raise ConfigurationError if the folder belongs to another run."""
    path = out / "run.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if differ := sorted(name for name in identity if found.get(name) != identity[name]):
            was = ", ".join(f"{name} {found.get(name)!r} (now {identity[name]!r})" for name in differ)
            raise ConfigurationError(f"{out} holds images of another run, with {was}; choose another folder")
        return
    # A killed run may have left a temporary file of run.json.
    if out.exists() and any(not found.name.startswith(".run.json.") for found in out.iterdir()):
        raise ConfigurationError(f"{out} is not empty and holds no run of sage generate; choose another folder")
    write_json(path, identity)


def drawn(
    pipe: Any,
    items: Sequence[Item],
    groups: Sequence[Sequence[int]],
    steps: int,
    settings: dict[str, Any],
    model: str,
    out: Path,
    wanted: Collection[int] | None = None,
    first: "FirstPredictions | None" = None,
) -> Iterator[Path]:
    """Draw the wanted images; yield the file of each.

    pipe      pipeline for shared sampling
    items     prompts without errors
    groups    indices of `items`
    steps     number of sampler steps, for the metadata
    settings  sampling settings (`Job.settings`)
    model     hash or name of the weights, for the metadata
    out       folder for the images
    wanted    indices of `items`; default: those that have no file yet
    first     first predictions of `items`, to take first steps from, or None
    """
    from flows import drawing

    seeds = image_seeds(settings["seed"], [item.prompt for item in items])
    number = {member: place for place, group in enumerate(groups) for member in group}
    total = len(items) if wanted is None else len(wanted)
    if wanted is None:
        wanted = {place for place, item in enumerate(items) if not (out / f"{item.id}.png").exists()}
    with progress(total, "generating") as advance:
        advance(total - len(wanted))
        texts = [item.prompt for item in items]
        images = drawing.draw(pipe, texts, seeds, groups, settings, wanted.__contains__, first)
        for member, result, truncated in images:
            item, group_members = items[member], groups[number[member]]
            others = {items[other].prompt for other in group_members} - {item.prompt}
            plan = {"steps": steps, "share_ratio": settings["share_ratio"] if others else 0.0}
            if settings.get("image_steps"):
                plan["image_steps"] = settings["image_steps"]
            facts = {
                "id": item.id,
                "prompt": item.prompt,
                "negative_prompt": settings["negative_prompt"],
                "seed": result.seed,
                "group": number[member],
                "shared_with": [items[other].id for other in group_members if other != member],
                "plan": plan,
                "guidance_scale": settings["guidance_scale"],
                "scheduler": type(pipe.scheduler).__name__,
                "model": model,
                "truncated_tokens": truncated,
            }
            path = out / f"{item.id}.png"
            save(result.image, facts, path)
            advance(1)
            yield path


def save(image: Image.Image, facts: dict[str, Any], path: Path) -> None:
    """Write a PNG with `facts` as JSON in its metadata, and as web UIs read them, atomically."""
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(facts, ensure_ascii=False))
    info.add_text(infotext.KEY, infotext.infotext(facts, image.size))
    with new_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def manifest(out: Path, items: Sequence[Item]) -> list[str]:
    """Write manifest.jsonl, a line for each prompt: file, hash and metadata of its image, or its error.

    A blank image has the key `blank`. Returns the ids of these.
    """
    lines, blank = [], []
    for item in items:
        if item.error is not None:
            lines.append({"id": item.id, "error": item.error})
            continue
        path = out / f"{item.id}.png"
        with Image.open(path) as image:
            facts = json.loads(image.text[KEY])  # type: ignore[attr-defined]
            if is_blank(image):
                blank.append(item.id)
                facts["blank"] = True
        lines.append({"file": path.name, "sha256": sha256(path), **facts})
    write_text(out / "manifest.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return blank


def report_blank(ids: Sequence[str]) -> None:
    """Say on standard error how many images are blank, and which are the first."""
    if ids:
        typer.echo(
            f"blank: {len(ids)} images are a single colour, first {', '.join(ids[:3])}: the model overflowed, or its "
            "safety checker removed them. manifest.jsonl marks them.",
            err=True,
        )


def contact_sheet(out: Path, ids: Sequence[str], groups: Sequence[Sequence[int]]) -> None:
    """Write a sheet of at most TILES images with their names, ordered by group, largest group first."""
    order = [ids[member] for group in sorted(groups, key=len, reverse=True) for member in group][:TILES]
    names = in_rows(order, COLUMNS)
    images = [[opened(out / f"{id}.png") for id in row] for row in names]
    found = sheet(images, size=(TILE, TILE), names=[[id[:20] for id in row] for row in names])
    with new_file(out / CONTACT) as temporary:
        found.save(temporary, format="JPEG", quality=90)


if __name__ == "__main__":
    run(main)
