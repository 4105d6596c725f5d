import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_judges
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from faults import in_child
from PIL import Image
from prepared_files import write_split
from safetensors.torch import load_file

from flows.stages import finetune
from flows.terminal import exit_on_error
from flows.tracking.runs import run_of
from sage.data import dataset
from sage.data.tags import tag_orders
from sage.errors import DataError, DivergedError
from sage.files import sha256, sha256_tree, write_json
from sage.sampling import adapters, base
from sage.training import kohya
from sage.training.curves import HELD_OUT, TRAINING, read_curves

pytestmark = pytest.mark.slow

TEXTS = ["red cat", "red dog", "blue cat", "tall tree", "big tree", "snow"]
GROUPS = [["p0", "p1", "p2"], ["p3", "p4"], ["p5"]]
SETTINGS = {"steps": 6, "warmup": 1, "decay": 2, "batch_size": 9, "learning_rate": 1.0e-3, "ema": 0.5}
SETTINGS["checkpoint_every"] = 2
SETTINGS["weights"] = {"diffusion": 1.0, "shared": 1.0, "branch": 1.0, "consistency": 0.1}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with prepared dataset, groups and a tiny base."""
    folder = tmp_path_factory.mktemp("project")
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        images = [Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in TEXTS]
        rows = ({"id": f"p{i}", "text": TEXTS[i], "image": image} for i, image in enumerate(images))
        write_split(folder / "data/prepared" / split, rows)
        write_groups(folder / "data/groups", split, GROUPS)
    dataset.write_sums(folder / "data/prepared")
    torch.manual_seed(0)
    base.save(base.assemble(tiny.autoencoder(), tiny.unet(cross_attention_dim=384)), folder / "base")
    return folder


def write_groups(folder, split, groups):
    write_json(folder / f"{split}.json", {"groups": [{"ids": ids, "similarity": 0.8} for ids in groups]})


@pytest.fixture
def tune(project, tmp_path, monkeypatch):
    """Run the stage in a folder of its own, with changes to its parameters; return its figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    monkeypatch.setenv("SAGE_CACHE", str(tmp_path / "cache"))
    # dvc.yaml does not name it: an import of it would fail here.
    monkeypatch.setitem(sys.modules, "sage.grouping.auto", None)
    shipped = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())

    def run(
        groups=project / "data/groups", base_folder=project / "base", prepared=project / "data/prepared", **changes
    ):
        (tmp_path / "params.yaml").write_text(
            yaml.safe_dump(
                shipped
                | {
                    "finetune": shipped["finetune"] | SETTINGS | changes,
                    "generate": shipped["generate"] | {"split": "validation"},
                    "evaluate": shipped["evaluate"] | tiny_judges.own(),
                }
            )
        )
        paths = tmp_path / "tuned", tmp_path / "finetune.json", Path("work"), tmp_path / "losses.csv"
        finetune.main(base_folder, prepared, groups, *paths)
        return json.loads((tmp_path / "finetune.json").read_text())

    return run


def test_the_stage_leaves_a_model_figures_losses_and_no_work(project, tune, tmp_path):
    figures = tune(validation={"every": 3, "images": 4, "keep": "last"})
    assert list(Path("work").iterdir()) == []
    found = read_curves(tmp_path / "losses.csv")
    assert {one.step for one in found if one.set == TRAINING} == {6}
    assert {one.step for one in found if one.set == HELD_OUT} == {0, 3, 6}
    held_out = {one.term: one.value for one in found if (one.set, one.step) == (HELD_OUT, 6)}
    assert {"loss", "diffusion", "t0_249"} <= held_out.keys()
    assert held_out["loss"] == pytest.approx(figures["validation"]["last"]["loss"], rel=1e-5)
    assert figures["steps"] == 6 and figures["evaluations"] == 54 and 6 * 5 <= figures["base_evaluations"] <= 6 * 12
    assert figures["losses"].keys() == {"loss", "diffusion", "shared", "branch", "consistency", "gradient_norm"}
    assert figures["model_sha256"] == sha256_tree(tmp_path / "tuned")
    assert figures["base_sha256"] == sha256_tree(project / "base")
    assert figures["data_digest"] == sha256_tree(project / "data/prepared")
    assert (figures["images"], figures["groups"]) == (6, 3) and not {"run_id", "seconds"} & figures.keys()
    before, after = base.load(project / "base"), base.load(tmp_path / "tuned")
    assert not torch.equal(before.unet.conv_in.weight, after.unet.conv_in.weight)
    assert all(torch.equal(a, b) for a, b in zip(before.vae.parameters(), after.vae.parameters(), strict=True))
    assert after.scheduler.config == before.scheduler.config


