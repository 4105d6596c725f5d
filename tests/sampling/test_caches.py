"""Step caches: each phase of a call is the stock pipeline with that cache, begun clean, or the cache is refused."""

from functools import partial

import pytest
import tiny
import tiny_families
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_pyramid_attention_broadcast,
)
from diffusers.hooks.hooks import HookRegistry
from diffusers.hooks.mag_cache import MagCacheHeadHook
from tiny_families import generators, latents, rows

from benchmarks import caches
from sage.errors import UnsupportedError
from sage.sampling.continuous import Continuous
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Block, Plan

pytestmark = pytest.mark.slow
STEPS, BRANCH = 8, 3


def broadcast(pipe, **changes):
    """Attention every second step; `pipe()` is the pipeline whose steps are under way."""
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe().current_timestep,
        **changes,
    )


def faster(pipe, **changes):
    return FasterCacheConfig(
        **{
            "spatial_attention_block_skip_range": 2,
            "spatial_attention_timestep_skip_range": (-1, 700),
            "unconditional_batch_timestep_skip_range": (-1, 900),
            "attention_weight_callback": lambda module: 0.5,
            "current_timestep_callback": lambda: pipe().current_timestep,
            "tensor_format": "BCHW",
            **changes,
        }
    )


def first_block(pipe):
    return FirstBlockCacheConfig(threshold=0.5)


def taylor(pipe, **changes):
    return TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, cache_identifiers=[r".*blocks\.\d+\.attn1?"], **changes
    )


def magnitude(pipe, **changes):
    ratios = [1.0, 1.3, 0.9, 1.1, 0.97, 1.02, 0.99, 1.0]
    return MagCacheConfig(**{"threshold": 0.3, "num_inference_steps": STEPS, "mag_ratios": ratios, **changes})


CASES = [
    ("FluxPipeline", broadcast),
    ("FluxPipeline", partial(faster, is_guidance_distilled=True)),
    ("FluxPipeline", first_block),
    ("FluxPipeline", taylor),
    ("FluxPipeline", magnitude),
    ("Flux2Pipeline", magnitude),
    ("QwenImagePipeline", first_block),
    ("QwenImagePipeline", taylor),
    ("QwenImagePipeline", magnitude),
    ("CogView4Pipeline", first_block),
    ("CogView4Pipeline", taylor),
    ("WanPipeline", first_block),
    ("WanPipeline", taylor),
    ("LTXPipeline", taylor),
    ("LTXPipeline", magnitude),
]


class Case:
    """A tiny family with two blocks, a cache in its transformers, and the pipeline that is under way."""

    def __init__(self, name, config):
        self.family = tiny_families.tiny(name)
        torch.manual_seed(1)
        for part in ("transformer", "transformer_2"):
            if name not in ("FluxPipeline", "Flux2Pipeline") and getattr(self.family.pipe, part, None) is not None:
                network = getattr(self.family.pipe, part)
                deeper = type(network).from_config(dict(network.config) | {"num_layers": 2})
                setattr(self.family.pipe, part, deeper.eval().requires_grad_(False))
        self.shared = SharedSamplingPipeline.from_pipe(self.family.pipe)
        self.under_way = self.shared
        self.config = config
        self.embeddings = self.family.embed(3)

    @property
    def networks(self):
        return [n for n in (self.family.pipe.transformer, getattr(self.family.pipe, "transformer_2", None)) if n]

    def enable(self):
        for network in self.networks:
            network.enable_cache(self.config(lambda: self.under_way))

    def disable(self):
        for network in self.networks:
            network.disable_cache()

    def sample(self, chosen, seeds, **changes):
        self.under_way = self.shared
        call = self.family.call | {"num_inference_steps": STEPS, "output_type": "latent", "share_ratio": 0} | changes
        if self.family.guidance:
            call["guidance_scale"] = self.family.guidance[1]
        return self.shared(**rows(self.embeddings, chosen), **call, seed=seeds).images

    def stock(self, chosen, seeds, **changes):
        self.under_way = self.family.pipe
        call = self.family.call | {"num_inference_steps": STEPS, "output_type": "latent"} | changes
        if self.family.guidance:
            call[self.family.guidance[0]] = self.family.guidance[1]
        return latents(self.family.pipe(**rows(self.embeddings, chosen), **call, generator=generators(seeds)))

    def begin(self):
        """Empty the caches, but for the number of the step that MagCache counts."""
        for network in self.networks:
            for module in network.modules():
                registry = getattr(module, "_diffusers_hook", None)
                for hook in registry.hooks.values() if registry else ():
                    if isinstance(hook, MagCacheHeadHook):
                        for state in hook.state_manager._state_cache.values():
                            step = state.step_index
                            state.reset()
                            state.step_index = step
            if not isinstance(network._cache_config, MagCacheConfig):
                HookRegistry.check_if_exists_or_initialize(network).reset_stateful_hooks()


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{getattr(case[1], 'func', case[1]).__name__}")
def case(request):
    return Case(*request.param)


