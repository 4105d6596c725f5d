import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import single_files
import tiny
import torch
import yaml
from PIL import Image
from waiting import wait_for

from flows.prompts import generate as prompts
from flows.prompts import shards
from flows.prompts.files import read_prompts
from sage.errors import ConfigurationError, DataError, DivergedError
from sage.files import sha256, sha256_tree, write_json
from sage.grouping.cost import FILE, Damage, Point, kept_form
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.seeds import image_seeds

pytestmark = pytest.mark.slow

TEXTS = ["red cat", "tall tree", "red dog", "tall trees", "red cat", "blue house", "a big red cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline("stable_diffusion", folder).save_pretrained(folder / "model")
    return str(folder / "model")


def write(folder, lines=TEXTS, name="prompts.txt"):
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def generate(model, tmp_path, monkeypatch):
    monkeypatch.setenv("SAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAGE_DEVICE", "cpu")

    def call(source, out=tmp_path / "out", **more):
        options = {"steps": 4, "share_ratio": 0.5, "guidance_scale": 3.0, "batch_size": 1, "seed": 0, "plan": False}
        prompts.main(source, out, **{"model": model, "negative_prompt": "", **options, **more})
        return out

    return call


def lines_of(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def test_rows_of_different_share_keys_are_kept_apart(model, generate, tmp_path):
    rows = [{"prompt": text, "share_key": key} for text, key in zip(TEXTS, "abaabab", strict=True)]
    items = read_prompts(write(tmp_path, map(json.dumps, rows), "p.jsonl"))
    job = prompts.prepare(items, model, {}, "", 0)
    shared = [{rows[member]["share_key"] for member in members} for members in job.groups if len(members) > 1]
    assert shared == [{"a"}, {"b"}]


def test_each_prompt_becomes_one_picture_that_says_how_it_was_made(generate, tmp_path, model):
    lines = lines_of(generate(write(tmp_path)))
    assert [line["prompt"] for line in lines] == TEXTS
    assert [line["file"] for line in lines] == [f"{i:06d}.png" for i in range(1, 8)]
    assert [line["seed"] for line in lines] == image_seeds(0, TEXTS)
    out = tmp_path / "out"
    for line in lines:
        assert sha256(out / line["file"]) == line["sha256"]
        with Image.open(out / line["file"]) as image:
            inside = json.loads(image.text["sage"])
        assert inside == {name: value for name, value in line.items() if name not in ("file", "sha256")}
        assert inside["plan"] == {"steps": 4, "share_ratio": 0.5 if inside["shared_with"] else 0.0}
        assert inside["model"] == sha256_tree(Path(model))
    by_id = {line["id"]: line for line in lines}
    assert by_id["000002"]["shared_with"] == ["000004"]
    assert all(by_id[other]["group"] == line["group"] for line in lines for other in line["shared_with"])
    with Image.open(out / "contact.jpg") as sheet:
        assert sheet.width == 7 * prompts.TILE


def test_the_pictures_are_the_pipelines(generate, tmp_path, model):
    out = generate(write(tmp_path))
    pipe = SharedSamplingPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    alone = pipe("blue house", seed=[image_seeds(0, ["blue house"])[0]], num_inference_steps=4, guidance_scale=3.0)
    assert np.abs(np.asarray(alone.images[0], int) - np.asarray(Image.open(out / "000006.png"), int)).max() <= 1


def test_the_cost_is_shown_first_and_with_plan_nothing_else_happens(generate, tmp_path, capsys):
    out = generate(write(tmp_path), plan=True)
    shown = capsys.readouterr().out
    assert "7 prompts in" in shown
    assert "network evaluations instead of 56" in shown
    assert not out.exists()


def test_a_repeated_prompt_shares_its_first_steps_if_asked(generate, tmp_path, capsys):
    texts = ["a red house", "a blue house", "a red house", "a red house"]
    call = {"branch_noise": 1.0, "image_steps": 1}
    out = generate(write(tmp_path, texts), **call)
    # Guidance 2: a group's first step, its second one for each copy, and two steps of four images; or no group.
    assert any(f" {2 * nfe} network evaluations instead of 32" in capsys.readouterr().out for nfe in (1 + 3 + 8,))
    lines = lines_of(out)
    assert [line["seed"] for line in lines] == image_seeds(0, texts)
    assert lines[0]["shared_with"] == ["000002", "000003", "000004"]
    assert lines[0]["plan"] == {"steps": 4, "share_ratio": 0.5, "image_steps": 1}
    assert len({line["sha256"] for line in lines}) == 4
    whole = sha256_tree(out)
    (out / "000003.png").unlink()
    generate(write(tmp_path, texts), **call)
    assert sha256_tree(out) == whole
    with pytest.raises(ConfigurationError, match=r"image_steps 1 \(now 0\)"):
        generate(write(tmp_path, texts), **call | {"image_steps": 0})


def test_groups_by_first_prediction_cost_what_the_first_line_says(generate, model, tmp_path, monkeypatch, capsys):
    zero = tmp_path / "zero"
    shutil.copytree(model, zero)
    config = zero / "scheduler/scheduler_config.json"
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    opened, rows = prompts.open_model, []

    def by_prediction(model):
        pipe, name, settings, group, _ = opened(model)
        pipe.unet.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
        return pipe, name, settings, group.model_copy(update={"by": "prediction", "threshold": 0.0}), None

    monkeypatch.setattr(prompts, "open_model", by_prediction)
    out = generate(write(tmp_path), model=str(zero), branch_noise=1.0)
    said = re.search(r"(\d+) network evaluations instead of 56, 12 of them first predictions", capsys.readouterr().out)
    assert said and int(said[1]) == sum(rows)
    lines = lines_of(out)
    assert any(line["shared_with"] for line in lines)
    whole = sha256_tree(out)
    (out / f"{lines[0]['file']}").unlink()
    generate(write(tmp_path), model=str(zero), branch_noise=1.0)
    assert sha256_tree(out) == whole
    rows.clear()
    generate(write(tmp_path), tmp_path / "alone", model=str(zero), share_ratio=0.0)
    assert sum(rows) == 56
    with pytest.raises(ConfigurationError, match=r"set group\.by to distilled or text"):
        shards.plan(write(tmp_path), str(tmp_path / "shards"), str(zero))


def test_what_is_missing_is_made_again_to_the_same_bytes(generate, tmp_path):
    source = write(tmp_path)
    out = generate(source)
    whole = sha256_tree(out)
    # One picture of a group, and one alone.
    for name in ("000004.png", "000006.png", "manifest.jsonl", "contact.jpg"):
        (out / name).unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    generate(source)
    assert sha256_tree(out) == whole
    assert all((out / name).stat().st_mtime_ns == when for name, when in kept.items())


@pytest.mark.slow
def test_killed_at_random_and_started_again_it_ends_as_if_never_killed(generate, tmp_path, model):
    source = write(tmp_path, [f"{a} {b}" for a in ("red", "blue", "big") for b in ("cat", "dog", "tree", "house")])
    whole = sha256_tree(generate(source, tmp_path / "whole"))
    command = [
        sys.executable,
        "-m",
        "flows.prompts.generate",
        source,
        "--out",
        str(tmp_path / "killed"),
        "--model",
        model,
    ]
    command += ["--steps", "4", "--share-ratio", "0.5", "--guidance-scale", "3", "--batch-size", "1"]
    kills = 0
    for wanted in (1, 7, 11):
        process = subprocess.Popen(command, env=os.environ | {"SAGE_DEVICE": "cpu"}, start_new_session=True)

        def enough(process=process, wanted=wanted):
            return process.poll() is not None or len(list((tmp_path / "killed").glob("0*.png"))) >= wanted

        wait_for(enough, every=0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    subprocess.run(command, env=os.environ | {"SAGE_DEVICE": "cpu"}, check=True)
    assert sha256_tree(tmp_path / "killed") == whole


def test_a_bad_prompt_costs_no_other_prompt(generate, tmp_path, capsys):
    rows = [{"prompt": text} for text in TEXTS] + [{"prompt": "\ud800"}, {"prompt": "  "}, {"prompt": None}, {}]
    source = write(tmp_path, [*map(json.dumps, rows), "{broken", '"a cat"'], "prompts.jsonl")
    lines = lines_of(generate(source))
    assert [line.get("error", "").split(":")[0] for line in lines] == [
        *[""] * 7,
        "bad_text",
        "no_caption",
        "no_caption",
        "no_caption",
        "bad_row",
        "",
    ]
    assert lines[-1]["prompt"] == "a cat"
    assert len(list((tmp_path / "out").glob("0*.png"))) == 8
    assert "not drawn: 000008: bad_text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "lines", "says"),
    [
        ("p.txt", [""], "has no prompt that can be drawn"),
        ("p.jsonl", ['{"prompt": ""}'], "has no prompt that can be drawn: no_caption"),
    ],
)
def test_a_list_that_cannot_be_read_says_why(generate, tmp_path, name, lines, says):
    with pytest.raises(DataError, match=says):
        generate(write(tmp_path, lines, name))
    assert not (tmp_path / "out").exists()


def test_a_bound_on_damage_is_kept_by_what_was_measured_on_the_model_that_draws(model, generate, tmp_path, monkeypatch):
    source = write(tmp_path, ["red cat", "a red cat", "blue house"])
    values = yaml.safe_load(Path("params.yaml").read_text())
    del values["group"]["threshold"]
    values["group"]["max_damage"] = 0.2
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(model, tmp_path / "models/base")
    monkeypatch.chdir(tmp_path)

    def measure(folder, high):
        points = [Point(0.0, 0.0, 0.0, high, 9, 20), Point(1.0, 0.0, 0.0, high, 9, 20)]
        write_json(folder / FILE, kept_form(Damage(0.5, 6, points), folder, {}))

    measure(Path("models/base"), 0.0)
    with pytest.raises(ConfigurationError, match=r"model/damage.json does not exist, so the damage of sharing is unkn"):
        prompts.prepare(read_prompts(source), "model", {}, "", 0)
    measure(Path("model"), 0.5)
    with pytest.raises(ConfigurationError, match=r"least measured is 0\.5"):
        prompts.prepare(read_prompts(source), "model", {}, "", 0)
    assert len(prompts.prepare(read_prompts(source), "models/base", {}, "", 0).groups) < 3


def test_a_model_that_is_not_the_one_that_the_graph_made_is_not_drawn_with(generate, model, tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text(Path("params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(model)
    Path("dvc.lock").write_text("stages:\n  finetune:\n    outs:\n    - {path: model, md5: aaaa.dir}\n")
    with pytest.raises(DataError, match=r"model has MD5 .*, not aaaa"):
        generate(write(tmp_path), model="model")
    assert not Path("out").exists()


def test_a_model_in_one_file_is_named_by_the_hash_of_its_weights(generate, tmp_path):
    made = tiny.pipeline("stable_diffusion", tmp_path)
    file = single_files.configuration(made, tmp_path / "single") / "model.safetensors"
    single_files.write(made, file)
    source = write(tmp_path, ["red cat"])
    (line,) = lines_of(generate(source, model=str(file)))
    assert line["model"] == sha256(file)
    made.unet.conv_out.bias.data += 1
    single_files.write(made, file)
    with pytest.raises(ConfigurationError, match="holds images of another run, with model"):
        generate(source, model=str(file))


def test_prompts_that_the_encoder_does_not_read_are_told(generate, tmp_path, capsys):
    generate(write(tmp_path, ["\u043a\u043e\u0442", "\u043f\u0435\u0441", "red cat"]), plan=True)
    assert "2 prompts are in a script other than Latin" in capsys.readouterr().err


def test_a_project_that_cannot_be_written_draws_elsewhere(generate, tmp_path, monkeypatch, caplog):
    project = tmp_path / "project"
    project.mkdir()
    (project / "params.yaml").write_text(Path("params.yaml").read_text())
    (project / "work").write_text("a file, where the cache would be")  # root may write anywhere else
    monkeypatch.chdir(project)
    monkeypatch.delenv("SAGE_CACHE")
    assert len(list(generate(write(tmp_path)).glob("0*.png"))) == len(TEXTS)
    assert "embeddings are not cached" in caplog.text
    assert sorted(path.name for path in project.iterdir()) == ["params.yaml", "work"]


def test_prompts_of_a_template_share_and_those_of_different_templates_do_not(generate, tmp_path, capsys):
    source = write(tmp_path, ["a {red|blue} cat", "tall tree", "a {red|blue} cat on a __thing__", "(a cat:1.3)"])
    (tmp_path / "thing.txt").write_text("mat\nred (mat:1.2)\n")
    out = generate(source, expand="all", wildcards=tmp_path)
    lines = lines_of(out)
    assert [line["id"] for line in lines] == [
        *("000001-1", "000001-2", "000002", "000003-1", "000003-2", "000003-3", "000003-4", "000004"),
    ]
    assert [line.get("error", "")[:7] for line in lines] == ["", "", "", "", "markup:", "", "markup:", "markup:"]
    shared = [(line["id"], line["shared_with"]) for line in lines if line.get("shared_with")]
    assert shared == [
        ("000001-1", ["000001-2"]),
        ("000001-2", ["000001-1"]),
        ("000003-1", ["000003-3"]),
        ("000003-3", ["000003-1"]),
    ]
    # Four steps under guidance; two groups of two share two of the steps.
    assert "5 prompts in 3 groups; 32 network evaluations instead of 40, 20.0% saved" in capsys.readouterr().out


def test_a_missing_file_says_so(generate, tmp_path):
    with pytest.raises(DataError, match=r"is no file; give a file of prompts"):
        generate(str(tmp_path / "none.txt"))


def test_another_runs_folder_is_not_mixed_with_this_one(generate, tmp_path):
    source = write(tmp_path)
    generate(source)
    with pytest.raises(ConfigurationError, match=r"another run, with seed 0 \(now 1\); choose another folder"):
        generate(source, seed=1)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    with pytest.raises(ConfigurationError, match="is not empty and holds no run"):
        generate(source, full)
    assert (full / "mine").read_text() == "x"


def test_images_of_one_colour_are_counted_and_marked(generate, tmp_path, model, capsys):
    pipe = SharedSamplingPipeline.from_pretrained(model)
    torch.nn.init.zeros_(pipe.vae.decoder.conv_out.weight)
    pipe.save_pretrained(tmp_path / "flat")
    lines = lines_of(generate(write(tmp_path), model=str(tmp_path / "flat")))
    assert all(line["blank"] is True for line in lines)
    assert "blank: 7 images are a single colour, first 000001, 000002, 000003" in capsys.readouterr().err
    lines = lines_of(generate(write(tmp_path), tmp_path / "good"))
    assert not any("blank" in line for line in lines)
    assert "blank" not in capsys.readouterr().err


def poisoned(model, folder):
    """Save a model whose text encoder overflows at the letter q."""
    pipe = SharedSamplingPipeline.from_pretrained(model)
    tiny.overflow_at("q", pipe)
    pipe.save_pretrained(folder)
    return str(folder)


def test_an_image_that_is_not_finite_is_the_error_of_its_prompt_and_the_others_are_drawn(
    generate, tmp_path, model, capsys
):
    texts = [*TEXTS, "q", "q"]
    good = lines_of(generate(write(tmp_path), tmp_path / "good"))
    capsys.readouterr()
    bad = poisoned(model, tmp_path / "bad")
    lines = lines_of(generate(write(tmp_path, texts), model=bad))
    assert [line.get("prompt") for line in lines] == [*TEXTS, None, None]
    assert not any("blank" in line for line in lines)
    for line in lines[7:]:
        assert line["error"].startswith("not_finite: the latents from step 0 of 4 on; check the weights of UNet2DCond")
    for line in good:
        assert np.array_equal(*(np.asarray(Image.open(tmp_path / n / line["file"])) for n in ("out", "good")))
    shown = capsys.readouterr()
    assert "not drawn: 000008: not_finite: the latents" in shown.err
    assert f"7 images in {tmp_path / 'out'}; 2 prompts were not drawn" in shown.out
    whole = sha256_tree(tmp_path / "out")
    (tmp_path / "out/000008.error").unlink()
    (tmp_path / "out/manifest.jsonl").unlink()
    assert sha256_tree(generate(write(tmp_path, texts), model=bad)) == whole


def test_a_run_without_a_finite_image_ends_with_the_reasons_in_the_manifest(generate, tmp_path, model):
    with pytest.raises(
        DivergedError, match=r"no image is finite; .*manifest.jsonl has the reason for each of 2 prompts"
    ):
        generate(write(tmp_path, ["q", "quiet q"]), model=poisoned(model, tmp_path / "bad"))
    assert [line["id"] for line in lines_of(tmp_path / "out") if "not_finite" in line["error"]] == ["000001", "000002"]


def test_no_name_of_a_prompt_meets_a_name_of_ours(generate, tmp_path):
    rows = [
        {"id": name, "prompt": "red cat"}
        for name in ("contact", "contact.jpg", "run.json", "manifest.jsonl", "a.error")
    ]
    source = write(tmp_path, map(json.dumps, rows), "prompts.jsonl")
    whole = sha256_tree(generate(source))
    for line in lines_of(tmp_path / "out"):
        assert sha256(tmp_path / "out" / line["file"]) == line["sha256"]
    assert sha256_tree(generate(source)) == whole
