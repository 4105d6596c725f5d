"""Continuous batching: calls of a pipeline join and leave the running batch at step boundaries.

Each block of a call's plan is a *track*. A network call evaluates up to `batch_size` tracks, of any calls, that are at
the same step of the same schedule, size, guidance and LoRAs. A track carries everything that its next step needs
(latents, scheduler state, random generator, condition), so who runs beside it changes only rounding, and with
`batch_size` 1 not even that: the images are then bit for bit those of the pipeline with `batch_size=1`.

    running = Continuous(pipe, batch_size=8)
    call = running.admit(pipe.stream(prompts, plan=plan, seed=seeds))
    while running.tracks:
        for finished in running.step():
            finished.call, finished.index, finished.image
"""

import copy
import inspect
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from sage.errors import ConfigurationError, UnsupportedError
from sage.sampling.adapters import Wearer, Worn
from sage.sampling.branch_noise import SCHEDULERS, begins_as_noise, levels, predicted_x_0, recentred, rotated
from sage.sampling.conditions import Condition, block_conditions, concatenated, joined
from sage.sampling.loop import HISTORY, branched, one_of_each, prompts_of
from sage.sampling.plan import Block, Node, leaves_of
from sage.sampling.stream import Stream

# What the schedulers that support branch noise count while they step, besides the tensors of HISTORY.
_COUNTERS = ("_step_index", "_begin_index", "lower_order_nums", "is_scale_input_called")


@dataclass(eq=False)
class Call:
    """One admitted stream; `evaluations` are those spent on it so far, of the `planned` ones.

    `kept` has the prefixes of its blocks at the steps `keep`, with the images of each block; the reader clears it.
    """

    stream: Stream
    key: tuple[Any, ...]
    order: tuple[bool, int]  # calls in the background come last
    keep: Collection[int] = ()
    loras: Worn | None = None
    evaluations: int = 0
    skipped: int = 0
    cancelled: set[int] = field(default_factory=set)
    kept: list[tuple[list[int], "Prefix"]] = field(default_factory=list)

    @property
    def background(self) -> bool:
        """Whether it runs only beside calls that do not, or if there are none."""
        return self.order[0]

    def alive(self, node: Node) -> list[int]:
        """Return the images of a node that were not cancelled."""
        return [image for image in leaves_of((node,)) if image not in self.cancelled]

    @property
    def planned(self) -> int:
        """The evaluations of the whole plan, without those that prefixes save."""
        return self.stream.cost.formula - self.skipped

    def rank(self, image: int) -> tuple[int, str, int]:
        """Return the sort key by which a block's leader is chosen; it does not depend on the image's place."""
        return self.stream.seeds[image], self.stream._keys[image], image


@dataclass(frozen=True)
class Finished:
    """One image of a call, as `sage.sampling.stream.Result`; `evaluations` is its part of the shared cost.

    `image` is None if it holds values that are not finite.
    """

    call: Call
    index: int
    image: Any
    seed: int
    nsfw: bool | None
    evaluations: float


@dataclass(frozen=True)
class Prefix:
    """What a block has after its first steps, from which images of other calls may go on.

    step     number of steps that were run
    latents  shape (1, ...)
    clean    the x_0 that the block predicted at its last step, shape (...)
    state    what the scheduler keeps of this block, by attribute: tensors, lists of tensors or None, and counters
    """

    step: int
    latents: Tensor
    clean: Tensor
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in _tensors([self.latents, self.clean, list(self.state.values())]))


@dataclass(frozen=True)
class Start:
    """How an image begins from a prefix.

    With `own_noise` it takes only the prediction, and the noise that the image alone begins with. This is exact if the
    prediction is for the same condition and does not depend on the noise: after the first step from pure noise
    (`begins_as_noise`). Otherwise it branches off as a child of the block, which needs branch noise.
    """

    prefix: Prefix
    own_noise: bool


@dataclass
class _Rows:
    """What tracks evaluated together keep between steps; every tensor has one row per track."""

    latents: Tensor
    scheduler: Any
    condition: Condition  # joined: (g * rows, ...)


@dataclass(eq=False)
class _Track:
    """A block of a plan, and the row of a batch in which it last was."""

    call: Call
    node: Node
    leader: int
    generator: Generator
    condition: Condition  # (1, g, ...)
    step: int
    rows: _Rows
    row: int = 0
    evaluations: float = 0.0  # of one member
    held: int = 0  # network calls for which it waited for others to catch up
    inherited: Tensor | None = None  # the parent's prediction, until the first step after a branch with branch noise
    begun: Tensor | None = None  # the initial latents, until the first step, if children continue with theirs


