import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tracked import client, database, project, small_model, write_results  # noqa: F401

from flows.report import comparison
from flows.report import page as report
from flows.tracking import recorded, runs
from sage.errors import SageError
from sage.files import write_json

pytestmark = pytest.mark.slow

HOSTILE = "<script>alert('x')</script> & \"quotes\""
COLUMNS = ["real", "independent", "shared", "sage"]


def samples(colour: str, texts: list[str], seed: int = 0) -> dict[str, object]:
    """Pictures as the evaluation keeps them: one group, a column an arm."""
    images = [Image.new("RGB", (8, 8), colour) for _ in COLUMNS]
    row = report.GroupRow(0.9, 0.1, 0.0, COLUMNS, [(text, images) for text in texts])
    return report.samples([row], seed)


def run(monkeypatch, kept: dict[str, object] | None, threshold: float, **changes) -> str:
    """Record a pipeline as its stages do; return the id of its run."""
    with runs.pipeline_run() as pipeline, monkeypatch.context() as patch:
        for name, value in pipeline.environment.items():
            patch.setenv(name, value)
        with runs.stage_run("evaluate", {}) as evaluate:
            if kept is not None:
                write_json(Path("report/samples.json"), kept)
                evaluate.artifact(Path("report"), "report")
        metrics = write_results(small_model(Path("m")), **changes)
        params = {"group": {"threshold": threshold, "max_size": 6}, "note": HOSTILE if threshold > 0.8 else "plain"}
        Path("dvc.lock").write_text(yaml.safe_dump({"stages": {"group": {"params": {"params.yaml": params}}}}))
        evaluate.result(metrics / "evaluate.json")
        pipeline.finish("FINISHED", metrics)
    tracker = client()
    (parent,) = tracker.search_runs(
        [tracker.get_experiment_by_name("sage").experiment_id], f"tags.`sage.pipeline` = '{pipeline._id}'"
    )
    return parent.info.run_id


def test_two_runs_stand_side_by_side(project, monkeypatch):
    first = run(monkeypatch, samples("red", ["red cat", HOSTILE]), 0.7)
    second = run(monkeypatch, samples("blue", [HOSTILE, "tall tree", "red cat"]), 0.9, alignment=0.7)
    sides = [recorded.recorded(name) for name in (first, second)]
    page = comparison.build(*sides)
    rows = re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td><td>([^<]*)</td></tr>", page)
    assert ("group.threshold", "0.7", "0.9") in rows
    assert not [row for row in rows if row[0] == "group.max_size"]
    # Alignment 0.5 and 0.7, each with 0.05 to either side, lie apart; the other figures are equal.
    assert page.count('<tr class="apart judged">') == 1
    assert page.count('<tr class="equal judged">') == 4
    # Two prompts that both drew, each with the real picture and two arms a run.
    red, blue = (side.samples["groups"][0][0]["images"][3] for side in sides)
    assert page.count("<figure><img") == 2 * 5
    assert page.count(red) == 2 * 3
    assert page.count(blue) == 2 * 2
    assert "tall tree" not in page
    # Nothing of a prompt or a parameter is markup, nothing comes from outside.
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", page)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (None, "keeps no pictures"),
        (samples("red", ["red cat"], seed=1), "seed 0 and seed 1"),
        (samples("red", ["tall tree"]), "share no prompt"),
    ],
)
def test_pictures_that_cannot_be_compared_are_not_shown(project, monkeypatch, kept, reason):
    first = run(monkeypatch, samples("red", ["red cat"]), 0.7)
    second = run(monkeypatch, kept, 0.7, held_out="b" * 64)
    page = comparison.build(*map(recorded.recorded, (first, second)))
    assert reason in page
    assert "<figure>" not in page
    assert "judged on different held-out sets" in page


def test_a_run_without_results_is_named(project):
    with runs.stage_run("group", {}) as stage:
        pass
    with pytest.raises(SageError, match=f"run {stage.id} has no results"):
        recorded.recorded(stage.id)
    with pytest.raises(SageError, match="there is no run abc"):
        recorded.recorded("abc")


def test_the_evaluation_keeps_what_the_comparison_reads():
    kept = samples("red", ["red cat"])
    assert json.loads(json.dumps(kept)) == kept
    assert kept["columns"] == COLUMNS
    assert kept["groups"][0][0]["text"] == "red cat"
    assert all(image.startswith("data:image/webp;base64,") for image in kept["groups"][0][0]["images"])
