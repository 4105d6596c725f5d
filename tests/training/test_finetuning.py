import functools
from collections import Counter

import sage.torchvision_ops  # noqa: F401

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional as F

from sage import diffusion
from sage.errors import DataError, UnsupportedError
from sage.randomness import stratified_uniform
from sage.sampling import base
from sage.sampling.conditions import merge
from sage.training.batches import Batches, Buckets, Endless
from sage.training.denoiser import Denoiser
from sage.training.finetuning import TrainingSet, finetuning_loss, sampling_cost, within_reach
from sage.training.loop import Schedule, fit

ALL = {"diffusion": 1.0, "shared": 1.0, "branch": 1.0, "consistency": 0.1}
GROUPS = ((0, 1, 2), (3,), (4, 5), (6, 7, 8, 9), (10,), (11,))


def weights(**given):
    return dict.fromkeys(ALL, 0.0) | given


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def data(groups=GROUPS, captions=1):
    n = sum(map(len, groups))
    own = torch.arange(captions * n).reshape(captions, n).T
    return TrainingSet(randn(n, 4, 8, 8), {"prompt_embeds": randn(captions * n + 1, 5, 16, seed=1)}, own, groups)


def unet(seed=0):
    """A denoiser of a pipeline that has a U-Net and nothing else."""
    torch.manual_seed(seed)
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return Denoiser(
        StableDiffusionPipeline(**nothing, unet=network, scheduler=base.new_scheduler(), requires_safety_checker=False),
        "bf16",
    )


def loss_of(network, batches, training_set=None, **changes):
    settings = {
        "share_ratios": (0.4, 0.4),
        "soft_target": "mean",
        "branch_start": "mixture",
        "sampler_steps": 8,
        "drop_text": 0.0,
        "seed": 0,
    }
    return finetuning_loss(network, base.new_scheduler(), training_set or data(), batches, **settings | changes)


@pytest.fixture
def asked():
    """Every evaluation of a U-Net: (x_t, t, condition, output, whether it is trained)."""
    calls = []

    def record(module, args, output):
        if isinstance(module, Denoiser):
            x_t, t, condition = args
            calls.append((x_t, t, condition["prompt_embeds"], output, output.requires_grad))

    handle = torch.nn.modules.module.register_module_forward_hook(record)
    yield calls
    handle.remove()


# Which rows


def test_an_endless_order_is_a_permutation_each_epoch_with_groups_side_by_side():
    shareable = [group for group in GROUPS if len(group) > 1]
    rows = torch.cat([Endless(shareable, 3).rows(5 * step, 5) for step in range(36)]).tolist()
    epochs = [rows[start : start + 9] for start in range(0, 180, 9)]
    for epoch in epochs:
        assert sorted(epoch) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
        for group in shareable:
            place = epoch.index(group[0])
            assert tuple(epoch[place : place + len(group)]) == group
    assert len({tuple(epoch) for epoch in epochs}) == 6  # all orders of three groups
    assert rows != torch.cat([Endless(shareable, 4).rows(5 * step, 5) for step in range(36)]).tolist()


CHOICES = [ALL, *(weights(**{term: 1.0}) for term in ALL)]
CHOICES += [weights(shared=1, branch=1), weights(diffusion=1, branch=1), weights(diffusion=1, consistency=1)]


@pytest.mark.parametrize("groups", [GROUPS, ((0,), (1,)), ((0, 1),), (tuple(range(40)),)])
@pytest.mark.parametrize("evaluations", [3, 7, 16])
@pytest.mark.parametrize("chosen", CHOICES)
def test_every_step_costs_the_same_whatever_the_groups(chosen, evaluations, groups):
    if not any(len(group) > 1 for group in groups) and not chosen["diffusion"] + chosen["consistency"]:
        with pytest.raises(DataError, match="no two training prompts are in one group"):
            Batches(groups, chosen, evaluations, 0)
        return
    batches = Batches(groups, chosen, evaluations, 0)
    shareable = {row for group in groups if len(group) > 1 for row in group}
    for step in range(12):
        rows = batches.rows(step)
        assert sum(map(len, rows.values())) == evaluations == batches.cost(step)[0]
        assert (
            set(rows.get("shared", torch.empty(0)).tolist()) | set(rows.get("branch", torch.empty(0)).tolist())
            <= shareable
        )
        needed = {"diffusion"} if chosen["diffusion"] + chosen["consistency"] else set()
        if shareable:
            needed |= {term for term in ("shared", "branch") if chosen[term]}
            needed |= {"shared"} if chosen["consistency"] else set()
        assert set(rows) == needed