def test_share_ratio_0_is_the_stock_pipeline_with_the_cache_and_so_is_a_second_call(case):
    plain = case.stock([0, 1], [5, 6])
    case.enable()
    expected = case.stock([0, 1], [5, 6])
    assert not torch.equal(plain, expected)
    assert torch.equal(case.sample([0, 1], [5, 6]), expected)
    assert torch.equal(case.sample([0, 1], [5, 6]), expected)
    assert torch.equal(case.stock([0, 1], [5, 6]), expected)
    case.disable()
    assert torch.equal(case.sample([0, 1], [5, 6]), plain)


def test_batches_of_equal_and_different_sizes_are_each_the_stock_pipeline(case):
    case.enable()
    found = case.sample([0, 1, 2], [5, 6, 7], batch_size=2)
    assert torch.equal(found, torch.cat([case.stock([0], [5]), case.stock([1, 2], [6, 7])]))
    found = case.sample([0, 1], [5, 6], batch_size=1)
    assert torch.equal(found, torch.cat([case.stock([0], [5]), case.stock([1], [6])]))


def test_a_branch_is_the_stock_pipeline_with_the_cache_begun_clean_there(case):
    case.enable()
    at_branch = {}

    def keep(pipe, step, t, tensors):
        if step == BRANCH - 1:
            at_branch["latents"] = tensors["latents"].clone()
        return {}

    found = case.sample([0, 1], [5, 6], plan=Plan(STEPS, (Block(BRANCH, (0, 1)),)), callback_on_step_end=keep)

    def go_on(pipe, step, t, tensors):
        if step != BRANCH - 1:
            return {}
        case.begin()
        return {"latents": at_branch["latents"].repeat(2, *[1] * (tensors["latents"].ndim - 1))}

    assert torch.equal(found, case.stock([0, 1], [5, 6], callback_on_step_end=go_on))
    assert not torch.equal(found[0], found[1])


def test_a_call_inside_another_does_not_meet_its_cache(case):
    case.enable()
    alone = case.sample([0, 1], [5, 6])

    def other_call(pipe, step, t, tensors):
        if step == 1:
            case.sample([2], [7], num_inference_steps=STEPS)
        return {}

    assert torch.equal(case.sample([0, 1], [5, 6], callback_on_step_end=other_call), alone)


def test_the_trunk_is_the_stock_pipeline_for_the_mean_of_the_texts():
    case = Case("FluxPipeline", taylor)
    case.enable()
    seen = []
    case.sample(
        [0, 1],
        [5, 6],
        plan=Plan(STEPS, (Block(STEPS - 1, (0, 1)),)),
        callback_on_step_end=lambda pipe, step, t, tensors: seen.append(tensors["latents"]) or {},
    )
    case.embeddings = {name: both[:1] + (both[1:2] - both[:1]) / 2 for name, both in case.embeddings.items()}
    expected = []
    case.stock([0], [5], callback_on_step_end=lambda pipe, step, t, tensors: expected.append(tensors["latents"]) or {})
    assert all(torch.equal(a, b) for a, b in zip(seen[: STEPS - 1], expected[: STEPS - 1], strict=True))


def test_blocks_that_branch_elsewhere_begin_no_cache_anew():
    """An image alone, beside a group that branches, has its cache from the beginning to the end."""
    case = Case("FluxPipeline", taylor)
    case.enable()
    found = case.sample([0, 1, 2], [5, 6, 7], plan=Plan(STEPS, (Block(BRANCH, (0, 1)), 2)))
    assert torch.equal(found[2:], case.stock([2], [7]))


