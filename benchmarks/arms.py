"""What each part of SAGE is worth, and what sharing saves at equal quality: the figures of docs/results_tables.md.

    python -m benchmarks.arms choose     every recipe on the validation split, the only one to choose by
    python -m benchmarks.arms noise      how far one pair of seeds is to be trusted, on the validation split
    python -m benchmarks.arms prove      the arms, the targets and both frontiers on the held-out test split
    python -m benchmarks.arms prove --quick     one training seed and few points: minutes

A command that was killed goes on. Each rewrites its own part of docs/results_tables.md, between two marks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import sage.torchvision_ops  # noqa: F401

import matplotlib as mpl
import numpy as np
import typer
from PIL import Image

from benchmarks.trials import Point, Recipe, Trials, standard
from flows.terminal import exit_on_error
from sage.config import Params, load_params
from sage.data.dataset import load_pixels
from sage.evaluation import figures as judging
from sage.evaluation import registry
from sage.evaluation.bootstrap import Array, Statistic, percentiles
from sage.evaluation.frontier import saving
from sage.evaluation.results import Figure
from sage.files import new_file, write_text
from sage.sampling.plan import Plan

mpl.use("Agg")
import matplotlib.pyplot as plt

app = typer.Typer(no_args_is_help=True, help=__doc__)

METRICS = {name: metric.label for name, metric in registry.METRICS.items() if not metric.cost}
CHOSEN_BY = registry.BY_SIMILARITY
Work = Annotated[Path, typer.Option(help="Where models and features are kept.")]
Page = Annotated[Path, typer.Option(help="The page whose figures are rewritten; pictures go beside it.")]


@dataclass(frozen=True)
class Form:
    """How much is measured.

    `seeds`: training seeds; `sampling_seeds`: those of a prompt's pictures; `ratios`: share ratios; `full`: steps
    that stand for all steps, beyond which little is won; `alone`: a model, a solver, training seeds and steps of each
    series of independent sampling; `shared`: a model, a share ratio, training seeds and steps of each series of shared
    sampling.
    """

    seeds: int
    sampling_seeds: tuple[int, ...]
    ratios: tuple[float, ...]
    full: tuple[int, ...]
    alone: tuple[tuple[str, str, int, tuple[int, ...]], ...]
    shared: tuple[tuple[str, float, int, tuple[int, ...]], ...]


# Of six steps these ratios share one, two, three and four. 0.34 is also one of three; below three it shares none.
FULL = Form(
    seeds=3,
    sampling_seeds=(0, 1, 2, 3),
    ratios=(0.2, 0.34, 0.5, 0.67),
    full=(8, 20),
    alone=(
        ("base", "dpm++", 1, (2, 3, 4, 5, 6, 7, 8, 12, 20, 50)),
        ("base", "ddim", 1, (4, 8)),
        ("standard", "dpm++", 1, (3, 4, 5, 6, 8, 12)),
        ("SAGE", "dpm++", 3, (3, 4, 5, 6, 8)),
    ),
    shared=(
        ("base", 0.34, 1, (4, 5, 6, 8)),
        ("standard", 0.34, 1, (4, 5, 6, 8)),
        ("SAGE", 0.34, 3, (4, 5, 6, 8, 20)),
        ("SAGE", 0.5, 3, (4, 5, 6, 8, 20)),
    ),
)
QUICK = Form(
    seeds=1,
    sampling_seeds=(0, 1),
    ratios=(0.5,),
    full=(8,),
    alone=(("base", "dpm++", 1, (2, 4, 6, 8)), ("standard", "dpm++", 1, (6,)), ("SAGE", "dpm++", 1, (6,))),
    shared=(("base", 0.34, 1, (4, 6)), ("SAGE", 0.34, 1, (4, 6)), ("SAGE", 0.5, 1, (4, 6))),
)
# The targets were set for 25.5% fewer evaluations. Two of six steps save less and three more, so they are read at both.
GOAL_RATIO = 0.5


class Judge:
    """Every figure of one split, paired: the same prompts, seeds and bootstrap draws for all arms."""

    def __init__(self, trials: Trials) -> None:
        """Take the settings of section evaluate."""
        self.trials = trials
        settings = trials.params.evaluate
        self.bootstrap = judging.Bootstrap.over(trials.groups, settings.resamples, settings.confidence, settings.seed)
        # The data themselves, then the draws.
        self.counts = np.vstack([np.ones((1, len(trials.groups))), self.bootstrap.counts])
        # Every table asks for some of the same.
        self._statistics: dict[Point, dict[str, Statistic]] = {}
        self._figures: dict[tuple[Point, ...], dict[str, Figure]] = {}
        self._draws: dict[tuple[Point, str], Array] = {}

    def measured(self, points: Sequence[Point]) -> dict[str, Statistic]:
        """Return the statistics of an arm: their means over its points, one for each training seed."""
        trials = self.trials
        for point in points:
            if point not in self._statistics:
                self._statistics[point] = judging.statistics(trials.real, trials.images(point), trials.groups)
        return {name: _mean([self._statistics[point][name] for point in points]) for name in METRICS}

    def figures(self, points: Sequence[Point]) -> dict[str, Figure]:
        """Return value and interval of everything measured."""
        if (key := tuple(points)) not in self._figures:
            images = self.trials.images(points[0])
            self._figures[key] = judging.arm_figures(self.measured(points), images, self.bootstrap)
        return self._figures[key]

    def draws(self, points: Sequence[Point], metric: str = "kernel_distance") -> Array:
        """Return a metric's value, then its draws."""
        for point in points:
            if (point, metric) not in self._draws:
                self._draws[point, metric] = self.measured([point])[metric](self.counts)
        mean: Array = np.mean([self._draws[point, metric] for point in points], axis=0)
        return mean

    def change(self, arm: Sequence[Point], reference: Sequence[Point], metric: str) -> tuple[float, float, float]:
        """Return by what share a metric is higher than the reference's, with its interval."""
        if metric == "frechet_distance":  # no draws: the bootstrap biases it
            ours, theirs = (self.figures(points)[metric].value for points in (arm, reference))
            return float(ours or 0) / float(theirs or 1) - 1, np.nan, np.nan
        share = self.draws(arm, metric) / self.draws(reference, metric) - 1
        return float(share[0]), *percentiles(share[1:], self.bootstrap.confidence, len(self.trials.groups))


