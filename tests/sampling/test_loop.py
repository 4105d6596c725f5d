"""The loop on a small network of real layers, for every scheduler: what must hold whatever the model family."""

import itertools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from sage import diffusion
from sage.errors import ConfigurationError, PlanError, UnsupportedError
from sage.sampling import loop
from sage.sampling.branch_noise import levels, rotated, safe_image_steps
from sage.sampling.conditions import merge
from sage.sampling.plan import Block, Plan

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(**BETAS, clip_sample=False),
    "ddim zero snr": lambda: DDIMScheduler(
        **BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    "ddpm": lambda: DDPMScheduler(**BETAS, clip_sample=False),
    "euler": lambda: EulerDiscreteScheduler(**BETAS),
    "euler ancestral": lambda: EulerAncestralDiscreteScheduler(**BETAS),
    "heun": lambda: HeunDiscreteScheduler(**BETAS),
    "dpm multistep": lambda: DPMSolverMultistepScheduler(**BETAS, solver_order=3, use_karras_sigmas=True),
    "dpm first order": lambda: DPMSolverMultistepScheduler(**BETAS, solver_order=1),
    "dpm sde": lambda: DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++"),
    "dpm single": lambda: DPMSolverSinglestepScheduler(**BETAS),
    "unipc": lambda: UniPCMultistepScheduler(**BETAS),
    "lms": lambda: LMSDiscreteScheduler(**BETAS),
    "pndm": lambda: PNDMScheduler(**BETAS),
    "plms": lambda: PNDMScheduler(**BETAS, skip_prk_steps=True),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow stochastic": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
}
SHAPE = (2, 4, 4)
# A batch of another size rounds differently.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Network(torch.nn.Module):
    """Latents and a condition of width 8 to a prediction; counts the rows that it evaluates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Conv2d(2, 2, 3, padding=1)
        self.shift = torch.nn.Linear(8, 2)
        self.rows, self.calls = 0, []

    def forward(self, x, t, condition, guidance=1.0):
        self.rows += len(x)
        self.calls.append(len(x))
        return torch.tanh(self.mix(x) + self.shift(condition["states"])[:, :, None, None] + t.float() / 1000)


CONDITIONS = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


def run(scheduler, plan, seeds=None, prompts=None, batch_size=32, kwargs=None, network=None, **more):
    """Return latents by prompt; prompt i has condition `prompts[i]` and seed `seeds[i]`."""
    seeds = list(seeds or range(100, 100 + plan.prompts))
    prompts = list(prompts or range(plan.prompts))
    network = network or Network()
    found = loop.sample(
        plan,
        scheduler,
        predict=network,
        encode=lambda rows: {"states": CONDITIONS[[prompts[row] for row in rows]][:, None]},
        noise=lambda rows, generators: (
            torch.cat([torch.randn(1, *SHAPE, generator=g) for g in generators])
            * getattr(scheduler, "init_noise_sigma", 1)
        ),
        generator=lambda row: torch.Generator().manual_seed(seeds[row]),
        rank=lambda row: (seeds[row], prompts[row], row),
        batch_size=batch_size,
        step_kwargs=kwargs,
        **more,
    )
    latents = {}
    for part in found:
        assert part.finished
        assert not set(part.prompts) & set(latents)
        latents.update(zip(part.prompts, part.latents, strict=True))
    assert sorted(latents) == list(range(plan.prompts))
    result = torch.stack([latents[i] for i in range(plan.prompts)])
    assert result.isfinite().all()
    return result


@pytest.fixture(params=list(SCHEDULERS))
def scheduler(request):
    made = SCHEDULERS[request.param]()
    made.set_timesteps(6)
    return made


def steps(scheduler):
    return len(scheduler.timesteps)


def test_alone_is_the_plain_loop(scheduler):
    """What diffusers' own loop gives for one image, bit for bit: draws and history included."""
    network, generator = Network(), torch.Generator().manual_seed(5)
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(6)
    latents = torch.randn(1, *SHAPE, generator=generator) * getattr(fresh, "init_noise_sigma", 1)
    takes = "generator" in fresh.step.__code__.co_varnames
    with torch.no_grad():
        for t in fresh.timesteps:
            x = fresh.scale_model_input(latents, t) if hasattr(fresh, "scale_model_input") else latents
            output = network(x, t, {"states": CONDITIONS[3:4]})
            kwargs = {"generator": generator} if takes else {}
            latents = fresh.step(output, t, latents, **kwargs, return_dict=False)[0]
    assert torch.equal(run(scheduler, Plan.independent(1, steps(scheduler)), [5], [3]), latents)


