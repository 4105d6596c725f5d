"""`sage distil`: a small encoder that tells from the text what the model first predicts, stored beside the model.

Prompts are then grouped by first prediction without an evaluation of the network (`group.by: distilled`). An
interrupted run resumes.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.machine import device, embedding_cache
from flows.terminal import progress, run
from sage.config import load_params
from sage.data.dataset import load_pixels, read_split
from sage.errors import DataError, DivergedError
from sage.files import digest, new_file

if TYPE_CHECKING:
    import numpy as np

    from sage.config import Distil
    from sage.grouping.distilled import Distilled
    from sage.training.distillation import Components

COMPONENTS = 256  # at most
HELD_OUT = 10  # one of so many captions chooses the step whose weights are kept
LEAST = 2 * HELD_OUT  # captions that can be learned from at all
MEASURED = 1000  # captions of the validation split at most
_PIECE = 512  # captions at least whose first predictions are kept together


def main(
    model: Annotated[
        Path | None,
        typer.Option(help="Model to distil: a folder, a .safetensors file or a pin; default: the base."),
    ] = None,
    data: Annotated[Path, typer.Option(help="Prepared data.")] = Path("data/prepared"),
    work: Annotated[Path, typer.Option(help="Folder for the state of an interrupted run.")] = Path("work/distil"),
) -> None:
    """Learn the model's first predictions from its training captions, measure that on validation, and store it."""
    params = load_params()
    model = model or Path(params.base)
    drawing, settings = params.generate, params.pretrain.distil
    captions = chosen((text for example in read_split(data, "train") for text in example.texts), settings.captions)
    validation = read_split(data, "validation")
    unseen = chosen((example.text for example in validation), MEASURED)
    if not model.exists():
        raise DataError(
            f"there is no {model}; give a folder, a .safetensors file, or the pin that `sage base` writes for a model "
            "on a hub"
        )
    if len(captions) < LEAST or len(unseen) < 2:
        raise DataError(
            f"{data} has {len(captions)} different captions to learn from and {len(unseen)} to measure on; at least "
            f"{LEAST} and 2 are needed"
        )
    device()  # a missing device fails here

    import torch

    from flows.drawing import open_pipeline
    from sage.grouping.cost import model_digest
    from sage.grouping.distilled import CoefficientNetwork, Distilled, kept_at, write_distilled
    from sage.training.distillation import principal_components

    pipe = open_pipeline(model, scheduler=drawing.scheduler, precision=drawing.precision)
    size = dict(zip(("height", "width"), load_pixels(validation[:1]).shape[1:3], strict=True))
    made_for = pipe.made_for(drawing.steps, drawing.guidance_scale, **size)
    how = {"made_for": list(made_for), "precision": drawing.precision, "size": size, "captions": digest(captions)}
    folder = work / digest({"model": model_digest(model), "unseen": digest(unseen)} | how)[:16]
    pieces = predicted(pipe, captions, drawing.model_dump(), size, folder / "train")
    # Whole in memory, as they are few.
    real = _read(predicted(pipe, unseen, drawing.model_dump(), size, folder / "validation"))

    latents = real.shape[1]
    count = min(COMPONENTS, latents, len(captions), _PIECE)
    components = principal_components((_read([path]) for path in pieces), count)
    torch.manual_seed(settings.seed)
    network = CoefficientNetwork(384, count)
    network.scale.copy_(torch.from_numpy(components.deviations))
    _train(network, captions, pieces, components, settings, folder / digest(settings.model_dump())[:16])
    encoder = Distilled(network.requires_grad_(False), components.mean_in_components, latents, made_for, {})
    encoder = measured(encoder, components, unseen, real, params.group.max_size)
    write_distilled(model, encoder, how | {"settings": settings.model_dump()})
    typer.echo(f"wrote {kept_at(model)}")


