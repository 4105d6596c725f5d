"""Saved pipelines as people have them are drawn as the one that was saved, or refused in one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from huggingface_hub import constants
from peft import LoraConfig

from sage.errors import DataError
from sage.sampling import base, hub, saved
from sage.sampling.pipeline import SharedSamplingPipeline

pytestmark = pytest.mark.slow

COMMIT = "a" * 40
CALL = {"num_inference_steps": 3, "output_type": "np", "share_ratio": 0.5, "groups": [[0, 1], [2, 3, 4]]}


def drawn(pipe, family):
    pipe.set_progress_bar_config(disable=True)
    options = tiny.OPTIONS.get(family, {})
    shared = SharedSamplingPipeline.from_pipe(pipe)
    return shared(tiny.PROMPTS, generator=torch.Generator().manual_seed(0), **CALL, **options).images


def dtypes(pipe):
    return {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("how", ["plain", "fp16", "bf16", "variant"])
def test_a_folder_is_drawn_as_what_was_saved(family, how, tmp_path):
    pipe = tiny.pipeline(family, tmp_path)
    half = {"plain": torch.float32, "bf16": torch.bfloat16}.get(how, torch.float16)
    pipe.to(half).save_pretrained(tmp_path / "saved", variant="fp16" if how == "variant" else None)
    found = saved.load(tmp_path / "saved")
    assert dtypes(found) == {torch.float32} and type(found) is type(pipe)
    expected = drawn(pipe.to(torch.float32), family)  # rounded to half precision, as in the folder
    np.testing.assert_allclose(drawn(found, family), expected, atol=1e-3)
    assert dtypes(saved.load(tmp_path / "saved", dtype=torch.float16)) == {torch.float16}
    with pytest.warns(FutureWarning, match="torch_dtype"):
        assert dtypes(saved.load(tmp_path / "saved", torch_dtype=torch.bfloat16)) == {torch.bfloat16}


def test_stable_diffusion_3_without_t5_is_drawn(tmp_path):
    pipe = tiny.pipeline("stable_diffusion_3", tmp_path)
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "saved")
    found = saved.load(tmp_path / "saved")
    assert found.text_encoder_3 is None
    assert np.array_equal(drawn(found, "stable_diffusion_3"), drawn(pipe, "stable_diffusion_3"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny")
    tiny.pipeline("stable_diffusion", place).save_pretrained(place / "saved")
    return place / "saved"


def pickled(folder):
    tiny.pipeline("stable_diffusion", folder.parent).save_pretrained(folder, safe_serialization=False)
    for path in folder.rglob("*.safetensors"):
        path.unlink()


def several(folder):
    for name in ("fp16", "bf16"):
        (folder / f"unet/diffusion_pytorch_model.{name}.safetensors").write_bytes(b"")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()


def with_lora(folder):
    pipe = tiny.pipeline("stable_diffusion", folder.parent)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    pipe.save_pretrained(folder)


FAULTS = {
    "no such folder": (shutil.rmtree, r"cannot be loaded \(there is no such folder"),
    "pickled": (pickled, "no file named .*safetensors"),
    "cut": (
        lambda folder: (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"0" * 100),
        "unet/diffusion_pytorch_model.safetensors",
    ),
    "a part is missing": (lambda folder: shutil.rmtree(folder / "unet"), "cannot be loaded"),
    "an own text encoder is missing": (lambda folder: shutil.rmtree(folder / "text_encoder"), "cannot be loaded"),
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "model_index.json"),
    "index cut": (lambda folder: (folder / "model_index.json").write_text("{"), "cannot be loaded"),
    "several variants": (several, "variants bf16, fp16; give one of them"),
    "saved with a LoRA": (with_lora, r"unet lacks \d+ weights.*fuse_lora\(\) and unload_lora_weights\(\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_loaded_is_named_in_one_line(fault, folder, tmp_path):
    damage, said = FAULTS[fault]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(DataError, match=said) as caught:
        SharedSamplingPipeline.from_pretrained(copy)
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)


def test_stable_diffusion_3_whose_t5_was_not_copied_is_drawn_as_without(tmp_path, caplog):
    pipe = tiny.pipeline("stable_diffusion_3", tmp_path)
    pipe.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved/text_encoder_3")
    found = saved.load(tmp_path / "saved")
    assert found.text_encoder_3 is None and "is loaded without text_encoder_3, which it lacks" in caplog.text
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    assert np.array_equal(drawn(found, "stable_diffusion_3"), drawn(pipe, "stable_diffusion_3"))
    shutil.rmtree(tmp_path / "saved/text_encoder_2")
    with pytest.raises(DataError, match="it lacks text_encoder_2, text_encoder_3"):
        saved.load(tmp_path / "saved")


def test_what_is_no_folder_and_no_name_on_a_hub_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"model.safetensors cannot be loaded \(Unable to load weights"):
        saved.load(tmp_path / "model.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"model.ckpt is no safetensors file.*pickled; convert it to safetensors"):
        saved.load(tmp_path / "model.ckpt")
    with pytest.raises(DataError, match=r"some/model cannot be loaded: .*the hub gave: .*sage base some/model"):
        saved.load("some/model")


@pytest.fixture
def hub_cache(folder, tmp_path, monkeypatch):
    """A hub cache that holds some/model at commit aaa..., and no network; return the folder of that commit."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "cache/models--some--model/snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    return snapshot


