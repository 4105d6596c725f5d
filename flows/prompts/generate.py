"""`sage generate`: images for a list of prompts; similar prompts share their early steps.

    sage generate prompts.txt --out images          one prompt per line; also .jsonl, .csv, .tsv, -
    sage generate prompts.txt --out images --plan   only print the cost
    sage generate prompts.txt --out images --server http://127.0.0.1:8000    a running `sage serve` draws

The metadata of each PNG holds prompt, seed, group and plan, and `parameters` as web UIs do; `manifest.jsonl` has
a line for every prompt, with its image or its error, and marks images of a single colour as `blank`. `contact.jpg` is a
sheet of the first images. A killed run continues when it is started again and gives the same bytes, because batches of
whole groups do not depend on which images exist already. An image that is not finite is the error of its prompt, kept
in `ID.error`; the others are drawn. Without this file it is drawn again.
"""

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from flows.machine import embedding_cache
from flows.prompts import metadata
from flows.prompts.files import Expand, Item, Literal, Wildcards, negative, read_prompts, syntax
from flows.prompts.remote import Picture, Server
from flows.report.sheet import in_rows, opened, sheet
from flows.terminal import finite, progress, run
from flows.versioning import integrity
from sage.config import Group, load_params
from sage.data.images import is_blank
from sage.errors import ConfigurationError, DataError, DivergedError
from sage.files import digest, new_file, sha256, sha256_tree, write_json, write_text
from sage.grouping.boilerplate import distinct
from sage.grouping.doubts import doubts
from sage.grouping.embedding import embed
from sage.grouping.policy import ENCODER, Policy
from sage.sampling import hub
from sage.sampling.plan import Plan, shared_steps
from sage.sampling.seeds import image_seeds

if TYPE_CHECKING:
    from sage.grouping.distilled import Distilled
    from sage.sampling.first_prediction import FirstPredictions

MODEL = "models/sage"
CONTACT = "contact.jpg"  # never the image of a prompt, which ends in .png
ERROR = ".error"  # suffix of the file with the reason why a prompt has no image
TILE, TILES, COLUMNS = 128, 240, 12


@dataclass(frozen=True)
class Job:
    """One run of `sage generate`; `groups` partition the prompts that can be drawn, by their index among them.

    `pipe` is a pipeline for shared sampling, or a `Server`.
    """

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
        str | None,
        typer.Option(
            help=f"Pipeline folder, hub name or registered model (models:/sage@champion); default: {MODEL}. With "
            "--server: what it must serve."
        ),
    ] = None,
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
    expand: Expand = None,
    wildcards: Wildcards = None,
    literal: Literal = False,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Let a running `sage serve` draw, http://HOST:PORT; its token is in the variable SAGE_SERVER_TOKEN.",
        ),
    ] = None,
) -> None:
    """Generate images for a list of prompts, sharing early steps among similar ones; print the cost first."""
    given = {"steps": steps, "share_ratio": share_ratio, "branch_noise": branch_noise, "batch_size": batch_size}
    given |= {"guidance_scale": guidance_scale, "image_steps": image_steps}
    avoided = negative(negative_prompt, literal)
    items = read_prompts(prompts, syntax(expand, wildcards, literal, seed))
    job = prepare(items, model, given, avoided, seed, server)
    typer.echo(job.cost)
    report_errors(job.items)
    if plan:
        return

    begin(out, job.identity)
    if server is not None:
        _draw_remotely(job, out)
        return
    for _ in drawn(job.pipe, job.drawn, job.groups, job.plan.steps, job.settings, job.model, out, first=job.first):
        pass
    say_count(out, conclude(out, job.items, job.groups))