def test_whatever_the_weights_the_same_pictures_are_seen():
    def seen(chosen):
        batches = Batches(GROUPS, chosen, 15, 0)
        return [Counter(torch.cat(list(batches.rows(step).values())).tolist()) for step in range(20)]

    with_diffusion = [chosen for chosen in CHOICES if chosen["diffusion"] + chosen["consistency"]]
    assert len(with_diffusion) > 4 and all(seen(chosen) == seen(ALL) for chosen in with_diffusion)
    assert sum(seen(ALL), Counter()).keys() == set(range(12))


def test_rows_depend_on_seed_and_step_alone():
    def rows(step, seed=0):
        return {term: rows.tolist() for term, rows in Batches(GROUPS, ALL, 15, seed).rows(step).items()}

    assert rows(3) == rows(3) != rows(4)
    assert rows(3) != rows(3, seed=1)


@pytest.mark.parametrize(
    ("latents", "states", "groups", "message"),
    [
        (0, 1, (), "no pictures"),
        (2, 2, ((0, 1),), "caption 1 and the empty prompt after it need at least 3 rows of prompt_embeds; found 2"),
        (2, 3, ((0,),), "no partition"),
        (2, 3, ((0, 1), (1,)), "no partition"),
        (2, 3, ((0, 2),), "no partition"),
    ],
)
def test_a_training_set_that_does_not_fit_is_refused(latents, states, groups, message):
    with pytest.raises(DataError, match=message):
        TrainingSet(
            randn(latents, 4, 8, 8), {"prompt_embeds": randn(states, 5, 16)}, torch.arange(latents)[:, None], groups
        )
    with pytest.raises(DataError, match="2 pictures need as many rows of captions; found 1"):
        TrainingSet(randn(2, 4, 8, 8), {"prompt_embeds": randn(2, 5, 16)}, torch.tensor([[0]]), ((0, 1),))


def test_times_are_spread_and_stay_below_one():
    u = stratified_uniform(64, torch.Generator().manual_seed(0))
    assert sorted((u * 64).long().tolist()) == list(range(64)) and u.max() < 1
    assert (u * 64).long().tolist() != list(range(64))


# The loss


def test_plain_diffusion_alone_is_the_loss_of_pretraining(asked):
    """The formula of sage.training.pretraining.denoiser_loss on the same draws, with its numbers."""
    network = unet()
    batches = Batches(GROUPS, weights(diffusion=1), 16, 0)
    values = loss_of(network, batches)(5)
    [(x_t, t, condition, output, trained)] = asked
    rows = batches.rows(5)["diffusion"]
    assert trained and torch.equal(condition, data().conditions["prompt_embeds"][rows])
    alphas, sigmas = diffusion.noise_levels(base.new_scheduler())
    x_0 = data().latents[rows]
    eps = diffusion.implied_noise(x_t, x_0, alphas[t], sigmas[t])
    assert abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05
    expected = F.mse_loss(output, diffusion.target("v_prediction", x_0, eps, alphas[t], sigmas[t]))
    assert values.keys() == {"loss", "diffusion"}
    torch.testing.assert_close(values["loss"], expected)


def test_captions_are_dropped_from_plain_diffusion_alone(asked):
    loss_of(unet(), Batches(GROUPS, weights(diffusion=1, branch=1), 48, 0), drop_text=0.5)(0)
    empty = (asked[0][2] == data().conditions["prompt_embeds"][-1]).flatten(1).all(1)
    assert 8 < empty[:32].sum() < 24 and not empty[32:].any()