class StableDiffusion:
    """Pyramid attention broadcast in a U-Net, whose stock pipeline does not say at which timestep it is."""

    prompts = ("red cat", "blue dog", "a tall tree")

    def __init__(self, folder):
        self.call = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 3.0}
        self.pipe = tiny.pipeline("stable_diffusion", folder)
        self.shared = SharedSamplingPipeline.from_pipe(self.pipe)
        self.timestep = lambda: self.shared.current_timestep

    def enable(self):
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            spatial_attention_block_identifiers=("transformer_blocks",),
            cross_attention_block_skip_range=3,
            cross_attention_timestep_skip_range=(-1, 700),
            cross_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: self.timestep(),
        )
        apply_pyramid_attention_broadcast(self.pipe.unet, config)

    def begin(self):
        HookRegistry.check_if_exists_or_initialize(self.pipe.unet).reset_stateful_hooks()

    def sample(self, chosen, seeds, **changes):
        self.timestep = lambda: self.shared.current_timestep
        prompts = [self.prompts[number] for number in chosen]
        return self.shared(prompts, seed=seeds, **self.call, **{"share_ratio": 0} | changes).images

    def stock(self, chosen, seeds, **changes):
        seen = []
        self.timestep = lambda: seen[-1]
        handle = self.pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        prompts = [self.prompts[number] for number in chosen]
        found = self.pipe(prompts, generator=generators(seeds), **self.call, **changes).images
        handle.remove()
        self.begin()  # a U-Net is not a CacheMixin, so the stock call leaves it as it is
        return found


def test_stable_diffusion_is_the_stock_pipeline_with_the_cache(tmp_path):
    case = StableDiffusion(tmp_path)
    plain = case.stock([0, 1], [5, 6])
    case.enable()
    expected = case.stock([0, 1], [5, 6])
    assert not torch.equal(plain, expected)
    assert torch.equal(case.sample([0, 1], [5, 6]), expected)
    assert torch.equal(case.sample([0, 1], [5, 6]), expected)
    alone = [case.stock([0], [5]), case.stock([1, 2], [6, 7])]
    assert torch.equal(case.sample([0, 1, 2], [5, 6, 7], batch_size=2), torch.cat(alone))


def test_a_branch_of_stable_diffusion_is_the_stock_pipeline_with_the_cache_begun_clean_there(tmp_path):
    case, at_branch = StableDiffusion(tmp_path), {}
    case.enable()

    def keep(pipe, step, t, tensors):
        at_branch[step] = tensors["latents"].clone()
        return {}

    def go_on(pipe, step, t, tensors):
        if step != BRANCH - 1:
            return {}
        case.begin()
        return {"latents": at_branch[step].repeat(2, 1, 1, 1)}

    found = case.sample([0, 1], [5, 6], plan=Plan(STEPS, (Block(BRANCH, (0, 1)),)), callback_on_step_end=keep)
    assert torch.equal(found, case.stock([0, 1], [5, 6], callback_on_step_end=go_on))


def test_a_callback_that_turns_guidance_off_begins_the_cache_anew(tmp_path):
    """The rows of the network's batch are others from there on."""
    case = StableDiffusion(tmp_path)
    case.enable()

    def cut(pipe, step, t, tensors):
        if step != BRANCH:
            return {}
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"][-2:]}

    def cut_and_begin(pipe, step, t, tensors):
        if step == BRANCH:
            case.begin()
        return cut(pipe, step, t, tensors)

    more = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    found = case.sample([0, 1], [5, 6], callback_on_step_end=cut, **more)
    assert torch.equal(found, case.stock([0, 1], [5, 6], callback_on_step_end=cut_and_begin, **more))


def pixart(folder):
    pipe = tiny.pipeline("pixart_alpha", folder)
    call = {"num_inference_steps": STEPS, "output_type": "latent", "share_ratio": 0, **tiny.OPTIONS["pixart_alpha"]}
    return SharedSamplingPipeline.from_pipe(pipe), call


@pytest.mark.filterwarnings("ignore:.*indexing argument:UserWarning")
def test_fastercache_of_a_guided_batch_is_the_stock_pipeline(tmp_path):
    """PixArt-alpha: the rows without text are the first half of its batch."""
    shared, call = pixart(tmp_path)
    plain = shared(["red cat", "a dog"], **call, seed=[5, 6]).images
    timestep = [lambda: shared.current_timestep]
    config = faster(lambda: None, current_timestep_callback=lambda: timestep[0]())
    apply_faster_cache(shared.transformer, config)
    found = [shared(["red cat", "a dog"], **call, seed=[5, 6]).images for _ in range(2)]
    stock, seen = tiny.pipeline("pixart_alpha", tmp_path), []
    apply_faster_cache(stock.transformer, config)
    timestep[0] = lambda: float(seen[-1][0])
    stock.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True
    )
    call.pop("share_ratio")
    expected = stock(["red cat", "a dog"], **call, generator=generators([5, 6])).images
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected) and not torch.equal(plain, expected)


