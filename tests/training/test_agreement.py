"""Training branches where the stock pipeline's own loop stands, whatever its scheduler, spacing and shift."""

import sage.torchvision_ops  # noqa: F401

import diffusers
import pytest
import tiny
import torch

from sage import diffusion
from sage.training.denoiser import Denoiser

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


def told(denoiser, scheduler, size):
    """Return the times that training gives the network where it stands for the sampler's steps."""
    condition = denoiser.encode_texts(["red cat"], size)
    visited = denoiser.times(scheduler, STEPS, denoiser.encode_images(torch.zeros(1, *size, 3)), condition)
    return diffusion.network_times(scheduler)[visited]


@pytest.mark.parametrize(("kind", "config"), CASES)
def test_training_visits_the_times_of_the_stock_loop(kind, config, stable_diffusion):
    stable_diffusion.scheduler = kind(**config)
    expected = asked(stable_diffusion)
    found = told(Denoiser(stable_diffusion), stable_diffusion.scheduler, (16, 16))
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.501)  # rounded to a training timestep


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"shift": 1.0}, (16, 16)),
        ({"shift": 3.0}, (16, 16)),
        ({"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}, (16, 16)),
        ({"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}, (16, 32)),
    ],
)
@pytest.mark.parametrize("family", ["stable_diffusion_3", "flux"])
def test_flow_matching_visits_the_times_of_the_stock_loop(family, config, size, tmp_path, monkeypatch):
    pipe = tiny.pipeline(family, tmp_path)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    expected = asked(pipe, height=size[0], width=size[1], **tiny.OPTIONS[family])
    expected *= 1000 if family == "flux" else 1  # its network takes a time of 1 at most
    denoiser = Denoiser(pipe)
    denoiser._pipe._options = {**denoiser._pipe._options, **tiny.OPTIONS[family]}
    found = told(denoiser, pipe.scheduler, size)
    shift = config.get("shift", 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.6 * shift)  # the shifted times lie further apart
    if family == "flux" and "use_dynamic_shifting" in config:
        unshifted = 1000 * (1 - torch.arange(STEPS) / STEPS)
        assert (found[1:] > unshifted[1:] + 20).all()
