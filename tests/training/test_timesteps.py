import sage.torchvision_ops  # noqa: F401

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from test_finetuning import GROUPS, data, loss_of, unet, weights

from sage.errors import UnsupportedError
from sage.randomness import generator, stratified_uniform
from sage.sampling import base
from sage.training.batches import Batches
from sage.training.timesteps import check, drawn


def test_uniform_is_what_it_was():
    found = drawn("uniform", 64, 1000, generator(0, 1))
    assert torch.equal(found, (stratified_uniform(64, generator(0, 1)) * 1000).long())


def test_logit_normal_is_the_density_of_the_stock_trainer():
    ours = drawn("logit_normal", 4000, 1000, generator(0)) / 1000
    random = torch.Generator().manual_seed(0)
    stock = compute_density_for_timestep_sampling("logit_normal", 40_000, 0.0, 1.0, generator=random)
    places = torch.linspace(0.01, 0.99, 25)
    torch.testing.assert_close(torch.quantile(ours, places), torch.quantile(stock, places), atol=0.01, rtol=0)
    assert not torch.equal(ours, ours.sort().values), "timesteps must not follow the order of the images"


@pytest.mark.parametrize("n", [1, 3, 10_000])
def test_all_timesteps_are_of_the_schedule(n):
    for seed in range(20):
        found = drawn("logit_normal", n, 10, generator(seed))
        assert found.dtype == torch.long and len(found) == n and 0 <= found.min() <= found.max() < 10


def test_it_is_for_flow_matching_alone():
    check("logit_normal", FlowMatchEulerDiscreteScheduler(shift=3.0))
    check("uniform", base.new_scheduler())
    network = unet()
    batches = Batches(GROUPS, weights(diffusion=1.0), 6, 0)
    with pytest.raises(
        UnsupportedError, match="logit_normal is for flow matching, but DPMSolverMultistepScheduler has prediction type"
    ):
        loss_of(network, batches, data(), timestep_sampling="logit_normal")