class Continuous:
    """Runs the plans of many calls of one pipeline together, one network call at a time."""

    def __init__(self, pipe: Any, batch_size: int) -> None:
        """Take a pipeline for shared sampling and the largest number of blocks in a network call.

        Raises ConfigurationError for a `batch_size` below 1.
        """
        if batch_size < 1:
            raise ConfigurationError(f"batch_size is {batch_size}; give at least 1")
        self._pipe, self.batch_size = pipe, batch_size
        self._tracks: list[_Track] = []
        self._orders = itertools.count()
        self._wearer = Wearer(pipe)

    @property
    def tracks(self) -> int:
        """Number of blocks that are not finished."""
        return len(self._tracks)

    @property
    def foreground(self) -> int:
        """Number of blocks that are not finished, of calls that are not in the background."""
        return sum(not track.call.background for track in self._tracks)

    @torch.no_grad()
    def admit(
        self,
        stream: Stream,
        keep: Collection[int] = (),
        starts: Mapping[int, Start] | None = None,
        background: bool = False,
        loras: Worn | None = None,
    ) -> Call:
        """Take a stream of this pipeline that was not iterated; its first step is part of a later `step`.

        keep        numbers of steps after which the blocks' prefixes are kept in `Call.kept`; for schedulers that
                    support branch noise
        starts      prefixes from which images begin, by number; each image must be in no block
        background  whether it runs only beside calls that do not, or if there are none
        loras       names and weights of the pipeline's LoRAs to use, for this call alone; give them for every call,
                    or for none: None leaves the pipeline as it is
        """
        if stream._caches:
            raise UnsupportedError(
                "a step cache keeps features for the rows of a batch, which change here from step to step; call "
                "disable_cache() of the transformer"
            )
        if stream._padded_sizes:
            raise UnsupportedError(
                f"batches are not padded to {tuple(stream._padded_sizes)} here: they have the rows that are under way; "
                "give one batch_size"
            )
        scheduler = stream._pipe.scheduler
        key = (
            type(scheduler).__name__,
            tuple(scheduler.timesteps.tolist()),
            stream._scale,
            stream._branch_noise,
            stream._output_type,
            repr(sorted(stream._options.items())),
            loras,
        )
        kept = keep if type(scheduler).__name__ in SCHEDULERS else ()
        call = Call(stream, key, (background, next(self._orders)), kept, loras)
        self._wearer.wear(loras)
        if loras is not None:
            stream.forget()  # text encoders have LoRAs, too
        nodes, tracks = stream.plan.roots, []
        leaders = [min(leaves_of((node,)), key=call.rank) for node in nodes]
        generators = {leader: stream._generator(leader) for leader in leaders}
        starts = starts or {}
        # One draw for all: each row comes from its own generator, and the call costs more than the numbers.
        drawn = [leader for leader in leaders if leader not in starts or starts[leader].own_noise]
        noise = stream._noise(drawn, [generators[leader] for leader in drawn]) if drawn else ()
        noises = {leader: row[None] for leader, row in zip(drawn, noise, strict=True)}
        for node, leader, condition in zip(nodes, leaders, _conditions(call, nodes), strict=True):
            generator = generators[leader]
            if leader in starts:
                tracks.append(_begun(call, leader, generator, condition, starts[leader], noises.get(leader)))
                continue
            fresh = branched(scheduler, None)
            if hasattr(fresh, "set_begin_index"):
                fresh.set_begin_index(0)
            begun = noises[leader][0] if stream._branch_noise == 1 and begins_as_noise(fresh) else None
            rows = _Rows(noises[leader], fresh, joined(condition))
            tracks.append(_Track(call, node, leader, generator, condition, 0, rows, begun=begun))
        self._tracks += tracks
        return call

    def cancel(self, call: Call, images: Collection[int] | None = None) -> None:
        """Drop images of a call (default: all); the other images stay as they are, conditions of blocks included."""
        call.cancelled.update(range(call.stream.plan.prompts) if images is None else images)
        self._tracks = [track for track in self._tracks if track.call is not call or call.alive(track.node)]

    @torch.no_grad()
    def step(self) -> list[Finished]:
        """Run one step of one batch and return the images that it finished; without tracks, none."""
        if not self._tracks:
            return []
        tracks = self._next()
        call, step = tracks[0].call, tracks[0].step
        stream, rows = call.stream, _gathered(tracks)
        scheduler, s = rows.scheduler, stream._branch_noise
        t = stream._pipe.scheduler.timesteps[step]
        x = scheduler.scale_model_input(rows.latents, t) if hasattr(scheduler, "scale_model_input") else rows.latents
        self._wearer.wear(call.loras)
        output = stream._pipe._predict(x, t, rows.condition, stream._scale, stream._options)
        self._count(tracks, 2 if stream._guided else 1)
        ends = [isinstance(track.node, Block) and track.node.until == step + 1 for track in tracks]
        kept = step + 1 in {kept for track in tracks for kept in track.call.keep}
        clean = predicted_x_0(scheduler, step, rows.latents, output) if kept or (s and any(ends)) else None
        if moved := [(row, track.inherited) for row, track in enumerate(tracks) if track.inherited is not None]:
            x_0 = torch.stack([parent for _, parent in moved])
            rows.latents, output = recentred(scheduler, step, rows.latents, output, [row for row, _ in moved], x_0, s)
        rows.latents = scheduler.step(output, t, rows.latents, **_step_kwargs(tracks), return_dict=False)[0]
        finished = []
        for row, track in enumerate(tracks):
            track.step, track.rows, track.row, track.inherited = step + 1, rows, row, None
            track.begun = track.begun if step == 0 else None
            if clean is not None and track.step in track.call.keep:
                track.call.kept.append((track.call.alive(track.node), _prefix(track, clean[row])))
            if ends[row]:
                self._branch(track, clean[row] if s and clean is not None else None)
            elif track.step == stream.plan.steps:
                self._tracks.remove(track)
                finished.append(track)
        return self._decoded(finished)

    def _next(self) -> list[_Track]:
        """Return the tracks of the next batch: with the oldest one, or those that may still catch up with it.

        A batch in the first half of its steps that has room waits for later arrivals of its kind, so that they go on
        together; for at most half as many network calls as it has steps.
        """
        oldest = min(self._tracks, key=lambda track: track.call.order)
        alike = [track for track in self._tracks if track.call.key == oldest.call.key]
        batch = [track for track in alike if track.step == oldest.step]
        behind = [
            track for track in alike if track.step < oldest.step and track.call.background <= oldest.call.background
        ]
        patience = oldest.call.stream.plan.steps // 2
        if behind and len(batch) < self.batch_size and oldest.step <= patience and oldest.held < patience:
            oldest.held += 1
            last = min(track.step for track in behind)
            batch = [track for track in behind if track.step == last]
        return sorted(batch, key=lambda track: track.call.order)[: self.batch_size]

    def _count(self, tracks: Sequence[_Track], guidance: int) -> None:
        for track in tracks:
            track.call.evaluations += guidance
            track.evaluations += guidance / len(track.call.alive(track.node))

    def _branch(self, parent: _Track, clean: Tensor | None) -> None:
        """Replace a track by its children, as `sage.sampling.loop` does at a branch."""
        call, rows, step = parent.call, parent.rows, parent.step
        assert isinstance(parent.node, Block)
        before = prompts_of(parent.node, call.stream.prompt_of)
        nodes = [node for node in parent.node.children if call.alive(node)]
        children = []
        for node, condition in zip(nodes, _conditions(call, nodes), strict=True):
            leader = min(leaves_of((node,)), key=call.rank)
            own = call.stream._generator(leader)
            same = leader == parent.leader or own.initial_seed() == parent.generator.initial_seed()
            begun = parent.begun
            if begun is not None and leader != parent.leader:
                begun = call.stream._noise([leader], [own])[0]
            generator = parent.generator.clone_state() if same else own
            latents = rows.latents[parent.row].clone()
            if clean is not None:
                if begun is not None:
                    xi = begun / levels(rows.scheduler, 0)[1]
                else:
                    xi = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents)
                latents = rotated(rows.scheduler, step, latents, clean, xi, call.stream._branch_noise)
            index = torch.tensor([parent.row], device=latents.device)
            own_rows = _Rows(latents[None], branched(rows.scheduler, index), joined(condition))
            moved = parent.begun is None or prompts_of(node, call.stream.prompt_of) != before
            child = _Track(call, node, leader, generator, condition, step, own_rows, inherited=clean if moved else None)
            child.evaluations, child.held = parent.evaluations, parent.held
            children.append(child)
        place = self._tracks.index(parent)
        self._tracks[place : place + 1] = children

    def _decoded(self, tracks: Sequence[_Track]) -> list[Finished]:
        if not tracks:
            return []
        stream = tracks[0].call.stream
        latents = torch.stack([track.rows.latents[track.row] for track in tracks])
        images, nsfw = stream._pipe._finish(latents, stream._output_type, stream._options)
        finite = latents.isfinite().flatten(1).all(1).tolist()
        found = []
        for row, track in enumerate(tracks):
            (index,) = leaves_of((track.node,))
            seed = track.call.stream.seeds[index]
            flagged = None if nsfw is None else nsfw[row]
            image = images[row] if finite[row] and stream._pipe._finite[row] else None
            found.append(Finished(track.call, index, image, seed, flagged, track.evaluations))
        return found


