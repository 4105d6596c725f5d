"""One call of the pipeline: an iterator over finished images, with their seeds, noise, conditions and cost."""

import hashlib
import inspect
import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sage.torchvision_ops  # noqa: F401

import torch
from torch import Generator, Tensor

from sage.errors import ConfigurationError, DataError, DivergedError, PlanError, SageError, UnsupportedError
from sage.numbers import single, whole
from sage.sampling import loop
from sage.sampling.caches import StepCaches
from sage.sampling.conditions import Condition, concatenated, padded
from sage.sampling.first_prediction import FirstPredictions, made_for
from sage.sampling.plan import Plan
from sage.sampling.seeds import image_seeds

# Tokenizers keep the padding of their last call, and decoding may change the autoencoder's precision for its time.
ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class Cost:
    """The cost of a call, in network evaluations and seconds.

    `network_evaluations`: counted so far, in rows of the batches; under guidance a latent takes two.
    `formula`: expected for the whole plan, `plan.nfe(guidance)`; a finished call with another count raises PlanError,
    unless a callback turned guidance off on the way.
    `independent`: the evaluations that independent sampling takes; `saving`: the fraction of them that the plan saves.
    `padding`: rows that were evaluated beside these, to pad batches to a size of `batch_size`.
    """

    network_evaluations: int
    formula: int
    independent: int
    saving: float
    seconds: float
    padding: int = 0


@dataclass(frozen=True)
class Result:
    """One image, the seed of its noise, and whether the safety checker blanked it (None: not checked).

    Image r of prompt i has index i * num_images_per_prompt + r. If the call was interrupted while the image was on its
    way, it is not `finished`.
    """

    index: int
    image: Any
    seed: int
    nsfw: bool | None
    finished: bool = True


