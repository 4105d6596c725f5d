"""Draw docs/results.svg, the plot of docs/results.md, from committed data: seconds, nothing is trained or sampled.

    python -m benchmarks.plot

Left, from metrics/evaluate.json: how SAGE's shared pictures differ from independent ones, beside each gate's limit.
Right, from docs/results_tables.md: the saving at equal kernel distance, by model and number of steps.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer

from flows.terminal import run
from sage.files import new_file

mpl.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "kernel_distance": "kernel distance",
    "alignment": "attributes right",
    "group_diversity": "diversity\nwithin groups",
    "nfe_per_image": "evaluations\nper image",
}
MODELS = {
    "base": ("base model", "#57606a"),
    "standard": ("standard fine-tuning", "#0969da"),
    "SAGE": ("SAGE", "#bc4c00"),
}
SHARE, STEPS = "0.34", (4, 5, 6)
# "+17.8% (+9.9% to +32.2%)"
CHANGE = re.compile(r"([+-][\d.]+)% \(([+-][\d.]+)% to ([+-][\d.]+)%\)")
STYLE = {"svg.hashsalt": "sage", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False}


def main(
    figures: Annotated[Path, typer.Option(help="The figures of stage evaluate.")] = Path("metrics/evaluate.json"),
    tables: Annotated[Path, typer.Option(help="The tables of benchmarks.arms.")] = Path("docs/results_tables.md"),
    out: Annotated[Path, typer.Option(help="The plot to write.")] = Path("docs/results.svg"),
) -> None:
    """Read both files and draw both panels."""
    gates = json.loads(figures.read_text(encoding="utf-8"))["gates"]
    saved = savings(tables.read_text(encoding="utf-8"))
    with mpl.rc_context(STYLE):
        # A white card of its own: the same on light and on dark pages.
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True, facecolor="white")
        draw_gates(left, gates)
        draw_savings(right, saved)
        with new_file(out) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        plt.close(figure)
    typer.echo(f"wrote {out}")


def savings(page: str) -> dict[tuple[str, int], tuple[float, float, float]]:
    """Return the saving in percent and its interval, by model and steps, against base and standard fine-tuning."""
    found = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name = re.fullmatch(rf"shared, (\w+), {re.escape(SHARE)}", cells[0])
        if name and int(cells[2]) in STEPS and (change := CHANGE.fullmatch(cells[5])):
            value, low, high = map(float, change.groups())
            found[name[1], int(cells[2])] = value, low, high
    return found


def draw_gates(axes: Any, gates: list[dict[str, Any]]) -> None:
    """Draw each change for the worse with its interval, and the limit that its worst case must keep to."""
    for row, gate in enumerate(gates):
        value, low, high = (100 * gate[key] for key in ("value", "low", "high"))
        axes.plot((low, high), (row, row), color="#bc4c00", linewidth=2.5, solid_capstyle="butt")
        axes.plot(value, row, "o", color="#bc4c00", markersize=7, label="SAGE, 95% interval" if row == 0 else None)
        axes.plot(
            100 * gate["limit"], row, "|", color="#1f2328", markersize=22, markeredgewidth=2,
            label="limit of the gate" if row == 0 else None,
        )  # fmt: skip
    axes.axvline(0, color="#8c959f", linewidth=1)
    axes.set_yticks(range(len(gates)), [LABELS[gate["metric"]] for gate in gates])
    axes.set_ylim(len(gates) - 0.4, -0.6)
    axes.set_xlabel("% better  ←  shared SAGE against independent  →  % worse")
    axes.xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
    cost = next(gate["value"] for gate in gates if gate["metric"] == "nfe_per_image")
    axes.set_title(f"Quality at {-cost:.0%} fewer evaluations", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper left", markerscale=0.7)


def draw_savings(axes: Any, saved: dict[tuple[str, int], tuple[float, float, float]]) -> None:
    """Draw the iso-quality saving of each model at each number of steps."""
    for place, (model, (label, colour)) in enumerate(MODELS.items()):
        x = [row + 0.22 * (place - 1) for row in range(len(STEPS))]
        value, low, high = zip(*(saved[model, steps] for steps in STEPS), strict=True)
        axes.vlines(x, low, high, color=colour, linewidth=2.5)
        axes.plot(x, value, "o", color=colour, markersize=7, label=label)
    axes.axhline(0, color="#8c959f", linewidth=1)
    axes.set_xticks(range(len(STEPS)), [f"{steps} steps" for steps in STEPS])
    axes.set_ylabel("evaluations saved, %")
    axes.set_title("Saving at equal kernel distance", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper left")


if __name__ == "__main__":
    run(main)