def test_plain_diffusion_sees_every_caption_and_the_groups_those_that_made_them(asked):
    terms = weights(diffusion=1, shared=1, branch=1)
    training_set, batches = data(captions=3), Batches(GROUPS, terms, 48, 0)
    states = training_set.conditions["prompt_embeds"]
    step_loss = loss_of(unet(), batches, training_set, drop_text=0.0, branch_start="mixture")
    drawn = set()
    for step in range(4):
        asked.clear()
        step_loss(step)
        rows, condition = batches.rows(step), torch.cat([asked_of[2] for asked_of in asked])
        plain, _, branch = condition.split([len(rows[term]) for term in ("diffusion", "shared", "branch")])
        assert torch.equal(branch, states[training_set.captions[rows["branch"], 0]])
        for row, seen in zip(rows["diffusion"].tolist(), plain, strict=True):
            own = training_set.captions[row]
            (place,) = (states[own] == seen).flatten(1).all(1).nonzero().flatten().tolist()
            drawn.add(place)
    assert drawn == {0, 1, 2}


# Mirrored images, and images of several sizes


def mirrored(groups=GROUPS):
    plain = data(groups)
    return TrainingSet(plain.latents, plain.conditions, plain.captions, groups, plain.latents.flip(3))


def targets(step_loss, monkeypatch, step=0):
    """Return the clean latents of each query of a step, by the name of the term."""
    found = {}

    def terms(network, queries, anchors, weight):
        found.update(queries)
        return {name: torch.zeros(len(query.t), requires_grad=True) for name, query in queries.items()}

    monkeypatch.setattr("sage.training.loss.terms", terms)
    step_loss(step)
    schedule = diffusion.NoiseSchedule.of(base.new_scheduler())
    # v and x_t together give x_0: x_0 = alpha x_t - sigma v.
    levels = {name: [diffusion.spread(one, q.x_t) for one in schedule.at(q.t)] for name, q in found.items()}
    return {name: a * found[name].x_t - s * found[name].target for name, (a, s) in levels.items()}


@pytest.mark.parametrize("start", ["mixture", "sampled", "plain"])
def test_half_of_the_images_are_mirrored_and_a_group_as_a_whole(start, monkeypatch):
    batches, both = Batches(GROUPS, weights(diffusion=1, branch=1), 48, 0), mirrored()
    turned = {"diffusion": [], "branch": []}
    for step in range(4):
        seen = targets(loss_of(unet(), batches, both, branch_start=start), monkeypatch, step)
        rows = batches.rows(step)
        for term in turned:
            plain = (seen[term] - both.latents[rows[term]]).abs().flatten(1).amax(1) < 1e-2
            other = (seen[term] - both.mirrored[rows[term]]).abs().flatten(1).amax(1) < 1e-2
            assert (plain ^ other).all()
            turned[term] += other.tolist()
        for group in GROUPS:
            mine = [
                bool(is_other) for row, is_other in zip(rows["branch"].tolist(), other, strict=True) if row in group
            ]
            assert len(set(mine)) <= 1
    assert 0.3 < sum(turned["diffusion"]) / len(turned["diffusion"]) < 0.7
    assert {True, False} == set(turned["branch"])


def test_the_soft_target_of_a_mirrored_item_is_of_mirrored_members(monkeypatch):
    groups = ((0, 1),)
    batches = Batches(groups, weights(shared=1), 16, 0)
    seen = targets(loss_of(unet(), batches, mirrored(groups), soft_target="mean"), monkeypatch)["shared"]
    mean = data(groups).latents.mean(0)
    both = torch.stack([mean, mean.flip(2)])
    distance = (seen[:, None] - both).abs().flatten(2).amax(2)
    assert (distance.amin(1) < 1e-2).all() and set(distance.argmin(1).tolist()) == {0, 1}


def test_without_mirrored_images_nothing_is_drawn_for_them():
    batches = Batches(GROUPS, ALL, 24, 0)
    found = [loss_of(unet(), batches, training_set)(0) for training_set in (data(), [data()])]
    assert found[0] == found[1]
    assert loss_of(unet(), batches, mirrored())(0)["diffusion"] != found[0]["diffusion"]


def test_mirrored_latents_of_another_shape_are_refused():
    plain = data()
    with pytest.raises(DataError, match="as many mirrored ones"):
        TrainingSet(plain.latents, plain.conditions, plain.captions, GROUPS, plain.latents[:3])


