"""The engine on a simulated accelerator: no mixed devices; a step waits and copies no more than a stock one."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import diffusers
import numpy as np
import pytest
import simulated_device
import tiny
import tiny_families
import torch
from peft import LoraConfig
from simulated_device import DEVICE, counted
from torch import Tensor

from sage.sampling.branch_noise import SCHEDULERS
from sage.sampling.continuous import Continuous, Start
from sage.sampling.loop import HISTORY
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Block, Plan
from sage.training.batches import Batches
from sage.training.denoiser import Denoiser
from sage.training.finetuning import TrainingSet, finetuning_loss
from sage.training.loop import Schedule, fit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning"),
    # diffusers 0.42's Chroma imports a name that it deprecates.
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]
AUDIO = "StableAudioPipeline"
FAMILIES = [*tiny.FAMILIES, *tiny_families.FAMILIES]
# Not Stable Audio: sounds are not served. Not the ControlNet of SD 3: calls draw from torch's own generator in turn.
SERVED = [name for name in FAMILIES if name not in (AUDIO, "StableDiffusion3ControlNetPipeline")]
STEPS, SEEDS = 4, [5, 6, 7, 8, 9]
GROUPS = ((0, 1, 2), (3, 4))


@pytest.fixture(autouse=True, scope="module")
def device() -> None:
    simulated_device.register()


@dataclass
class Subject:
    """A tiny pipeline on a device and what it is called with; `given` are embeddings, not prompts."""

    pipe: Any
    inputs: Callable[[int], dict[str, Any]]
    options: dict[str, Any]
    guidance: tuple[str, float] | None
    given: bool = False

    def arguments(self, plan: Plan, **changes: Any) -> dict[str, Any]:
        """Arguments of a shared call; embeddings are on the host."""
        scale = {"guidance_scale": self.guidance[1]} if self.guidance else {}
        call = {"plan": plan, "num_inference_steps": STEPS, "output_type": "latent", "seed": SEEDS[: plan.prompts]}
        return self.inputs(plan.prompts) | self.options | scale | call | changes

    @property
    def shared_pipe(self) -> Any:
        return SharedSamplingPipeline.from_pipe(self.pipe)

    def shared(self, plan: Plan, **changes: Any) -> Any:
        torch.manual_seed(0)  # the ControlNet of SD 3 draws from torch's own generator
        return self.shared_pipe(**self.arguments(plan, **changes)).images

    def stock(self, count: int, **changes: Any) -> Any:
        inputs = self.inputs(count)
        if self.given:
            inputs = {name: moved(value, self.pipe.device) for name, value in inputs.items()}
        call = {"num_inference_steps": STEPS, "output_type": "latent", **dict([self.guidance] if self.guidance else [])}
        if type(self.pipe).__name__ in ("SanaPipeline", "PixArtSigmaPipeline"):
            call["negative_prompt"] = None
        seeds = tiny_families.generators(SEEDS[:count])
        torch.manual_seed(0)
        return tiny_families.latents(self.pipe(**inputs, **self.options | call | changes, generator=seeds))

    def tree(self, steps: int = STEPS) -> Plan:
        """A plan of five prompts with three branches."""
        n = self.shared_pipe.evaluations(steps)
        return Plan(n, (Block(n // 4, (Block(3 * n // 4, (0, 1)), 2)), Block(n // 2, (3, 4))))

    def alone(self, count: int, steps: int = STEPS) -> Plan:
        return Plan.independent(count, self.shared_pipe.evaluations(steps))


def moved(value: Any, device: Any) -> Any:
    return [row.to(device) for row in value] if isinstance(value, list) else value.to(device)


def subject(name: str, folder: Path, device: str = DEVICE) -> Subject:
    """The same weights each time."""
    if name in tiny.FAMILIES:
        pipe = tiny.pipeline(name, folder).to(device)
        options = tiny.OPTIONS.get(name, {})
        return Subject(pipe, lambda count: {"prompt": tiny.PROMPTS[:count]}, options, ("guidance_scale", 3.0))
    family = tiny_families.tiny(name)
    return Subject(family.pipe.to(device), family.embed, family.call, family.guidance, given=True)


def assert_near(found: Any, expected: Any) -> None:
    """The values of a device are those of the host: the same kernels in batches of the same size."""
    torch.testing.assert_close(torch.as_tensor(found).cpu(), torch.as_tensor(expected).cpu(), rtol=1e-4, atol=1e-4)


@dataclass
class Cost:
    """Waits and copies of a step, and the lines that ask for them."""

    waits: float
    copies: float
    places: Counter[str]


def per_step(run: Callable[[int], Any]) -> Cost:
    """Return what `run(steps)` costs in each step: what is added by twice as many steps."""
    found = []
    for steps in (STEPS, 2 * STEPS):
        with counted() as events:
            run(steps)
        found.append(events)
    once, twice = found
    waits, copies = twice.waits - once.waits, twice.copies - once.copies
    more = twice.waits.total() - once.waits.total(), twice.copies.total() - once.copies.total()
    return Cost(more[0] / STEPS, more[1] / STEPS, waits + copies)


def assert_no_more(found: Cost, stock: Cost, copies: int = 0) -> None:
    assert found.waits <= stock.waits, (found, stock)
    assert found.copies <= stock.copies + copies, (found, stock)


# What the device refuses and counts.


def test_the_device_refuses_tensors_of_the_host() -> None:
    on_device, here = torch.ones(3, 3, device=DEVICE), torch.ones(3, 3)
    weight = torch.nn.Linear(3, 3).to(DEVICE)
    mixed: list[Callable[[], Any]] = [
        lambda: on_device + here,
        lambda: here * on_device,
        lambda: weight(here),
        lambda: torch.cat([on_device, here]),
        lambda: on_device.index_select(0, torch.tensor([0])),
        lambda: here[torch.tensor([0], device=DEVICE)],
        lambda: here.add_(on_device),
        lambda: torch.tensor(1.0).add_(on_device[0, 0]),
        lambda: on_device.where(here > 0, on_device),
        lambda: torch.stack([torch.tensor(1.0), on_device[0, 0]]),
    ]
    for number, operation in enumerate(mixed):
        with pytest.raises(RuntimeError, match="at least two devices"):
            operation()
            pytest.fail(f"operation {number} was allowed")
    with pytest.raises(TypeError, match="can't convert simulated"):
        on_device.numpy()
    # As on a GPU, a number of the host and an index of the host are allowed.
    assert torch.equal((on_device + torch.tensor(1.0))[torch.tensor([0, 2])].cpu(), torch.full((2, 3), 2.0))


@pytest.mark.parametrize(
    ("waits", "copies", "operation"),
    [
        (1, 0, lambda x: x[0].item()),
        (1, 0, lambda x: float(x[0])),
        (1, 0, lambda x: bool(x[0] > 0)),
        (1, 0, lambda x: torch.arange(9)[x[0].long()]),
        (1, 0, lambda x: x[x > 0]),
        (1, 0, lambda x: x.nonzero()),
        (1, 0, lambda x: torch.equal(x, x)),
        (1, 1, lambda x: x.cpu()),
        (1, 1, lambda x: x.tolist()),
        (1, 1, lambda x: f"{x[0]:.2f}"),
        (1, 1, lambda x: torch.zeros(3).copy_(x)),
        (0, 1, lambda x: torch.ones(3).to(DEVICE)),
        (0, 1, lambda x: torch.tensor([1.0], device=DEVICE)),
        (0, 1, lambda x: x[[0, 1]]),
        (0, 0, lambda x: x.to(torch.float64) * 2 + torch.zeros(3, device=DEVICE)),
        (0, 0, lambda x: x + torch.tensor(1.0)),
    ],
)
def test_the_device_counts_waits_and_copies(waits: int, copies: int, operation: Callable[[Tensor], Any]) -> None:
    x = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    with counted() as events:
        operation(x)
    assert (events.waits.total(), events.copies.total()) == (waits, copies), events


# Sampling.


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_shares_on_the_device(name: str, tmp_path: Path) -> None:
    """Share ratio 0 is the stock pipeline bit for bit, images too; a tree with branch noise is what the host gets."""
    there, here = subject(name, tmp_path), subject(name, tmp_path, "cpu")
    assert torch.equal(there.shared(there.alone(2)), there.stock(2))
    images = there.shared(there.alone(2), output_type="np")
    assert np.array_equal(np.asarray(images), np.asarray(there.stock(2, output_type="np")))
    # The schedulers of Stable Audio take no branch noise.
    changes = {"branch_noise": 0.0 if name == AUDIO else 0.7, "output_type": "pt"}
    assert_near(there.shared(there.tree(), **changes), here.shared(here.tree(), **changes))


# Copies of a step beside those of a stock step: sizes, or the seconds of a sound, of which the stock call makes tensors
# before its loop.
BESIDE = {"CogView4Pipeline": 3, "HunyuanDiTPipeline": 2, AUDIO: 2}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_waits_and_copies_no_more_than_a_stock_step(name: str, tmp_path: Path) -> None:
    it = subject(name, tmp_path)
    it.stock(5, num_inference_steps=2)  # some transformers keep their tables of positions on the device
    stock = per_step(lambda steps: it.stock(5, num_inference_steps=steps))

    def share(steps: int) -> None:
        it.shared(it.tree(steps), num_inference_steps=steps, batch_size=5)

    def serve(steps: int) -> None:
        running = Continuous(it.shared_pipe, 5)
        running.admit(it.shared_pipe.stream(**it.arguments(it.alone(5, steps), num_inference_steps=steps)))
        finished(running)

    for run in (share, serve) if name in SERVED else (share,):
        assert_no_more(per_step(run), stock, BESIDE.get(name, 0))


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SETTINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DDIMScheduler", {"clip_sample": False}, {}),
    ("DDIMScheduler", {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
                       "prediction_type": "v_prediction"}, {"eta": 0.7}),
    ("DDPMScheduler", {"clip_sample": False}, {}),
    ("EulerDiscreteScheduler", {}, {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {}),
    ("EulerAncestralDiscreteScheduler", {}, {}),
    ("HeunDiscreteScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("DPMSolverSinglestepScheduler", {}, {}),
    ("UniPCMultistepScheduler", {}, {}),
    ("LMSDiscreteScheduler", {}, {}),
    ("PNDMScheduler", {}, {}),
    ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
]  # fmt: skip


def test_all_supported_schedulers_are_here() -> None:
    # The others are held to the stock pipeline in tests/sampling/test_segment_schedulers.py.
    own = {name for name in HISTORY if name.startswith(("EDM", "Cosine", "FlowMatchHeun"))}
    assert {name for name, _, _ in SETTINGS} == HISTORY.keys() - own


@pytest.mark.parametrize(("name", "settings", "changes"), SETTINGS)
def test_every_scheduler_runs_on_the_device(
    name: str, settings: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    flow = name == "FlowMatchEulerDiscreteScheduler"
    family = "stable_diffusion_3" if flow else "stable_diffusion"
    there, here = subject(family, tmp_path), subject(family, tmp_path, "cpu")
    for it in (there, here):
        it.pipe.scheduler = getattr(diffusers, name)(**({} if flow else NOISE), **settings)
    assert torch.equal(there.shared(there.alone(2), **changes), there.stock(2, **changes))
    noisy = name in SCHEDULERS
    more = changes | {"branch_noise": 0.7 if noisy else 0.0, "batch_size": 5}
    assert_near(there.shared(there.tree(), **more), here.shared(here.tree(), **more))
    stock = per_step(lambda steps: there.stock(5, num_inference_steps=steps, **changes))
    assert_no_more(per_step(lambda steps: there.shared(there.tree(steps), num_inference_steps=steps, **more)), stock)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "FluxPipeline"])
def test_what_is_given_may_be_on_the_host(name: str, tmp_path: Path) -> None:
    """Embeddings, latents, one generator for all; several images of a prompt; medoids; a callback on the latents."""
    there, here = subject(name, tmp_path), subject(name, tmp_path, "cpu")
    if there.given:
        inputs = there.inputs(5)
    else:
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "device": "cpu"}
        options |= {"prompt_2": None, "prompt_3": None} if name == "stable_diffusion_3" else {}
        options |= there.options
        with torch.no_grad():
            results = here.pipe.encode_prompt(prompt=tiny.PROMPTS, **options)
        names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        inputs = {"prompt": None} | dict(zip(names, results, strict=False))

    def brighter(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"] * 1.01}

    shape = here.shared(here.alone(1)).shape[1:]
    own = torch.randn(10, *shape, generator=torch.Generator().manual_seed(0))
    for changes in (
        {"latents": own, "num_images_per_prompt": 2, "seed": list(range(10))},
        {"generator": None, "seed": None, "group_condition": "medoid"},
        {"callback_on_step_end": brighter, "batch_size": 2},
    ):
        found = []
        for it in (there, here):
            if "generator" in changes:
                changes = changes | {"generator": torch.Generator().manual_seed(3)}
            found.append(it.shared(it.tree(), **inputs | changes))
        assert_near(*found)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "FluxPipeline"])
def test_half_precision_is_the_stock_pipeline(name: str, half: torch.dtype, tmp_path: Path) -> None:
    it = subject(name, tmp_path)
    it.pipe.to(half)
    if it.given:
        embed = it.inputs
        it.inputs = lambda count: {key: value.to(half) for key, value in embed(count).items()}
    assert torch.equal(it.shared(it.alone(2)), it.stock(2))
    assert it.shared(it.tree(), branch_noise=0.7).isfinite().all()


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "FluxPipeline"])
def test_weights_that_wait_on_the_host_change_no_image(name: str, tmp_path: Path) -> None:
    """Whole models; accelerate's sequential offloading makes tensors by their class, which is another here."""
    it, waiting = subject(name, tmp_path), subject(name, tmp_path, "cpu")
    pipe = waiting.shared_pipe
    pipe.enable_model_cpu_offload(device=DEVICE)
    for plan in (it.alone(2), it.tree()):
        found = [pipe(**waiting.arguments(plan, output_type="pt")).images for _ in range(2)]
        assert torch.equal(found[0], found[1])
        assert_near(found[0], it.shared(plan, output_type="pt"))
    assert {weight.device.type for weight in pipe._network.parameters()} == {"cpu"}


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "FluxPipeline"])
def test_an_adapter_and_an_interruption_are_the_stock_pipelines(name: str, tmp_path: Path) -> None:
    it = subject(name, tmp_path)
    plain = it.shared(it.alone(2))
    network = it.shared_pipe._network
    network.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v"], init_lora_weights=False))
    network.to(DEVICE)
    found = it.shared(it.alone(2))
    assert torch.equal(found, it.stock(2)) and not torch.equal(found, plain)

    def stop(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = step == 1
        return {}

    changes = {"callback_on_step_end": stop}
    assert torch.equal(it.shared(it.alone(2), **changes), it.stock(2, **changes))


# The serving engine.


def finished(running: Continuous) -> list[Any]:
    found = []
    while running.tracks:
        found += running.step()
    return found


@pytest.mark.parametrize("name", SERVED)
def test_calls_that_join_in_the_middle_get_their_images(name: str, tmp_path: Path) -> None:
    it = subject(name, tmp_path)
    calls = [(it.tree(), SEEDS), (it.alone(2), [1, 2])]
    wanted = [it.shared(plan, seed=seeds) for plan, seeds in calls]
    running, admitted, found = Continuous(it.shared_pipe, 4), [], []
    for plan, seeds in calls:
        admitted.append(running.admit(it.shared_pipe.stream(**it.arguments(plan, seed=seeds))))
        found += running.step()
    found += finished(running)
    for call, images in zip(admitted, wanted, strict=True):
        mine = sorted((one for one in found if one.call is call), key=lambda one: one.index)
        torch.testing.assert_close(torch.stack([one.image for one in mine]).cpu(), images.cpu(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_3"])
def test_an_image_begins_from_a_kept_prefix(name: str, tmp_path: Path) -> None:
    it = subject(name, tmp_path)
    pair = Plan.shared([[0, 1]], STEPS, 0.5)
    call = it.arguments(pair, branch_noise=0.8)
    running = Continuous(it.shared_pipe, 4)
    kept = running.admit(it.shared_pipe.stream(**call), keep=[2])
    wanted = [one.image for one in sorted(finished(running), key=lambda one: one.index)]
    alone = it.arguments(it.alone(1), prompt=tiny.PROMPTS[1:2], seed=SEEDS[1:2], branch_noise=0.8)
    (_, prefix), running = kept.kept[0], Continuous(it.shared_pipe, 4)
    running.admit(it.shared_pipe.stream(**alone), starts={0: Start(prefix, own_noise=False)})
    torch.testing.assert_close(finished(running)[0].image.cpu(), wanted[1].cpu(), rtol=1e-3, atol=1e-4)


# Training.


def tuned(pipe: Any, options: dict[str, Any], work: Path, start: str, steps: int = 1) -> tuple[Any, Any]:
    """Fine-tune for some steps; return the losses of the last one and the weights."""
    denoiser = Denoiser(pipe)
    denoiser._pipe._options = {**denoiser._pipe._options, **options}
    pixels = torch.randint(0, 256, (5, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    latents = denoiser.encode_images(pixels)
    conditions = denoiser.encode_texts([*tiny.PROMPTS, ""], (16, 16))
    data = TrainingSet(latents, conditions, torch.arange(5)[:, None], GROUPS)
    weights = {"diffusion": 1.0, "shared": 1.0, "branch": 1.0, "consistency": 0.1}
    loss = finetuning_loss(
        denoiser,
        pipe.scheduler,
        data,
        Batches(GROUPS, weights, 12, 0),
        share_ratios=(0.2, 0.6),
        soft_target="posterior",
        branch_start=start,  # type: ignore[arg-type]
        sampler_steps=8,
        drop_text=0.1,
        seed=0,
        min_snr=5.0,
    )
    trained = fit(denoiser, loss, Schedule(steps, 1e-3, warmup=0), work=work, identity={})
    return trained.losses, [weight.detach().cpu() for weight in denoiser.network.parameters()]


@pytest.mark.parametrize("start", ["sampled", "mixture"])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_training_step_on_the_device_is_that_of_the_host(name: str, start: str, tmp_path: Path) -> None:
    found = [
        tuned(tiny.pipeline(name, tmp_path).to(device), tiny.OPTIONS.get(name, {}), tmp_path / device, start)
        for device in (DEVICE, "cpu")
    ]
    (losses, weights), (expected, expected_weights) = found
    assert losses == pytest.approx(expected, rel=1e-3)
    for weight, other in zip(weights, expected_weights, strict=True):
        # AdamW's first step is the learning rate, 1e-3, by the sign of the gradient, and rounding can turn one near 0.
        assert (weight - other).abs().mean() < 1e-5
