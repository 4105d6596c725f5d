"""The stage on a small real set: real pictures, the real extractor, arms made by blurring."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_judges
import yaml
from PIL import Image, ImageFilter
from prepared_files import NOWHERE, write_split

from flows.stages import evaluate
from sage.data.accounting import write_accounting
from sage.data.dataset import Example, read_split
from sage.data.figures import figures
from sage.data.shards import rgb
from sage.errors import DataError, MetricError
from sage.evaluation import gates
from sage.evaluation.bootstrap import LEAST_GROUPS
from sage.evaluation.manifest import write_unread
from sage.evaluation.results import read
from sage.evaluation.samples import read_judged, siblings
from sage.training.curves import points, write_curves
from sage.training.selection import Measured

SEEDS = [0, 1]
GROUPS = [["p0", "p1", "p2"], ["p3", "p4"], ["p5", "p6"], ["p7"]]
ARMS = {"independent": 0.3, "independent_same_nfe": 2.5, "shared": 1.0, "sage": 0.5}
NFE = {"independent": 16.0, "independent_same_nfe": 12.0, "shared": 12.0, "sage": 12.0}


def build(folder):
    """A project folder with everything that the stage reads."""
    found = list(figures(["moods", "planets"], "train", 20, 0, 0.1))
    for split, names, rows in (("test", "p", found[:8]), ("train", "t", found[8:])):
        lines = []
        for number, drawn in enumerate(rows):
            named = {"text": drawn.texts[0], "id": f"{names}{number}", "family": f"family {number % 4}"}
            lines.append(named | {"image": drawn.figure.image(24)})
        write_split(folder / "prepared" / split, lines)
    reals = {example.id: rgb(example.image) for example in read_split(folder / "prepared", "test")}
    (folder / "groups").mkdir()
    groups = [{"ids": ids, "similarity": 0.75 + 0.05 * k} for k, ids in enumerate(GROUPS)]
    (folder / "groups" / "test.json").write_text(json.dumps({"groups": groups}))
    manifest = []
    for arm, blur in ARMS.items():
        for seed in SEEDS:
            (folder / "generated" / arm / f"seed-{seed}").mkdir(parents=True)
            for group, ids in enumerate(GROUPS):
                for name in ids:
                    path = folder / "generated" / arm / f"seed-{seed}" / f"{name}.png"
                    reals[name].filter(ImageFilter.GaussianBlur(blur * (1 + seed / 2))).save(path)
                    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
                    line = {"arm": arm, "seed": seed, "id": name, "group": group, "sha256": sha256}
                    manifest.append(line)
    write_manifest(folder, manifest)
    kept = [{"id": id, "file": f"{id}.png", "status": "kept", "split": "test"} for id in reals]
    rejected = {"id": "bad", "file": "<b>.png", "status": "rejected", "reason": "decode_error", "detail": "no image"}
    write_accounting(folder / "prepared", [*kept, rejected])
    write_curves(folder / "losses.csv", points([(10, {"loss": 0.5})], [Measured(0, {"validation_loss": 0.75})]))
    costs = {arm: {"images": 16, "nfe_per_image": nfe} for arm, nfe in NFE.items()}
    (folder / "generate.json").write_text(json.dumps({"arms": costs}))
    tiny_judges.clip(folder / "judges/clip")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["generate"] |= {"split": "test", "seeds": SEEDS}
    params["evaluate"] |= {"resamples": 200, "alignment": "judges/clip", "references": None}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def write_manifest(folder, lines):
    (folder / "generated" / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_manifest(folder):
    return [json.loads(line) for line in (folder / "generated" / "manifest.jsonl").read_text().splitlines()]


def run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SAGE_TRACKING_URI", "off")
    evaluate.main(
        data=Path("prepared"),
        groups=Path("groups"),
        generated=Path("generated"),
        costs=Path("generate.json"),
        report=Path("report"),
        metrics=Path("metrics/evaluate.json"),
        losses=Path("losses.csv"),
        headline=Path("metrics/headline.json"),
        frontier=Path("plots/frontier.csv"),
    )


@pytest.fixture
def project(tmp_path):
    return build(tmp_path)


@pytest.mark.slow
def test_the_stage_writes_figures_verdicts_and_the_page(project, monkeypatch):
    run(project, monkeypatch)
    found = json.loads((project / "metrics" / "evaluate.json").read_text())
    assert list(found["arms"]) == list(ARMS)
    for measured in found["arms"].values():
        assert all(np.isfinite(figure["value"]) for figure in measured.values())
        assert measured["kernel_distance"]["n"] == 16
        assert measured["kernel_distance"]["low"] is None  # four groups are too few for an interval
    order = sorted(ARMS, key=lambda arm: found["arms"][arm]["kernel_distance"]["value"])
    assert order == sorted(ARMS, key=ARMS.get)
    assert found["features"] == "efficientnet_lite0"
    assert found["saving"] == 0.25
    assert {"n_real", "n_prompts", "seeds", "digest", "generated"} == set(found["set"])
    assert len(found["gates"]) == 5 and found["passed"] == all(gate["passed"] for gate in found["gates"])
    assert found["gates"][4]["passed"] and found["gates"][4]["value"] == -0.25
    assert f"only 4 groups; an interval needs at least {LEAST_GROUPS}." in found["gates"][0]["reason"]
    assert "only 3 groups of two or more prompts; an interval" in found["gates"][2]["reason"]
    page = (project / "report" / "index.html").read_text()
    assert all(gate["reason"] in page for gate in found["gates"])
    assert "9 input rows: 8 kept, 0 duplicates" in page and "&lt;b&gt;.png: no image" in page
    assert "Training loss" in page and "Held-out loss" in page
    headline = json.loads((project / "metrics/headline.json").read_text())
    assert headline["alignment"] == found["arms"]["sage"]["alignment"]["value"]
    assert headline["gates_passed"] + headline["gates_failed"] == 5
    assert len((project / "plots/frontier.csv").read_text().splitlines()) == 1 + len(ARMS)
    # What was written can be judged again, by whoever registers the model, and only against the set it belongs to.
    expected = read_judged(Path("prepared"), Path("groups"), Path("generated"), "test", SEEDS).set
    settings = [gate.model_dump() for gate in evaluate.load_params().evaluate.gates]
    written = read(project / "metrics" / "evaluate.json")
    again = gates.judge(written, expected, settings)
    assert again == written.gates
    assert not gates.passed(gates.judge(written, expected.model_copy(update={"generated": "other"}), settings))
    # The same input gives the same bytes.
    before = (project / "metrics" / "evaluate.json").read_bytes(), page
    run(project, monkeypatch)
    assert before == ((project / "metrics" / "evaluate.json").read_bytes(), (project / "report/index.html").read_text())


def missing(folder):
    write_manifest(folder, read_manifest(folder)[:-1])


def double(folder):
    lines = read_manifest(folder)
    write_manifest(folder, [*lines, lines[0]])


def foreign(folder):
    lines = read_manifest(folder)
    lines[0]["id"] = "p99"
    write_manifest(folder, lines)


def altered(folder):
    Image.new("RGB", (24, 24)).save(folder / "generated" / "sage" / "seed-1" / "p3.png")


def blank(folder):
    altered(folder)
    lines = read_manifest(folder)
    path = folder / "generated" / "sage" / "seed-1" / "p3.png"
    for line in lines:
        if (line["arm"], line["seed"], line["id"]) == ("sage", 1, "p3"):
            line["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_manifest(folder, lines)


def removed(folder):
    (folder / "generated" / "sage" / "seed-1" / "p3.png").unlink()


def unlisted(folder):
    Image.new("RGB", (24, 24)).save(folder / "generated" / "sage" / "seed-1" / "p9.png")


def regrouped(folder):
    groups = [{"ids": ids, "similarity": 1.0} for ids in [["p0", "p1"], ["p2", "p3", "p4"], *GROUPS[2:]]]
    (folder / "groups" / "test.json").write_text(json.dumps({"groups": groups}))


def partial(folder):
    groups = [{"ids": ids, "similarity": 1.0} for ids in [["p0", "p1"], *GROUPS[1:]]]
    (folder / "groups" / "test.json").write_text(json.dumps({"groups": groups}))


def miscounted(folder):
    costs = json.loads((folder / "generate.json").read_text())
    costs["arms"]["sage"]["images"] = 8
    (folder / "generate.json").write_text(json.dumps(costs))


def uncounted(folder):
    costs = json.loads((folder / "generate.json").read_text())
    del costs["arms"]["shared"]
    (folder / "generate.json").write_text(json.dumps(costs))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (missing, r"names 63 pictures, expected 8 prompts x 2 seeds .* 1 missing \(\('sage', 1, 'p7'\)\)"),
        (double, r"1 foreign or double \(\('independent', 0, 'p0'\)\)"),
        (foreign, r"1 foreign or double \(\('independent', 0, 'p99'\)\)"),
        (altered, r"1 missing or altered \(sage/seed-1/p3\)"),
        (removed, r"1 missing or altered \(sage/seed-1/p3\)"),
        (unlisted, r"1 not listed \(sage/seed-1/p9.png\)"),
        (regrouped, "other groups than the ones at hand"),
        (partial, r"no partition of the split's 8 prompts: 1 missing \(p2\)"),
        (miscounted, "arm sage counts 8 images .* expected 16"),
        (uncounted, "counts arms independent, independent_same_nfe, sage, but there are pictures of"),
    ],
)
def test_wrong_pictures_stop_the_stage_with_no_report_and_no_figures(project, monkeypatch, fault, words):
    fault(project)
    with pytest.raises((MetricError, DataError), match=words):
        run(project, monkeypatch)
    assert not (project / "report").exists()
    assert not (project / "metrics").exists()


def test_blank_images_are_counted_and_the_report_says_so_and_no_gate_passes(project, monkeypatch):
    blank(project)
    write_unread(project / "generated", {"p3": 9})
    run(project, monkeypatch)
    found = read(project / "metrics/evaluate.json")
    assert found.blank == {"sage": 1}
    assert not any(gate.passed for gate in found.gates) and not found.passed
    assert json.loads((project / "metrics/headline.json").read_text())["blank_images"] == 1
    page = (project / "report/index.html").read_text()
    assert "1 of 16 images of SAGE are of a single colour" in page
    assert "does not read 1 of 8 prompts to their end" in page


def test_a_fault_is_one_message_and_exit_code_2(project, monkeypatch, capsys):
    missing(project)
    monkeypatch.chdir(project)
    options = ["--data", "prepared", "--groups", "groups", "--generated", "generated", "--costs", "generate.json"]
    options += ["--report", "report", "--metrics", "metrics/evaluate.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *options])
    with pytest.raises(SystemExit) as stopped:
        evaluate.run(evaluate.main)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error


def example(name, family):
    return Example(name, NOWHERE, name, family)


def test_training_images_of_other_shapes_are_judged_at_the_drawn_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 3), dtype=np.uint8)
    write_split(tmp_path / "train", [{"id": "t", "text": "t", "image": Image.fromarray(pixels), "bucket": (8, 32)}])
    square = [{"id": f"{n}", "text": "t", "image": Image.fromarray(pixels[:, n : n + 8])} for n in range(2)]
    write_split(tmp_path / "test", square)
    held_out, seen = read_split(tmp_path, "test"), []

    def extract(images, on_batch):
        found = list(images)
        seen.append(found)
        return np.zeros((len(found), 3), np.float32)

    judged = SimpleNamespace(examples=held_out, seeds=[0], arms={})
    real_ones, training = [[one.image] for one in held_out], read_split(tmp_path, "train")
    evaluate.measure(
        judged, real_ones, training, extract, lambda *_: SimpleNamespace(values=np.zeros((2, 1)), parts=None)
    )
    real, others = seen
    assert [image.shape for image in real] == [(8, 8, 3)] * 2 and len(others) == 1
    assert np.array_equal(others[0], pixels[:, 12:20])  # the middle


def test_siblings_are_of_the_same_family_while_there_are_some_and_each_is_taken_once():
    held_out = [example("a", "x"), example("b", "x"), example("c", "y")]
    training = [example("1", "y"), example("2", "z"), example("3", "x")]
    assert [found.id for found in siblings(held_out, training)] == ["3", "2", "1"]
    assert [found.id for found in siblings(held_out, training[:1])] == ["1"]
    assert siblings(held_out, []) == []
