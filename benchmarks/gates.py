"""How many groups a gate needs: how often a model that is worse than a gate allows would pass it, by number of groups.

    python -m benchmarks.gates

Both arms are simulated: images of known distance, alignment and diversity, two seeds a prompt, three prompts a group;
half of the variance of alignment is common to a group. The shipped gates judge them, with intervals from however few
groups.

| column | what is true | right |
|---|---|---|
| at the limit | the metric is worse by exactly what its gate allows | passes at most 5 of 100 |
| at the limit, skewed | the same for alignment, but a few groups lose most of it | passes at most 5 of 100 |
| far beyond | alignment is lower by four times what its gate allows | never passes |
| equal | both arms have one distribution | passes, if there are enough groups to tell |

Below LEAST_GROUPS of sage/evaluation/bootstrap.py there is no interval, so no gate passes.
"""

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq

from flows.terminal import exit_on_error
from sage.config import Evaluate, Gate, load_params
from sage.evaluation import bootstrap, gates
from sage.evaluation.arms import INDEPENDENT, JUDGED
from sage.evaluation.bootstrap import Array
from sage.evaluation.figures import Bootstrap, ImageFeatures, cost_worse_by, figure, statistics, worse_by
from sage.evaluation.registry import METRICS
from sage.evaluation.results import JudgedSet, Part, Results, Verdict

SIZE, SEEDS, WIDTH = 3, 2, 40
DISTANCE, ALIGNMENT = 0.15, 0.3  # of the reference arm, about those of docs/results.md
ALLOWED = 0.05  # false passes
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@dataclass(frozen=True)
class Truth:
    """By what share an arm is truly worse than the reference, and whether a few groups lose most of the alignment."""

    kernel_distance: float = 0.0
    alignment: float = 0.0
    group_diversity: float = 0.0
    skewed: bool = False


@cache
def shift_for(wanted: float, spread: float) -> float:
    """Return the shift of N(shift, spread^2) at a kernel distance from N(0, 1)."""
    return float(brentq(lambda shift: kernel_distance(shift, spread) - wanted, 0, 2))


def kernel_distance(shift: float, spread: float = 1.0) -> float:
    """Return the kernel distance of N(0, 1) and N(shift, spread^2) in WIDTH dimensions, in closed form."""

    def mean(a: float, b: float, s: float, t: float) -> float:
        # The first moments of x . y for x ~ N(a, s^2), y ~ N(b, t^2), each alike in all dimensions.
        c, w = WIDTH * a * b, WIDTH
        second = c**2 + w * (a**2 * t**2 + b**2 * s**2 + s**2 * t**2)
        third = c**3 + 3 * c * (second - c**2) + 6 * c * s**2 * t**2
        return third / w**3 + 3 * second / w**2 + 3 * c / w + 1

    return mean(0, 0, 1, 1) + mean(shift, shift, spread, spread) - 2 * mean(0, shift, 1, spread)


def draw(groups: int, truth: Truth, random: np.random.Generator) -> ImageFeatures:
    """Return an arm's images; half of the variance of alignment is common to a group."""
    n = groups * SIZE

    def noise() -> Array:
        own = random.normal(size=(n, SEEDS))
        common = 1 - random.exponential(size=(groups, 1)) if truth.skewed else random.normal(size=(groups, 1))
        drawn: Array = (own + common.repeat(SIZE, 0)) / np.sqrt(2)
        return drawn

    spread = 1 - truth.group_diversity
    shift = shift_for(DISTANCE * (1 + truth.kernel_distance), spread)
    features = shift + spread * random.normal(size=(n, SEEDS, WIDTH))
    return ImageFeatures(features.astype(np.float32), ALIGNMENT * (1 - truth.alignment) + 0.1 * noise())