@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_on_several_sizes_has_the_loss_of_the_set_whose_turn_it_is(parts, asked):
    square = data()
    n = 7
    wide = TrainingSet(
        randn(n, 4, 6, 12, seed=2),
        {"prompt_embeds": randn(n + 1, 5, 16, seed=3)},
        torch.arange(n)[:, None],
        ((0, 1, 2), (3, 4, 5, 6)),
    )
    batches = Buckets([Batches(one.groups, ALL, 12, 0) for one in (square, wide)])
    network = unet()
    step_loss = loss_of(network, batches, [square, wide], branch_start="sampled", drop_text=0.5)
    seen = set()
    for step in range(8):
        asked.clear()
        found = [step_loss(step, part, parts) for part in range(parts)]
        number = batches.turn(step)[0]
        data_of_step = (square, wide)[number]
        assert {call[0].shape[1:] for call in asked} == {data_of_step.latents.shape[1:]}
        assert (asked[-1][2][:, None] == data_of_step.conditions["prompt_embeds"]).flatten(2).all(2).any(1).any()
        assert sum(len(call[0]) for call in asked if call[4]) == 12
        if parts == 1:
            sampled = sum(len(call[0]) for call in asked if not call[4]) - batches.cost(step)[1]
            assert sampled == sampling_cost(batches, (0.4, 0.4), 8, step)
        assert all(part["loss"].isfinite() for part in found)
        seen.add(number)
    assert seen == {0, 1}


@pytest.mark.parametrize("chosen", CHOICES)
@pytest.mark.parametrize("groups", [GROUPS, (tuple(range(20)),)])
def test_evaluations_counted_equal_the_formula(chosen, groups, asked):
    batches = Batches(groups, chosen, 15, 0)
    step_loss = loss_of(unet(), batches, data(groups))
    for step in range(2):
        asked.clear()
        values = step_loss(step)
        counted = tuple(sum(len(call[0]) for call in asked if call[4] == trained) for trained in (True, False))
        assert counted == batches.cost(step)
        assert counted[0] == 15 and sum(call[4] for call in asked) == 1
        total = sum(chosen[name] * value for name, value in values.items() if name != "loss")
        torch.testing.assert_close(values["loss"], total)
        assert values["loss"].isfinite()


def test_the_shared_phase_lies_above_the_branch_time_under_the_groups_condition(asked):
    batches = Batches(GROUPS, weights(shared=1), 60, 0)
    loss_of(unet(), batches)(0)
    [(_, t, condition, *_)] = asked
    assert t.min() > 599 and t.max() <= 999 and t.min() < 620 and t.max() > 980
    for row, found in zip(batches.rows(0)["shared"].tolist(), condition, strict=True):
        members = next(group for group in GROUPS if row in group)
        merged = merge({"text": data().conditions["prompt_embeds"][list(members)][:, None]})["text"][0, 0]
        torch.testing.assert_close(found, merged)  # what the sampler gives the block


@pytest.mark.parametrize("soft", ["mean", "posterior"])
def test_siblings_in_a_batch_branch_off_one_shared_latent(soft, asked):
    batches = Batches(GROUPS, weights(branch=1), 27, 0)
    loss_of(unet(), batches, soft_target=soft)(0)
    [(x_t, t, condition, *_)] = asked
    rows = batches.rows(0)["branch"]
    assert torch.equal(condition, data().conditions["prompt_embeds"][rows]) and t.max() <= 599 and t.max() > 560
    alphas, sigmas = diffusion.noise_levels(base.new_scheduler())
    z = data().latents[rows]
    eps = diffusion.implied_noise(x_t, z, alphas[t], sigmas[t])
    x_star = alphas[599] * z + sigmas[599] * eps
    for group in (group for group in GROUPS if len(group) > 1):
        mine = torch.tensor([row in group for row in rows.tolist()])
        stars = x_star[mine]
        assert len(stars) > 3
        torch.testing.assert_close(stars, stars[:1].expand_as(stars), rtol=1e-3, atol=1e-3)
        # It is a latent of the group: noise of variance one around the mean, or around a member.
        centres = data().latents[list(group)]
        centres = centres.mean(0, keepdim=True) if soft == "mean" else centres
        noise = (stars[0] - alphas[599] * centres) / sigmas[599]
        assert min(abs(one.std() - 1) for one in noise) < 0.12
    between = torch.stack([x_star[[row in group for row in rows.tolist()]][0] for group in GROUPS if len(group) > 1])
    assert (between[0] - between[1]).abs().mean() > 0.5


