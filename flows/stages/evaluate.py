"""Stage evaluate: metrics with confidence intervals for every arm, gates, and the report page."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import sage.torchvision_ops  # noqa: F401

import numpy as np
import typer

from flows.machine import device
from flows.report import page as page
from flows.terminal import progress, run
from flows.tracking.runs import stage_run
from sage.config import Evaluate, load_params
from sage.data.accounting import read_accounting
from sage.data.dataset import Example, read_split
from sage.data.images import compose
from sage.data.shards import ImageFile, rgb
from sage.errors import MetricError
from sage.evaluation import figures as judging
from sage.evaluation import gates
from sage.evaluation.arms import INDEPENDENT, JUDGED
from sage.evaluation.extractors import Extractor, open_extractor, read_images
from sage.evaluation.judges import Judge, open_judge, with_other_captions
from sage.evaluation.references import references
from sage.evaluation.registry import METRICS
from sage.evaluation.results import Results, write, write_frontier
from sage.evaluation.results import headline as summary
from sage.evaluation.samples import Judged, read_judged, siblings
from sage.files import new_folder, sha256_tree, write_json
from sage.grouping.embedding import embed
from sage.training.curves import read_curves

COSTS = tuple(name for name, metric in METRICS.items() if metric.cost)


def main(
    data: Annotated[Path, typer.Option(help="Prepared data.")],
    groups: Annotated[Path, typer.Option(help="Groups of each split.")],
    generated: Annotated[Path, typer.Option(help="The pictures of every arm, with their manifest.")],
    costs: Annotated[Path, typer.Option(help="What the pictures cost: the figures of stage generate.")],
    report: Annotated[Path, typer.Option(help="Folder of the report page.")],
    metrics: Annotated[Path, typer.Option(help="JSON file of figures to write.")],
    losses: Annotated[Path | None, typer.Option(help="The losses of stage finetune, for the report.")] = None,
    headline: Annotated[Path | None, typer.Option(help="JSON file for the dozen figures that matter most.")] = None,
    frontier: Annotated[Path | None, typer.Option(help="CSV file for quality and cost of every arm.")] = None,
) -> None:
    """Evaluate every arm on the same held-out prompts and seeds, check the gates, and write figures and report."""
    params = load_params()
    settings = params.evaluate
    extract = open_extractor(settings.features, device())
    judged = read_judged(data, groups, generated, params.generate.split, params.generate.seeds)
    aligned = open_judge(settings.alignment, judged.examples, device())
    cost = read_costs(costs, judged)
    accounting, curves = read_accounting(data), [] if losses is None else read_curves(losses)
    with stage_run("evaluate", settings.model_dump()) as record:
        record.dataset("prepared", sha256_tree(data), "evaluation")
        compared = references(judged.examples, settings.references, settings.seed)
        further = judged.examples if settings.references else siblings(judged.examples, read_split(data, "train"))
        real, arms, others = measure(judged, compared, further, extract, aligned)
        wrong, differs = with_other_captions(judged.examples)
        other = aligned(wrong, [row[:1] for row in compared]).values[:, 0]
        by = {"features": extract.description, "alignment": aligned.description}
        if settings.references:
            by |= {"references": f"{settings.references} figures drawn for each prompt"}
        results = judge(judged, real, arms, others, cost, settings, extract.name, aligned.name, by, (other, differs))
        for warning in results.warnings:
            typer.echo(f"warning: {warning}", err=True)
        texts = embed([example.text for example in judged.examples])
        rows = page.group_rows(judged, results.saving, alignment_lost(judged, arms), texts)
        about = page.run_rows(judged, arms[JUDGED].alignment if JUDGED in arms else None, accounting, curves)
        with new_folder(report) as folder:
            (folder / "index.html").write_text(page.build(results, rows, about), encoding="utf-8")
            write_json(folder / "samples.json", page.samples([*rows.across, *rows.hardest], rows.seed))
        record.metrics(flat(results))
        for step, row in enumerate(rows.across):
            record.image(page.group_sheet(row), "groups", step)
        record.artifact(report, "report")
        record.tags({"gates": "passed" if results.passed else "failed"})
        if headline is not None:
            write_json(headline, summary(results))
        if frontier is not None:
            write_frontier(frontier, results)
        write(metrics, results)
        record.result(metrics)


def read_costs(path: Path, judged: Judged) -> dict[str, float]:
    """Return what an image of each arm cost; raise MetricError if it was counted on other images than are judged."""
    arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
    if list(arms) != list(judged.arms):
        raise MetricError(
            f"{path} counts arms {', '.join(arms)}, but there are pictures of {', '.join(judged.arms)}. "
            "Run `dvc repro generate`."
        )
    images = len(judged.examples) * len(judged.seeds)
    for arm, figures in arms.items():
        if figures["images"] != images or not math.isfinite(figures["nfe_per_image"]):
            raise MetricError(
                f"{path}: arm {arm} counts {figures['images']} images at {figures['nfe_per_image']} evaluations each, "
                f"expected {images} images and finite costs. Run `dvc repro generate`."
            )
    return {arm: figures["nfe_per_image"] for arm, figures in arms.items()}


def measure(
    judged: Judged,
    compared: Sequence[Sequence[ImageFile]],
    others: Sequence[Example],
    extract: Extractor,
    aligned: Judge,
) -> tuple[judging.ImageFeatures, dict[str, judging.ImageFeatures], np.ndarray]:
    """Return what the extractors see: the references, each arm's images, and the features of other real images.

    judged    the images to evaluate
    compared  the references of each prompt
    others    real images that tell how far such are from the references: siblings from the training split, or the
              held-out images if the references were drawn anew; cropped to the drawn size if they have another shape
    extract   what the features are of
    aligned   the judge of alignment
    """
    width, height = rgb(judged.examples[0].image).size
    cropped = (np.asarray(compose(rgb(example.image), (height, width), "crop")) for example in others)
    prompts, seeds = len(judged.examples), len(judged.seeds)
    total = prompts * (len(compared[0]) + seeds * len(judged.arms)) + len(others)
    with progress(total, "extracting features") as advance:

        def see(images: Sequence[Sequence[ImageFile]]) -> judging.ImageFeatures:
            features = extract(read_images(image for row in images for image in row), advance)
            features = features.reshape(prompts, -1, features.shape[-1])
            scores = aligned(judged.examples, images)
            return judging.ImageFeatures(features, scores.values, scores.parts)

        real = see(compared)
        arms = {arm: see(paths) for arm, paths in judged.arms.items()}
        return real, arms, extract(cropped, advance)


def judge(
    judged: Judged,
    real: judging.ImageFeatures,
    arms: Mapping[str, judging.ImageFeatures],
    others: np.ndarray,
    cost: Mapping[str, float],
    settings: Evaluate,
    features: str,
    aligned: str,
    by: Mapping[str, str],
    other: tuple[np.ndarray, np.ndarray],
) -> Results:
    """Return the figures of all arms and the verdicts of the gates.

    judged    prompts, groups and seeds of the evaluation
    real      features and alignment of the references
    arms      features and alignment of each arm's images
    others    features of other real images, for the floor of the distances
    cost      network evaluations per image of each arm
    settings  the section evaluate of params.yaml
    features  name of the extractor
    aligned   name of the judge of alignment
    by        what extractor and judge are, for the record
    other     alignment of each real image with another's caption, and whether the captions differ, both (prompts,)
    """
    groups, n = judged.groups, len(judged.examples) * len(judged.seeds)
    bootstrap = judging.Bootstrap.over(groups, settings.resamples, settings.confidence, settings.seed)
    measured = {arm: judging.statistics(real, images, groups) for arm, images in arms.items()}
    figures = {arm: judging.arm_figures(measured[arm], arms[arm], bootstrap) for arm in arms}
    for arm, values in figures.items():
        # Evaluations are counted, not estimated, so the interval is a point.
        values |= {"nfe_per_image": judging.figure(cost[arm], cost[arm], cost[arm], n)}
    floor = judging.floor(real.features, others, groups, bootstrap)
    worse = {}
    for reference in (arm for arm in arms if JUDGED in arms and arm != JUDGED):
        least = float(floor["kernel_distance"].high or 0)
        worse[reference] = judging.worse_by(measured[JUDGED], measured[reference], bootstrap, n, least)
        pair = cost[JUDGED], cost[reference]
        worse[reference]["nfe_per_image"] = judging.cost_worse_by(*pair, n)
    cheaper = worse[INDEPENDENT]["nfe_per_image"].relative.value if INDEPENDENT in worse else None
    saving = -(cheaper or 0.0)
    told = {arm: judging.attribute_figures(images, groups, bootstrap) for arm, images in arms.items()}
    own = real.alignment[:, 0]
    captions, warning = judging.other_captions(own, *other, groups, bootstrap)
    # Left out if there is nothing to say, so that results without it stay as they are.
    some: dict[str, Any] = {"attributes": told} if any(told.values()) else {}
    some |= {"blank": judged.blank} if judged.blank else {}
    results = Results(
        features=features,
        alignment=aligned,
        measured_by=dict(by),
        other_captions=captions,
        warnings=[warning] if warning else [],
        **some,
        confidence=settings.confidence,
        resamples=settings.resamples,
        set=judged.set,
        saving=saving,
        arms=figures,
        real=judging.real_figures(real, groups, bootstrap),
        floor=floor,
        worse_by=worse,
        by_similarity=judging.by_similarity(measured, groups, judged.similarity, bootstrap, len(judged.seeds), saving),
        gates=[],
        passed=False,
    )
    verdicts = gates.judge(results, judged.set, [gate.model_dump() for gate in settings.gates])
    return results.model_copy(update={"gates": verdicts, "passed": gates.passed(verdicts)})


def alignment_lost(judged: Judged, arms: Mapping[str, judging.ImageFeatures]) -> list[float]:
    """Return for each group by how much sharing lowered its alignment; 0 if there is nothing to compare."""
    if not {INDEPENDENT, JUDGED} <= set(arms):
        return [0.0] * len(judged.groups)
    lost = (arms[INDEPENDENT].alignment - arms[JUDGED].alignment).mean(1)
    return [float(lost[group].mean()) for group in judged.groups]


def flat(results: Results) -> dict[str, float]:
    """Return the figures as metrics for MLflow: ARM.METRIC, ARM.METRIC.low and ARM.METRIC.high."""
    return {
        f"{arm}.{metric}" + ("" if end == "value" else f".{end}"): number
        for arm, figures in results.arms.items()
        for metric, figure in figures.items()
        for end, number in (("value", figure.value), ("low", figure.low), ("high", figure.high))
        if number is not None
    }


if __name__ == "__main__":
    run(main)
