import functools
import itertools

import pytest
import torch
from test_finetuning import ALL, GROUPS, data, loss_of, unet, weights

from sage.diffusion import NoiseSchedule
from sage.sampling import base
from sage.training import validation
from sage.training.finetuning import TrainingSet
from sage.training.loop import processes
from sage.training.validation import BANDS, held_out_batches, held_out_loss


@functools.cache
def measured(network):
    batches = held_out_batches(GROUPS, ALL, 6, 0)
    loss = loss_of(network, batches)
    return held_out_loss(network, base.new_scheduler(), data(), batches, loss)()


def test_measurements_are_the_same_each_time_and_another_networks_differ():
    network = unet()
    assert measured(network) == measured.__wrapped__(network) != measured(unet(1))


def test_the_terms_are_the_means_of_training_batches():
    network = unet()
    batches = held_out_batches(GROUPS, ALL, 6, 0)
    with torch.no_grad():
        steps = [loss_of(network, batches)(step) for step in range(2)]  # 12 images fill two batches
    for name in ("loss", "diffusion", "shared", "branch"):
        assert measured(network)[f"validation_{name}"] == pytest.approx(sum(float(s[name]) for s in steps) / 2)


def test_a_band_is_the_error_at_its_timesteps():
    """A network that answers with zero errs by the target, alpha eps - sigma x_0, whose size is known in each band."""
    network, schedule = unet(), NoiseSchedule.of(base.new_scheduler())
    network.network.conv_out.requires_grad_(False).weight.zero_()
    network.network.conv_out.bias.zero_()
    latents = 3 * data().latents
    large = TrainingSet(latents, data().conditions, data().captions, GROUPS)
    batches = held_out_batches(GROUPS, ALL, 5, 0)
    values = held_out_loss(network, base.new_scheduler(), large, batches, lambda step: {"loss": torch.zeros(())})()
    edges = [len(schedule) * k // BANDS for k in range(BANDS + 1)]
    spans = list(itertools.pairwise(edges))
    assert [name for name in values if "_t" in name] == [f"validation_t{low}_{high - 1}" for low, high in spans]
    for low, high in spans:
        size = schedule.alphas[low:high].square().mean() + latents.square().mean() * (
            schedule.sigmas[low:high].square().mean()
        )
        assert values[f"validation_t{low}_{high - 1}"] == pytest.approx(float(size), rel=0.1)


def test_processes_share_the_work_and_get_the_same_values(monkeypatch):
    """Each of two ranks measures a part; what `all_reduce` adds up is what one process measures."""
    network, parts = unet(), []
    monkeypatch.setattr(validation.distributed, "all_reduce", lambda sums: parts.append(sums.clone()))
    for rank in (0, 1):
        monkeypatch.setattr(validation, "processes", lambda rank=rank: (rank, 2))
        measured.__wrapped__(network)
    assert processes() == (0, 1)
    monkeypatch.setattr(validation, "processes", processes)
    torch.testing.assert_close(sum(parts), torch.tensor(list(measured(network).values())).double())
    assert all(part.count_nonzero() == len(part) for part in parts)


@pytest.mark.parametrize(
    ("groups", "given", "terms"),
    [
        (GROUPS, ALL, {"diffusion", "shared", "branch"}),
        (GROUPS, weights(consistency=1.0), {"diffusion"}),
        (GROUPS, weights(branch=1.0), {"branch"}),
        (((0,), (1,), (2,)), weights(branch=1.0), {"diffusion"}),
    ],
)
def test_held_out_terms_are_the_trained_ones_that_the_split_has(groups, given, terms):
    batches = held_out_batches(groups, given, 6, 0)
    assert batches.rows(0).keys() == terms and batches.weights["consistency"] == 0
