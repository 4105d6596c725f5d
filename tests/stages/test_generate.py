import json
import os
import shutil
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_judges
import torch
import yaml
from faults import in_child
from PIL import Image
from prepared_files import write_split

from flows import packs
from flows.stages import generate
from sage.config import Generate
from sage.data.dataset import read_split
from sage.errors import ConfigurationError, DataError
from sage.evaluation.manifest import read_unread
from sage.files import digest, sha256, sha256_tree
from sage.sampling.plan import Plan

pytestmark = pytest.mark.slow

TEXTS = ["red cat", "red dog", "blue cat", "tall tree", "big tree"]
GROUPS = [["p0", "p1", "p2"], ["p3", "p4"]]

PATHS = {"base": "base", "model": "tuned", "data": "data/prepared", "groups": "data/groups"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with prepared data, groups, two tiny models and params.yaml."""
    folder = tmp_path_factory.mktemp("project")
    split = folder / "data/prepared/test"
    write_split(split, ({"id": f"p{i}", "text": text} for i, text in enumerate(TEXTS)))
    (folder / "data/groups").mkdir()
    groups = {"groups": [{"ids": ids, "similarity": 0.8} for ids in GROUPS]}
    (folder / "data/groups/test.json").write_text(json.dumps(groups))
    pipe = tiny.stable_diffusion(folder)
    pipe.save_pretrained(folder / "base")
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.5)
    pipe.save_pretrained(folder / "tuned")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["generate"] |= {"steps": 6, "share_ratio": 0.5, "seeds": [0, 3], "batch_size": 4, "guidance_scale": 3.0}
    params["evaluate"] |= tiny_judges.own()
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def run(project, monkeypatch, out, model="tuned"):
    monkeypatch.chdir(project)
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    paths = PATHS | {"model": model}
    generate.main(
        **{k: project / v for k, v in paths.items()},
        out=project / out / "images",
        metrics=project / out / "generate.json",
    )
    lines = (project / out / "images/manifest.jsonl").read_text().splitlines()
    return json.loads((project / out / "generate.json").read_text()), [json.loads(line) for line in lines]


def drawn_image(project, out, arm, seed, id):
    with Image.open(project / out / f"images/{arm}/seed-{seed}/{id}.png") as image:
        return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def made(project):
    with pytest.MonkeyPatch.context() as monkeypatch:
        # dvc.yaml does not name it: an import of it would fail here.
        monkeypatch.setitem(sys.modules, "sage.grouping.auto", None)
        return run(project, monkeypatch, "first")


def test_branch_noise_moves_shared_pictures_and_no_others(project, made, monkeypatch):
    params = yaml.safe_load((project / "params.yaml").read_text())
    assert params["generate"]["branch_noise"] == 1
    changed = params | {"generate": params["generate"] | {"branch_noise": 0.0}}
    try:
        (project / "params.yaml").write_text(yaml.safe_dump(changed))
        run(project, monkeypatch, "quiet")
    finally:
        (project / "params.yaml").write_text(yaml.safe_dump(params))
    ids = [id for group in GROUPS for id in group]
    for arm, moves in (("independent", False), ("shared", True), ("sage", True)):
        same = [
            np.array_equal(drawn_image(project, "first", arm, 0, id), drawn_image(project, "quiet", arm, 0, id))
            for id in ids
        ]
        assert not any(same) if moves else all(same)


def test_costs_follow_from_the_plans(made):
    arms = made[0]["arms"]
    # 5 prompts, 2 seeds, guidance 2: 3 steps of 2 groups, then 3 steps of 5 prompts.
    assert arms["shared"]["nfe"] == arms["sage"]["nfe"] == 2 * 2 * (3 * 2 + 3 * 5)
    assert arms["independent"]["nfe"] == 2 * 2 * 6 * 5
    assert arms["shared"]["nfe_per_image"] == pytest.approx(2 * 4.2)
    # 4.2 steps are rounded up: the cheap baseline gets no less than sharing.
    assert arms["independent_same_nfe"]["steps"] == 5
    assert all(
        figures["images"] == 10 and not {"seconds", "seconds_per_image"} & figures.keys() for figures in arms.values()
    )


def test_seeds_of_a_prompt_share_their_first_steps_if_asked(project, made, monkeypatch):
    params = yaml.safe_load((project / "params.yaml").read_text())
    try:
        changed = params | {"generate": params["generate"] | {"image_steps": 2}}
        (project / "params.yaml").write_text(yaml.safe_dump(changed))
        figures, lines = run(project, monkeypatch, "sharing")
        # This schedule does not begin with noise alone, so the rule shares nothing.
        changed = params | {"generate": params["generate"] | {"image_steps": None}}
        (project / "params.yaml").write_text(yaml.safe_dump(changed))
        assert run(project, monkeypatch, "rule")[0] == made[0]
    finally:
        (project / "params.yaml").write_text(yaml.safe_dump(params))
    arms = figures["arms"]
    # 5 prompts, 2 seeds, guidance 2: 2 steps of 2 groups, a step of 2 groups for each seed, 3 steps of 10 images.
    assert arms["shared"]["nfe"] == arms["sage"]["nfe"] == 2 * (2 * 2 + 2 * 2 + 3 * 10)
    assert arms["shared"]["saving"] == pytest.approx(1 - arms["shared"]["nfe"] / (2 * 6 * 10))
    assert arms["independent_same_nfe"]["nfe"] >= arms["shared"]["nfe"] > 2 * 10 * 3
    assert arms["independent"] == made[0]["arms"]["independent"]
    assert len(lines) == len(made[1])
    for id in (id for group in GROUPS for id in group):
        first, second = (drawn_image(project, "sharing", "shared", seed, id) for seed in (0, 3))
        assert not np.array_equal(first, second)
        unshared = [drawn_image(project, out, "independent", 0, id) for out in ("first", "sharing")]
        assert np.array_equal(*unshared)


def test_first_predictions_count_and_first_steps_are_not_evaluated_again(project, monkeypatch):
    params = yaml.safe_load((project / "params.yaml").read_text())
    for name in ("base", "tuned"):
        shutil.copytree(project / name, project / "zero" / name)
        config = project / "zero" / name / "scheduler/scheduler_config.json"
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
        config.write_text(json.dumps(json.loads(config.read_text()) | zero))
    settings = {"generate": params["generate"] | {"image_steps": None}, "group": params["group"] | {"by": "prediction"}}
    try:
        (project / "params.yaml").write_text(yaml.safe_dump(params | settings))
        monkeypatch.chdir(project)
        monkeypatch.setenv("SAGE_DEVICE", "cpu")
        out = project / "predicted"
        paths = {"base": project / "zero/base", "model": project / "zero/tuned", "data": project / "data/prepared"}
        generate.main(**paths, groups=project / "data/groups", out=out / "images", metrics=out / "generate.json")
    finally:
        (project / "params.yaml").write_text(yaml.safe_dump(params))
    arms = json.loads((out / "generate.json").read_text())["arms"]
    # Guidance 2: 5 predictions and no first step, then 2 steps of 2 groups for each of 2 seeds, 3 steps of 10 images.
    assert arms["shared"]["nfe"] == arms["sage"]["nfe"] == 2 * (5 + 2 * 2 * 2 + 3 * 10)
    assert arms["shared"]["saving"] == pytest.approx(1 - 43 / 60)
    assert arms["independent"]["nfe"] == 2 * 60


def test_every_prompt_has_one_picture_an_arm_and_seed(project, made):
    lines = made[1]
    assert Counter((line["arm"], line["seed"]) for line in lines) == {
        (arm, seed): 5 for arm in ("independent", "independent_same_nfe", "shared", "sage") for seed in (0, 3)
    }
    for line in lines:
        path = project / "first/images" / line["arm"] / f"seed-{line['seed']}" / f"{line['id']}.png"
        assert sha256(path) == line["sha256"]
        assert line["id"] in GROUPS[line["group"]]


def test_arms_and_seeds_differ_as_they_should(project, made):
    first = drawn_image(project, "first", "independent", 0, "p0")
    for arm, seed in (("independent", 3), ("independent_same_nfe", 0), ("shared", 0), ("sage", 0)):
        assert np.abs(drawn_image(project, "first", arm, seed, "p0") - first).max() > 1
    assert (
        np.abs(drawn_image(project, "first", "sage", 0, "p0") - drawn_image(project, "first", "shared", 0, "p0")).max()
        > 5
    )


def test_an_independent_picture_is_the_stock_pipelines(project, made):
    from diffusers import StableDiffusionPipeline

    from sage.sampling.seeds import prompt_seed

    stock = StableDiffusionPipeline.from_pretrained(project / "base")
    stock.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(prompt_seed(3, "p2"))
    image = stock("blue cat", num_inference_steps=6, guidance_scale=3.0, generator=generator).images[0]
    assert np.abs(np.asarray(image) - drawn_image(project, "first", "independent", 3, "p2")).max() <= 1


@pytest.mark.slow
def test_again_is_the_same_bytes(project, made, monkeypatch):
    run(project, monkeypatch, "second")
    assert sha256_tree(project / "second/images") == sha256_tree(project / "first/images")


@pytest.mark.slow
def test_an_arm_with_the_same_model_and_plan_is_not_made_twice(project, made, monkeypatch):
    count = []
    make = generate.make
    monkeypatch.setattr(generate, "make", lambda arm, *rest: count.append(arm.name) or make(arm, *rest))
    figures, lines = run(project, monkeypatch, "untuned", model="base")
    assert count == ["independent", "independent_same_nfe", "shared"]
    assert figures["arms"]["sage"]["nfe"] == figures["arms"]["shared"]["nfe"]
    hashes = {(line["arm"], line["seed"], line["id"]): line["sha256"] for line in lines}
    assert all(hashes["sage", seed, f"p{i}"] == hashes["shared", seed, f"p{i}"] for seed in (0, 3) for i in range(5))


def kill_after(project, images, out):
    """Run the stage in a process that kills itself when it has drawn so many images."""

    def work():
        count = 0
        add = packs.add

        def counted(*arguments):
            nonlocal count
            if count == images:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            add(*arguments)

        packs.add = counted
        os.chdir(project)
        paths = {name: project / path for name, path in PATHS.items()}
        generate.main(**paths, out=project / out / "images", metrics=project / out / "generate.json")

    return in_child(work)


def test_a_killed_run_goes_on_and_draws_no_finished_pack_again(project, made, monkeypatch):
    """Ten images an arm. Without sharing, the packs of a seed have 2 and 3 prompts; with it, one has both groups."""
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    assert kill_after(project, 16, "killed") == -signal.SIGKILL
    assert not (project / "killed/images").exists()
    # One arm of 2 seeds with 2 packs each, and the first seed's 2 packs of the next arm; another was under way.
    done = sorted(path.parent.name for path in project.glob("work/generate/*/*/pack.json"))
    assert done == sorted(f"seed-{seed}-pack-0000{number}" for seed in (0, 3, 0) for number in (0, 1))
    (damaged,) = project.glob("work/generate/*/seed-3-pack-00001")
    next(damaged.glob("*/*.png")).write_bytes(b"no image")

    drawn = []
    add = packs.add
    monkeypatch.setattr(packs, "add", lambda folder, *rest: drawn.append(folder) or add(folder, *rest))
    figures, lines = run(project, monkeypatch, "killed")
    assert (figures, lines) == made
    assert sha256_tree(project / "killed/images") == sha256_tree(project / "first/images")
    # Of 40 images 15 were finished, and 3 of these are in the damaged pack.
    assert len(drawn) == 40 - 15 + 3
    assert not list(project.glob("work/generate/*"))


def test_what_a_killed_run_keeps_is_named_by_all_that_its_images_depend_on(project, monkeypatch):
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    settings = Generate.model_validate(yaml.safe_load((project / "params.yaml").read_text())["generate"])
    examples = read_split(project / "data/prepared", "test")
    arm = generate.Arm("shared", project, "hash", 6, Plan.shared([[0, 1, 2], [3, 4]], 6, 0.5), 0.5, 0)
    base = generate.identity(arm, examples, settings)
    assert base == generate.identity(replace(arm, name="sage", model=project / "elsewhere"), examples, settings)
    changes = {"model_hash": "other", "plan": Plan.independent(5, 6), "image_steps": 2, "steps": 7, "reuses": True}
    others = [generate.identity(replace(arm, **{name: value}), examples, settings) for name, value in changes.items()]
    others.append(generate.identity(arm, examples, settings.model_copy(update={"guidance_scale": 2.0})))
    others.append(generate.identity(arm, [replace(examples[0], text="other"), *examples[1:]], settings))
    monkeypatch.setattr(generate, "version", lambda package: "0")
    others.append(generate.identity(arm, examples, settings))
    assert len({digest(one) for one in (base, *others)}) == 1 + len(others)


def test_tokens_that_the_text_encoder_leaves_out_are_counted_for_each_prompt(project, made, monkeypatch):
    assert read_unread(project / "first/images") == {}
    limit = tiny.TOKENS
    monkeypatch.setattr(tiny, "TOKENS", 9)  # "tall tree" has 8 letters, a start and an end
    try:
        short = tiny.clip_tokenizer(project)
    finally:
        monkeypatch.setattr(tiny, "TOKENS", limit)
    for name in ("base", "tuned"):
        shutil.copytree(project / name, project / "short" / name)
        short.save_pretrained(project / "short" / name / "tokenizer")
    monkeypatch.chdir(project)
    out = project / "cut"
    paths = {"base": project / "short/base", "model": project / "short/tuned", "data": project / "data/prepared"}
    generate.main(**paths, groups=project / "data/groups", out=out / "images", metrics=out / "generate.json")
    assert read_unread(out / "images") == {"p3": 1}


def test_groups_of_other_prompts_are_refused_and_leave_nothing(project, monkeypatch, tmp_path):
    groups = tmp_path / "groups"
    shutil.copytree(project / "data/groups", groups)
    (groups / "test.json").write_text(json.dumps({"groups": [{"ids": ["p0", "p1"]}, {"ids": ["x9"]}]}))
    monkeypatch.chdir(project)
    arguments = {"base": project / "base", "model": project / "tuned", "data": project / "data/prepared"}
    with pytest.raises(DataError, match="no partition of the split's 5 prompts: 3 missing"):
        generate.main(**arguments, groups=groups, out=tmp_path / "out", metrics=tmp_path / "m.json")
    assert not (tmp_path / "out").exists()


def test_an_arm_that_does_not_exist_is_named(project, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    paths = {name: project / path for name, path in PATHS.items()}
    with pytest.raises(ConfigurationError, match="--only best is no arm; the arms are independent, "):
        generate.main(**paths, out=tmp_path / "images", metrics=tmp_path / "generate.json", only="best")