class Stream:
    """An iterator over the images of one call, in the order in which they finish; `cost` is the cost so far.

    Images that are not finite are left out; DivergedError names them after the others were yielded. If the call is
    interrupted, the images of the batch under way come unfinished, and those not begun do not come.
    """

    def __init__(
        self,
        pipe: Any,
        plan: Plan,
        *,
        prompts: list[str] | None,
        given: dict[str, Any],
        negatives: list[str] | None,
        images: int,
        predictions: FirstPredictions | None,
        guidance_scale: float,
        seed: int | Sequence[int] | None,
        generator: Generator | Sequence[Generator] | None,
        latents: Tensor | None,
        batch_size: int,
        padded_sizes: Sequence[int],
        caches: StepCaches,
        medoid: bool,
        branch_noise: float,
        output_type: str,
        callback: Any,
        callback_inputs: Sequence[str],
        options: dict[str, Any],
    ) -> None:
        """Take the arguments that `SharedSamplingPipeline.stream` has checked.

        pipe            the pipeline's copy for this call, which holds the call's state
        plan            plan over images: image r of prompt i is i * images + r
        prompts         the prompts, or None if embeddings are given
        given           embeddings, and texts of further encoders, by name, one row for each prompt
        negatives       negative prompts, one for each prompt, or None
        images          number of images of each prompt
        predictions     first predictions of the prompts, which take the place of the first step if they can
        guidance_scale  guidance if above 1
        seed            one seed, or one for each image; None: drawn from torch's global generator
        generator       instead of `seed`: one for all noise, or one for each image
        latents         standard normal initial noise, one row for each image, or None
        batch_size      latents in a network call
        padded_sizes    numbers of latents that network calls are padded to, ascending; empty: they are not padded
        caches          step caches of the networks
        medoid          whether groups take the medoid's condition instead of the mean
        branch_noise    in [0, 1]
        output_type     "pil", "np", "pt" or "latent"
        callback        called after each step of each batch, or None
        callback_inputs names of the tensors that the callback gets
        options         arguments of the stock pipeline, and "size", (height, width)

        Raises ConfigurationError if seeds, generators or latents do not match the images, DataError if latents are not
        finite.
        """
        self.plan = plan
        self._pipe, self._prompts, self._negatives = pipe, prompts, negatives
        self._images, self._scale, self._batch_size = images, guidance_scale, batch_size
        self._padded_sizes, self._caches = padded_sizes, caches
        self._medoid, self._branch_noise = medoid, branch_noise
        self._output_type, self._options = output_type, options
        self._callback, self._callback_inputs = callback, callback_inputs
        self._guided = pipe._is_guided(guidance_scale, negatives, given)
        self._device, self._dtype = pipe._execution_device, pipe._network.dtype
        self._given = {
            name: [row.to(self._device) if torch.is_tensor(row) else row for row in rows]
            if isinstance(rows, list)
            else rows.to(self._device)
            for name, rows in given.items()
        }
        self._latents = latents
        # Evaluations of this call before the plan's own: first predictions that it was grouped by.
        self._spent = pipe._evaluations
        self._first = predictions if predictions is not None and predictions.reusable else None
        self._check_predictions(predictions)
        self._keys = [_key(prompts, given, number) for number in range(plan.prompts // images) for _ in range(images)]
        self._generators: list[Generator] | None = None
        if pipe._encodes_control and images > 1:
            raise UnsupportedError(
                f"num_images_per_prompt is {images}, but each image has latents of its own of its control image, which "
                "are drawn; give 1, and the prompt several times"
            )
        one = _copied(generator) if isinstance(generator, Generator) else None
        self.seeds = self._take_seeds(seed, generator)
        if pipe._encodes_control:
            own = one or [_copied(self._generator(image)) for image in range(plan.prompts)]
            self._given |= pipe._drawn_before(own, plan.prompts)
        self.truncated_tokens = [0] * (plan.prompts // images)
        self._encoded: dict[int, Condition] = {}
        self._undone = [images] * (plan.prompts // images)
        # A negative prompt common to all images is encoded once, together with the first batch as in diffusers.
        self._one_negative = (
            not any(name.startswith("negative") or "image" in name for name in given)
            and len(set(negatives or [""])) == 1
        )
        self._without: Condition = {}
        self._keep(pipe._first_conditions())
        # Latents and rows of the network's batches that the steps so far needed.
        self._steps, self._rows, self._padding, self._seconds = 0, 0, 0, 0.0
        # The conditions of the pack under way, and the same padded.
        self._latest: tuple[Condition, Condition] = ({}, {})
        # The images that are not finite, with the step of the first such latents, or None if only the pixels are.
        self._diverged: dict[int, int | None] = {}
        if self._latents is not None:
            self._latents = pipe._as_drawn(self._latents, options)
            self._check_latents(self._latents)
        self._failure = ""
        self._results = self._run()

    def __iter__(self) -> Iterator[Result]:
        """Return the stream itself."""
        return self

    def __next__(self) -> Result:
        """Return the next finished image; raise SageError after an error, so that the stream does not seem complete."""
        if self._failure:
            raise SageError(f"this stream has failed with {self._failure}; begin another one")
        begin = time.perf_counter()
        try:
            return next(self._results)
        except StopIteration:
            raise
        except BaseException as error:
            # Not the error itself: its traceback would keep the latents.
            self._failure = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise
        finally:
            self._seconds += time.perf_counter() - begin

    def prompt_of(self, image: int) -> Hashable:
        """Return a key that images of equal prompts, and so of equal conditions, have in common."""
        number = image // self._images
        # Texts that are equal may have control images or image prompts of their own.
        if any(name.startswith("negative") or "image" in name for name in self._given):
            return number
        return self._keys[image], None if self._negatives is None else self._negatives[number]

    @property
    def cost(self) -> Cost:
        """The cost so far; `formula` and `independent` are for the whole plan."""
        each = 2 if self._guided else 1
        formula = self._spent + each * self._planned
        independent = each * self.plan.prompts * self.plan.steps
        plain = self._planned == self.plan.nfe(guidance=False) and not self._spent
        saving = self.plan.saving if plain else 1 - formula / independent
        counted = self._pipe._evaluations - self._padding
        return Cost(counted, formula, independent, saving, self._seconds, self._padding)

    @property
    def _planned(self) -> int:
        """The latents that the network evaluates in this stream's plan: all, without a first step that is known."""
        return self.plan.nfe(guidance=False) - (len(self.plan.roots) if self._first is not None else 0)

    def _first_of(self, images: list[int]) -> Tensor:
        assert self._first is not None
        return self._first.mean([image // self._images for image in images])

    def _check_predictions(self, given: FirstPredictions | None) -> None:
        if given is None:
            return
        if self._caches:
            raise UnsupportedError(
                "a step cache begins with the first step, which first predictions take the place of; give none, or "
                "call disable_cache() of the transformer"
            )
        count = self.plan.prompts // self._images
        wanted = made_for(self._pipe.scheduler, self._scale)
        if len(given.x_0) != count or given.made_for != wanted:
            raise ConfigurationError(
                f"the first predictions are of {len(given.x_0)} prompts with (scheduler, timestep, guidance scale) "
                f"{given.made_for}, but the call has {count} prompts with {wanted}; make them for this call"
            )

    @torch.no_grad()
    def _run(self) -> Iterator[Result]:
        pipe = self._pipe
        accepts_eta = "eta" in inspect.signature(pipe.scheduler.step).parameters
        with pipe.progress_bar(total=self.plan.nfe(guidance=False)) as self._bar:
            packs = loop.sample(
                self.plan,
                pipe.scheduler,
                predict=self._predict,
                encode=self._encode,
                noise=self._noise,
                generator=self._generator,
                rank=lambda image: (self.seeds[image], self._keys[image], image),
                prompt_of=self.prompt_of,
                first=None if self._first is None else self._first_of,
                batch_size=self._batch_size,
                guidance=self._scale,
                medoid=self._medoid,
                branch_noise=self._branch_noise,
                step_kwargs={"eta": self._options["eta"]} if accepts_eta and "eta" in self._options else {},
                fill=bool(self._padded_sizes),
                begin=self._caches.begin if self._caches else None,
                on_step=self._on_step,
                interrupted=lambda: pipe._interrupt,
            )
            try:
                for part in packs:
                    yield from self._results_of(part)
            finally:
                with ONE_AT_A_TIME:  # it empties step caches
                    pipe._end_call()
        counted = self.cost.network_evaluations
        if not pipe._interrupt and (self._steps, self._rows + self._spent) != (self._planned, counted):
            raise PlanError(
                f"the network was evaluated {counted} times, but the plan has {self.cost.formula}; "
                "this is a bug in this package, please report it"
            )
        if self._diverged:
            raise self._divergence()

    def _results_of(self, part: loop.Sampled) -> Iterator[Result]:
        """Yield the finite images of a part, and note the others; forget the conditions of prompts that are done."""
        for image in part.prompts:
            self._undone[image // self._images] -= 1
            if not self._undone[image // self._images]:
                self._encoded.pop(image // self._images, None)
        rows = [row for row, step in enumerate(part.diverged) if step is None]
        self._diverged |= {part.prompts[row]: step for row, step in enumerate(part.diverged) if step is not None}
        latents = part.latents if len(rows) == len(part.prompts) else part.latents[rows]
        images, nsfw, finite = latents, None, [True] * len(rows)
        if rows:
            with ONE_AT_A_TIME:
                images, nsfw = self._pipe._finish(latents, self._output_type, self._options)
            finite = self._pipe._finite
        for place, row in enumerate(rows):
            index = part.prompts[row]
            if finite[place]:
                flagged = None if nsfw is None else nsfw[place]
                yield Result(index, images[place], self.seeds[index], flagged, part.finished)
            else:
                self._diverged[index] = None

    def _divergence(self) -> DivergedError:
        """Return the error that names the images that are not finite, what made them so, and what to do."""
        pipe, failed = self._pipe, sorted(self._diverged.items())
        steps = [step for _, step in failed if step is not None]
        named = ", ".join(
            f"{index}" + (f" ({self._prompts[index // self._images][:60]!r})" if self._prompts is not None else "")
            for index, _ in failed[:3]
        )
        more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
        network = (
            f"check the weights of {type(pipe._network).__name__} ({self._dtype}) and the settings of "
            f"{type(pipe.scheduler).__name__}, or use bfloat16 or float32"
        )
        autoencoder = (
            f"the autoencoder ({pipe.vae.dtype}) overflows, use bfloat16 or float32, or an autoencoder made for float16"
        )
        causes = []
        if steps:
            causes.append(f"the latents of {len(steps)} from step {min(steps)} of {self.plan.steps} on; {network}")
        if len(steps) < len(failed):
            causes.append(f"the decoded pixels of {len(failed) - len(steps)}; {autoencoder}")
        images = {
            index: f"the decoded pixels; {autoencoder}"
            if step is None
            else f"the latents from step {step} of {self.plan.steps} on; {network}"
            for index, step in failed
        }
        return DivergedError(
            f"{len(failed)} of {self.plan.prompts} images are not finite and were left out, image {named}{more}: "
            f"{'; '.join(causes)}. `stream` yields the other images before this error.",
            images,
        )

    def _predict(self, x: Tensor, t: Tensor, condition: Condition, guidance: float) -> Tensor:
        self._steps += len(x)
        guided = self._guided and self._pipe._guides(guidance)
        times = 2 if guided else 1
        self._rows += times * len(x)
        rows = len(x)
        if more := next((size for size in self._padded_sizes if size >= rows), rows) - rows:
            self._padding += times * more
            x, condition = torch.cat([x, x[-1:].expand(more, *x.shape[1:])]), self._padded(condition, rows, rows + more)
        with self._evaluating(t, len(x), times):
            output: Tensor = self._pipe._predict(x, t, condition, guidance, self._options)
        return output[:rows]

    @contextmanager
    def _evaluating(self, t: Tensor, rows: int, times: int) -> Iterator[None]:
        """Within, the networks have the step caches of this call, and no other call has them."""
        if not self._caches:
            yield
            return
        with ONE_AT_A_TIME, self._caches.own(self._pipe._called, t, rows, times):
            yield

    def _padded(self, condition: Condition, rows: int, size: int) -> Condition:
        if self._latest[0] is not condition:
            self._latest = condition, padded(condition, rows, size)
        return self._latest[1]

    def _on_step(self, step: int, t: Tensor, pack: loop.Pack) -> None:
        self._bar.update(len(pack.latents))
        if self._callback is None:
            return
        named = self._pipe._callback_tensors([n for n in self._callback_inputs if n != "latents"], pack.condition)
        given = {name: tensor.clone() for name, tensor in named.items()}
        # As in diffusers, the callback may set the guidance scale on the pipeline that it gets.
        self._pipe._guidance_scale = before = pack.guidance
        changed = self._callback(self._pipe, step, t, given | {"latents": pack.latents})
        pack.latents = changed.get("latents", pack.latents)
        pack.guidance = self._pipe._guidance_scale
        if pack.guidance != before and self._pipe._guides(pack.guidance) and not self._guided:
            raise ConfigurationError(
                f"the callback set the guidance scale to {pack.guidance}, but the call began without guidance (scale "
                f"{self._scale}); begin with a scale above 1"
            )
        for name in given:
            after = changed.get(name, given[name])
            # Dropping rows is how callbacks of diffusers turn guidance off; the rows with text are taken in `_predict`.
            expected = named[name] if pack.guidance > 1 else named[name][-len(after) :]
            if not torch.equal(after, expected):
                raise UnsupportedError(
                    f"the callback changed {name}; it may change latents and the guidance scale (pipe._guidance_scale)"
                )

    def _encode(self, images: list[int]) -> Condition:
        with ONE_AT_A_TIME:
            return self._encode_alone(images)

    def _encode_alone(self, images: list[int]) -> Condition:
        """Return the conditions of images; encode `batch_size` prompts at a time, once, and keep them until drawn."""
        wanted = list(dict.fromkeys(image // self._images for image in images))
        missing = [number for number in wanted if number not in self._encoded]
        for start in range(0, len(missing), self._batch_size):
            numbers = missing[start : start + self._batch_size]
            texts = None if self._prompts is None else [self._prompts[number] for number in numbers]
            negatives = None if self._negatives is None else [self._negatives[number] for number in numbers]
            given = {
                name: [rows[number] for number in numbers] if isinstance(rows, list) else rows[numbers]
                for name, rows in self._given.items()
            }
            rows = self._pipe._encode(texts, negatives, self._guided and not self._without, given, self._options)
            self._keep(rows, numbers)
        found = [self._encoded[image // self._images] for image in images]
        return concatenated(found, dim=0)

    def _keep(self, rows: Condition, numbers: Sequence[int] | None = None) -> None:
        """Keep the conditions of prompts, by default the first ones, and count what was left out of their texts."""
        numbers = range(len(next(iter(rows.values()), ()))) if numbers is None else numbers
        if not numbers:
            return
        if self._prompts is not None:
            texts = [self._prompts[number] for number in numbers]
            for number, tokens in zip(numbers, self._pipe._count_truncated(texts, self._options), strict=True):
                self.truncated_tokens[number] = tokens
        if self._without:
            without = {name: values.expand(len(numbers), *values.shape[1:]) for name, values in self._without.items()}
            rows = {**without, **rows}
        elif self._guided and self._one_negative:
            self._without = {name: values[:1] for name, values in rows.items() if name.startswith("negative_")}
        for place, number in enumerate(numbers):
            self._encoded[number] = {name: values[place : place + 1] for name, values in rows.items()}

    def forget(self) -> None:
        """Forget the conditions so far, which other LoRAs of the text encoders may have made."""
        self._encoded, self._without = {}, {}

    def _noise(self, images: list[int], generators: list[Generator]) -> Tensor:
        if self._latents is not None:
            latents = self._latents[images].to(self._device, self._dtype)
        else:
            latents = self._pipe._noise(generators, len(images), self._options)
        return latents * getattr(self._pipe.scheduler, "init_noise_sigma", 1.0)

    def _check_latents(self, latents: Tensor) -> None:
        if len(latents) != self.plan.prompts:
            raise ConfigurationError(
                f"{len(latents)} latents were given for {self.plan.prompts} images; give one for each"
            )
        shape = self._pipe._latents_shape(self._options)
        if latents.shape[1:] != shape:
            raise ConfigurationError(f"latents have shape {tuple(latents.shape[1:])} each; give {tuple(shape)}")
        if not latents.isfinite().all():
            raise DataError(f"latents hold values that are not finite, in rows {bad_rows(latents)}; leave those out")

    def _generator(self, image: int) -> Generator:
        if self._generators is not None:
            return self._generators[image]
        return Generator().manual_seed(self.seeds[image])

    def _take_seeds(
        self, seed: int | Sequence[int] | None, generator: Generator | Sequence[Generator] | None
    ) -> list[int]:
        """Return a seed for each image."""
        count = self.plan.prompts
        if seed is not None and generator is not None:
            raise ConfigurationError("give either seed or generator, and not both")
        if isinstance(generator, Generator):
            if count > 1:
                return self._draw_from_one(generator)
            generator = [generator]
        if generator is not None:
            self._generators = list(generator)
            if len(self._generators) != count or len(set(map(id, self._generators))) != count:
                raise ConfigurationError(
                    f"{len(set(map(id, self._generators)))} different generators were given for {count} images; "
                    "give each image its own generator"
                )
            return [one.initial_seed() for one in self._generators]
        if seed is None:
            # As in diffusers, torch.manual_seed then determines the images.
            seed = int(torch.randint(2**62, ()))
        if single(seed):
            return image_seeds(whole("seed", seed), self._keys)
        seeds: Sequence[int] = seed  # type: ignore[assignment]
        if len(seeds) != count:
            raise ConfigurationError(f"{len(seeds)} seeds were given for {count} images; give one for each")
        return [whole("seed", one) for one in seeds]

    def _draw_from_one(self, generator: Generator) -> list[int]:
        """Draw all initial noise from one generator as in diffusers, then a seed for the later draws of each image."""
        if self._latents is None:
            self._latents = self._pipe._noise(generator, self.plan.prompts, self._options)
        draws = torch.randint(2**62, (self.plan.prompts,), generator=generator, device=generator.device)
        return [int(draw) for draw in draws.tolist()]


def _copied(generator: Generator) -> Generator:
    """Return a generator that draws what this one will draw."""
    return Generator(generator.device).set_state(generator.get_state())


def bad_rows(values: Tensor) -> list[int]:
    """Return the rows of a tensor that hold a value that is not finite."""
    return torch.nonzero(~torch.isfinite(values).flatten(1).all(1)).flatten().tolist()


def _key(prompts: list[str] | None, given: dict[str, Any], number: int) -> str:
    """Return a key that identifies a prompt: its texts, or the hash of its embedding."""
    if prompts is not None:
        return "\n".join(
            [prompts[number], *(given[name][number] for name in ("prompt_2", "prompt_3") if name in given)]
        )
    return hashlib.sha256(given["prompt_embeds"][number].float().cpu().numpy().tobytes()).hexdigest()