def test_a_plain_branch_start_is_fresh_for_every_sibling(asked):
    loss_of(unet(), Batches(((0, 1),), weights(branch=1), 8, 0), data(((0, 1),)), branch_start="plain")(0)
    [(_, t, *_)] = asked
    assert t.max() <= 599
    asked.clear()
    network = unet()
    batches = Batches(GROUPS, weights(branch=1), 27, 0)
    mixture, plain = (loss_of(network, batches, branch_start=start)(0)["branch"] for start in ("mixture", "plain"))
    assert mixture != plain


def test_sampled_branches_start_where_the_sampler_arrives(asked):
    """What the loss is asked for lies on bridges from the sampler's own shared prediction, its noise drawn anew."""
    network, batches = unet(), Batches(GROUPS, weights(branch=1), 27, 0)
    step_loss = loss_of(network, batches, branch_start="sampled", share_ratios=(0.2, 0.5))
    alphas, sigmas = diffusion.noise_levels(base.new_scheduler())
    shared = set()
    for step in range(6):
        asked.clear()
        step_loss(step)
        rows = batches.rows(step)["branch"]
        *rollout, (x_t, t, condition, *_) = asked
        k = len(rollout)
        shared.add(k)
        scheduler = DDIMScheduler.from_config(base.new_scheduler().config, clip_sample=False)
        scheduler.set_timesteps(8)
        x = rollout[0][0]
        for time, (seen, at, _, output, trained) in zip(scheduler.timesteps[:k], rollout, strict=True):
            assert not trained and set(at.tolist()) == {int(time)}
            torch.testing.assert_close(seen, x, rtol=1e-3, atol=1e-3)
            stepped = scheduler.step(output, time, x)
            x, x_0 = stepped.prev_sample, stepped.pred_original_sample
        star = scheduler.timesteps[k]
        assert torch.equal(condition, data().conditions["prompt_embeds"][rows]) and t.max() <= star
        order = [next(group for group in GROUPS if row in group) for row in rows.tolist()]
        place = torch.tensor([list(dict.fromkeys(order)).index(group) for group in order])
        z = data().latents[rows]
        bridge = diffusion.implied_noise(x_t, z, alphas[t], sigmas[t])
        own = (alphas[star] * (z - x_0[place]) + sigmas[star] * bridge) / sigmas[star]
        assert abs(own.std() - 1) < 0.05 and abs(own.mean()) < 0.05
        assert abs(torch.corrcoef(own.flatten(1)).fill_diagonal_(0)).max() < 0.3  # no two share their noise
        members = [list(dict.fromkeys(order))[i] for i in range(len(x_0))]
        c_bar = [merge({"t": data().conditions["prompt_embeds"][list(m)][:, None]})["t"][0, 0] for m in members]
        torch.testing.assert_close(rollout[-1][2], torch.stack(c_bar))
    assert shared <= {1, 2, 3, 4} and len(shared) > 1


@pytest.mark.parametrize("evaluations", [3, 16])
def test_where_branches_start_costs_what_is_said(evaluations, asked):
    batches = Batches(GROUPS, ALL | {"consistency": 0.0}, evaluations, 0)
    step_loss = loss_of(unet(), batches, branch_start="sampled", share_ratios=(0.1, 0.5))
    for step in range(8):
        asked.clear()
        step_loss(step)
        assert sum(len(call[0]) for call in asked if not call[4]) == sampling_cost(batches, (0.1, 0.5), 8, step) > 0