def prepare(
    items: list[Item],
    model: str | None,
    given: Mapping[str, Any],
    negative_prompt: str,
    seed: int,
    server: str | None = None,
) -> Job:
    """Return the run for a list of prompts; settings in `given` that are not None override the model's.

    items            the list
    model            as for `open_model`, default MODEL; with a server, the name that it must have there, or None
    given            sampling settings
    negative_prompt  what the images should not show
    seed             seed of the run
    server           address of a running `sage serve`, which draws instead of this machine

    Raises DataError if no prompt can be drawn, RegistryError for a registered model that is damaged or unknown.
    """
    from flows import drawing
    from sage.sampling.partition import equal

    texts = [item.prompt for item in items if item.error is None]
    keys = [item.share_key for item in items if item.error is None]
    if not texts:
        raise DataError("the list has no prompt that can be drawn" + (f": {items[0].error}" if items else ""))
    if server is not None and given.get("batch_size") is not None:
        raise ConfigurationError("--batch-size is the server's own; leave it out, or start the server with another one")
    if server is None:
        pipe, name, settings, grouping, encoder = open_model(model or MODEL)
    else:
        (pipe, name, settings, grouping), encoder = Server(server, model).opened(), None
    settings |= {key: value for key, value in given.items() if value is not None}
    settings |= {"negative_prompt": negative_prompt, "seed": seed, "group": grouping.model_dump()}
    settings["image_steps"] = drawing.image_steps(pipe, settings)
    # The images of one prompt are grouped as one if they share steps; else no group has a prompt twice.
    alike = list(zip(texts, keys, strict=True))
    images = equal(alike) if settings["image_steps"] else [[number] for number in range(len(texts))]
    prompts, prompt_keys = ([column[numbers[0]] for numbers in images] for column in (texts, keys))
    policy, first = Policy(**grouping.model_dump()), None
    steps = pipe.evaluations(settings["steps"])
    groups = [[number] for number in range(len(prompts))]
    if policy.by == "prediction" and settings["share_ratio"]:
        first = drawing.first_predictions(pipe, texts, settings)
        embeddings = first.of([numbers[0] for numbers in images]).embeddings()
    elif policy.by != "prediction":
        with progress(len(prompts), "embedding") as advance:
            if encoder is not None:
                made_for = pipe.made_for(settings["steps"], settings["guidance_scale"])
                embeddings = encoder.check(made_for).embed(prompts, progress=advance)
            else:
                embeddings = embed(distinct(prompts), ENCODER, cache=embedding_cache(), progress=advance)
    if policy.by != "prediction" or first is not None:
        ratio = shared_steps(settings["share_ratio"], steps) / steps
        threshold = policy.choose_threshold(embeddings, ratio, Path(model or MODEL), prompts, prompt_keys)
        for doubt in doubts(prompts, embeddings, threshold, policy.by):
            typer.echo(doubt, err=True)
        groups = policy.form(prompts, embeddings, threshold, prompt_keys)
    groups = [sorted(image for prompt in members for image in images[prompt]) for members in groups]
    whole = drawing.planned(groups, texts, steps, settings["share_ratio"], settings["image_steps"])
    return Job(items, groups, whole, settings, name, pipe, first)


def open_model(model: str, groups: bool = True) -> "tuple[Any, str, dict[str, Any], Group, Distilled | None]":
    """Return a pipeline, the hash or name of its weights, sampling settings, grouping settings, and distilled encoder.

    A registered model contains both settings, and its files are verified before one is read; for other models the
    settings come from params.yaml. The encoder is None unless prompts are to be grouped (`groups`) by it. Raises
    RegistryError if a version is damaged or unknown, DataError if an output of the graph is damaged, ConfigurationError
    if the encoder is missing, damaged or another model's.
    """
    from flows import drawing

    def encoder(weights: Path, grouping: Group) -> "Distilled | None":
        if not groups or grouping.by != "distilled":
            return None
        from sage.grouping.distilled import read_distilled

        return read_distilled(weights)

    if model.startswith("models:/"):
        from flows.tracking import registry

        with tempfile.TemporaryDirectory() as folder:
            version = registry.fetch(model, Path(folder))
            name, settings, grouping = version.settings()
            found = encoder(version.weights, grouping)
            return drawing.open_pipeline(version.weights), name, settings, grouping, found
    params = load_params()
    settings = params.generate.sampling()
    integrity.check_output(Path(model))
    name = model if hub.named(model) is not None else sha256_tree(Path(model))
    found = encoder(Path(model), params.group)
    return drawing.open_pipeline(model, scheduler=params.generate.scheduler), name, settings, params.group, found


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
    """Draw the wanted images; yield the file of each, or that of its error.

    pipe      pipeline for shared sampling
    items     prompts without errors
    groups    indices of `items`
    steps     number of sampler steps, for the metadata
    settings  sampling settings (`Job.settings`)
    model     hash or name of the weights, for the metadata
    out       folder for the images
    wanted    indices of `items`; default: those that have neither image nor error yet
    first     first predictions of `items`, to take first steps from, or None
    """
    from flows import drawing

    seeds = image_seeds(settings["seed"], [item.prompt for item in items])
    number = {member: place for place, group in enumerate(groups) for member in group}
    total = len(items) if wanted is None else len(wanted)
    if wanted is None:
        there = {path.name for path in out.iterdir()}
        wanted = {place for place, item in enumerate(items) if not made(item.id, there)}
    with progress(total, "generating") as advance:
        advance(total - len(wanted))
        texts = [item.prompt for item in items]
        images = drawing.draw(pipe, texts, seeds, groups, settings, wanted.__contains__, first)
        for member, result, truncated in images:
            advance(1)
            item = items[member]
            if isinstance(result, str):
                path = out / f"{item.id}{ERROR}"
                write_text(path, result)
                yield path
                continue
            mates = {items[other].id: items[other].prompt for other in groups[number[member]] if other != member}
            scheduler = type(pipe.scheduler).__name__
            facts = metadata.facts(
                item.id, item.prompt, result.seed, number[member], mates, steps, settings, scheduler, model, truncated
            )
            path = out / f"{item.id}.png"
            save(result.image, facts, path)
            yield path


def made(id: str, there: Collection[str]) -> bool:
    """Return whether a prompt has its image or its error among the names of a folder's files."""
    return f"{id}.png" in there or f"{id}{ERROR}" in there


