import sage.torchvision_ops  # noqa: F401

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from torch.nn import functional as F

from sage import diffusion
from sage.diffusion import NoiseSchedule
from sage.sampling import base, branch_noise
from sage.sampling.loop import rollout
from sage.training import loss

KINDS = ("epsilon", "v_prediction", "sample")
SHAPE = (2, 4, 4)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(n):
    return {"states": randn(n, 5, 8)}


def scheduler_of(kind):
    return DDIMScheduler.from_config(base.new_scheduler().config, prediction_type=kind, clip_sample=False)


def schedule_of(kind):
    return NoiseSchedule(kind, *diffusion.noise_levels(scheduler_of(kind)))


@pytest.fixture
def group():
    """Three items of one group of three and one of two, padded: latents (4, 3, ...) and who is present."""
    z = randn(4, 3, *SHAPE)
    z[:3] = z[0]
    present = torch.ones(4, 3, dtype=torch.bool)
    present[3, 2] = False
    z[3, 2] = 1e3  # padding must count nothing, whatever it holds
    return z, present


def test_posterior_is_the_mean_at_pure_noise_and_the_member_without_noise(group):
    z, present = group
    schedule = schedule_of("v_prediction")
    mean = loss.member_weights("mean", z[:, 0], z, present, *schedule.at(torch.tensor([500] * 4)))
    assert mean[3].tolist() == [0.5, 0.5, 0] and mean[0].tolist() == pytest.approx([1 / 3] * 3)

    alpha, sigma = schedule.at(torch.full((4,), 999))
    torch.testing.assert_close(loss.member_weights("posterior", randn(4, *SHAPE), z, present, alpha, sigma), mean)

    alpha, sigma = schedule.at(torch.full((4,), 0))
    x_t = diffusion.add_noise(z[:, 1], randn(4, *SHAPE), alpha, sigma)
    weights = loss.member_weights("posterior", x_t, z, present, alpha, sigma)
    assert weights[:, 1].tolist() == [1, 1, 1, 1]


