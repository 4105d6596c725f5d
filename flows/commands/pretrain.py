"""`sage pretrain`: train the base model from scratch on the training split; run once, not a stage of dvc.yaml."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.machine import check_cpu
from flows.terminal import exit_on_error, progress
from sage import files
from sage.config import NetworkTraining, load_params
from sage.data.dataset import captions_of, load_pixels, read_split
from sage.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sage.data.dataset import Example
    from sage.training.loop import Losses

app = typer.Typer(
    no_args_is_help=True,
    help="Train the models in models/, on the CPU; a killed command resumes when called again.",
    callback=lambda: check_cpu("sage pretrain"),
)

Data = Annotated[Path, typer.Option(help="Prepared data: `dvc repro prepare` makes it.")]
Work = Annotated[Path, typer.Option(help="Folder for resumable state.")]
ATTRIBUTES = Path("models/attributes")
Out = Annotated[Path, typer.Option(help="Folder for the trained model.")]


@app.command("base")
def whole_base(
    data: Data = Path("data/prepared"), work: Work = Path("work/pretrain"), out: Out = Path("models/base")
) -> None:
    """Train the base model from nothing: the autoencoder, then the U-Net; hours, continued when called again."""
    autoencoder(data, work, work / "vae")
    denoiser(data, work / "vae", work, None, out)


@app.command()
def autoencoder(
    data: Data = Path("data/prepared"), work: Work = Path("work/pretrain"), out: Out = Path("work/pretrain/vae")
) -> None:
    """Train the autoencoder on the training images and print its reconstruction quality on unseen images."""
    settings = load_params().pretrain.autoencoder
    examples = read_split(data, "train")

    import torch

    from sage.sampling import base
    from sage.training import pretraining

    images = _images(examples)
    torch.manual_seed(settings.seed)
    network = base.new_autoencoder()
    loss = pretraining.autoencoder_loss(
        network, images, batch_size=settings.batch_size, kl_weight=settings.kl_weight, seed=settings.seed
    )
    _fit(network, loss, settings, work / "autoencoder", files.sha256_tree(data / "train"))
    pretraining.normalise_latents(network, images)
    with files.new_folder(out) as temporary:
        network.save_pretrained(temporary)
    unseen = _images(read_split(data, "validation"))
    typer.echo(f"reconstruction of {len(unseen)} unseen pictures: {pretraining.reconstruction(network, unseen):.2f} dB")


@app.command()
def denoiser(
    data: Data = Path("data/prepared"),
    vae: Annotated[Path, typer.Option(help="The autoencoder that `sage pretrain autoencoder` made.")] = Path(
        "work/pretrain/vae"
    ),
    work: Work = Path("work/pretrain"),
    start: Annotated[
        Path | None, typer.Option(help="A base model whose U-Net to continue from; default: start from scratch.")
    ] = None,
    out: Out = Path("models/base"),
) -> None:
    """Train the U-Net on the autoencoder's latents and write the whole base model."""
    settings = load_params().pretrain.denoiser
    examples = read_split(data, "train")

    import torch

    from sage.sampling import base
    from sage.training import pretraining

    autoencoder = _autoencoder(vae)
    texts, captions = captions_of([example.texts for example in examples])
    parents = [files.sha256_tree(folder) for folder in (data / "train", vae)]
    latents, states = _encoded(work / f"encoded-{files.digest(parents)[:16]}.safetensors", autoencoder, examples, texts)
    torch.manual_seed(settings.seed)
    network = base.new_unet() if start is None else base.load(start).unet.requires_grad_(True)
    network = network.to(memory_format=torch.channels_last)
    if settings.compile:
        pretraining.compile_blocks(network)
    ancestors = [*parents, *([files.sha256_tree(start)] if start is not None else [])]
    loss = pretraining.denoiser_loss(
        network,
        base.new_scheduler(),
        latents,
        states,
        torch.from_numpy(captions),
        batch_size=settings.batch_size,
        drop_text=settings.drop_text,
        seed=settings.seed,
    )
    _fit(network, loss, settings, work / "denoiser", *ancestors)
    card = out / "README.md"
    card_text = card.read_text(encoding="utf-8") if card.exists() else None
    base.save(base.assemble(autoencoder, network), out)
    if card_text is not None:
        files.write_text(card, card_text)
    typer.echo(f"wrote {out}. Now update {card} and measure the damage of sharing: `sage calibrate`.")