def judge(groups: int, truth: Truth, seed: int) -> list[Verdict]:
    """Return the verdicts of the shipped gates on one trial."""
    settings, random = shipped(), np.random.default_rng(seed)
    partition = [list(range(SIZE * k, SIZE * (k + 1))) for k in range(groups)]
    n = groups * SIZE * SEEDS
    real = ImageFeatures(random.normal(size=(groups * SIZE, 1, WIDTH)).astype(np.float32), np.zeros((groups * SIZE, 1)))
    drawn = {INDEPENDENT: draw(groups, Truth(), random), JUDGED: draw(groups, truth, random)}
    intervals = Bootstrap.over(partition, settings.resamples, settings.confidence, settings.seed)
    measured = {name: statistics(real, arm, partition) for name, arm in drawn.items()}
    whole = np.ones((1, groups))
    cost = {INDEPENDENT: 6.0, JUDGED: 4.5}
    judged = JudgedSet(digest="", generated="", n_real=n, n_prompts=groups * SIZE, seeds=list(range(SEEDS)))
    # No more than the gates read.
    results = Results.model_construct(  # type: ignore[call-arg]
        features=settings.features,
        confidence=settings.confidence,
        set=judged,
        arms={
            name: {
                metric: figure(float(found[metric](whole)[0]), None, None, n)
                for metric in ("kernel_distance", "alignment", "group_diversity", "seed_diversity")
            }
            | {"nfe_per_image": figure(cost[name], cost[name], cost[name], n)}
            for name, found in measured.items()
        },
        worse_by={
            INDEPENDENT: worse_by(measured[JUDGED], measured[INDEPENDENT], intervals, n, 0.0)
            | {"nfe_per_image": cost_worse_by(cost[JUDGED], cost[INDEPENDENT], n)}
        },
        by_similarity=[Part(part="all", similarity=[1, 1], groups=groups, prompts=groups * SIZE, saving=0.25, arms={})],
    )
    return gates.judge(results, judged, [gate.model_dump() for gate in settings.gates])


@cache
def shipped() -> Evaluate:
    """Return section evaluate of params.yaml."""
    return load_params().evaluate


def limits() -> dict[str, Gate]:
    """Return the shipped gates that rest on an interval and whose metric can be made worse here, by metric."""
    known = {field.name for field in fields(Truth)}
    return {gate.metric: gate for gate in shipped().gates if gate.metric in known}


@app.command()
def main(
    trials: Annotated[int, typer.Option(min=20, help="Trials of each kind.")] = 1000,
    counts: Annotated[str, typer.Option("--groups", help="Numbers of groups.")] = "1,2,3,5,8,10,12,15,20,25,30,40,60",
) -> None:
    """Print how many of 100 trials pass, by number of groups, and the least number that may have an interval."""
    # What is tried here is what is forbidden elsewhere.
    bootstrap.LEAST_GROUPS = 0
    found = limits()
    limit = {metric: gate.worse_by_at_most for metric, gate in found.items()}
    kernel, aligned, diverse = (limit.get(name, 0.0) for name in ("kernel_distance", "alignment", "group_diversity"))
    at_limit = Truth(kernel, aligned, diverse)
    beyond = Truth(alignment=4 * found["alignment"].worse_by_at_most)
    table = Table("groups", title=f"passes of 100 ({trials} trials)")
    for name in (*(METRICS[metric].label for metric in found), "alignment, skewed"):
        table.add_column(f"at the limit: {name}")
    table.add_column("far beyond: all gates")
    table.add_column("equal: all gates")
    kinds = (at_limit, replace(at_limit, skewed=True), beyond, Truth())
    least: dict[str, int | None] = {"at the limit": None, "at the limit, skewed": None}
    for groups in map(int, counts.split(",")):
        at, skewed, far, equal = ([judge(groups, truth, seed) for seed in range(trials)] for truth in kinds)
        false = [_passes(at, metric) for metric in found] + [_passes(skewed, "alignment")]
        both = [float(np.mean([gates.passed(verdicts) for verdicts in kind])) for kind in (far, equal)]
        table.add_row(str(groups), *(f"{100 * share:.1f}" for share in (*false, *both)))
        for name, share in zip(least, (max(false[:-1]), false[-1]), strict=True):
            least[name] = None if share > ALLOWED else least[name] or groups
    console = Console(width=140)
    console.print(table)
    for name, number in least.items():
        console.print(f"{name}: at most {100 * ALLOWED:.0f} of 100 pass from {number} groups on")


def _passes(trials: list[list[Verdict]], metric: str) -> float:
    return float(np.mean([verdict.passed for verdicts in trials for verdict in verdicts if verdict.metric == metric]))


if __name__ == "__main__":
    exit_on_error(app)