def test_one_model_serves_a_range_of_share_ratios(asked):
    step_loss = loss_of(unet(), Batches(GROUPS, weights(shared=1, branch=1), 40, 0), share_ratios=(0.1, 0.7))
    for step in range(8):
        step_loss(step)
    shared, branch = (torch.cat([part(call[1]) for call in asked]) for part in (lambda t: t[:20], lambda t: t[20:]))
    assert 299 < shared.min() < 500 and branch.max() > 700


@pytest.mark.parametrize("share_ratios", [(0.0, 0.0), (0.999, 0.999)])
@pytest.mark.parametrize("soft", ["mean", "posterior"])
def test_the_ends_of_the_schedule_are_finite(share_ratios, soft):
    values = loss_of(unet(), Batches(GROUPS, ALL, 30, 0), share_ratios=share_ratios, soft_target=soft)(0)
    assert all(value.isfinite() for value in values.values())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_can_be_tuned(kind):
    scheduler = DDIMScheduler(prediction_type=kind)
    settings = {
        "share_ratios": (0.2, 0.6),
        "soft_target": "mean",
        "branch_start": "mixture",
        "sampler_steps": 8,
        "drop_text": 0.1,
        "seed": 0,
    }
    network = unet()
    values = finetuning_loss(network, scheduler, data(), Batches(GROUPS, ALL, 30, 0), **settings)(0)
    values["loss"].backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
    # The base agrees with itself; in the shared phase but for the difference of c_bar from c_n.
    assert values["consistency"] < 1e-3 < values["diffusion"]


@pytest.mark.parametrize("start", ["sampled", "mixture", "plain"])
def test_a_prediction_of_noise_at_zero_terminal_snr_is_refused_before_the_first_step(start):
    settings = {"share_ratios": (0.2, 0.6), "soft_target": "mean", "branch_start": start, "sampler_steps": 8}
    settings |= {"drop_text": 0.1, "seed": 0, "min_snr": 5.0}
    for kind, spacing in (("v_prediction", "trailing"), ("sample", "trailing"), ("epsilon", "leading")):
        scheduler = DDIMScheduler(rescale_betas_zero_snr=True, prediction_type=kind, timestep_spacing=spacing)
        step_loss = finetuning_loss(unet(), scheduler, data(), Batches(GROUPS, ALL, 30, 0), **settings)
        for step in range(2):
            assert all(value.isfinite() for value in step_loss(step).values())
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(UnsupportedError, match="prediction type epsilon and zero terminal SNR"):
        finetuning_loss(unet(), scheduler, data(), Batches(GROUPS, ALL, 30, 0), **settings)


def test_consistency_is_measured_from_the_base_not_from_what_it_became():
    network = unet()
    step_loss = loss_of(network, Batches(GROUPS, weights(diffusion=1, consistency=1), 12, 0))
    before = step_loss(0)["consistency"]
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05)
    assert step_loss(0)["consistency"] > before + 1e-4


def test_a_base_that_does_not_fit_is_refused():
    with pytest.raises(UnsupportedError, match="text states 16 wide, but its text encoder gives 8"):
        narrow = TrainingSet(randn(2, 4, 8, 8), {"prompt_embeds": randn(3, 5, 8)}, torch.tensor([[0], [1]]), ((0, 1),))
        loss_of(unet(), Batches(((0, 1),), ALL, 6, 0), narrow)


@pytest.mark.slow
def test_it_learns_and_resumes_bit_for_bit(tmp_path):
    def train(folder, stop=None):
        network = unet()
        batches = Batches(GROUPS, ALL, 24, 0)
        seen = {}

        def on_step(step, values):
            seen[step] = values["loss"]
            if step == stop:
                raise KeyboardInterrupt

        schedule = Schedule(12, 3e-3, warmup=1, ema=0.9, checkpoint_every=4)
        fit(network, loss_of(network, batches), schedule, work=folder, identity={}, on_step=on_step)
        return network, seen

    whole, seen = train(tmp_path / "whole")
    assert sum(seen[step] for step in range(9, 13)) < sum(seen[step] for step in range(1, 5))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", stop=6)
    resumed, again = train(tmp_path / "parts")
    assert list(again) == list(range(5, 13)) and all(again[step] == seen[step] for step in again)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_shared_steps_are_guided_as_in_sampling(asked):
    """The network is asked for both branches; the next step begins where the guided prediction leads."""
    scale, network = 3.0, unet()
    step_loss = loss_of(
        network, Batches(GROUPS, weights(branch=1), 27, 0), branch_start="sampled", guidance_scale=scale
    )
    step_loss(0)
    *calls, _ = asked
    assert len(calls) == 3  # 0.4 of 8 steps
    scheduler = DDIMScheduler.from_config(base.new_scheduler().config, clip_sample=False)
    scheduler.set_timesteps(8)
    x = calls[0][0].chunk(2)[1]
    for time, (seen, _, states, output, _) in zip(scheduler.timesteps, calls, strict=False):
        torch.testing.assert_close(seen, torch.cat([x, x]), rtol=1e-3, atol=1e-3)
        assert torch.equal(states.chunk(2)[0], data().conditions["prompt_embeds"][-1:].expand(len(x), -1, -1))
        without, with_text = output.chunk(2)
        x = scheduler.step(without + scale * (with_text - without), time, x).prev_sample


