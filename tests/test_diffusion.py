import sage.torchvision_ops  # noqa: F401

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from sage import diffusion
from sage.errors import UnsupportedError
from sage.sampling import base

KINDS = ("epsilon", "v_prediction", "sample")


@pytest.fixture
def levels():
    return diffusion.noise_levels(base.new_scheduler())


@pytest.fixture
def draws():
    random = torch.Generator().manual_seed(0)
    return (torch.randn(5, 3, 4, 4, generator=random) for _ in range(2))


def test_levels_keep_the_variance_and_reach_zero_signal(levels):
    alphas, sigmas = levels
    torch.testing.assert_close(alphas**2 + sigmas**2, torch.ones(1000))
    assert alphas[-1] < 3e-4 and sigmas[-1] > 1 - 1e-6
    assert (sigmas > 0).all()


def test_noising_is_that_of_diffusers(draws):
    x_0, eps = draws
    t = torch.tensor([0, 10, 500, 998, 999])
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    alpha, sigma = (level[t] for level in diffusion.noise_levels(scheduler))
    torch.testing.assert_close(diffusion.add_noise(x_0, eps, alpha, sigma), scheduler.add_noise(x_0, eps, t))
    torch.testing.assert_close(
        diffusion.target("v_prediction", x_0, eps, alpha, sigma), scheduler.get_velocity(x_0, eps, t)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_means_the_sample_that_it_was_made_from(kind, levels, draws):
    x_0, eps = draws
    t = torch.tensor([0, 10, 500, 900, 990])
    alpha, sigma = (level[t] for level in levels)
    x_t = diffusion.add_noise(x_0, eps, alpha, sigma)
    output = diffusion.target(kind, x_0, eps, alpha, sigma)
    torch.testing.assert_close(diffusion.predicted_sample(kind, output, x_t, alpha, sigma), x_0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_sample_is_that_of_the_sampler(kind, draws):
    x_t, output = draws
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    alphas, sigmas = diffusion.noise_levels(scheduler)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[3]
    alpha, sigma = (level[t].repeat(5) for level in (alphas, sigmas))
    expected = scheduler.step(output, t, x_t).pred_original_sample
    torch.testing.assert_close(diffusion.predicted_sample(kind, output, x_t, alpha, sigma), expected)


def test_implied_noise_is_the_noise_that_was_added(levels, draws):
    x_0, eps = draws
    t = torch.tensor([0, 10, 500, 998, 999])
    alpha, sigma = (level[t] for level in levels)
    x_t = diffusion.add_noise(x_0, eps, alpha, sigma)
    torch.testing.assert_close(diffusion.implied_noise(x_t, x_0, alpha, sigma), eps, rtol=1e-4, atol=1e-4)


def test_what_is_not_known_is_refused():
    with pytest.raises(UnsupportedError, match="FlowMatchHeunDiscreteScheduler has no alphas_cumprod"):
        diffusion.noise_levels(FlowMatchHeunDiscreteScheduler())
    with pytest.raises(UnsupportedError, match="flow_prediction"):
        diffusion.prediction_type(DDIMScheduler(prediction_type="flow_prediction"))
    assert diffusion.prediction_type(base.new_scheduler()) == "v_prediction"


def test_flow_matching_is_that_of_diffusers(draws):
    x_0, eps = draws
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)  # leaves other levels in it
    alphas, sigmas = diffusion.noise_levels(scheduler)
    times = diffusion.network_times(scheduler)
    fresh = FlowMatchEulerDiscreteScheduler(shift=3.0)
    t = torch.tensor([0, 10, 500, 998, 999])
    told = times[t]
    assert told.tolist() == fresh.timesteps.flip(0)[t].tolist() and told[-1] == 1000
    x_t = diffusion.add_noise(x_0, eps, alphas[t], sigmas[t])
    torch.testing.assert_close(x_t, fresh.scale_noise(x_0, told, eps))
    kind = diffusion.prediction_type(scheduler)
    output = diffusion.target(kind, x_0, eps, alphas[t], sigmas[t])
    torch.testing.assert_close(diffusion.predicted_sample(kind, output, x_t, alphas[t], sigmas[t]), x_0)
    assert torch.equal(diffusion.network_times(base.new_scheduler()), torch.arange(1000))


def test_the_sampler_follows_the_flow_to_the_sample(draws):
    x_0, x = draws
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        eps = diffusion.implied_noise(x, x_0, (1 - sigma).repeat(5), sigma.repeat(5))
        x = scheduler.step(diffusion.target("flow_prediction", x_0, eps, 1 - sigma, sigma), t, x).prev_sample
    torch.testing.assert_close(x, x_0, rtol=1e-3, atol=1e-4)
