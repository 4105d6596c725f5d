"""A single .safetensors file is drawn as the pipeline that it was made of, or what it lacks is said in one line."""

import shutil

import numpy as np
import pytest
import single_files
import tiny
import torch
from diffusers import PixArtAlphaPipeline
from huggingface_hub import constants

from flows.drawing import open_pipeline
from sage.errors import DataError
from sage.grouping.cost import model_digest
from sage.sampling import saved

PUBLISHED = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Return the folder of an empty hub cache; there is no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def made(tmp_path):
    return tiny.pipeline("stable_diffusion", tmp_path)


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("red cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_folder_of_a_file_and_its_configuration_is_drawn_as_what_was_saved(dtype, made, tmp_path, offline):
    folder = single_files.configuration(made, tmp_path / "model")
    single_files.write(made, folder / "anything.safetensors", dtype)
    found = open_pipeline(folder, "cpu")
    assert {part.dtype for part in (found.unet, found.vae, found.text_encoder)} == {torch.float32}
    assert type(found.scheduler) is type(made.scheduler)
    expected = drawn(made.to(dtype).to(torch.float32))
    np.testing.assert_allclose(drawn(saved.load(folder)), expected, atol=1e-5)
    np.testing.assert_allclose(drawn(saved.load(folder / "anything.safetensors")), expected, atol=1e-5)


def test_its_weights_count_for_what_is_measured_on_it(made, tmp_path):
    folder = single_files.configuration(made, tmp_path / "model")
    single_files.write(made, folder / "model.safetensors")
    before = model_digest(folder)
    (folder / "damage.json").write_text("{}")
    assert model_digest(folder) == before
    made.unet.conv_out.bias.data += 1
    single_files.write(made, folder / "model.safetensors")
    assert model_digest(folder) != before


def test_a_file_alone_needs_the_published_configuration_in_the_hub_cache(made, tmp_path, offline):
    single_files.write(made, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=rf"is a single file without configuration: .*hf download {PUBLISHED}"):
        saved.load(tmp_path / "model.safetensors")
    place = offline / f"models--{PUBLISHED.replace('/', '--')}"
    single_files.configuration(made, place / "snapshots" / ("c" * 40))
    (place / "refs").mkdir()
    (place / "refs/main").write_text("c" * 40)
    np.testing.assert_allclose(drawn(saved.load(tmp_path / "model.safetensors")), drawn(made), atol=1e-5)


def test_a_family_without_single_files_and_a_file_that_lacks_a_part_are_named(made, tmp_path, offline):
    folder = single_files.configuration(tiny.pipeline("pixart_alpha", tmp_path), tmp_path / "pixart")
    single_files.write(made, folder / "model.safetensors")
    assert not hasattr(PixArtAlphaPipeline, "from_single_file")
    with pytest.raises(DataError, match="a single file, from which diffusers cannot load PixArtAlphaPipeline"):
        saved.load(folder)
    folder = single_files.configuration(made, tmp_path / "model")
    del made.text_encoder
    made.text_encoder = torch.nn.Module()
    single_files.write(made, folder / "model.safetensors")
    with pytest.raises(DataError, match=r"model cannot be loaded .*CLIP"):
        saved.load(folder)
    shutil.copy(folder / "model.safetensors", folder / "second.safetensors")
    with pytest.raises(DataError, match="model cannot be loaded"):
        saved.load(folder)