@pytest.mark.filterwarnings("ignore:.*indexing argument:UserWarning")
def test_fastercache_without_guidance_is_refused(tmp_path):
    shared, call = pixart(tmp_path)
    apply_faster_cache(shared.transformer, faster(lambda: shared))
    with pytest.raises(UnsupportedError, match=r"FasterCache .* there is no guidance; set is_guidance_distilled=True"):
        shared(["red cat"], **call, seed=5, guidance_scale=1.0)

    def cut(pipe, step, t, tensors):
        pipe._guidance_scale = 1.0
        return {}

    with pytest.raises(UnsupportedError, match=r"FasterCache .* there is no guidance; set is_guidance_distilled=True"):
        shared(["red cat"], **call, seed=5, callback_on_step_end=cut)


class Idle:
    current_timestep = None


class Constant:
    current_timestep = 500


SHARED = Plan(STEPS, (Block(BRANCH, (0, 1)),))


# diffusers 0.42's Chroma imports a name that it deprecates.
@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "config", "call", "words"),
    [
        # Two network calls in a step, which these caches do not tell apart.
        ("CogView4Pipeline", broadcast, {}, "PyramidAttentionBroadcast would mix the network calls of a step"),
        ("CogView4Pipeline", faster, {}, "FasterCache would mix the network calls of a step"),
        ("ChromaPipeline", broadcast, {}, "PyramidAttentionBroadcast would mix the network calls of a step"),
        # The stock pipeline does not name its network calls.
        ("Flux2Pipeline", first_block, {}, "FirstBlockCache needs a stock pipeline that names its network calls"),
        # What counts the steps of a whole call.
        ("FluxPipeline", partial(taylor, disable_cache_after_step=6), {"plan": SHARED}, "disable_cache_after_step=6"),
        ("FluxPipeline", partial(magnitude, num_inference_steps=28), {}, "ratios for 28 steps, .* evaluated in 8"),
        ("FluxPipeline", partial(magnitude, calibrate=True), {}, "MagCache is calibrated in a call of the stock"),
        ("WanPipeline", magnitude, {}, "MagCache counts the steps of its own network, .* has two"),
        ("FluxPipeline", lambda pipe: SeaCacheConfig(raw_vision_callback=lambda *_: None), {}, "the hook SeaCache"),
        # Caches that ask for the timestep get none, or another pipeline's.
        ("FluxPipeline", lambda pipe: broadcast(lambda: Idle), {}, "callback of a step cache returned None at"),
        ("FluxPipeline", lambda pipe: broadcast(lambda: Constant), {}, "returned 500 at timestep 1000"),
        (
            "FluxPipeline",
            partial(faster, is_guidance_distilled=True, spatial_attention_timestep_skip_range=(-1, 800)),
            {"plan": SHARED},
            r"has to begin outside its range of timesteps, .* in \(-1, 800\)",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(name, config, call, words):
    case = Case(name, config)
    case.enable()
    with pytest.raises(UnsupportedError, match=words):
        case.sample([0, 1], [5, 6], **call)


def test_a_cache_of_the_second_transformer_alone_is_seen():
    case = Case("WanPipeline", broadcast)
    case.networks[1].enable_cache(case.config(lambda: case.shared))
    with pytest.raises(UnsupportedError, match="PyramidAttentionBroadcast would mix the network calls of a step"):
        case.sample([0, 1], [5, 6])


def test_taylorseer_that_ends_at_a_step_is_the_stock_pipeline_at_share_ratio_0():
    case = Case("FluxPipeline", partial(taylor, disable_cache_after_step=6))
    case.enable()
    assert torch.equal(case.sample([0, 1], [5, 6]), case.stock([0, 1], [5, 6]))


def test_continuous_batching_refuses_caches():
    case = Case("FluxPipeline", taylor)
    case.enable()
    stream = case.shared.stream(**rows(case.embeddings, [0]), **case.family.call, seed=[5], output_type="latent")
    with pytest.raises(UnsupportedError, match="rows of a batch, which change here from step to step"):
        Continuous(case.shared, 2).admit(stream)


def test_the_caches_of_stock_calls_are_left_as_they_were():
    """A stock call that stopped on its way has something in its caches; ours do not see it, and leave it."""
    case = Case("FluxPipeline", taylor)
    case.enable()
    alone = case.sample([0, 1], [5, 6])

    def fail(pipe, step, t, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.stock([2], [7], callback_on_step_end=fail)
    assert torch.equal(case.sample([0, 1], [5, 6]), alone)


def test_a_late_cache_saves_beside_sharing_what_it_saves_alone_and_an_early_one_does_not():
    """The table of `python -m benchmarks.caches`."""
    for row in caches.measure():
        assert row["sharing"] == pytest.approx(0.4 * 2 / 3) and row["caching"] > 0.1
        late = row["cached_steps"] == "late"
        assert (row["both"] == pytest.approx(row["sharing"] + row["caching"])) is late
