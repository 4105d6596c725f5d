import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import operated
import pytest
import tiny
import tiny_judges
from PIL import Image
from waiting import wait_for

from flows import leash
from flows.prompts import generate, metadata, shards
from sage.errors import ConfigurationError, DataError
from sage.evaluation.diversity import group_diversity
from sage.evaluation.extractors import EfficientNetLite0, read_images
from sage.evaluation.judges import ClipJudge
from sage.files import sha256, sha256_tree
from sage.sampling.pipeline import SharedSamplingPipeline

TEXTS = [f"{colour} {thing}" for thing in ("cat", "dog", "tree", "house") for colour in ("red", "blue", "big")]
OPTIONS = {"steps": 4, "share_ratio": 0.5, "guidance_scale": 3.0, "batch_size": 1, "seed": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline("stable_diffusion", folder).save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(tiny_judges.clip(tmp_path_factory.mktemp("judge") / "clip"))


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return str(path)


@pytest.fixture
def whole(source, model, tmp_path):
    """The pictures that `sage generate` makes on one machine."""
    out = tmp_path / "whole"
    generate.main(source, out, model=model, negative_prompt="", plan=False, **OPTIONS)
    return {path.name: sha256(path) for path in out.iterdir()}


def draw_all(source, model, out, count, order=None):
    shards.plan(source, out, model, **OPTIONS)
    for number in order or range(1, count + 1):
        shards.draw(out, f"{number}/{count}")
    shards.finish(out)


def hashes(out):
    store, path = fsspec.core.url_to_fs(out)
    found = {name.rsplit("/", 1)[-1]: store.cat_file(name) for name in store.ls(path, detail=False)}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if name != "plan.json"}


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_shards_are_a_partition_of_whole_groups(count):
    groups = [[0, 3], [1], [2, 4, 5], [6], [7, 8], [9]]
    parts = [
        [member for batch in shards.part(groups, 1, number, count) for _, group in batch for member in group]
        for number in range(1, count + 1)
    ]
    assert sorted(itertools.chain(*parts)) == list(range(10))
    assert all(set(group) <= set(part) or not set(group) & set(part) for group in groups for part in parts)


@pytest.mark.parametrize("address", ["{}/out", "file://{}/out", "memory://{}/out"])
def test_shards_give_the_bytes_of_one_machine_in_any_order_at_any_address(source, model, whole, tmp_path, address):
    out = address.format(tmp_path)
    draw_all(source, model, out, 3, order=[3, 1, 2])
    assert hashes(out) == whole


@pytest.mark.slow
def test_a_shard_that_is_drawn_again_makes_only_what_is_missing(source, model, whole, tmp_path):
    out = tmp_path / "out"
    draw_all(source, model, str(out), 2)
    for name in ("000002.png", "manifest.jsonl"):
        (out / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    with pytest.raises(DataError, match="1 of 12 pictures are missing, first 000002"):
        shards.finish(str(out))
    draw_all(source, model, str(out), 2)
    assert hashes(str(out)) == whole
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


@pytest.mark.slow
def test_no_name_of_a_prompt_meets_a_name_of_ours(source, model, tmp_path):
    names = ["contact", "plan.json", "run.json", "judged-1-of-1.json", "a.error"]
    Path(source).with_suffix(".jsonl").write_text(
        "".join(json.dumps({"id": name, "prompt": "red cat"}) + "\n" for name in names)
    )
    out = tmp_path / "out"
    for _ in range(2):
        draw_all(str(Path(source).with_suffix(".jsonl")), model, str(out), 1)
        lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines] == names
        assert [sha256(out / line["file"]) for line in lines] == [line["sha256"] for line in lines]