def _mean(statistics: list[Statistic]) -> Statistic:
    measured = np.logical_and.reduce([statistic.measured for statistic in statistics])
    return Statistic(lambda counts: np.mean([statistic(counts) for statistic in statistics], axis=0), measured)


@app.command()
def choose(
    work: Work = Path("work/arms"),
    page: Page = Path("docs/results_tables.md"),
    seeds: Annotated[int, typer.Option(help="Training seeds.")] = 1,
    only: Annotated[str, typer.Option(help="Recipes whose name contains this, or one of several with commas.")] = "",
) -> None:
    """Train every recipe and judge its independent and its shared pictures on the validation split."""
    params = load_params()
    judge = Judge(Trials(params, "validation", work))
    chosen = {name: recipe for name, recipe in recipes(params).items() if any(part in name for part in only.split(","))}
    rows = []
    steps, ratios = params.generate.steps, (0.0, params.generate.share_ratio, GOAL_RATIO)
    shipped = [[Point(Recipe(seed=seed), steps, share) for seed in range(seeds)] for share in ratios]
    for name, recipe in chosen.items():
        models = [None] if recipe is None else [replace(recipe, seed=seed) for seed in range(seeds)]
        arms = [[Point(model, steps, share) for model in models] for share in ratios]
        pairs = list(zip(arms, shipped, strict=True))
        rows.append([name, *(_against(judge, arm, other, metric) for metric in CHOSEN_BY for arm, other in pairs)])
        typer.echo(" | ".join(rows[-1]))
    where = ["independent", *(f"share ratio {ratio}" for ratio in ratios[1:])]
    head = ["recipe", *(f"{METRICS[metric]}, {form}" for metric in CHOSEN_BY for form in where)]
    trials = judge.trials
    note = (
        f"{len(trials.examples)} prompts of the validation split, {len(trials.groups)} groups, seeds "
        f"{params.generate.seeds}, {steps} steps, {seeds} training seed(s); in brackets the change against the shipped "
        f"recipe on the same prompts and seeds{f'; recipes named {only}' if only else ''}."
    )
    _rewrite(page, "choose", f"{note}\n\n{_table(head, rows)}")


