"""Shared pipelines from stock ones and from folders."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline

from sage.errors import ConfigurationError, DataError, UnsupportedError
from sage.sampling import base
from sage.sampling.pipeline import SharedSamplingPipeline

CALL = {"num_inference_steps": 4, "output_type": "np"}


class Louder(StableDiffusionPipeline):
    """A subclass with a setting and an encoding of its own."""

    loud = 2.0

    def encode_prompt(self, *args, **kwargs):
        with_text, without = super().encode_prompt(*args, **kwargs)
        return with_text * self.loud, without


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def stock(tmp_path):
    return tiny.pipeline("stable_diffusion", tmp_path)


def test_the_stock_pipeline_and_its_scheduler_stay_as_they_are(stock):
    # The stock constructor would set clip_sample and steps_offset otherwise.
    stock.scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    config, before = dict(stock.scheduler.config), stock("red cat", generator=generator(1), **CALL).images
    shared = SharedSamplingPipeline.from_pipe(stock)
    assert dict(stock.scheduler.config) == config
    assert np.array_equal(shared("red cat", seed=[1], **CALL).images, before)
    assert np.array_equal(stock("red cat", generator=generator(1), **CALL).images, before)
    assert shared.components == stock.components
    steps = stock.scheduler.timesteps.tolist()
    shared("red cat", **CALL | {"num_inference_steps": 7})
    assert stock.scheduler.timesteps.tolist() == steps


def test_what_a_subclass_overrides_is_kept(stock):
    louder = Louder(**stock.components, requires_safety_checker=False)
    louder.loud = 3.0
    louder.set_progress_bar_config(disable=True)
    shared = SharedSamplingPipeline.from_pipe(louder)
    assert isinstance(shared, Louder)
    assert isinstance(shared, SharedSamplingPipeline)
    assert type(SharedSamplingPipeline.from_pipe(shared)) is type(shared)
    expected = louder("red cat", generator=generator(1), **CALL).images
    assert np.array_equal(shared("red cat", seed=[1], **CALL).images, expected)
    assert np.abs(expected - stock("red cat", generator=generator(1), **CALL).images).max() > 0.01


def test_a_subclass_with_a_call_of_its_own_is_refused(stock):
    other = type("Other", (StableDiffusionPipeline,), {"__call__": lambda self, *args, **kwargs: None})
    with pytest.raises(UnsupportedError, match="Other overrides __call__, whose loop may be another one; use StableD"):
        SharedSamplingPipeline.from_pipe(other(**stock.components, requires_safety_checker=False))


def test_an_unsupported_folder_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "KandinskyPipeline", "vae": ["diffusers", "X"]})
    )
    with pytest.raises(UnsupportedError, match=r"KandinskyPipeline cannot share sampling: .*; supported are AuraFlowP"):
        SharedSamplingPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("StableDiffusionImg2ImgPipeline", "cannot share sampling: it takes image, strength, from which single images"),
        ("StableDiffusionXLInpaintPipeline", "cannot share sampling: it takes image, mask_image, strength"),
        ("FluxControlPipeline", "cannot share sampling: it takes control_image"),
        ("MochiPipeline", "can share sampling only if it is proved to: `sage doctor --pipeline` tries it"),
    ],
)
def test_a_class_that_is_not_known_is_refused_with_its_reason(tmp_path, name, reason):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(UnsupportedError, match=f"{name} {reason}"):
        SharedSamplingPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_folder_without_its_text_encoder_says_so_and_loads_for_embeddings(family, tmp_path):
    stock = tiny.pipeline(family, tmp_path)
    stock.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "text_encoder")
    with pytest.raises(DataError, match=r"it lacks text_encoder, which model_index.json names; restore it, or"):
        SharedSamplingPipeline.from_pretrained(tmp_path / "model")
    assert SharedSamplingPipeline.from_pretrained(tmp_path / "model", text_encoder=None).text_encoder is None


def test_a_base_model_loads_with_the_given_precision_and_parts(tmp_path):
    base.save(base.assemble(base.new_autoencoder(), base.new_unet()), tmp_path / "model")
    scheduler = DDIMScheduler()
    pipe = SharedSamplingPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16, scheduler=scheduler)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    assert pipe.scheduler is scheduler
    with pytest.raises(ConfigurationError, match="is a base model, which is loaded without variant"):
        SharedSamplingPipeline.from_pretrained(tmp_path / "model", variant="fp16")
    shutil.rmtree(tmp_path / "model" / "unet")
    with pytest.raises(DataError, match="is no base model: it lacks unet"):
        SharedSamplingPipeline.from_pretrained(tmp_path / "model")


def test_a_subclass_saves_as_the_stock_class(stock, tmp_path):
    louder = Louder(**stock.components, requires_safety_checker=False)
    SharedSamplingPipeline.from_pipe(louder).save_pretrained(tmp_path / "saved")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "saved")) is StableDiffusionPipeline