def _begun(
    call: Call, image: int, generator: Generator, condition: Condition, start: Start, noise: Tensor | None
) -> _Track:
    """Return the track of an image at the end of a prefix; `noise` is its own initial noise if it begins with that."""
    prefix, stream = start.prefix, call.stream
    scheduler, s = copy.copy(stream._pipe.scheduler), stream._branch_noise
    for name, value in prefix.state.items():
        setattr(scheduler, name, value)
    scheduler = branched(scheduler, None)  # its lists are its own
    if noise is not None:
        # The scheduler scales initial noise to the deviation sigma of the first step.
        xi, s = noise[0] / levels(stream._pipe.scheduler, 0)[1], 1.0
    else:
        xi = torch.randn(prefix.clean.shape, generator=generator, device=generator.device)
    latents = prefix.latents[0]
    latents = rotated(scheduler, prefix.step, latents, prefix.clean, xi.to(latents), s)
    call.skipped += prefix.step * (2 if stream._guided else 1)
    rows = _Rows(latents[None], scheduler, joined(condition))
    inherited = prefix.clean if noise is None else None
    return _Track(call, image, image, generator, condition, prefix.step, rows, inherited=inherited)


def _prefix(track: _Track, clean: Tensor) -> Prefix:
    index = torch.tensor([track.row], device=clean.device)
    scheduler = branched(track.rows.scheduler, index)
    names = (*HISTORY[type(scheduler).__name__], *_COUNTERS)
    state = {name: getattr(scheduler, name) for name in names if hasattr(scheduler, name)}
    return Prefix(track.step, track.rows.latents[index], clean.clone(), state)


