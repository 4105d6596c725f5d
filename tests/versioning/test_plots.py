"""What DVC shows of a project: `dvc metrics diff` the headline alone, `dvc plots show` the frontier and the losses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small
import yaml
from evaluated import results

from sage.evaluation.results import headline, parse, write_frontier
from sage.files import write_json
from sage.training.curves import points, write_curves
from sage.training.selection import Measured

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def dvc(folder, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout


def write_figures(folder, saving):
    found = parse(results() | {"saving": saving}, "it")
    write_json(folder / "metrics/headline.json", headline(found))
    write_json(folder / "metrics/evaluate.json", results() | {"saving": saving})
    write_frontier(folder / "plots/frontier.csv", found)
    history = [Measured(0, {"validation_loss": 0.75, "validation_t0_249": 0.5})]
    write_curves(folder / "plots/losses.csv", points([(10, {"loss": saving, "branch": 0.1})], history))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The shipped graph and templates, with committed figures and then other ones."""
    folder = tmp_path_factory.mktemp("project")
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    # The outputs alone: what DVC shows does not depend on commands and deps.
    kept = {
        name: {"cmd": "true", "outs": [out for out in stage["outs"] if isinstance(out, dict)]}
        for name, stage in graph["stages"].items()
    }
    kept["evaluate"]["metrics"] = graph["stages"]["evaluate"]["metrics"]
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": kept, "plots": graph["plots"]}))
    write_figures(folder, 0.25)
    small.commit_all(folder)
    shutil.copytree(ROOT / ".dvc/plots", folder / ".dvc/plots")
    write_figures(folder, 0.5)
    return folder


def test_metrics_diff_shows_the_headline_alone(project):
    shown = json.loads(dvc(project, "metrics", "diff", "--json", "--all"))
    assert list(shown) == ["metrics/headline.json"]
    assert shown["metrics/headline.json"]["saving"] == {"old": 0.25, "new": 0.5, "diff": 0.25}
    assert shown["metrics/headline.json"]["kernel_distance"]["new"] == 0.21


def test_plots_show_the_frontier_and_the_losses(project):
    shown = json.loads(dvc(project, "plots", "show", "--json"))
    assert shown.get("errors", []) == []
    drawn = {
        name.split("::")[-1]: json.loads(plots[0]["content"])
        if isinstance(plots[0]["content"], str)
        else plots[0]["content"]
        for name, plots in shown["data"].items()
    }
    assert set(drawn) == {"kernel distance", "alignment", "losses"}
    frontier = drawn["kernel distance"]
    assert "toNumber(datum['kernel_distance_low'])" in json.dumps(frontier)
    rows = {row["arm"]: row for row in frontier["data"]["values"]}
    assert rows["SAGE"]["kernel_distance"] == "0.21" and rows["Independent"]["nfe_per_image"] == "16.0"
    assert drawn["losses"]["spec"]["mark"]["type"] == "line"
    assert {(row["set"], row["term"]) for row in drawn["losses"]["data"]["values"]} == {
        ("training", "loss"),
        ("training", "branch"),
        ("held-out", "loss"),
        ("held-out", "t0_249"),
    }