def chosen(texts: Iterable[str], most: int) -> list[str]:
    """Return at most `most` different texts in an order of their own that has nothing to do with what they say."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode("utf-8", "replace")).digest())[:most]


def predicted(
    pipe: Any, texts: Sequence[str], settings: dict[str, Any], size: dict[str, int], folder: Path
) -> list[Path]:
    """Return the files of the texts' first predictions, (n, d) in half precision; `folder` keeps them."""
    import numpy as np

    from flows.drawing import first_predictions

    paths = []
    parts = np.array_split(np.arange(len(texts)), max(1, len(texts) // _PIECE))
    with progress(len(texts), f"first predictions, {folder.name}") as advance:
        for number, part in enumerate(parts):
            path = folder / f"{number:04d}.npy"
            if not path.exists():
                rows = first_predictions(pipe, [texts[k] for k in part], settings, size).x_0.flatten(1).numpy()
                if not np.isfinite(rows).all():
                    bad = texts[part[np.flatnonzero(~np.isfinite(rows).all(1))[0]]]
                    raise DivergedError(
                        f"the first prediction of {bad[:100]!r} is not finite: the model overflows in its precision; "
                        "set generate.precision to fp32, or leave the caption out"
                    )
                with new_file(path) as temporary, temporary.open("wb") as file:
                    np.save(file, rows.astype(np.float16))
            paths.append(path)
            advance(len(part))
    return paths


def _read(paths: "Sequence[Path]") -> "np.ndarray":
    import numpy as np

    return np.concatenate([np.load(path) for path in paths]).astype(np.float32)


def _train(
    network: Any,
    captions: Sequence[str],
    pieces: Sequence[Path],
    components: "Components",
    settings: "Distil",
    work: Path,
) -> None:
    """Train the network on most captions; of all steps the weights that fit the others best are kept."""
    import numpy as np
    import torch

    from sage.grouping.embedding import token_states
    from sage.training.distillation import States, distillation_loss, held_out_loss
    from sage.training.loop import Schedule, fit
    from sage.training.selection import Validation

    states: list[Any] = [None] * len(captions)
    with progress(len(captions), "token states") as advance:
        for numbers, found in token_states(captions, progress=advance):
            for own, state in zip(numbers, found, strict=True):
                for number in own:
                    states[number] = state.half().numpy()
    targets = torch.from_numpy(np.concatenate([components.coefficients(_read([path])) for path in pieces]))
    latents, unseen = len(components.mean), len(captions) // HELD_OUT
    held_out, seen = States(states[:unseen]), States(states[unseen:])
    loss = distillation_loss(
        network, seen, targets[unseen:], latents, batch_size=settings.batch_size, seed=settings.seed
    )
    schedule = Schedule(
        settings.steps, settings.learning_rate, warmup=settings.warmup, decay=settings.decay, ema=settings.ema
    )
    validation = Validation(
        lambda: held_out_loss(network, held_out, targets[:unseen], latents),
        max(1, settings.steps // 40),
        patience=8,
        keep="best",
    )
    with progress(settings.steps, "training") as advance:
        at = 0

        def on_step(step: int, values: dict[str, float]) -> None:
            nonlocal at
            advance(step - at)
            at = step

        trained = fit(
            network, loss, schedule, work=work, identity=settings.model_dump(), on_step=on_step, validation=validation
        )
    kept = validation.kept(trained.history)
    typer.echo(f"{trained.steps} steps in {trained.seconds / 60:.0f} minutes; weights of step {kept.step} kept")


def measured(
    encoder: "Distilled", components: "Components", texts: Sequence[str], real: "np.ndarray", max_size: int
) -> "Distilled":
    """Return the encoder with its figures on texts of which the first predictions are known, and print them.

    encoder     as trained
    components  what its coefficients refer to
    texts       that it was not trained on
    real        their first predictions, (n, d)
    max_size    largest number of prompts in a group
    """
    from dataclasses import replace

    from rich.console import Console
    from rich.table import Table

    from sage.evaluation.spaces import groups_by_count, mean_difference, rank_correlation, variance_explained
    from sage.grouping.auto import DEFAULT
    from sage.grouping.boilerplate import distinct
    from sage.grouping.embedding import embed
    from sage.grouping.groups import cut, tree
    from sage.grouping.sphere import on_sphere

    sphere = on_sphere(real, real.shape[1])
    spaces = {
        "text": embed(distinct(texts), cache=embedding_cache()),
        "distilled": encoder.embed(texts),
        "prediction": sphere,
    }
    explained = variance_explained(real, components.predictions(encoder.coefficients(texts)))
    threshold = DEFAULT.threshold or 0.0
    count = len(cut(tree(spaces["text"], threshold, max_size), threshold))
    found: dict[str, float] = {"prompts": len(texts), "groups": count, "variance_explained": explained}
    title = f"{len(texts)} validation captions in {count} groups, as text forms at {threshold:g}"
    table = Table("groups by", "threshold", "rank correlation", "m within groups", title=title)
    for name, rows in spaces.items():
        groups, at = groups_by_count(rows, count, max_size)
        correlation, m = rank_correlation(sphere, rows), mean_difference(real, groups)
        found |= {f"{name}.threshold": at, f"{name}.rank_correlation": correlation, f"{name}.m": m}
        table.add_row(name, f"{at:.3f}", f"{correlation:.3f}", f"{m:.4f}")
    found["any.m"] = mean_difference(real)
    table.add_row("all in one", "", "", f"{found['any.m']:.4f}")
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    typer.echo(
        f"{explained:.1%} of the variance of first predictions explained; m: mean squared difference of two first "
        "predictions in latents; rank correlation: of the cosines of pairs with those by prediction"
    )
    return replace(encoder, measured={name: round(value, 4) for name, value in found.items()})


if __name__ == "__main__":
    run(main)