# All three terms of L_SAGE; the shipped recipe leaves out the shared one.
WHOLE = {"diffusion": 1.0, "shared": 1.0, "branch": 1.0, "consistency": 0.0}


def recipes(params: Params) -> dict[str, Recipe | None]:
    """Return what is compared: no training, standard and the shipped fine-tuning, and one thing changed at a time.

    Terms are left out of the loss with all of them, settings are changed in the shipped one.
    """
    shipped = params.finetune
    ratio = params.generate.share_ratio
    terms: dict[str, dict[str, float]] = {
        "all terms": {},
        "all terms without diffusion": {"diffusion": 0.0},
        "all terms without branch": {"branch": 0.0},
        "all terms with consistency": {"consistency": 0.1},
    }
    settings: dict[str, Recipe] = {
        "without diffusion": Recipe(weights=(("diffusion", 0.0),)),
        "half the weight of branch": Recipe(weights=(("branch", shipped.weights.branch / 2),)),
        "twice the weight of branch": Recipe(weights=(("branch", 2 * shipped.weights.branch),)),
        "mixture branch start": Recipe((("branch_start", "mixture"),)),
        "plain branch start": Recipe((("branch_start", "plain"),)),
        "one branch time": Recipe((("share_ratios", (ratio, ratio)),)),
        "three times the learning rate": Recipe((("learning_rate", 3 * shipped.learning_rate),)),
        "twice the steps": Recipe((("steps", 2 * shipped.steps), ("decay", 2 * shipped.decay))),
        "min-SNR weighting": Recipe((("min_snr", 5.0),)),
        # LoRA wants a higher rate than all weights: its matrices begin at zero.
        "LoRA of rank 8, ten times the learning rate": Recipe(
            (("adapter", (("rank", 8),)), ("learning_rate", 10 * shipped.learning_rate))
        ),
    }
    return {
        "base": None,
        "standard fine-tuning": standard(WHOLE, 0),
        "SAGE as shipped: all terms without shared": Recipe(),
        **{name: Recipe(weights=tuple((WHOLE | changed).items())) for name, changed in terms.items()},
        # What the shared term aims at means nothing without it.
        "all terms, mean soft target": Recipe((("soft_target", "mean"),), tuple(WHOLE.items())),
        **{f"shipped, {name}": recipe for name, recipe in settings.items()},
    }


@app.command()
def noise(work: Work = Path("work/arms"), page: Page = Path("docs/results_tables.md")) -> None:
    """Judge the arms that a choice rests on under other noise, on the validation split."""
    params = load_params()
    arms = Arms(params, 1)
    pairs = ((0, 1), (2, 3), (4, 5))
    columns: list[list[str]] = []
    names: list[str] = []
    for pair in pairs:
        judge = Judge(Trials(_with_seeds(params, pair), "validation", work))
        main = arms.main(judge.trials)
        names = [name for name in main if "standard" not in name and "training seed" not in name]
        figures = [judge.figures(main[name]) for name in names]
        columns += [[f"{arm[metric].value:.3g}" for arm in figures] for metric in ("kernel_distance", "alignment")]
        typer.echo(f"seeds {pair}: {columns[-2:]}")
    head = [
        "arm",
        *(f"{what}, seeds {a} and {b}" for a, b in pairs for what in ("kernel distance", "attributes right")),
    ]
    _rewrite(page, "noise", _table(head, [list(row) for row in zip(names, *columns, strict=True)]))


def _with_seeds(params: Params, seeds: Sequence[int]) -> Params:
    """Return the configuration with other sampling seeds."""
    return params.model_copy(update={"generate": params.generate.model_copy(update={"seeds": list(seeds)})})


