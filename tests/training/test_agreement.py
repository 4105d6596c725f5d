"""Training branches where the stock pipeline's own loop stands, whatever its scheduler, spacing and shift."""

import sage.torchvision_ops  # noqa: F401

import diffusers
import pytest
import tiny
import torch

from sage import diffusion

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = {
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "UniPCMultistepScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
}
SPACINGS = {
    "leading, offset": {"timestep_spacing": "leading", "steps_offset": 1},
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "Karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "zero SNR": {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}
STEPS = 6


def taken(kind, changes):
    """Return whether a scheduler has all of these settings; without a spacing of its own it ignores it."""
    return set(changes) <= set(kind.__init__.__wrapped__.__code__.co_varnames)


CASES = [
    pytest.param(getattr(diffusers, name), SD15 | own | changes, id=f"{name}, {spacing}")
    for name, own in SCHEDULERS.items()
    for spacing, changes in SPACINGS.items()
    if taken(getattr(diffusers, name), changes)
]


def asked(pipe, **options):
    """Return the times that the stock pipeline's loop gives its network."""
    times = []

    def note(module, args, kwargs):
        times.append(float((args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0]))

    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    pipe("red cat", num_inference_steps=STEPS, guidance_scale=1.0, output_type="latent", **options)
    handle.remove()
    return torch.tensor(times)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    return tiny.pipeline("stable_diffusion", tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_training_visits_the_times_of_the_stock_loop(kind, config, stable_diffusion):
    stable_diffusion.scheduler = kind(**config)
    expected = asked(stable_diffusion)
    found = diffusion.network_times(stable_diffusion.scheduler)[diffusion.visited(stable_diffusion.scheduler, STEPS)]
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.501)  # rounded to a training timestep


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_visits_the_times_of_the_stock_loop(shift, tmp_path):
    pipe = tiny.pipeline("stable_diffusion_3", tmp_path)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    expected = asked(pipe, height=16, width=16, **tiny.OPTIONS["stable_diffusion_3"])
    found = diffusion.network_times(pipe.scheduler)[diffusion.visited(pipe.scheduler, STEPS)]
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.6 * shift)  # the shifted times lie further apart