@pytest.mark.parametrize("s", [0.0, 0.6, 1.0])
def test_branches_begin_with_the_noise_that_branch_noise_leaves_them(s, asked):
    """cos of the angle between the shared noise and a member's: sqrt(1 - s^2)."""
    step_loss = loss_of(
        unet(),
        Batches(GROUPS, weights(branch=1), 27, 0),
        branch_start="sampled",
        branch_noise=s,
        share_ratios=(0.2, 0.2),
    )
    step_loss(0)
    (x, _, _, output, _), (x_t, t, *_) = asked  # one shared step: all of x is noise
    alphas, sigmas = diffusion.noise_levels(base.new_scheduler())
    scheduler = DDIMScheduler.from_config(base.new_scheduler().config, clip_sample=False)
    scheduler.set_timesteps(8)
    star = scheduler.timesteps[1]
    rows = Batches(GROUPS, weights(branch=1), 27, 0).rows(0)["branch"]
    order = [next(group for group in GROUPS if row in group) for row in rows.tolist()]
    place = torch.tensor([list(dict.fromkeys(order)).index(group) for group in order])
    x_0 = scheduler.step(output, scheduler.timesteps[0], x).pred_original_sample[place]
    bridge = diffusion.implied_noise(x_t, data().latents[rows], alphas[t], sigmas[t])
    x_star = diffusion.add_noise(data().latents[rows], bridge, alphas[star].repeat(27), sigmas[star].repeat(27))
    own = diffusion.implied_noise(x_star, x_0, alphas[star].repeat(27), sigmas[star].repeat(27))
    cosine = F.cosine_similarity(own.flatten(1), x[place].flatten(1))
    assert cosine.mean() == pytest.approx((1 - s**2) ** 0.5, abs=0.05)
    assert float(own.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_a_base_that_does_not_fit_its_data_does_not_blow_up_the_branch_term():
    """Its noise prediction is wrong by as much as the noise; near alpha = 0 that is x_0 wrong by 1 / alpha."""
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert 1 / diffusion.noise_levels(scheduler)[0][-1] > 14
    batches = Batches(GROUPS, weights(branch=1), 27, 0)
    settings = {"share_ratios": (0.2, 0.6), "soft_target": "mean", "sampler_steps": 8, "drop_text": 0.0, "seed": 0}
    network = unet()  # random weights
    means = {}
    for start in ("sampled", "plain"):
        step_loss = finetuning_loss(network, scheduler, data(), batches, branch_start=start, **settings)
        means[start] = [float(step_loss(step)["branch"].detach()) for step in range(6)]
    # With x_0 as it is predicted the ratio is above 20.
    assert max(means["sampled"]) < 4 * max(means["plain"])


def test_a_prediction_within_reach_stays_bit_for_bit():
    z, x_0 = randn(5, 4, 8, 8), randn(3, 4, 8, 8, seed=1)
    assert torch.equal(within_reach(x_0, z), x_0)
    far = within_reach(100 * x_0, z)
    largest = z.square().flatten(1).mean(1).sqrt().max()
    torch.testing.assert_close(far.square().flatten(1).mean(1).sqrt(), (2 * largest).expand(3))
