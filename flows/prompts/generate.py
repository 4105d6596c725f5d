"""`sage generate`: pictures for a list of prompts, similar ones sharing their early steps.

    sage generate prompts.txt --out pictures          one prompt a line; also .jsonl, .csv, .tsv, -
    sage generate prompts.txt --out pictures --plan   only say what it would cost

Pictures carry their prompt, seed, group and plan; `manifest.jsonl` has a line for every prompt, drawn or refused, and
`contact.jpg` shows them at a glance. Killed and started again it makes what is missing, to the same bytes: prompts are
drawn in batches of whole groups that do not depend on what is there already.
"""

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import sage.torchvision_ops  # noqa: F401

import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flows import drawing
from flows.machine import embedding_cache
from flows.prompts.files import Item, read_prompts
from flows.report.sheet import in_rows, opened, sheet
from flows.terminal import progress, run
from sage.config import Group, load_params
from sage.errors import ConfigurationError, DataError
from sage.files import digest, new_file, sha256, sha256_tree, write_json, write_text
from sage.grouping.embedding import embed
from sage.grouping.policy import ENCODER, Policy
from sage.sampling.plan import Plan
from sage.sampling.seeds import image_seeds

KEY = "sage"  # of the metadata in a picture
CONTACT = "contact.jpg"  # no name of a prompt: those end in .png
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

    @property
    def drawn(self) -> list[Item]:
        """The prompts that can be drawn."""
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
    out: Annotated[Path, typer.Option(help="The folder for the pictures.")],
    model: Annotated[
        str, typer.Option(help="A folder or hub name of a pipeline, or a registered one: models:/sage@champion.")
    ] = "models/sage",
    plan: Annotated[bool, typer.Option("--plan", help="Only show groups and cost.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same pictures.")] = 0,
    # Without it, and the same for the next four: how a registered model was judged; for another model, params.yaml.
    steps: Annotated[int | None, typer.Option(min=1, help="Inference steps; else the model's, or params.yaml.")] = None,
    share_ratio: Annotated[float | None, typer.Option(help="Share of the steps that a group takes together.")] = None,
    branch_noise: Annotated[
        float | None, typer.Option(min=0, max=1, help="How much of its noise each picture draws anew at a branch.")
    ] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="Above 1, every step costs two.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="What no picture shall show.")] = "",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Prompts a network call at most.")] = None,
) -> None:
    """Make pictures for a list of prompts, sharing early steps among similar ones; say what it saves first."""
    given = {"steps": steps, "share_ratio": share_ratio, "branch_noise": branch_noise, "batch_size": batch_size}
    given["guidance_scale"] = guidance_scale
    job = prepare(prompts, model, given, negative_prompt, seed)
    typer.echo(cost_line(job.plan, len(job.groups), job.settings["guidance_scale"] > 1))
    refused = [item for item in job.items if item.error is not None]
    for item in refused:
        typer.echo(f"not drawn: {item.id}: {item.error}", err=True)
    if plan:
        return

    begin(out, job.identity)
    for _ in drawn(job.pipe, job.drawn, job.groups, job.plan.steps, job.settings, job.model, out):
        pass
    manifest(out, job.items)
    contact_sheet(out, [item.id for item in job.drawn], job.groups)
    typer.echo(f"{len(job.drawn)} pictures in {out}" + (f"; {len(refused)} prompts were not drawn" if refused else ""))


def prepare(source: str, model: str, given: Mapping[str, Any], negative_prompt: str, seed: int) -> Job:
    """Return the run for a list of prompts; settings in `given` that are not None override the model's.

    Raises DataError if no prompt can be drawn, RegistryError for a registered model that is damaged or unknown.
    """
    items = read_prompts(source)
    texts = [item.prompt for item in items if item.error is None]
    if not texts:
        raise DataError(f"{source} has no prompt that can be drawn" + (f": {items[0].error}" if items else ""))
    pipe, name, settings, grouping = open_model(model)
    settings |= {key: value for key, value in given.items() if value is not None}
    settings |= {"negative_prompt": negative_prompt, "seed": seed, "group": grouping.model_dump()}
    with progress(len(texts), "embedding") as advance:
        embeddings = embed(texts, ENCODER, cache=embedding_cache(), progress=advance)
    policy = Policy(**grouping.model_dump())
    groups = policy.form(texts, embeddings, policy.choose_threshold(embeddings, settings["share_ratio"], Path(model)))
    pipe.scheduler.set_timesteps(settings["steps"])
    whole = Plan.shared(groups, len(pipe.scheduler.timesteps), settings["share_ratio"])
    return Job(items, groups, whole, settings, name, pipe)


