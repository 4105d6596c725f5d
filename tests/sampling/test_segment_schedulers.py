"""Every supported scheduler, spacing and shift with stock pipelines that take it: one table."""

from functools import partial

import diffusers
import pytest
import tiny_families
import torch
from test_segments import drift, half, scale, shared, stock
from tiny_families import FLOW, rows

from sage.sampling.loop import HISTORY
from sage.sampling.pipeline import SharedSamplingPipeline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
    # diffusers asks torchsde for noise up to 500.00006, rounded, of 500, and from 0.29999998 of 0.3.
    pytest.mark.filterwarnings("ignore:Should have t[ab][<>]=t[01] but got:UserWarning"),
]
STEPS = 5
SEEDS = ([5, 6], [7, 8])
FLOWS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SANA, SIGMA, AUDIO, FLUX = "SanaPipeline", "PixArtSigmaPipeline", "StableAudioPipeline", "FluxPipeline"
CONTROLLED = "StableDiffusionControlNetPipeline"
# Family, scheduler, and arguments of the call.
ROWS = [
    (SANA, partial(FLOW, shift=3.0), {}),
    (SANA, partial(FLOW, use_karras_sigmas=True), {}),
    (SANA, partial(FLOW, use_exponential_sigmas=True), {}),
    (SANA, partial(FLOW, use_beta_sigmas=True), {}),
    (SANA, partial(FLOW, shift_terminal=0.1), {}),
    (SANA, FLOW, {"sigmas": [1.0, 0.9, 0.5, 0.3, 0.1]}),
    (SANA, diffusers.FlowMatchHeunDiscreteScheduler, {}),
    (SANA, partial(diffusers.DPMSolverMultistepScheduler, **FLOWS), {}),
    (SANA, partial(diffusers.UniPCMultistepScheduler, **FLOWS), {}),
    (FLUX, partial(FLOW, use_dynamic_shifting=True, use_karras_sigmas=True), {}),
    (FLUX, partial(FLOW, use_dynamic_shifting=True, time_shift_type="linear"), {}),
    ("LTXPipeline", partial(FLOW, use_dynamic_shifting=True, shift_terminal=0.1), {}),
    ("WanPipeline", partial(diffusers.UniPCMultistepScheduler, **FLOWS), {}),
    ("WanPipeline", partial(diffusers.DPMSolverMultistepScheduler, **FLOWS), {}),
    (SIGMA, partial(diffusers.DDIMScheduler, timestep_spacing="trailing"), {}),
    (SIGMA, partial(diffusers.DDIMScheduler, prediction_type="v_prediction", rescale_betas_zero_snr=True), {}),
    (SIGMA, diffusers.DDPMScheduler, {}),
    (SIGMA, partial(diffusers.EulerDiscreteScheduler, use_karras_sigmas=True), {}),
    (SIGMA, partial(diffusers.EulerDiscreteScheduler, use_exponential_sigmas=True), {}),
    (SIGMA, partial(diffusers.EulerDiscreteScheduler, use_beta_sigmas=True), {}),
    (SIGMA, diffusers.EulerDiscreteScheduler, {"timesteps": [900, 700, 500, 300, 50]}),
    (SIGMA, partial(diffusers.EulerAncestralDiscreteScheduler, timestep_spacing="leading"), {}),
    (SIGMA, partial(diffusers.HeunDiscreteScheduler, use_karras_sigmas=True), {}),
    (SIGMA, partial(diffusers.DPMSolverMultistepScheduler, use_karras_sigmas=True, solver_order=3), {}),
    (SIGMA, partial(diffusers.DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"), {}),
    (SIGMA, partial(diffusers.DPMSolverMultistepScheduler, use_lu_lambdas=True), {}),
    (SIGMA, diffusers.DPMSolverSinglestepScheduler, {}),
    (SIGMA, diffusers.UniPCMultistepScheduler, {}),
    (SIGMA, diffusers.LMSDiscreteScheduler, {}),
    (SIGMA, partial(diffusers.PNDMScheduler, skip_prk_steps=True), {}),
    (CONTROLLED, diffusers.UniPCMultistepScheduler, {}),
    (CONTROLLED, partial(diffusers.DDIMScheduler, clip_sample=False), {}),
    (AUDIO, diffusers.EDMEulerScheduler, {}),
    (AUDIO, partial(diffusers.EDMDPMSolverMultistepScheduler, sigma_schedule="exponential"), {}),
    (AUDIO, partial(diffusers.EDMDPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"), {}),
    (AUDIO, "CosineDPMSolverMultistepScheduler", {}),
]


def said(row) -> str:
    name, make, call = row
    kind = make if isinstance(make, str) else getattr(make, "func", make).__name__
    settings = {**getattr(make, "keywords", {}), **dict.fromkeys(call, "own")}
    return "-".join([name, kind, *(f"{key}={value}" for key, value in settings.items() if key not in FLOWS)])


def made(make):
    """Return a scheduler; the one with Brownian noise needs another package, in diffusers, too."""
    if isinstance(make, str):
        pytest.importorskip("torchsde", reason=f"{make} of diffusers needs torchsde")
        make = getattr(diffusers, make)
    return make()


@pytest.mark.parametrize("row", ROWS, ids=said)
def test_a_scheduler_is_the_stock_pipelines_and_branches(row):
    name, make, call = row
    family = tiny_families.tiny(name)
    family.pipe.scheduler = made(make)
    embeddings, call = family.embed(2), {"num_inference_steps": STEPS, **call}
    alone = shared(family, embeddings, [5, 6], **call)
    assert torch.equal(alone.images, stock(family, embeddings, [5, 6], **call))
    # Equal prompts of one seed are one image, so the history went to the right rows at the branch.
    together = {"groups": [[0, 1, 2], [3]], "share_ratio": 0.4}  # inside a step of Heun's two evaluations
    found = shared(family, rows(embeddings, [0, 0, 1, 1]), [5, 5, 5, 6], **call, **together)
    assert found.cost.network_evaluations == found.cost.formula < found.cost.independent
    twins = found.images
    assert drift(twins[0], twins[1]) < min(scale(twins), drift(twins[0], twins[2]) / 10)
    assert drift(twins[3], alone.images[1]) < scale(twins)


def streamed(pipe, family, embeddings, seeds):
    call = family.call | {"num_inference_steps": STEPS, "output_type": "latent", "share_ratio": 0, "batch_size": 1}
    if family.guidance:
        call["guidance_scale"] = family.guidance[1]
    return pipe.stream(**embeddings, **call, seed=seeds)


@pytest.mark.parametrize("row", ROWS, ids=said)
def test_what_a_scheduler_keeps_belongs_to_its_call(row):
    """Two calls at once, one that was abandoned, and half precision."""
    name, make, call = row
    family = tiny_families.tiny(name)
    family.pipe.scheduler = made(make)
    embeddings, family.call = family.embed(2), {**family.call, **call}
    pipe = SharedSamplingPipeline.from_pipe(family.pipe)
    expected = [shared(family, embeddings, seeds, num_inference_steps=STEPS, batch_size=1).images for seeds in SEEDS]
    abandoned = streamed(pipe, family, embeddings, [5, 6])
    next(abandoned)
    streams = [streamed(pipe, family, embeddings, seeds) for seeds in SEEDS]
    for number, results in enumerate(zip(*streams, strict=True)):
        for result, images in zip(results, expected, strict=True):
            assert torch.equal(result.image, images[number])
    family.pipe.to(torch.bfloat16)
    embeddings = half(embeddings)
    found = shared(family, embeddings, [5, 6], num_inference_steps=STEPS).images
    assert torch.equal(found, stock(family, embeddings, [5, 6], num_inference_steps=STEPS))


def test_the_table_names_every_supported_scheduler():
    kinds = {make if isinstance(make, str) else getattr(make, "func", make).__name__ for _, make, _ in ROWS}
    assert kinds == set(HISTORY)