@app.command()
def prove(
    work: Work = Path("work/arms"),
    page: Page = Path("docs/results_tables.md"),
    quick: Annotated[bool, typer.Option("--quick", help="One training seed and few points.")] = False,
) -> None:
    """Judge the arms on the held-out split, compare with the targets, and draw both frontiers."""
    params = load_params()
    form = QUICK if quick else FULL
    judge = Judge(Trials(_with_seeds(params, form.sampling_seeds), "test", work))
    arms = Arms(params, form.seeds)
    parts = [
        _conditions(judge.trials, form),
        arms_table(judge, arms),
        targets_table(judge, arms, form),
        ratios_table(judge, arms, form),
        similarity_table(judge, arms),
        frontiers(judge, arms, form, page.parent / "frontier.png"),
    ]
    sheet(judge.trials, arms, page.parent / "results_grid.png")
    _rewrite(page, "prove", "\n\n".join(parts))


class Arms:
    """The arms by name, each a list of points, one for each training seed."""

    def __init__(self, params: Params, seeds: int) -> None:
        """`seeds`: how many training seeds the fine-tuned models have."""
        self.steps, self.ratio = params.generate.steps, params.generate.share_ratio
        weights = params.finetune.weights.model_dump()
        self.models: dict[str, list[Recipe | None]] = {
            "base": [None],
            "standard": [standard(weights, seed) for seed in range(seeds)],
            "SAGE": [Recipe(seed=seed) for seed in range(seeds)],
        }

    def at(self, model: str, steps: int, share: float | str = 0.0, solver: str = "dpm++") -> list[Point]:
        """Return an arm's points."""
        return [Point(recipe, steps, share, solver) for recipe in self.models[model]]

    def main(self, trials: Trials) -> dict[str, list[Point]]:
        """Return the rows of the table of arms."""
        steps, ratio = self.steps, self.ratio
        shared = Plan.shared(trials.groups, steps, ratio).nfe(guidance=False)
        fewer = -(-shared // len(trials.examples))
        return {
            f"independent, base, {steps} steps": self.at("base", steps),
            f"independent, base, {fewer} steps (same cost)": self.at("base", fewer),
            f"independent, standard, {steps} steps": self.at("standard", steps),
            f"independent, SAGE, {steps} steps": self.at("SAGE", steps),
            "shared, base": self.at("base", steps, ratio),
            "shared, standard": self.at("standard", steps, ratio),
            "shared, SAGE": self.at("SAGE", steps, ratio),
            "shared, SAGE of one training seed, branch points by similarity": self.at("SAGE", steps, "adaptive")[:1],
            "shared, SAGE of one training seed, tree": self.at("SAGE", steps, "tree")[:1],
        }


def _conditions(trials: Trials, form: Form) -> str:
    prompts, groups, settings = len(trials.examples), len(trials.groups), trials.params.generate
    return (
        f"{prompts} prompts of the {trials.split} split, {groups} groups (mean {prompts / groups:.2f}), seeds "
        f"{settings.seeds}, guidance {settings.guidance_scale}; {form.seeds} training seed(s); "
        f"{trials.params.evaluate.confidence:.0%} intervals from draws over groups."
    )


def arms_table(judge: Judge, arms: Arms) -> str:
    """Return the table of arms."""
    rows = []
    for name, points in arms.main(judge.trials).items():
        figures = judge.figures(points)
        rows.append([name, f"{judge.trials.nfe(points[0]):.1f}", *(_figure(figures[metric]) for metric in METRICS)])
        typer.echo(" | ".join(rows[-1]))
    return _table(["arm", "NFE per image", *METRICS.values()], rows)


def targets_table(judge: Judge, arms: Arms, form: Form) -> str:
    """Return the targets that the project set itself, what was reached, and whether the interval reaches it, too."""
    rows: dict[str, list[str]] = {}
    for ratio in (arms.ratio, GOAL_RATIO):
        for goal, change, reached in goals(judge, arms, form.full, ratio):
            value, low, high = change
            # With its whole interval, as a gate does; a Frechet distance has none here.
            ends = [value] if np.isnan(low) else [low, high]
            verdict = "yes" if all(map(reached, ends)) else "in the mean" if reached(value) else "no"
            rows.setdefault(goal, [goal]).extend((_percent(value, low, high), verdict))
    head = [cell for ratio in (arms.ratio, GOAL_RATIO) for cell in (f"share ratio {ratio}", "met")]
    return _table(["target", *head], list(rows.values()))


def goals(
    judge: Judge, arms: Arms, full: Sequence[int], ratio: float
) -> list[tuple[str, tuple[float, float, float], Callable[[float], bool]]]:
    """Return each target, by what share the figure changed, and what change reaches it."""
    steps = arms.steps
    sage, plain = arms.at("SAGE", steps, ratio), arms.at("standard", steps, ratio)
    alone = arms.at("base", steps)
    return [
        ("kernel distance, SAGE against standard, both shared: at least 5% lower",
         judge.change(sage, plain, "kernel_distance"), lambda x: x <= -0.05),
        ("Frechet distance, the same: at least 5% lower",
         judge.change(sage, plain, "frechet_distance"), lambda x: x <= -0.05),
        ("attributes right, the same: at least 5% higher", judge.change(sage, plain, "alignment"), lambda x: x >= 0.05),
        ("diversity within groups, the same: at least twice",
         judge.change(sage, plain, "group_diversity"), lambda x: x >= 1.0),
        ("diversity within groups, SAGE shared against base independent: within 10%",
         judge.change(sage, alone, "group_diversity"), lambda x: abs(x) <= 0.1),
        *((f"kernel distance, SAGE shared against base independent, {many} steps: at most 2% worse",
           judge.change(arms.at("SAGE", many, ratio), arms.at("base", many), "kernel_distance"), lambda x: x <= 0.02)
          for many in full),
        ("kernel distance, SAGE independent against base independent: at most 2% worse",
         judge.change(arms.at("SAGE", steps), alone, "kernel_distance"), lambda x: x <= 0.02),
    ]  # fmt: skip


def ratios_table(judge: Judge, arms: Arms, form: Form) -> str:
    """Return what each share ratio costs and gives."""
    rows = []
    for ratio in form.ratios:
        for model in arms.models:
            points = arms.at(model, arms.steps, ratio)
            figures = judge.figures(points)
            nfe = judge.trials.nfe(points[0])
            rows.append([f"{ratio}", model, f"{nfe:.1f}", *(_figure(figures[metric]) for metric in METRICS)])
    return _table(["share ratio", "model", "NFE per image", *METRICS.values()], rows)


def similarity_table(judge: Judge, arms: Arms) -> str:
    """Return the arms split by how similar a group's prompts are."""
    trials = judge.trials
    chosen = {
        "independent, base": arms.at("base", arms.steps),
        "shared, base": arms.at("base", arms.steps, arms.ratio),
        "shared, standard": arms.at("standard", arms.steps, arms.ratio),
        "shared, SAGE": arms.at("SAGE", arms.steps, arms.ratio),
    }
    measured = {name: judge.measured(points) for name, points in chosen.items()}
    parts = judging.by_similarity(
        measured, trials.groups, trials.similarity, judge.bootstrap, len(trials.params.generate.seeds), 0.0
    )
    rows = [
        [f"{part.part} (worst pair {part.similarity[0]:.2f} to {part.similarity[1]:.2f}, {part.prompts})",
         *(_figure(part.arms[name]["kernel_distance"]) for name in chosen)]
        for part in parts
    ]  # fmt: skip
    return "Kernel distance by the similarity of the group:\n\n" + _table(["groups (prompts)", *chosen], rows)


def frontiers(judge: Judge, arms: Arms, form: Form, image: Path) -> str:
    """Return the iso-quality saving at every shared point, and draw quality against cost with both frontiers."""
    alone = {
        f"independent, {model}, {solver}": [arms.at(model, steps, 0.0, solver)[:seeds] for steps in counts]
        for model, solver, seeds, counts in form.alone
    }
    shared = {
        f"shared, {model}, {share}": [arms.at(model, steps, share)[:seeds] for steps in counts]
        for model, share, seeds, counts in form.shared
    }
    goal = [arm for name, series in alone.items() if "SAGE" not in name for arm in series]
    every = [arm for series in alone.values() for arm in series]
    frontier, whole = _frontier(judge, goal), _frontier(judge, every)
    knee = 1.05 * frontier[1][0].min()
    rows = []
    for name, series in shared.items():
        for arm in series:
            distance, cost = judge.draws(arm), judge.trials.nfe(arm[0])
            savings = [saving(cost, distance, *points) for points in (frontier, whole)]
            ends = [percentiles(found[1:], judge.bootstrap.confidence, len(judge.trials.groups)) for found in savings]
            cells = [_percent(found[0], *pair) for found, pair in zip(savings, ends, strict=True)]
            at_knee = "yes" if distance[0] <= knee else "no"
            rows.append([name, str(len(arm)), str(arm[0].steps), f"{cost:.1f}", f"{distance[0]:.4f}", *cells, at_knee])
    _draw(judge, alone | shared, arms.ratio, image)
    against = ["saving against base and standard", "saving against SAGE's own model, too"]
    head = ["series", "training seeds", "steps", "NFE per image", "kernel distance", *against, "within 5% of the best"]
    return (
        "Iso-quality saving: 1 - the evaluations of the shared point / those that independent sampling needs for the "
        f"same kernel distance (the best model and solver, {len(goal)} points without SAGE's own model and "
        f"{len(every)} with it). Where independent sampling never gets there, its dearest point counts.\n\n"
        f"{_table(head, rows)}\n\n![Kernel distance against network evaluations per image]({image.name})"
    )


def _frontier(judge: Judge, arms: Sequence[Sequence[Point]]) -> tuple[Array, Array]:
    """Return the evaluations per image of some arms, (points,), and the draws of their distances, (draws, points)."""
    return np.array([judge.trials.nfe(arm[0]) for arm in arms]), np.column_stack([judge.draws(arm) for arm in arms])


def _draw(judge: Judge, series: Mapping[str, Sequence[Sequence[Point]]], ratio: float, image: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 6), constrained_layout=True)
    for name, points in series.items():
        nfe = [judge.trials.nfe(arm[0]) for arm in points]
        draws = np.array([judge.draws(arm) for arm in points])
        low, high = np.array(
            [percentiles(row[1:], judge.bootstrap.confidence, len(judge.trials.groups)) for row in draws]
        ).T
        style = "-" if "shared" in name else "--"
        (line,) = axes.plot(nfe, draws[:, 0], marker="o", markersize=4, linestyle=style, label=name)
        if name in ("independent, base, dpm++", f"shared, SAGE, {ratio}"):
            axes.fill_between(nfe, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(xscale="log", xlabel="network evaluations per image", ylabel="kernel distance (lower is better)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with new_file(image) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def sheet(trials: Trials, arms: Arms, image: Path, groups: int = 4, members: int = 4) -> None:
    """Draw a few groups: columns are prompts, rows are real, independent, same cost, shared base, standard, SAGE."""
    largest = sorted(trials.groups, key=len, reverse=True)
    wanted = [place for group in largest[:: max(1, len(largest) // (3 * groups))][:groups] for place in group[:members]]
    main = list(arms.main(trials).values())
    rows = [list(load_pixels([trials.examples[place] for place in wanted]))]
    for points in (main[0], main[1], main[4], main[5], main[6]):
        drawn = trials.draw(points[0], trials.params.generate.seeds[0])
        rows.append([drawn[place] for place in wanted])
    grid = Image.fromarray(np.vstack([np.hstack(row) for row in rows]))
    with new_file(image) as temporary:
        grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(temporary, format="png")


def _figure(figure: Figure) -> str:
    if figure.value is None:
        return "-"
    ends = "" if figure.low is None else f" [{figure.low:.3g}, {figure.high:.3g}]"
    return f"{figure.value:.3g}{ends}"


def _against(judge: Judge, arm: Sequence[Point], shipped: Sequence[Point], metric: str) -> str:
    value = f"{judge.draws(arm, metric)[0]:.3g}"
    return value if arm == shipped else f"{value} [{_percent(*judge.change(arm, shipped, metric))}]"


def _percent(value: float, low: float, high: float) -> str:
    if np.isnan(value):
        return "below the frontier's cheapest point"
    return f"{value:+.1%}" + ("" if np.isnan(low) or np.isnan(high) else f" ({low:+.1%} to {high:+.1%})")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rewrite(page: Path, part: str, text: str) -> None:
    """Replace what stands on the page between the marks of a part."""
    begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    old = page.read_text(encoding="utf-8")
    before, rest = old.split(begin)
    _, after = rest.split(end)
    write_text(page, f"{before}{begin}\n{text}\n{end}{after}")
    typer.echo(f"wrote {page}")


if __name__ == "__main__":
    exit_on_error(app)
