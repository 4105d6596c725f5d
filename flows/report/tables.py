"""The results as tables of text, for the terminal, Prefect and MLflow."""

from collections.abc import Mapping, Sequence

from sage.evaluation import arms as arm_table
from sage.evaluation import registry
from sage.evaluation.arms import JUDGED
from sage.evaluation.results import Figure, Results

TableRow = dict[str, str]


def arms(results: Results) -> list[TableRow]:
    """Return a row for each metric, with value and interval of each arm in its own column."""
    metrics = dict.fromkeys(metric for figures in results.arms.values() for metric in figures)
    return [
        {"metric": registry.label(metric, results.features, results.alignment)}
        | {arm_table.label(arm): _figure(figures[metric]) for arm, figures in results.arms.items() if metric in figures}
        for metric in metrics
    ]


def gates(results: Results) -> list[TableRow]:
    """Return a row for each gate: metric, reference arm, verdict and reason."""
    return [
        {
            "gate": registry.label(gate.metric, results.features, results.alignment),
            "against": arm_table.label(gate.reference),
            "verdict": "passed" if gate.passed else "FAILED",
            "reason": gate.reason,
        }
        for gate in results.gates
    ]


def versions(judged: Mapping[str, Results]) -> list[TableRow]:
    """Return a row for each metric of versions that were judged on one held-out set, and one for their gates."""
    first = next(iter(judged.values()))
    rows = [
        {"metric": registry.label(metric, first.features, first.alignment)}
        | {name: _figure(found.arms[JUDGED][metric]) for name, found in judged.items()}
        for metric in first.arms[JUDGED]
    ]
    return [*rows, {"metric": "Gates"} | {name: _verdicts(found) for name, found in judged.items()}]


def columns(rows: Sequence[TableRow]) -> list[str]:
    """Return the names of the columns in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _verdicts(results: Results) -> str:
    by = results.features, results.alignment
    failed = sorted({registry.label(gate.metric, *by) for gate in results.gates if not gate.passed})
    return f"FAILED: {', '.join(failed)}" if failed else "passed"


def _figure(figure: Figure) -> str:
    value, low, high = figure.value, figure.low, figure.high
    if value is None:
        return "-"
    return f"{value:.3g}" if low is None or high is None or low == high else f"{value:.3g} [{low:.3g}, {high:.3g}]"