def _tensors(value: Any) -> Iterator[Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _tensors(item)


def _conditions(call: Call, nodes: Sequence[Node]) -> list[Condition]:
    """Return the condition of each block, (1, g, ...)."""
    stream, blocks = call.stream, [one_of_each(node, call.rank, call.stream.prompt_of) for node in nodes]
    rows = block_conditions(blocks, stream._encode, call.rank, stream._batch_size, stream._medoid)
    apart = {name: values.reshape(-1, len(nodes), *values.shape[1:]).transpose(0, 1) for name, values in rows.items()}
    return [{name: values[i : i + 1] for name, values in apart.items()} for i in range(len(nodes))]


def _gathered(tracks: Sequence[_Track]) -> _Rows:
    """Return the rows of these tracks as one batch; those of the last batch itself if it has exactly these tracks."""
    rows = tracks[0].rows
    if len(tracks) == len(rows.latents) and all(
        track.rows is rows and track.row == place for place, track in enumerate(tracks)
    ):
        return rows
    latents = torch.stack([track.rows.latents[track.row] for track in tracks])
    schedulers = [branched(track.rows.scheduler, torch.tensor([track.row], device=latents.device)) for track in tracks]
    # Calls may have texts of different length.
    together = concatenated([track.condition for track in tracks], dim=0)
    return _Rows(latents, merged(schedulers), joined(together))


def merged(schedulers: Sequence[Any]) -> Any:
    """Return one scheduler with the state of several that are at the same step; the inverse of `loop.branched`."""

    def together(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, list):
            return [together(column) for column in zip(*values, strict=True)]
        return torch.cat(list(values)) if torch.is_tensor(first) and first.ndim else first

    scheduler = copy.copy(schedulers[0])
    for name in HISTORY[type(scheduler).__name__]:
        if hasattr(scheduler, name):
            setattr(scheduler, name, together([getattr(one, name) for one in schedulers]))
    return scheduler


def _step_kwargs(tracks: Sequence[_Track]) -> dict[str, Any]:
    stream = tracks[0].call.stream
    accepted = inspect.signature(stream._pipe.scheduler.step).parameters
    kwargs: dict[str, Any] = {"generator": [track.generator for track in tracks]} if "generator" in accepted else {}
    if "eta" in accepted and "eta" in stream._options:
        kwargs["eta"] = stream._options["eta"]
    return kwargs