def test_equal_prompts_in_a_group_are_exactly_their_independent_image(scheduler):
    for until in range(1, steps(scheduler)):
        plan = Plan(steps(scheduler), (Block(until, (0, 1, 2)), 3))
        shared = run(scheduler, plan, [7, 7, 7, 8], [4, 4, 4, 5])
        alone = run(scheduler, Plan.independent(4, steps(scheduler)), [7, 7, 7, 8], [4, 4, 4, 5])
        torch.testing.assert_close(shared, alone, rtol=0, atol=2e-6)


def test_equal_prompts_of_other_seeds_start_as_their_leader():
    scheduler = SCHEDULERS["unipc"]()
    scheduler.set_timesteps(6)
    shared = run(scheduler, Plan(6, (Block(3, (0, 1)),)), [9, 7], [4, 4])
    alone = run(scheduler, Plan.independent(1, 6), [7], [4])
    # Batches of one and two round differently: a few units in the last place of float32.
    torch.testing.assert_close(shared, alone.expand(2, *SHAPE), rtol=1e-6, atol=2e-6)


TREE = ((0, 1, 2), (3, 4), 5)


def tree(scheduler):
    """Branches at three different steps, nested and not."""
    n = steps(scheduler)
    return Plan(n, (Block(n // 3, (0, Block(n - 1, (1, 2)))), Block(n // 2, (3, 4)), 5))


def test_order_company_and_batch_size_change_nothing(scheduler):
    plan = tree(scheduler)
    whole = run(scheduler, plan)
    for batch_size in (1, 2, 3, 5):
        torch.testing.assert_close(run(scheduler, plan, batch_size=batch_size), whole, **TOLERANCE)
    order = [4, 2, 5, 0, 3, 1]  # prompt i stands at place order[i]

    def moved(node):
        return order[node] if isinstance(node, int) else Block(node.until, tuple(map(moved, node.children)))

    shuffled = Plan(plan.steps, tuple(map(moved, reversed(plan.roots))))
    seeds, prompts = [0] * 6, [0] * 6
    for i in range(6):
        seeds[order[i]], prompts[order[i]] = 100 + i, i
    torch.testing.assert_close(run(scheduler, shuffled, seeds, prompts)[order], whole, **TOLERANCE)
    # Without the others: the group of 3 and 4, and 5 alone.
    pair = Plan(plan.steps, (Block(steps(scheduler) // 2, (0, 1)),))
    torch.testing.assert_close(run(scheduler, pair, [103, 104], [3, 4]), whole[3:5], **TOLERANCE)
    alone = run(scheduler, Plan.independent(1, plan.steps), [105], [5])
    torch.testing.assert_close(alone[0], whole[5], **TOLERANCE)


def test_calls_counted_equal_the_formula(scheduler):
    for plan, batch_size in itertools.product((tree(scheduler), Plan.independent(6, steps(scheduler))), (1, 4, 32)):
        network = Network()
        run(scheduler, plan, batch_size=batch_size, network=network)
        assert network.rows == plan.nfe(guidance=False)
        assert max(network.calls) <= batch_size


def test_draws_are_a_groups_before_the_branch_and_a_prompts_after():
    for name in ("ddpm", "euler ancestral", "dpm sde", "flow stochastic"):
        scheduler = SCHEDULERS[name]()
        scheduler.set_timesteps(6)
        # Equal prompts: what differs after the branch is the draws of their seeds.
        a, b = run(scheduler, Plan(6, (Block(4, (0, 1)),)), [7, 8], [4, 4])
        alone = run(scheduler, Plan.independent(1, 6), [7], [4])[0]
        torch.testing.assert_close(a, alone, **TOLERANCE)
        assert (b - a).abs().max() > 1e-3
        # The members' own draws are all that the groups' steps leave open.
        again = run(scheduler, Plan(6, (Block(4, (0, 1)),)), [7, 9], [4, 4])
        torch.testing.assert_close(again[0], a, rtol=0, atol=0)
        assert (again[1] - b).abs().max() > 1e-3


def test_eta_reaches_the_scheduler():
    scheduler = SCHEDULERS["ddim"]()
    scheduler.set_timesteps(6)
    plan = Plan.independent(2, 6)
    assert not torch.equal(run(scheduler, plan, kwargs={"eta": 1.0}), run(scheduler, plan))


def test_a_shared_block_sees_the_mean_of_its_members():
    seen = []
    network = Network()
    network.register_forward_pre_hook(lambda module, args: seen.append(args[2]["states"]))
    scheduler = SCHEDULERS["ddim"]()
    scheduler.set_timesteps(2)
    run(scheduler, Plan(2, (Block(1, (0, 1, 2)), 3)), network=network)
    torch.testing.assert_close(seen[0], torch.stack([CONDITIONS[:3].mean(0), CONDITIONS[3]]))
    torch.testing.assert_close(seen[1], CONDITIONS[:4])


def test_merging_equal_members_is_exact_and_padding_does_not_count():
    rows = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).half()
    for n in (2, 3, 7):
        assert torch.equal(merge({"states": rows.expand(n, 2, 5, 8)})["states"], rows)
    states = torch.tensor([[[[1.0], [2.0], [5.0]]], [[[3.0], [9.0], [9.0]]]])
    mask = torch.tensor([[[1, 1, 0]], [[1, 0, 0]]])
    for order in ([0, 1], [1, 0]):
        merged = merge({"states": states[order], "states_mask": mask[order]})
        assert merged["states_mask"].tolist() == [[[1, 1, 0]]]
        # HunyuanDiT pools all tokens, so what no mask includes must not depend on the order of the members.
        assert merged["states"][0, 0, :, 0].tolist() == [2.0, 2.0, 7.0]


def test_the_medoid_is_a_member():
    rows = torch.tensor([[[0.0]], [[1.0]], [[5.0]]])
    assert merge({"states": rows}, medoid=True)["states"].item() == 1.0
    scheduler = SCHEDULERS["ddim"]()
    scheduler.set_timesteps(4)
    plan = Plan(4, (Block(2, (0, 1, 2)),))
    assert not torch.equal(run(scheduler, plan, medoid=True), run(scheduler, plan))


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler ancestral", "dpm multistep", "flow"])
def test_branch_noise_parts_equal_prompts_by_the_level_of_noise_at_the_branch(name):
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(20)
    plan = Plan(20, (Block(8, tuple(range(16))),))
    if name == "flow":
        sigma = scheduler.sigmas[8]
    else:
        reference = SCHEDULERS["ddim"]()
        sigma = (1 - reference.alphas_cumprod[int(scheduler.timesteps[8])]).sqrt()
    for s in (0.0, 0.3, 1.0):
        entering = []
        network = Network()
        network.register_forward_pre_hook(lambda module, args, entering=entering: entering.append(args[0]))
        run(scheduler, plan, range(16), [4] * 16, branch_noise=s, network=network)
        assert len(entering[7]) == 1
        spread = entering[8].std(0).square().mean().sqrt()
        assert spread == pytest.approx(float(s * sigma), rel=0.1, abs=1e-6)


def test_branch_noise_keeps_the_variance_of_noise():
    scheduler = SCHEDULERS["ddim"]()
    scheduler.set_timesteps(20)
    alpha = scheduler.alphas_cumprod[scheduler.timesteps[8]].sqrt()
    sigma = (1 - alpha**2).sqrt()
    x_0, eps, xi = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(0))
    turned = rotated(scheduler, 8, alpha * x_0 + sigma * eps, x_0, xi, 0.6)
    noise = (turned - alpha * x_0) / sigma
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert (noise * eps).mean() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("s", [0.6, 1.0])
@pytest.mark.parametrize("name", ["ddim", "ddim zero snr", "euler", "flow", "dpm first order"])
def test_a_childs_first_step_carries_on_the_noise_that_it_drew(name, s):
    scheduler = SCHEDULERS[name]()
    if name == "ddim zero snr":
        scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    scheduler.set_timesteps(20)
    network, seen = Network(), []
    network.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    run(scheduler, Plan(20, (Block(8, tuple(range(4))),)), branch_noise=s, network=network)

    def level(step):
        if name == "flow":
            return 1 - scheduler.sigmas[step], scheduler.sigmas[step]
        if name == "euler":
            return 1 / (1 + scheduler.sigmas[step] ** 2).sqrt(), 1 / (1 + scheduler.sigmas[step] ** -2).sqrt()
        signal = scheduler.alphas_cumprod[int(scheduler.timesteps[step])]
        return signal.sqrt(), (1 - signal).sqrt()

    def predicted(step):
        (x, output), (alpha, sigma) = seen[step], level(step)
        if name == "flow":
            return x - sigma * output
        return alpha * x - sigma * output if name == "ddim zero snr" else (x - sigma * output) / alpha

    (alpha, sigma), (alpha_after, sigma_after) = level(8), level(9)
    shared, own, x, after = predicted(7), predicted(8), seen[8][0], seen[9][0]
    assert len(shared) == 1
    assert len(own) == 4
    drawn, apparent = (x - alpha * shared) / sigma, (x - alpha * own) / sigma
    assert not torch.allclose(drawn, apparent, atol=1e-2)
    carried = s**2 * drawn + (1 - s**2) * apparent
    torch.testing.assert_close(after, alpha_after * own + sigma_after * carried, rtol=1e-3, atol=1e-3)


class Ideal:
    """The ideal network of latents that are normal given the condition: mean of the condition, variance 0.3."""

    def __init__(self, scheduler):
        self.scheduler, self.kind, self.rows = scheduler, diffusion.prediction_type(scheduler), 0

    def __call__(self, x, t, condition, guidance):
        self.rows += len(x)
        step = self.scheduler.timesteps.tolist().index(float(t))
        alpha, sigma = (torch.as_tensor(level) for level in levels(self.scheduler, step))
        norm = torch.ones(()) if self.kind == "flow_prediction" else torch.hypot(alpha, sigma)
        alpha, sigma = alpha / norm, sigma / norm
        mean = condition["states"][:, :2, None, None]
        x_0 = mean + alpha * 0.3 / (0.3 * alpha**2 + sigma**2) * (x - alpha * mean)
        return diffusion.target(self.kind, x_0, diffusion.implied_noise(x, x_0, alpha, sigma), alpha, sigma)


ZERO_SNR = BETAS | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
FROM_NOISE = {
    "ddim": lambda: DDIMScheduler(**ZERO_SNR, clip_sample=False),
    "dpm multistep": lambda: DPMSolverMultistepScheduler(**ZERO_SNR),
    "euler": lambda: EulerDiscreteScheduler(**ZERO_SNR),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}
# Two prompts with three images each; image r of prompt i is 3 i + r.
IMAGES = {"prompts": [0, 0, 0, 1, 1, 1], "prompt_of": lambda image: image // 3, "branch_noise": 1.0}


@pytest.mark.parametrize("name", FROM_NOISE)
def test_an_ideal_network_gives_each_image_that_shares_its_first_step_as_alone(name):
    scheduler = FROM_NOISE[name]()
    scheduler.set_timesteps(6)
    assert safe_image_steps(scheduler, 1.0) == 1
    independent = Plan.independent(2, 6)
    alone = run(scheduler, independent.repeat(3), network=Ideal(scheduler), **IMAGES)
    assert (alone[0] - alone[1]).abs().max() > 0.3
    network = Ideal(scheduler)
    shared = run(scheduler, independent.repeat(3, 1), network=network, **IMAGES)
    torch.testing.assert_close(shared, alone, rtol=0, atol=2e-3)
    assert network.rows == 2 * (1 + 5 * 3)
    # The second step sees its noise.
    further = run(scheduler, independent.repeat(3, 2), network=Ideal(scheduler), **IMAGES)
    assert (further - alone).abs().max() > 0.02


@pytest.mark.parametrize(
    ("scheduler", "s", "steps"),
    [
        (DDIMScheduler(**ZERO_SNR), 1.0, 1),
        (DDIMScheduler(**ZERO_SNR), 0.9, 0),
        (DDIMScheduler(**ZERO_SNR), 0.0, 0),
        (DDIMScheduler(**ZERO_SNR | {"timestep_spacing": "leading"}), 1.0, 0),  # its first timestep is 831
        (DDIMScheduler(**BETAS, timestep_spacing="trailing"), 1.0, 0),  # Stable Diffusion 1.5: 0.068
        (DDPMScheduler(timestep_spacing="trailing"), 1.0, 0),  # the linear schedule: 0.006
        (FlowMatchEulerDiscreteScheduler(), 1.0, 1),
        (UniPCMultistepScheduler(**ZERO_SNR), 1.0, 0),
    ],
)
def test_images_of_a_prompt_share_their_first_step_only_from_noise_alone(scheduler, s, steps):
    scheduler.set_timesteps(6)
    assert safe_image_steps(scheduler, s) == steps


def test_sharing_a_first_step_that_sees_its_noise_is_not_exact():
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction")
    scheduler.set_timesteps(6)
    plans = (Plan.independent(2, 6).repeat(3, image_steps) for image_steps in (0, 1))
    alone, shared = (run(scheduler, plan, network=Ideal(scheduler), **IMAGES) for plan in plans)
    assert (shared - alone).abs().max() > 0.01


@pytest.mark.parametrize("name", FROM_NOISE)
def test_images_of_a_prompt_do_not_depend_on_order_or_other_prompts(name):
    scheduler = FROM_NOISE[name]()
    scheduler.set_timesteps(6)
    pair = Plan.shared([[0, 1]], 6, 0.5)
    plan = pair.for_images([[0, 1, 2], [3, 4]], 1)
    call = {"branch_noise": 1.0, "seeds": range(100, 105), "prompts": [0, 0, 0, 1, 1]}
    wanted = run(scheduler, plan, prompt_of=lambda image: image // 3, **call)
    order = [4, 0, 2, 3, 1]
    places = [[order.index(image) for image in images] for images in ([0, 1, 2], [3, 4])]
    call = {"branch_noise": 1.0, "seeds": [100 + i for i in order], "prompts": [i // 3 for i in order]}
    moved = run(scheduler, pair.for_images(places, 1), prompt_of=lambda place: order[place] // 3, batch_size=2, **call)
    torch.testing.assert_close(moved, wanted[order], **TOLERANCE)
    # Company that shares nothing changes nothing.
    prompts, seeds = [0, 0, 0, 2, 2, 2], [100, 101, 102, 7, 8, 9]
    apart = Plan.independent(2, 6).repeat(3, 1)
    with_others = run(scheduler, apart, seeds, prompts, prompt_of=lambda image: image // 3, branch_noise=1.0)
    alone = run(
        scheduler, Plan.independent(1, 6).repeat(3, 1), seeds[:3], prompts[:3], prompt_of=lambda i: 0, branch_noise=1.0
    )
    torch.testing.assert_close(with_others[:3], alone, **TOLERANCE)


def test_a_prompt_counts_once_in_the_condition_of_its_group():
    scheduler = FROM_NOISE["ddim"]()
    scheduler.set_timesteps(6)
    seen = []

    class Watched(Network):
        def forward(self, x, t, condition, guidance=1.0):
            seen.append(condition["states"])
            return super().forward(x, t, condition)

    plan = Plan.shared([[0, 1]], 6, 0.5).for_images([[0, 1, 2], [3]], 1)
    run(scheduler, plan, prompts=[0, 0, 0, 1], network=Watched(), prompt_of=lambda image: image // 3, branch_noise=1.0)
    torch.testing.assert_close(seen[0][0], CONDITIONS[:2].mean(0))


def test_branch_noise_leaves_those_who_do_not_branch():
    scheduler = SCHEDULERS["ddim"]()
    scheduler.set_timesteps(6)
    plan = Plan(6, (Block(2, (0, 1)), Block(4, (2, 3)), 4))
    quiet, noisy = (run(scheduler, plan, branch_noise=s)[4] for s in (0.0, 0.5))
    torch.testing.assert_close(quiet, noisy, **TOLERANCE)


def test_branch_noise_is_refused_where_history_remembers_noise():
    scheduler = SCHEDULERS["pndm"]()
    scheduler.set_timesteps(6)
    with pytest.raises(UnsupportedError, match=r"branch noise needs one of DDIM.* not PNDMScheduler"):
        run(scheduler, Plan.independent(1, len(scheduler.timesteps)), branch_noise=0.1)
    with pytest.raises(ConfigurationError, match=r"branch_noise 1.5 is outside \[0, 1\]"):
        run(SCHEDULERS["ddim"](), Plan.independent(1, 6), branch_noise=1.5)


@pytest.mark.parametrize("grouped", [1, 300])
def test_memory_is_that_of_a_few_batches_and_images_leave_early(grouped):
    scheduler = SCHEDULERS["dpm multistep"]()
    scheduler.set_timesteps(4)
    network = Network()
    # Groups of 3, and others of 1, in calls of 8: the first images must not wait for the last prompts.
    blocks = [Block(2, (3 * i, 3 * i + 1, 3 * i + 2)) for i in range(grouped)]
    plan = Plan(4, (*blocks, *range(3 * grouped, 1000)))
    sample = loop.sample(
        plan,
        scheduler,
        predict=network,
        encode=lambda rows: {"states": CONDITIONS[[row % 32 for row in rows]][:, None]},
        noise=lambda rows, generators: torch.zeros(len(rows), *SHAPE),
        generator=lambda row: torch.Generator().manual_seed(row),
        rank=lambda row: row,
        batch_size=8,
    )
    next(sample)
    assert network.rows <= 8 * 2 + 8 * 2
    rest = sum(len(part.prompts) for part in sample)
    assert network.rows == plan.nfe(guidance=False)
    assert rest >= 1000 - 8
    # Packed well: nearly as few calls as hold all rows.
    assert len(network.calls) < 1.1 * plan.nfe(guidance=False) / 8 + 12


def test_an_unsupported_scheduler_is_named_with_those_that_are():
    scheduler = LCMScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(UnsupportedError, match=r"LCMScheduler cannot be shared; use one of .*DDIMScheduler, .*UniPC"):
        run(scheduler, Plan.independent(1, 4))


ZERO = {**BETAS, "rescale_betas_zero_snr": True}
STARTS = {
    "ddim": (DDIMScheduler, {}, True),
    "ddim leading": (DDIMScheduler, {"timestep_spacing": "leading"}, False),
    "ddpm": (DDPMScheduler, {}, True),
    "euler": (EulerDiscreteScheduler, {}, True),
    "dpm": (DPMSolverMultistepScheduler, {}, True),
    "unipc": (UniPCMultistepScheduler, {}, True),
    "no zero snr": (DDIMScheduler, {"rescale_betas_zero_snr": False}, False),
    "v": (DDIMScheduler, {"prediction_type": "v_prediction"}, False),
    "sample": (DDIMScheduler, {"prediction_type": "sample"}, False),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_prediction_of_noise_cannot_start_from_noise_alone(name):
    """If it is not refused, the latents are finite, which `run` checks."""
    kind, changes, refused = STARTS[name]
    scheduler = kind(**{"timestep_spacing": "trailing", **ZERO, **changes})
    scheduler.set_timesteps(4)
    if refused:
        with pytest.raises(
            UnsupportedError, match=f"{kind.__name__} has prediction type epsilon and zero terminal SNR"
        ):
            run(scheduler, Plan.independent(2, 4))
        with pytest.raises(UnsupportedError, match="at its first timestep, 999"):
            diffusion.visited(scheduler)
    else:
        run(scheduler, Plan.independent(2, 4))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("flow")])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_is_sampled_or_refused_by_name(name, kind):
    made = SCHEDULERS[name]()
    scheduler = type(made).from_config(made.config, prediction_type=kind, rescale_betas_zero_snr=False)
    scheduler.set_timesteps(4)
    plan = Plan.independent(2, steps(scheduler))
    if kind == "sample" and name in ("euler ancestral", "pndm", "plms"):
        with pytest.raises(UnsupportedError, match=f"{type(made).__name__} has no step for prediction type sample"):
            run(scheduler, plan)
    else:
        run(scheduler, plan)


def test_a_plan_for_other_steps_is_refused():
    scheduler = SCHEDULERS["heun"]()
    scheduler.set_timesteps(6)
    with pytest.raises(
        PlanError, match="the plan has 6 steps, but HeunDiscreteScheduler evaluates the network 11 times"
    ):
        run(scheduler, Plan.independent(1, 6))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_a_pack_that_starts_together_gives_the_same_bits_alone(scheduler, batch_size):
    """So a run that was killed goes on with the packs that are missing."""
    count = steps(scheduler)
    plan = Plan(count, (Block(2, (0, 4)), 1, Block(3, (2, 3, 6)), 5, Block(2, (7, Block(4, (8, 9))))))
    whole = run(scheduler, plan, batch_size=batch_size)
    packs = loop.first_packs(plan, batch_size)
    assert all(len(pack) <= batch_size for pack in packs)
    assert sorted(number for pack in packs for number in pack) == list(range(len(plan.roots)))
    for pack in packs:
        part, prompts = plan.part(pack)
        seeds = [100 + prompt for prompt in prompts]
        assert torch.equal(run(scheduler, part, seeds, prompts, batch_size), whole[prompts])