@pytest.mark.parametrize("name", [f"some/model@{COMMIT}", f"hub/some/model@{COMMIT}"])
def test_a_model_of_the_hub_cache_is_loaded_by_its_commit_without_a_network(name, folder, hub_cache):
    if name.startswith("hub/"):
        assert hub.pin(hub.Model("some/model", COMMIT)) == Path(name)
    found = SharedSamplingPipeline.from_pretrained(name)
    assert np.array_equal(drawn(found, "stable_diffusion"), drawn(saved.load(folder), "stable_diffusion"))
    with pytest.raises(DataError, match=f"some/model@{'b' * 40} cannot be loaded: .*this machine's hub cache lacks it"):
        saved.load(name.replace(COMMIT, "b" * 40))
    shutil.rmtree(hub_cache / "unet")
    with pytest.raises(DataError, match="cannot be loaded"):
        saved.load(name)


def test_pins_and_names_on_a_hub_are_told_from_files_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.named("owner/name") == hub.Model("owner/name", None)
    assert hub.named("owner/name@refs/pr/1") == hub.Model("owner/name", "refs/pr/1")
    for text in (f"owner/name@{COMMIT}", f"hub/owner/name@{COMMIT}", f"/a/hub/owner/name@{COMMIT}"):
        assert hub.named(text) == hub.Model("owner/name", COMMIT), text
    for text in ("/owner/name", "name", "hub/owner/name", "hub/owner/name@v1", "a/b/c@d", "owner/name@v1 .0"):
        assert hub.named(text) is None, text
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/name").write_text("a file")
    assert hub.named("owner/name") is None and hub.pinned(f"owner/name@{COMMIT}") is None


def test_an_own_folder_keeps_its_scheduler(tmp_path):
    made = base.assemble(tiny.autoencoder(), tiny.unet(cross_attention_dim=384))
    base.save(made, tmp_path / "shipped")
    again = saved.load(tmp_path / "shipped")
    public = {name: value for name, value in made.scheduler.config.items() if not name.startswith("_")}
    assert {name: again.scheduler.config[name] for name in public} == public
    base.save(again, tmp_path / "again")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "shipped" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    again.scheduler = DDIMScheduler.from_config(again.scheduler.config, clip_sample=False)
    base.save(again, tmp_path / "other")
    assert type(saved.load(tmp_path / "other").scheduler) is DDIMScheduler


def test_what_the_stages_write_can_be_made_a_folder_that_stock_diffusers_loads(tmp_path):
    made = base.assemble(tiny.autoencoder(), tiny.unet(cross_attention_dim=384))
    base.save(made, tmp_path / "own")
    SharedSamplingPipeline.from_pretrained(tmp_path / "own").save_pretrained(tmp_path / "stock")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "stock")
    stock.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "output_type": "np"}
    first, second = (
        pipe("a red heart", generator=torch.Generator().manual_seed(0), **call).images
        for pipe in (stock, base.load(tmp_path / "own"))
    )
    np.testing.assert_allclose(first, second, atol=1e-5)