def with_errors(out: Path, items: Sequence[Item]) -> list[Item]:
    """Return the items of a folder; those whose image is not finite have its error."""
    paths = [out / f"{item.id}{ERROR}" for item in items]
    return [
        replace(item, error=path.read_text(encoding="utf-8")) if path.exists() else item
        for item, path in zip(items, paths, strict=True)
    ]


def conclude(out: Path, items: Sequence[Item], groups: Sequence[Sequence[int]]) -> list[Item]:
    """Write manifest and contact sheet of a folder whose prompts were all drawn; report images that are not good.

    `groups` partition the items without an error. Returns the items with the errors of their images.
    """
    drawable = [item for item in items if item.error is None]
    report_errors(with_errors(out, drawable))
    found = with_errors(out, items)
    report_blank(manifest(out, found))
    if any(item.error is None for item in found):
        contact_sheet(out, [item.id for item in drawable], groups)
    return found


def say_count(out: Path | str, items: Sequence[Item]) -> None:
    """Print how many images there are; raise DivergedError if there are none."""
    lost = sum(item.error is not None for item in items)
    if lost == len(items):
        raise DivergedError(f"no image is finite; {out}/manifest.jsonl has the reason for each of {lost} prompts")
    typer.echo(f"{len(items) - lost} images in {out}" + (f"; {lost} prompts were not drawn" if lost else ""))


def _draw_remotely(job: Job, out: Path) -> None:
    """Let the server draw the missing images; what it refuses becomes an error in the manifest.

    Raises DataError if no image was drawn, DivergedError if that is because none is finite.
    """
    items, server, costs = job.drawn, job.pipe, [0.0, 0.0]
    there = {place for place, item in enumerate(items) if (out / f"{item.id}.png").exists()}
    number = {member: place for place, group in enumerate(job.groups) for member in group}
    texts = [item.prompt for item in items]
    seeds = image_seeds(job.settings["seed"], texts)
    with progress(len(items), "generating") as advance:
        advance(len(there))

        def take(found: Picture | int) -> None:
            member = found if isinstance(found, int) else found.member
            if member in there:
                return
            if isinstance(found, Picture):
                item, mates = items[member], {items[other].id: items[other].prompt for other in found.shared_with}
                group, truncated, steps = number[member], found.truncated_tokens, job.plan.steps
                scheduler, model = server.scheduler_name, job.model
                facts = metadata.facts(
                    item.id, item.prompt, found.seed, group, mates, steps, job.settings, scheduler, model, truncated
                )
                save(found.image, facts, out / f"{items[member].id}.png")
                costs[0] += found.evaluations
                costs[1] += found.alone
            advance(1)

        wanted = [group for group in job.groups if not there.issuperset(group)]
        server.draw(texts, seeds, wanted, job.settings, take)
    refused = {member: error for member, error in server.refused.items() if member not in there}
    if costs[1]:
        typer.echo(f"the server spent {costs[0]:g} network evaluations instead of {costs[1]:g}")
    if len(refused) == len(items):
        kind = DivergedError if all("DivergedError" in error for error in refused.values()) else DataError
        raise kind(f"the server drew none of {len(items)} prompts: {next(iter(refused.values()))}")
    errors = {items[member].id: error for member, error in refused.items()}
    for name, error in errors.items():
        typer.echo(f"not drawn: {name}: {error}", err=True)
    told = [replace(item, prompt="", error=errors[item.id]) if item.id in errors else item for item in job.items]
    say_count(out, conclude(out, told, _without(job.groups, refused)))


def _without(groups: Sequence[Sequence[int]], gone: Collection[int]) -> list[list[int]]:
    """Return the groups of the prompts that are left, by their index among these."""
    left = sorted(member for group in groups for member in group if member not in gone)
    place = {member: number for number, member in enumerate(left)}
    return [kept for group in groups if (kept := [place[member] for member in group if member in place])]


def save(image: Image.Image, facts: dict[str, Any], path: Path) -> None:
    """Write a PNG with `facts` as JSON in its metadata, and as web UIs read them, atomically."""
    with new_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=metadata.pnginfo(facts, image.size))


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
            facts = json.loads(image.text[metadata.KEY])  # type: ignore[attr-defined]
            if is_blank(image):
                blank.append(item.id)
                facts["blank"] = True
        lines.append({"file": path.name, "sha256": sha256(path), **facts})
    write_text(out / "manifest.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return blank


def report_errors(items: Sequence[Item]) -> None:
    """Say on standard error which prompts have no image, and why."""
    for item in items:
        if item.error is not None:
            typer.echo(f"not drawn: {item.id}: {item.error}", err=True)


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
    order = [ids[member] for group in sorted(groups, key=len, reverse=True) for member in group]
    names = in_rows([id for id in order if (out / f"{id}.png").exists()][:TILES], COLUMNS)
    images = [[opened(out / f"{id}.png") for id in row] for row in names]
    found = sheet(images, size=(TILE, TILE), names=[[id[:20] for id in row] for row in names])
    with new_file(out / CONTACT) as temporary:
        found.save(temporary, format="JPEG", quality=90)


if __name__ == "__main__":
    run(main)