@pytest.mark.slow
def test_judged_shards_give_the_figures_of_all_pictures(source, model, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(operated.ROOT)
    found = []
    for count in (1, 3):
        out = str(tmp_path / f"of-{count}")
        shards.plan(source, out, model, **OPTIONS)
        for number in range(1, count + 1):
            if number == 2:
                with pytest.raises(DataError, match="pictures are missing"):
                    shards.finish(out, judged=count)
            shards.draw(out, f"{number}/{count}", judge=clip)
        shards.finish(out, judged=count)
        found.append((tmp_path / f"of-{count}/evaluation.json").read_text())
    assert found[0] == found[1]
    values = json.loads(found[0])
    # From all pictures at once, as no shard sees them.
    groups = json.loads((tmp_path / "of-3/plan.json").read_text())["groups"]
    paths = sorted((tmp_path / "of-3").glob("0*.png"))
    features = EfficientNetLite0()(read_images(paths))
    distances, n = group_diversity(features[:, None], groups)
    assert values["group_diversity"]["value"] == pytest.approx(distances.sum() / n.sum(), rel=1e-4)
    fit = ClipJudge(Path(clip), "clip").scores(TEXTS, [[path] for path in paths])
    assert values["alignment"]["value"] == pytest.approx(fit.mean(), abs=1e-4)
    assert (values["prompts"], values["errors"], values["blank"], values["alignment"]["n"]) == (12, 0, 0, 12)
    # Half of four steps under guidance is shared: a group of m costs 2 * (2 + 2 m).
    assert values["nfe_per_image"] == sum(4 + 4 * len(group) for group in groups) / 12
    (tmp_path / "of-3/judged-2-of-3.json").unlink()
    with pytest.raises(DataError, match=r"1 of 3 shards are not judged, first judged-2-of-3.json"):
        shards.finish(out, judged=3)


@pytest.mark.slow
def test_a_blank_image_is_marked_and_not_judged(source, model, clip, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(operated.ROOT)
    draw_all(source, model, str(tmp_path / "out"), 1)
    path = tmp_path / "out/000005.png"
    with Image.open(path) as image:
        generate.save(Image.new("RGB", image.size), json.loads(image.text[metadata.KEY]), path)
    shards.draw(str(tmp_path / "out"), judge=clip)
    shards.finish(str(tmp_path / "out"), judged=1)
    assert "blank: 1 images are a single colour, first 000005" in capsys.readouterr().err
    values = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert (values["prompts"], values["blank"], values["alignment"]["n"]) == (12, 1, 11)


@pytest.mark.slow
def test_an_image_that_is_not_finite_is_an_error_of_its_shard_and_not_judged(
    source, model, clip, tmp_path, monkeypatch
):
    monkeypatch.chdir(operated.ROOT)
    pipe = SharedSamplingPipeline.from_pretrained(model)
    tiny.overflow_at("q", pipe)
    pipe.save_pretrained(tmp_path / "bad")
    Path(source).write_text("\n".join([*TEXTS, "q", ""]))
    out = tmp_path / "out"
    shards.plan(source, str(out), str(tmp_path / "bad"), **OPTIONS)
    for number in (1, 2, 3):
        shards.draw(str(out), f"{number}/3", judge=clip)
    made = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    shards.draw(str(out), "3/3")
    shards.draw(str(out), "1/3")
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == made
    shards.finish(str(out), judged=3)
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines if "not_finite" in line.get("error", "")] == ["000013"]
    values = json.loads((out / "evaluation.json").read_text())
    assert (values["prompts"], values["errors"], values["blank"], values["alignment"]["n"]) == (13, 1, 0, 12)


def test_a_folder_of_another_run_is_refused(source, model, tmp_path):
    out = str(tmp_path / "out")
    shards.plan(source, out, model, **OPTIONS)
    with pytest.raises(ConfigurationError, match="seed 0"):
        shards.plan(source, out, model, **OPTIONS | {"seed": 1})


def test_a_model_that_changed_meanwhile_is_refused(source, model, tmp_path):
    out = tmp_path / "out"
    shards.plan(source, str(out), model, **OPTIONS)
    values = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps(values | {"model": "0" * 64}))
    with pytest.raises(DataError, match="the run began with 000000000000"):
        shards.draw(str(out), "1/1")
    assert sha256_tree(out) and not list(out.glob("*.png"))


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "-1/2"])
def test_a_shard_that_is_none_is_refused(source, model, tmp_path, shard):
    out = str(tmp_path / "out")
    shards.plan(source, out, model, **OPTIONS)
    with pytest.raises(ConfigurationError, match="write I/N"):
        shards.draw(out, shard)


def test_without_prompts_there_is_no_plan(tmp_path, model):
    with pytest.raises(DataError, match=r"memory://none.txt does not exist"):
        shards.plan("memory://none.txt", str(tmp_path / "out"), model)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_without_a_plan_there_is_one_message(tmp_path):
    command = [sys.executable, "-m", "flows.prompts.shards", "draw", "--out", str(tmp_path), "--shard", "1/1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "has no plan.json" in done.stderr, "Traceback" in done.stderr) == (2, True, False)


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """An S3 server on loopback with a bucket, its address and keys in the environment, as a worker has them."""
    port = operated.free_port()
    (tmp_path / "store/pictures").mkdir(parents=True)
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}).items():
        monkeypatch.setenv(name, value)
    command = [Path(sys.executable).with_name("rclone"), "serve", "s3", tmp_path / "store", "--vfs-cache-mode", "off"]
    command += ["--addr", f"127.0.0.1:{port}", "--auth-key", "test,testtest"]
    with (tmp_path / "s3.log").open("wb") as log:
        server = leash.start(list(map(str, command)), log, os.environ | {"RCLONE_CONFIG": "/dev/null"})
    try:
        wait_for(lambda: operated.listens(port))
        yield "s3://pictures"
    finally:
        leash.end(server)


@pytest.mark.slow
def test_prompts_come_from_and_pictures_go_to_an_s3_store(source, model, whole, tmp_path, s3):
    (tmp_path / "store/pictures/prompts.txt").write_bytes(Path(source).read_bytes())
    draw_all(f"{s3}/prompts.txt", model, f"{s3}/run", 2)
    found = {path.name: sha256(path) for path in (tmp_path / "store/pictures/run").iterdir()}
    assert {name: digest for name, digest in found.items() if name != "plan.json"} == whole
