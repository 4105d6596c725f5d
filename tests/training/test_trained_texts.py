"""Adapters of text encoders in training: captions are read anew in each step, and the frozen base reads as before."""

import sage.torchvision_ops  # noqa: F401

import pytest
import tiny
import torch
from test_denoiser import GROUPS, SIZE, WEIGHTS, images, loss_of
from test_lora import ENCODERS

from sage.training import lora
from sage.training.denoiser import Denoiser
from sage.training.finetuning import TrainingSet
from sage.training.loop import Schedule, fit

TEXTS = [*tiny.PROMPTS, "never asked for", ""]


def adapted(family, tmp_path, asked=None):
    """Return a denoiser with adapters of network and text encoders, its training set, and the pipeline."""
    pipe = tiny.pipeline(family, tmp_path)
    denoiser = Denoiser(pipe)
    denoiser._pipe._options = {**denoiser._pipe._options, **tiny.OPTIONS.get(family, {})}
    cached = denoiser.encode_texts(TEXTS, SIZE)

    def encode(rows):
        (asked if asked is not None else []).append(rows)
        return denoiser.current_texts([TEXTS[row] for row in rows], SIZE)

    encoders = lora.trainable_encoders(pipe)
    lora.add(denoiser.network, 2, seed=0)
    lora.add_to_texts(encoders, 2, 0)
    denoiser.train_texts(encoders)
    data = TrainingSet(denoiser.encode_images(images(5)), cached, torch.arange(5)[:, None], GROUPS, encode=encode)
    return denoiser, data, pipe


def wake(denoiser):
    for name, values in denoiser.texts.named_parameters():
        if "lora_B" in name:
            values.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))


@pytest.mark.parametrize("family", ENCODERS)
def test_gradients_reach_every_text_encoder(family, tmp_path):
    denoiser, data, pipe = adapted(family, tmp_path)
    step_loss = loss_of(denoiser, data, pipe.scheduler, branch_start="sampled")
    still = loss_of(denoiser, TrainingSet(data.latents, data.conditions, data.captions, GROUPS), pipe.scheduler,
                    branch_start="sampled")  # fmt: skip
    # An adapter begins as nothing, so the first step is that of cached conditions.
    torch.testing.assert_close(step_loss(0)["loss"], still(0)["loss"])
    step_loss(0)["loss"].backward()
    for name in ENCODERS[family]:
        grown = [p.grad.abs().max() for p in denoiser.texts[name].parameters() if p.grad is not None]
        assert grown and max(grown) > 0
    wake(denoiser)
    assert (step_loss(0)["loss"] - still(0)["loss"]).abs() > 1e-6


def test_parts_with_trained_texts_add_up_to_the_step(tmp_path):
    denoiser, data, pipe = adapted("stable_diffusion", tmp_path)
    wake(denoiser)
    step_loss = loss_of(denoiser, data, pipe.scheduler, batch_size=7)
    trained = [p for p in denoiser.parameters() if p.requires_grad]

    def gradient(values):
        denoiser.zero_grad()
        sum(value["loss"] for value in values).backward()
        return torch.cat([p.grad.flatten() for p in trained if p.grad is not None])

    expected = gradient([step_loss(3)])
    found = gradient([step_loss(3, part, 3) for part in range(3)])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_the_frozen_base_reads_captions_as_it_did(tmp_path):
    denoiser, data, pipe = adapted("stable_diffusion", tmp_path)
    weights = {"shared": 0.0, "branch": 0.0, "consistency": 1.0}
    step_loss = loss_of(denoiser, data, pipe.scheduler, weights=weights)
    still = TrainingSet(data.latents, data.conditions, data.captions, GROUPS)
    cached = loss_of(denoiser, still, pipe.scheduler, weights=weights)(0)["consistency"].detach()
    torch.testing.assert_close(step_loss(0)["consistency"].detach(), cached)
    wake(denoiser)
    # The adapter of the network is still nothing, so all of the difference comes from the texts.
    assert step_loss(0)["consistency"] > 2 * cached


def test_only_the_captions_of_a_step_are_read(tmp_path):
    asked = []
    denoiser, data, pipe = adapted("stable_diffusion", tmp_path, asked)
    weights = {"diffusion": 1.0, "shared": 0.0, "branch": 0.0, "consistency": 0.0}
    loss_of(denoiser, data, pipe.scheduler, batch_size=3, weights=weights)(0)
    [rows] = asked
    assert rows[-1] == len(TEXTS) - 1 and set(rows[:-1]) <= set(range(5))


def test_text_encoders_learn_and_resume(tmp_path):
    finals = []
    for stop in (None, 2):
        denoiser, data, pipe = adapted("stable_diffusion", tmp_path)
        step_loss, work = loss_of(denoiser, data, pipe.scheduler, weights=WEIGHTS), tmp_path / f"work{stop}"
        schedule = Schedule(4, 0.01, warmup=0, ema=0.0, checkpoint_every=2)
        if stop:
            fit(denoiser, step_loss, Schedule(2, 0.01, warmup=0, ema=0.0, checkpoint_every=2), work=work, identity={})
            denoiser, data, pipe = adapted("stable_diffusion", tmp_path)
            step_loss = loss_of(denoiser, data, pipe.scheduler, weights=WEIGHTS)
        fit(denoiser, step_loss, schedule, work=work, identity={})
        finals.append({name: values for name, values in denoiser.texts.named_parameters() if values.requires_grad})
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    assert any(values.any() for name, values in finals[0].items() if "lora_B" in name)