def test_posterior_is_bayes_rule(group):
    z, present = group
    schedule = schedule_of("v_prediction")
    t = torch.tensor([300, 600, 900, 800])
    alpha, sigma = schedule.at(t)
    x_t = diffusion.add_noise(z[:, 0], randn(4, *SHAPE, seed=1), alpha, sigma)
    weights = loss.member_weights("posterior", x_t, z, present, alpha, sigma)
    for i in range(4):
        likelihood = [
            torch.distributions.Normal(alpha[i] * z[i, n], sigma[i]).log_prob(x_t[i]).double().sum()
            if present[i, n]
            else torch.tensor(-torch.inf, dtype=torch.float64)
            for n in range(3)
        ]
        expected = torch.stack(likelihood).softmax(0)
        torch.testing.assert_close(weights[i].double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_finite_from_no_noise_to_no_signal(kind):
    schedule = schedule_of(kind)
    t = torch.tensor([0, 1, 500, 998, 999])
    x_t, x_0 = randn(5, *SHAPE), randn(5, *SHAPE, seed=1)
    target = schedule.target(x_t, x_0, t)
    assert target.isfinite().all()
    # But for eps at pure noise, where it says nothing, the target means the x_0 asked for.
    some = slice(0, 3) if kind == "epsilon" else slice(None)
    found = diffusion.predicted_sample(kind, target, x_t, *schedule.at(t))
    torch.testing.assert_close(found[some], x_0[some], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("soft", ["mean", "posterior"])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_phase_of_one_member_is_plain_diffusion(kind, soft):
    schedule, t = schedule_of(kind), torch.tensor([0, 400, 999])
    z, c, eps = randn(3, *SHAPE), text(3), randn(3, *SHAPE, seed=1)
    alone = loss.shared_query(schedule, soft, z, z[:, None], torch.ones(3, 1, dtype=torch.bool), c, t, eps)
    plain = loss.diffusion_query(schedule, z, c, t, eps)
    assert torch.equal(alone.x_t, plain.x_t) and torch.equal(alone.condition["states"], plain.condition["states"])
    torch.testing.assert_close(alone.target, plain.target, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("soft", ["mean", "posterior"])
def test_shared_phase_answers_with_the_soft_target(soft, group):
    z, present = group
    schedule, t = schedule_of("sample"), torch.tensor([500, 700, 900, 800])
    query = loss.shared_query(schedule, soft, z[:, 0], z, present, text(4), t, randn(4, *SHAPE, seed=1))
    weights = loss.member_weights(soft, query.x_t, z, present, *schedule.at(t))
    expected = torch.stack([sum(weights[i, n] * z[i, n] for n in range(3)) for i in range(4)])
    torch.testing.assert_close(query.target, expected)


SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SAMPLERS = {
    "shipped": base.new_scheduler(),
    "leading": DDIMScheduler(**SD15, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
    "leading, Euler": EulerDiscreteScheduler(**SD15, steps_offset=1, timestep_spacing="leading"),
    "linspace": DPMSolverMultistepScheduler(**SD15),
    "Karras": EulerDiscreteScheduler(**SD15, use_karras_sigmas=True),
    "Karras, DPM++": DPMSolverMultistepScheduler(**SD15, use_karras_sigmas=True),
    "PNDM": PNDMScheduler(**SD15, steps_offset=1, skip_prk_steps=True),
    "Heun": HeunDiscreteScheduler(**SD15),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [6, 30])
def test_branch_time_is_where_the_sampler_stands(name, steps):
    """After k evaluations, for any k: the sampler's noise level, and the time that it gives the network."""
    scheduler = SAMPLERS[name]
    scheduler.set_timesteps(steps)
    visited, times = diffusion.visited(scheduler), diffusion.network_times(scheduler)
    sigmas = diffusion.noise_levels(scheduler)[1]
    torch.testing.assert_close(times[visited].double(), scheduler.timesteps.double(), rtol=0, atol=1.6)
    shares = torch.arange(len(visited)) / len(visited)
    assert torch.equal(diffusion.timestep_after(visited, shares), visited)
    if name == "PNDM":
        return  # its sigmas are others
    for k, t in enumerate(visited):
        alpha, sigma = (float(level) for level in branch_noise.levels(scheduler, k))
        level = sigma if name == "flow" else sigma / (alpha**2 + sigma**2) ** 0.5
        assert float(sigmas[t]) == pytest.approx(level, abs=6e-3)  # half a timestep


@pytest.mark.parametrize("steps", [2, 5, 6, 8, 20, 50])
def test_trailing_branch_times_are_the_formula(steps):
    """(1 - k / steps) T - 1, rounded, and in between as well."""
    scheduler = base.new_scheduler()
    scheduler.set_timesteps(steps)
    visited = diffusion.visited(scheduler)
    expected = ((1 - torch.arange(steps) / steps) * 1000).round().long() - 1
    assert torch.equal(visited, expected)
    between = diffusion.timestep_after(visited, torch.rand(100, generator=torch.Generator().manual_seed(0)))
    shares = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert ((between - ((1 - shares) * 1000 - 1)).abs() <= 2).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1, 3, 7])
def test_deterministic_sampler_walks_the_bridge_and_reaches_the_member(kind, share):
    schedule, scheduler = schedule_of(kind), scheduler_of(kind)
    scheduler.set_timesteps(8)
    z, c, x = randn(3, *SHAPE), text(3), randn(3, *SHAPE, seed=1)
    x_star, t_star = x, scheduler.timesteps[share].repeat(3)
    for t in scheduler.timesteps[share:]:
        query = loss.branch_query(schedule, z, c, t.repeat(3), x_star, t_star)
        torch.testing.assert_close(query.x_t, x, rtol=1e-4, atol=1e-4)
        x = scheduler.step(query.target, t, x).prev_sample
    torch.testing.assert_close(x, z, rtol=1e-3, atol=1e-3)


def test_bridge_from_pure_noise_is_plain_diffusion():
    schedule = schedule_of("v_prediction")
    z, c, eps, t = randn(3, *SHAPE), text(3), randn(3, *SHAPE, seed=1), torch.tensor([0, 500, 999])
    bridge = loss.branch_query(schedule, z, c, t, eps, torch.full((3,), 999))
    plain = loss.diffusion_query(schedule, z, c, t, eps)
    assert torch.equal(bridge.x_t, plain.x_t) and torch.equal(bridge.target, plain.target)


def test_mean_target_leads_the_sampler_to_the_branch_start(group):
    z, present = group
    schedule, scheduler = schedule_of("v_prediction"), scheduler_of("v_prediction")
    scheduler.set_timesteps(8)
    mean = torch.stack([z[i, present[i]].mean(0) for i in range(4)])
    eps = x = randn(4, *SHAPE, seed=1)
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(schedule.target(x, mean, t.repeat(4)), t, x).prev_sample
    start = loss.mixture_start(schedule, "mean", z[:, 0], z, present, scheduler.timesteps[3].repeat(4), eps)
    torch.testing.assert_close(start, x, rtol=1e-4, atol=1e-4)


def test_posterior_target_leads_the_sampler_to_noised_members():
    schedule, scheduler = schedule_of("v_prediction"), scheduler_of("v_prediction")
    scheduler.set_timesteps(200)
    n = 4000
    z, present = torch.tensor([-2.0, 1.0, 1.5]).expand(n, 3)[..., None], torch.ones(n, 3, dtype=torch.bool)
    eps = x = randn(n, 1)
    for t in scheduler.timesteps[:120]:
        weights = loss.member_weights("posterior", x, z, present, *schedule.at(t.repeat(n)))
        x = scheduler.step(schedule.target(x, (weights[..., None] * z).sum(1), t.repeat(n)), t, x).prev_sample
    member = torch.randint(3, (n,), generator=torch.Generator().manual_seed(2))
    t_star = scheduler.timesteps[120].repeat(n)
    z_m = z[torch.arange(n), member]
    start = loss.mixture_start(schedule, "posterior", z_m, z, present, t_star, randn(n, 1, seed=3))
    shares = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(x.flatten().quantile(shares), start.flatten().quantile(shares), rtol=0, atol=0.15)
    # The mean's branch start, one bump between the members, is another distribution.
    mean = loss.mixture_start(schedule, "mean", z[:, 0], z, present, t_star, eps)
    assert (x.flatten().quantile(shares) - mean.flatten().quantile(shares)).abs().max() > 0.4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_rollout_is_the_samplers(kind, steps):
    # At zero SNR, noise tells nothing of x_0.
    scheduler = DDIMScheduler.from_config(scheduler_of(kind).config, rescale_betas_zero_snr=kind != "epsilon")
    schedule = NoiseSchedule(kind, *diffusion.noise_levels(scheduler))
    scheduler.set_timesteps(8)
    x = eps = randn(4, *SHAPE)

    def network(x_t, t, condition):
        return torch.tanh(x_t) + condition["states"].mean() + diffusion.spread(t / 1000, x_t)

    for t in scheduler.timesteps[:steps]:
        stepped = scheduler.step(network(x, t.repeat(4), text(4)), t, x)
        x, x_0 = stepped.prev_sample, stepped.pred_original_sample
    found, noise = rollout(schedule, network, text(4), eps, diffusion.visited(scheduler)[:steps])
    torch.testing.assert_close(found, x_0, rtol=1e-3, atol=1e-3)
    after = schedule.at(scheduler.timesteps[steps].repeat(4))
    torch.testing.assert_close(diffusion.add_noise(found, noise, *after), x, rtol=1e-3, atol=1e-3)


def test_a_rollout_needs_a_step():
    with pytest.raises(ValueError, match="0 shared steps predict nothing"):
        rollout(schedule_of("sample"), lambda x, t, c: x, text(4), randn(4, *SHAPE), torch.arange(0))


class Counted(torch.nn.Module):
    """A small real network of (x_t, t, condition) that counts the rows that it is asked for."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.mix, self.text, self.calls, self.rows = torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.Linear(8, 2), 0, 0

    def forward(self, x_t, t, condition):
        self.calls, self.rows = self.calls + 1, self.rows + len(x_t)
        return torch.tanh(
            self.mix(x_t) + self.text(condition["states"].mean(1))[:, :, None, None] + (t / 1000)[:, None, None, None]
        )


@pytest.fixture
def queries():
    schedule = schedule_of("v_prediction")
    return {
        name: loss.diffusion_query(schedule, randn(n, *SHAPE), text(n), torch.arange(n) * 90, randn(n, *SHAPE, seed=n))
        for n, name in ((4, "diffusion"), (3, "shared"), (2, "branch"))
    }


def test_terms_are_unreduced_squared_errors_of_one_evaluation(queries):
    network = Counted(0)
    values = loss.terms(network, queries, {})
    assert (network.calls, network.rows) == (1, 9)
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        "diffusion": (4,),
        "shared": (3,),
        "branch": (2,),
    }
    for name, query in queries.items():
        output = network(query.x_t, query.t, query.condition)
        expected = torch.stack([F.mse_loss(output[i], query.target[i]) for i in range(len(output))])
        torch.testing.assert_close(values[name], expected)


def test_consistency_is_zero_at_the_base_and_pulls_back_to_it(queries):
    network, other = Counted(0), Counted(1)
    asked = {"diffusion": queries["diffusion"]}
    anchors = {"diffusion": loss.anchor(network, asked["diffusion"])}
    assert loss.terms(network, asked, anchors)["consistency"].abs().max() < 1e-12
    values = loss.terms(other, asked, anchors)
    assert (values["consistency"] > 0).all()
    loss.total({"consistency": values["consistency"].mean()}, {"consistency": 1.0}).backward()
    assert other.mix.weight.grad.abs().sum() > 0 and network.mix.weight.grad is None


def test_shared_anchor_is_the_mean_of_the_base_under_each_member(queries):
    base_network, query = Counted(0), queries["shared"]
    c, item = randn(9, 5, 8), torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2])
    found = loss.shared_anchor(base_network, query, {"states": c}, item)
    assert base_network.rows == 9 and not found.requires_grad
    for i in range(3):
        members = [
            base_network(query.x_t[i : i + 1], query.t[i : i + 1], {"states": c[n : n + 1]})
            for n in range(9)
            if item[n] == i
        ]
        torch.testing.assert_close(found[i], torch.cat(members).mean(0))


def test_total_is_the_weighted_sum():
    means = {"diffusion": torch.tensor(2.0), "shared": torch.tensor(5.0), "branch": torch.tensor(0.5)}
    assert loss.total(means, {"diffusion": 1, "shared": 2, "branch": 4, "consistency": 0}) == 2 + 10 + 2
