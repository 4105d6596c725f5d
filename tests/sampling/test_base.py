import json

import sage.torchvision_ops  # noqa: F401

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sage.errors import DataError
from sage.sampling import base


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "model"
    base.save(base.assemble(base.new_autoencoder(), base.new_unet()), folder)
    return folder


def test_weights_fit_into_25_megabytes(saved):
    assert sum(path.stat().st_size for path in saved.rglob("*.safetensors")) < 25e6


def test_load_returns_the_saved_weights_rounded_to_half_precision(saved):
    torch.manual_seed(0)
    expected = base.new_autoencoder().state_dict()
    found = base.load(saved).vae.state_dict()
    assert all(torch.equal(found[name], expected[name].half().float()) for name in expected)


def test_stock_diffusers_loads_the_folder_given_the_text_parts(saved):
    tokenizer, encoder = base.text_parts()
    stock = StableDiffusionPipeline.from_pretrained(
        saved, tokenizer=tokenizer, text_encoder=encoder, dtype=torch.float32
    )
    stock.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "output_type": "np", "guidance_scale": 3.0}
    images = stock("red heart", generator=torch.Generator().manual_seed(1), **call).images
    ours = base.load(saved)("red heart", generator=torch.Generator().manual_seed(1), **call).images
    assert images.shape == (1, 64, 64, 3)
    assert (images == ours).all()


def test_padding_does_not_reach_the_words():
    """With padding masked, a prompt's own tokens have the states that they have without padding."""
    tokenizer, encoder = base.text_parts()
    padded = tokenizer("red heart", padding="max_length", return_tensors="pt")
    bare = tokenizer("red heart", return_tensors="pt")
    n = bare.input_ids.shape[1]
    assert padded.input_ids.shape[1] == base.MAX_TOKENS > n
    states = encoder(padded.input_ids, attention_mask=padded.attention_mask).last_hidden_state
    torch.testing.assert_close(states[:, :n], encoder(**bare).last_hidden_state)


@pytest.mark.parametrize("missing", ["unet", "model_index.json"])
def test_an_incomplete_folder_is_named_with_what_it_lacks(saved, tmp_path, missing):
    for item in saved.iterdir():
        if item.name != missing:
            (tmp_path / item.name).symlink_to(item)
    with pytest.raises(DataError, match=missing):
        base.load(tmp_path)


def test_the_index_names_the_classes_that_are_there(saved):
    index = json.loads((saved / "model_index.json").read_text())
    pipeline = base.load(saved)
    for name in ("vae", "unet", "scheduler", "text_encoder", "tokenizer"):
        assert type(getattr(pipeline, name)).__name__ == index[name][1]