def open_model(model: str) -> tuple[Any, str, dict[str, Any], Group]:
    """Return a pipeline, the hash or name of its weights, how to sample with it, and how to group prompts for it.

    A registered model says the last two itself, and its files are verified before any is read; for another one they are
    those of params.yaml. Raises RegistryError for a version that is damaged or unknown.
    """
    if model.startswith("models:/"):
        from flows.tracking import registry

        with tempfile.TemporaryDirectory() as folder:
            version = registry.fetch(model, Path(folder))
            return drawing.open_pipeline(version.weights), *version.settings()
    params = load_params()
    settings = params.generate.sampling()
    name = sha256_tree(Path(model)) if Path(model).is_dir() else model
    return drawing.open_pipeline(model), name, settings, params.group


def cost_line(plan: Plan, groups: int, guided: bool) -> str:
    """Return what a plan costs, in words."""
    alone = Plan.independent(plan.prompts, plan.steps).nfe(guided)
    return (
        f"{plan.prompts} prompts in {groups} groups; {plan.nfe(guided)} network evaluations instead of {alone}, "
        f"{plan.saving:.1%} saved"
    )


def begin(out: Path, identity: dict[str, Any]) -> None:
    """Claim a folder for one run, or go on with the same run; raise ConfigurationError for another run's folder."""
    path = out / "run.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if differ := sorted(name for name in identity if found.get(name) != identity[name]):
            was = ", ".join(f"{name} {found.get(name)!r} (now {identity[name]!r})" for name in differ)
            raise ConfigurationError(f"{out} holds pictures of another run, with {was}; choose another folder")
        return
    # A kill may have left the unfinished run.json itself.
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
) -> Iterator[Path]:
    """Make the pictures that are wanted, by default those that are missing; yield the file of each."""
    seeds = image_seeds(settings["seed"], [item.prompt for item in items])
    number = {member: place for place, group in enumerate(groups) for member in group}
    total = len(items) if wanted is None else len(wanted)
    if wanted is None:
        wanted = {place for place, item in enumerate(items) if not (out / f"{item.id}.png").exists()}
    with progress(total, "generating") as advance:
        advance(total - len(wanted))
        texts = [item.prompt for item in items]
        for member, result, truncated in drawing.draw(pipe, texts, seeds, groups, settings, wanted.__contains__):
            item, company = items[member], groups[number[member]]
            facts = {
                "id": item.id,
                "prompt": item.prompt,
                "negative_prompt": settings["negative_prompt"],
                "seed": result.seed,
                "group": number[member],
                "shared_with": [items[other].id for other in company if other != member],
                "plan": {"steps": steps, "share_ratio": settings["share_ratio"] if len(company) > 1 else 0.0},
                "guidance_scale": settings["guidance_scale"],
                "model": model,
                "truncated_tokens": truncated,
            }
            path = out / f"{item.id}.png"
            save(result.image, facts, path)
            advance(1)
            yield path


def save(picture: Image.Image, facts: dict[str, Any], path: Path) -> None:
    """Write a PNG with its facts inside, whole or not at all."""
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(facts, ensure_ascii=False))
    with new_file(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=info)


def manifest(out: Path, items: Sequence[Item]) -> None:
    """Write one line for every prompt: a picture with its facts and hash, or an error."""
    lines = []
    for item in items:
        if item.error is not None:
            lines.append({"id": item.id, "error": item.error})
            continue
        path = out / f"{item.id}.png"
        with Image.open(path) as picture:
            facts = json.loads(picture.text[KEY])  # type: ignore[attr-defined]
        lines.append({"file": path.name, "sha256": sha256(path), **facts})
    write_text(out / "manifest.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def contact_sheet(out: Path, ids: Sequence[str], groups: Sequence[Sequence[int]]) -> None:
    """Write a sheet of the first images with their names, groups together, largest first."""
    order = [ids[member] for group in sorted(groups, key=len, reverse=True) for member in group][:TILES]
    names = in_rows(order, COLUMNS)
    images = [[opened(out / f"{id}.png") for id in row] for row in names]
    found = sheet(images, size=(TILE, TILE), names=[[id[:20] for id in row] for row in names])
    with new_file(out / CONTACT) as temporary:
        found.save(temporary, format="JPEG", quality=90)


if __name__ == "__main__":
    run(main)