@pytest.mark.slow
def test_a_killed_stage_resumes_to_the_same_model(tune, tmp_path, project):
    whole = tune()["model_sha256"]
    script = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        import torch
        from flows.stages import finetune
        project, threads = sys.argv[1:]
        torch.set_num_threads(int(threads))
        finetune.REPORT_EVERY = 1
        def metrics(self, values, step=None):
            if step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        finetune.Run.metrics = metrics
        paths = (Path(project) / name for name in ("base", "data/prepared", "data/groups"))
        finetune.main(*paths, Path("tuned"), Path("finetune.json"), Path("work"))
    """)
    (tmp_path / "finetune.json").unlink()
    (tmp_path / "tuned").rename(tmp_path / "whole")
    command = [sys.executable, "-c", script, str(project), str(torch.get_num_threads())]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    assert not (tmp_path / "tuned").exists() and not (tmp_path / "finetune.json").exists()
    [state] = Path("work").iterdir()
    assert [path.name[:13] for path in sorted(state.iterdir())] == ["step-00000002", "step-00000004"]
    assert tune()["model_sha256"] == whole == sha256_tree(tmp_path / "whole")
    assert not state.exists()


def test_settings_without_effect_may_differ_between_a_stopped_run_and_the_one_that_resumes_it(tune, monkeypatch):
    def stop(self, values, step=None):
        if step == 6:
            raise InterruptedError

    monkeypatch.setattr(finetune, "REPORT_EVERY", 1)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(finetune.Run, "metrics", stop)
        tune()
    [state] = Path("work").iterdir()
    reported = []
    monkeypatch.setattr(finetune.Run, "metrics", lambda self, values, step=None: reported.append(step))
    monkeypatch.setattr(finetune, "_shown", lambda total, what: contextlib.nullcontext(lambda n: shown.append(n)))
    shown = []
    tune(accumulate=3, checkpoint_every=1, gradient_checkpointing=True, watch_every=1)
    assert not state.exists() and sum(shown[-2:]) == 6 and shown[-2] == 5


@pytest.mark.slow
def test_another_seed_gives_another_model(tune):
    assert tune()["model_sha256"] != tune(seed=1)["model_sha256"]


@pytest.mark.slow
def test_state_of_another_configuration_is_not_touched(tune, tmp_path):
    other = tmp_path / "work" / "0123456789abcdef" / "step-00000002.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"another's")
    tune()
    assert other.read_bytes() == b"another's" and len(list((tmp_path / "work").iterdir())) == 1


def test_an_exploding_rate_leaves_no_model(tune, tmp_path):
    with pytest.raises(DivergedError, match=r"step 1: not finite.*Lower the learning rate"):
        tune(learning_rate=1.0e20)
    assert not (tmp_path / "tuned").exists() and not (tmp_path / "finetune.json").exists()


@pytest.mark.slow
def test_an_exploding_rate_ends_with_code_4(tune, tmp_path):
    said = tmp_path / "said"

    def stage():
        os.chdir(tmp_path)
        sys.stderr = said.open("w")
        exit_on_error(lambda: tune(learning_rate=1.0e20))

    assert in_child(stage) == 4
    assert re.search(r"error: step 1: not finite: loss \S+.*there is no checkpoint yet", said.read_text())


def test_one_group_larger_than_a_batch_is_trained_on(tune, tmp_path):
    for split in ("train", "validation"):
        write_groups(tmp_path / "groups", split, [[f"p{i}" for i in range(6)]])
    figures = tune(groups=tmp_path / "groups", batch_size=4, steps=3)
    assert figures["evaluations"] == 12 and figures["groups"] == 1 and figures["losses"]["shared"] > 0


@pytest.mark.slow
def test_an_adapter_is_merged_and_stands_beside_as_stock_diffusers_loads_it(project, tune, tmp_path):
    tune(adapter={"rank": 2}, learning_rate=0.05, accumulate=2, gradient_checkpointing=True, min_snr=5.0, ema=0.0)
    before, merged = base.load(project / "base"), base.load(tmp_path / "tuned")
    changed = [
        name
        for (name, a), (_, b) in zip(before.unet.named_parameters(), merged.unet.named_parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert changed and all(".to_" in name or ".ff.net." in name for name in changed)

    def draw(pipe):
        random = torch.Generator().manual_seed(0)
        return pipe("red cat", num_inference_steps=3, height=16, width=16, generator=random, output_type="np").images

    plain = draw(before)
    before.load_lora_weights(tmp_path / "tuned", weight_name="pytorch_lora_weights.safetensors")
    assert np.abs(draw(before) - plain).max() > 1e-2
    np.testing.assert_allclose(draw(before), draw(merged), atol=5e-3)  # models/ holds half precision


@pytest.mark.slow
def test_training_goes_on_with_an_earlier_adapter(tune, tmp_path):
    adapter = {"rank": 4, "alpha": 2, "targets": ["to_q", "to_v"]}
    tune(adapter=adapter, learning_rate=0.05, ema=0.0, precision="fp32")
    first = tmp_path / "first"
    (tmp_path / "tuned").rename(first)
    # In less than float32, diffusers loads an earlier adapter rounded.
    later = {"adapter": {"rank": 4, "alpha": 2}, "learning_rate": 1.0e-12, "precision": "fp32"}
    figures = tune(init=str(first / adapters.FILE), **later)
    assert figures["init_sha256"] == sha256(first / adapters.FILE)
    # With a rate of nearly 0 it ends where the earlier one did, in both formats.
    for name in (adapters.FILE, kohya.FILE):
        before, after = load_file(first / name), load_file(tmp_path / "tuned" / name)
        assert before.keys() == after.keys() and all("to_q" in key or "to_v" in key for key in before)
        torch.testing.assert_close(after, before)
    a, b = base.load(first).unet, base.load(tmp_path / "tuned").unet
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    # Another file is another configuration: it does not go on from the other's checkpoints.
    assert tune(init=str(first / kohya.FILE), **later)["init_sha256"] == sha256(first / kohya.FILE)


def test_a_stock_pipeline_with_its_own_text_encoder_is_tuned_and_saved_as_such(tune, tmp_path):
    stock = tiny.pipeline("stable_diffusion_3", tmp_path)
    stock.save_pretrained(tmp_path / "stock")
    tune(base_folder=tmp_path / "stock", precision="fp32", steps=2, decay=1)
    tuned = StableDiffusion3Pipeline.from_pretrained(tmp_path / "tuned")
    assert not torch.equal(tuned.transformer.proj_out.weight, stock.transformer.proj_out.weight)
    assert torch.equal(tuned.vae.decoder.conv_in.weight, stock.vae.decoder.conv_in.weight)


def test_without_groups_it_is_plain_fine_tuning_and_says_so(tune, tmp_path, caplog):
    for split in ("train", "validation"):
        write_groups(tmp_path / "groups", split, [[f"p{i}"] for i in range(6)])
    with caplog.at_level(logging.WARNING):
        figures = tune(groups=tmp_path / "groups")
    assert "plain fine-tuning" in caplog.text
    assert figures["losses"].keys() == {"loss", "diffusion", "consistency", "gradient_norm"}
    with pytest.raises(DataError, match="no two training prompts are in one group"):
        tune(groups=tmp_path / "groups", weights={"diffusion": 0.0, "shared": 1.0, "branch": 1.0, "consistency": 0.0})


@pytest.mark.parametrize("groups", [[["p0", "p1"]], [*GROUPS, ["p9"]], [*GROUPS, ["p5"]]])
def test_groups_of_other_data_are_refused(groups, tune, tmp_path):
    write_groups(tmp_path / "groups", "train", groups)
    write_groups(tmp_path / "groups", "validation", GROUPS)
    with pytest.raises(DataError, match="no partition of the split's 6 prompts"):
        tune(groups=tmp_path / "groups")


@pytest.mark.parametrize("fault", ["a bit", "another caption", "cut off", "missing", "extra", "no sums"])
def test_damaged_data_is_never_trained_on(fault, project, tune, tmp_path):
    prepared = tmp_path / "prepared"
    shutil.copytree(project / "data/prepared", prepared)
    named = prepared / {"no sums": dataset.SUMS}.get(fault, "train/00000.parquet")
    content = named.read_bytes()
    match fault:
        case "a bit":
            # In the name of the program that wrote it, which no reader needs, so that only the hash tells.
            assert content.count(b"parquet-cpp") == 1
            named.write_bytes(content.replace(b"parquet-cpp", b"parquet-cpq"))
        case "another caption":
            rows = ({"id": f"p{i}", "text": text.replace("dog", "fog")} for i, text in enumerate(TEXTS))
            shutil.rmtree(named.parent)
            write_split(named.parent, rows)
        case "cut off":
            named.write_bytes(content[:-20])
        case "missing" | "no sums":
            named.unlink()
        case "extra":
            named = prepared / "train/00001.parquet"
            named.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(named.relative_to(prepared).as_posix())):
        tune(prepared=prepared)
    assert not (tmp_path / "tuned").exists()


def test_a_missing_base_is_named(tune, tmp_path):
    with pytest.raises(DataError, match="nothing cannot be loaded"):
        tune(base_folder=tmp_path / "nothing")


@pytest.mark.slow
def test_curves_and_pictures_are_recorded(tune, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("SAGE_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(finetune, "REPORT_EVERY", 3)
    figures = tune(watch_every=2)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (home,) = client.search_experiments(filter_string="name = 'sage'")
    record = client.get_run(run_of(client, home.experiment_id, tmp_path / "finetune.json"))
    assert record.data.metrics["seconds"] > 0
    assert record.data.metrics["evaluations"] == 54 and record.data.tags["model_sha256"] == figures["model_sha256"]
    assert [point.step for point in client.get_metric_history(record.info.run_id, "shared")] == [3, 6]
    names = [item.path for item in client.list_artifacts(record.info.run_id, "images")]
    assert {int(re.search(r"step\D(\d+)\D", name)[1]) for name in names} == {0, 2, 4, 6}
    # Looking changes nothing.
    monkeypatch.setenv("SAGE_TRACKING_URI", "off")
    assert tune()["model_sha256"] == figures["model_sha256"]


@pytest.fixture
def in_buckets(tmp_path):
    """Prepared images of two sizes, in groups of one size each, with tags as captions; held-out ones are square."""
    random = np.random.default_rng(1)
    sizes = [(16, 16)] * 3 + [(8, 32)] * 3
    images = [Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    rows = [
        {"id": f"p{n}", "text": f"{TEXTS[n]}, night, rain, fog", "image": image, "bucket": size}
        for n, (image, size) in enumerate(zip(images, sizes, strict=True))
    ]
    write_split(tmp_path / "prepared/train", rows)
    square = [{"id": f"p{n}", "text": text, "image": images[n % 3]} for n, text in enumerate(TEXTS)]
    write_split(tmp_path / "prepared/validation", square)
    dataset.write_sums(tmp_path / "prepared")
    for split in ("train", "validation"):
        write_groups(tmp_path / "groups", split, GROUPS)
    return {"prepared": tmp_path / "prepared", "groups": tmp_path / "groups"}


VARIED = {"flip": True, "shuffle_tags": {"keep": 1, "orders": 3}}


def test_images_of_several_sizes_are_trained_on_mirrored_and_with_shuffled_tags(tune, in_buckets, caplog, monkeypatch):
    encoded = {"images": [], "texts": []}
    encode_images, encode_texts = finetune.Denoiser.encode_images, finetune.Denoiser.encode_texts

    def images(self, pixels):
        encoded["images"].append(pixels)
        return encode_images(self, pixels)

    def texts(self, some, size):
        encoded["texts"].append((some, size))
        return encode_texts(self, some, size)

    monkeypatch.setattr(finetune.Denoiser, "encode_images", images)
    monkeypatch.setattr(finetune.Denoiser, "encode_texts", texts)
    with caplog.at_level(logging.WARNING, "flows.preflight"):
        figures = tune(**in_buckets, **VARIED, validation={"every": 3, "images": 4, "keep": "last"})
    assert figures["images"] == 6 and figures["evaluations"] == 54 and figures["validation"]["last"]["loss"] > 0
    assert "2 of 2 buckets have fewer images than a step has items (finetune.batch_size 9)" in caplog.text
    wide, square = encoded["images"][1], encoded["images"][3]
    assert (wide.shape[1:3], square.shape[1:3]) == ((8, 32), (16, 16))
    assert torch.equal(encoded["images"][0], wide.flip(2)) and torch.equal(encoded["images"][2], square.flip(2))
    # The captions in their orders and the empty one, for each size; then those of the held-out images, as they are.
    for (some, size), place in zip(encoded["texts"], (3, 0), strict=False):
        orders = [tag_orders(f"{text}, night, rain, fog", 1, 3, 0) for text in TEXTS[place : place + 3]]
        assert some == [order for own in orders for order in own] + [""] and len(some) > 7
        assert size == ((16, 16) if place == 0 else (8, 32))
    assert {text for some, _ in encoded["texts"][2:] for text in some} <= {*TEXTS, ""}
    # The next run finds all of it, and comes to the same model.
    count = len(encoded["images"]), len(encoded["texts"])
    assert tune(**in_buckets, **VARIED)["model_sha256"] == figures["model_sha256"]
    assert (len(encoded["images"]), len(encoded["texts"])) == count
    # Without mirroring it needs no other latents.
    assert tune(**in_buckets, flip=False)["model_sha256"] != figures["model_sha256"]
    assert len(encoded["images"]) == count[0]


def test_a_group_of_two_sizes_is_refused(tune, in_buckets, tmp_path):
    write_groups(tmp_path / "groups", "train", [["p0", "p3"], ["p1", "p2"], ["p4", "p5"]])
    with pytest.raises(DataError, match=r"a group has images of several sizes.*dvc repro group"):
        tune(**in_buckets)


def test_latents_of_another_base_are_not_taken(tune, tmp_path):
    tune(steps=3)
    before = {path.name for path in (tmp_path / "cache/encoded").iterdir()}
    torch.manual_seed(1)
    base.save(base.assemble(tiny.autoencoder(), tiny.unet(cross_attention_dim=384)), tmp_path / "other")
    tune(base_folder=tmp_path / "other", steps=3)
    assert len({path.name for path in (tmp_path / "cache/encoded").iterdir()} - before) == 2


def test_the_held_out_loss_is_recorded_and_changes_no_weight(tune, tmp_path, monkeypatch):
    without = tune()["model_sha256"]
    recorded = {}
    monkeypatch.setattr(
        finetune.Run, "metrics", lambda self, values, step=None: recorded.setdefault(step, {}).update(values)
    )
    figures = tune(validation={"every": 2, "images": 4, "keep": "last"})
    assert figures["model_sha256"] == without
    held_out = figures["validation"]
    assert {name: found["step"] for name, found in held_out.items()} == {"base": 0, "last": 6, "kept": 6}
    assert held_out["last"] == held_out["kept"] != held_out["base"]
    assert held_out["last"].keys() == {
        *("step", "loss", "diffusion", "shared", "branch", "t0_249", "t250_499", "t500_749", "t750_999")
    }
    for step in (0, 2, 4, 6):
        assert {"validation_loss", "validation_t0_249"} <= recorded[step].keys()
    assert figures == tune(validation={"every": 2, "images": 4, "keep": "last"})


def test_the_best_weights_may_be_the_bases_and_then_it_is_said(tune, tmp_path, project, caplog):
    figures = tune(validation={"every": 1, "images": 9, "keep": "best", "patience": 2}, learning_rate=0.3, warmup=0)
    assert (figures["steps"], figures["evaluations"]) == (2, 18), "two measurements in a row were worse"
    assert figures["validation"]["kept"] == figures["validation"]["base"] != figures["validation"]["last"]
    assert "the held-out loss was never below the base's" in caplog.text
    before, after = base.load(project / "base"), base.load(tmp_path / "tuned")
    assert all(torch.equal(a, b) for a, b in zip(before.unet.parameters(), after.unet.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"share_ratios": [0.6, 0.2]}, "not in order"),
        ({"share_ratios": [0.4]}, "share_ratios"),
        ({"share_ratios": [0.0, 0.0]}, "no step is shared"),
        ({"batch_size": 2}, "greater than or equal to 3"),
        ({"warmup": 5}, "more than the 6 steps"),
        ({"branch_start": "pink"}, "'sampled', 'mixture' or 'plain'"),
        ({"weights": dict.fromkeys(("diffusion", "shared", "branch", "consistency"), 0.0)}, "all weights are 0"),
        ({"accumulate": 10}, "accumulate 10 is more than batch_size 9"),
        ({"adapter": {"rank": 0}}, "finetune.adapter.rank"),
        ({"adapter": {"rank": 2, "targets": []}}, "finetune.adapter.targets"),
        ({"init": "old.safetensors"}, "'old.safetensors' goes on with an earlier adapter.*found adapter None"),
        (
            {"optimizer": "adamw8bit"},
            "'adamw' or 'adafactor': optimizers of 8 bits need bitsandbytes.*found 'adamw8bit'",
        ),
        ({"timesteps": "cosine"}, "'uniform' or 'logit_normal'"),
        ({"min_snr": 0.0}, "finetune.min_snr"),
        ({"precision": "fp16"}, "'bf16', 'fp8' or 'fp32'"),
        ({"precision": "fp8"}, "adapter is null, so all weights are trained; give an adapter"),
        ({"validation": {"every": 2, "images": 4, "keep": "first"}}, "'last' or 'best'"),
        ({"validation": {"every": 2, "images": 4, "keep": "best", "patience": 0}}, "finetune.validation.patience"),
    ],
)
def test_contradictions_are_found_before_work(changes, said, tune, tmp_path):
    from sage.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match=said):
        tune(base_folder=tmp_path / "not read", **changes)