@app.command("attributes")
def attribute_judge(
    work: Work = Path("work/pretrain"), out: Annotated[Path, typer.Option(help="Folder for the judge.")] = ATTRIBUTES
) -> None:
    """Train the network that tells which attributes an image of a composed figure shows, on renders of all styles."""
    params = load_params()
    settings, styles = params.pretrain.attributes, params.prepare.figures.styles

    import torch

    from sage.evaluation import attributes, renders

    torch.manual_seed(settings.seed)
    classifier = attributes.AttributeClassifier(renders.labels_of(styles))
    unseen = settings.figures // 4
    with progress(settings.figures + unseen, "drawing figures") as advance:
        drawn = renders.render(classifier, settings.figures, f"{settings.seed}/judge", advance)
        test = renders.render(classifier, unseen, f"{settings.seed}/judge unseen", advance)
    loss = renders.loss(classifier, drawn, batch_size=settings.batch_size, seed=settings.seed)
    _fit(classifier, loss, settings, work / "attributes", ",".join(styles))
    judge = attributes.AttributeJudge(classifier.eval(), renders.accuracy(classifier, test))
    attributes.save(judge, out, f"{settings.figures} rendered figures of {', '.join(styles)}")
    heads = sum(map(len, judge.accuracy.values()))
    for style, known in judge.accuracy.items():
        typer.echo(f"{style}: " + ", ".join(f"{name} {share:.1%}" for name, share in known.items()))
    typer.echo(
        f"{len(judge.judged)} of {heads} attributes reach {attributes.LEAST_ACCURACY:.0%} on {unseen} unseen figures"
    )


def _autoencoder(folder: Path) -> Any:
    """Return a saved autoencoder; raise DataError if it cannot be loaded or its weights are not safetensors."""
    from diffusers import AutoencoderKL

    try:
        found = AutoencoderKL.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no autoencoder: {error}. Run `sage pretrain autoencoder`.") from error
    return found.eval().requires_grad_(False)


def _encoded(path: Path, autoencoder: Any, examples: "list[Example]", texts: list[str]) -> "tuple[Tensor, Tensor]":
    """Return scaled latents of all images, and text states of all captions and the empty one, kept in a file."""
    from safetensors.torch import load_file, save_file

    from sage.training import pretraining

    if not path.is_file():
        with progress(len(examples) + len(texts), "encoding images and captions") as advance:
            latents = pretraining.encode_images(autoencoder, _images(examples), advance)
            states = pretraining.encode_texts([*texts, ""], advance)
        latents = (latents * autoencoder.config.scaling_factor).contiguous()
        with files.new_file(path) as temporary:
            save_file({"latents": latents, "states": states}, temporary)
    found = load_file(path)
    return found["latents"], found["states"]


def _images(examples: "list[Example]") -> "Tensor":
    import torch

    return torch.from_numpy(load_pixels(examples))


def _fit(
    network: "nn.Module",
    loss: "Callable[[int], Losses]",
    settings: NetworkTraining,
    work: Path,
    *ancestors: str,
) -> None:
    """Train with a progress display; resume only with the same data, ancestors and settings except steps and decay.

    network, loss  the network to train and its loss of step k
    settings       the network's part of section pretrain in params.yaml
    work           folder of the checkpoints
    ancestors      hashes of the data and of the models that the training starts from
    """
    from sage.training.loop import Schedule, fit

    schedule = Schedule(
        settings.steps, settings.learning_rate, warmup=settings.warmup, decay=settings.decay, ema=settings.ema
    )
    # Steps and decay may change in a resumed run, because the steps before the decay do not depend on them.
    identity = settings.model_dump(exclude={"steps", "decay"})
    identity |= {"ancestors": list(ancestors)}
    with progress(settings.steps, f"training {work.name}") as advance:
        at = 0

        def on_step(step: int, values: dict[str, float]) -> None:
            nonlocal at
            advance(step - at)
            at = step

        trained = fit(network, loss, schedule, work=work, identity=identity, on_step=on_step)
    typer.echo(f"{work.name}: {trained.steps} steps in {trained.seconds / 60:.0f} minutes")


if __name__ == "__main__":
    exit_on_error(app)
