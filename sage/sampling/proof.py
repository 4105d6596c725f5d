"""Whether a pipeline can share sampling: tried on a few prompts against its stock run, and not assumed.

A class of the table is tried as it is. For any other class of diffusers the general rules
(`sage.sampling.families.derived`) make candidate rows, and the first that passes every check is its row.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sage.torchvision_ops  # noqa: F401

import numpy as np
import torch
from torch import Generator

from sage.errors import ConfigurationError, PlanError, SageError, UnsupportedError
from sage.sampling.families import derived
from sage.sampling.pipeline import SharedSamplingPipeline, adopted, is_known
from sage.sampling.segments import segmented

PROMPTS = ("a red cat on a chair", "a blue house by the sea")
NEGATIVE = "blurry"
STEPS = 4


@dataclass(frozen=True)
class Check:
    """A check, whether it passed, and what was found."""

    what: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Proof:
    """The checks of a pipeline up to the first that failed; `shared`: the pipeline for shared sampling if none did."""

    stock: str
    rules: str
    checks: list[Check]
    shared: Any = None

    @property
    def reason(self) -> str:
        """Why the pipeline cannot be shared; empty if it can."""
        return "" if self.shared is not None else f"{self.checks[-1].what}: no, {self.checks[-1].found}"


def prove(pipeline: Any, prompts: Sequence[str] = PROMPTS, **call: Any) -> Proof:
    """Try a stock pipeline on two or more prompts, with further arguments of its call, such as a size.

    It takes a few runs of `STEPS` steps of the stock pipeline and of the shared one. Raises ConfigurationError for
    fewer than two different prompts.
    """
    if len(prompts) < 2 or len(set(prompts)) < len(prompts):
        raise ConfigurationError(f"{list(prompts)} are not two or more different prompts; give such")
    cls = type(pipeline)
    rules = "as it is known here" if is_known(cls) else "by the general rules"
    try:
        rows = [] if is_known(cls) else derived.candidates(cls)
    except UnsupportedError as error:
        return Proof(cls.__name__, rules, [Check("its call can be driven in segments", False, str(error))])
    stock = _Stock(pipeline, list(prompts), call)
    checks = _until_failed([("the stock pipeline runs", stock.run), ("it repeats itself", stock.repeat)])
    if not checks[-1].passed:
        return Proof(cls.__name__, rules, checks)
    tried = []
    for row in (*rows,) or (None,):
        if row is None:
            shared: Any = SharedSamplingPipeline.from_pipe(pipeline)
        else:
            shared = adopted(segmented(dataclasses.replace(row, output=stock.output), cls), pipeline)
        found = checks + _until_failed(_attempts(shared, stock))
        if found[-1].passed:
            return Proof(cls.__name__, rules, found, shared)
        tried.append(found)
    return Proof(cls.__name__, rules, max(tried, key=len))  # the candidate that came furthest says most


def proved(pipeline: Any, prompts: Sequence[str] = PROMPTS, **call: Any) -> Any:
    """Return a pipeline for shared sampling if it passes `prove`; raise UnsupportedError with the reason if not."""
    found = prove(pipeline, prompts, **call)
    if found.shared is None:
        raise UnsupportedError(f"{found.stock} cannot share sampling; {found.reason}")
    return found.shared


class _Stock:
    """The stock runs that the shared ones are compared with."""

    def __init__(self, pipeline: Any, prompts: list[str], call: dict[str, Any]) -> None:
        self.prompts, self.call = prompts, call
        self._pipeline = pipeline
        negative = "negative_prompt" in inspect.signature(type(pipeline).__call__).parameters
        self.negatives = (None, NEGATIVE) if negative else (None,)
        self.latents: dict[str | None, Any] = {}
        self.decoded: Any = None
        self.output = ""  # the name of the stock output

    def run(self) -> str:
        for negative in self.negatives:
            out = self._called("latent", negative)
            self.output, self.latents[negative] = next(iter(out)), out[0]
        self.decoded = self._called("np", None)[0]
        return f"{len(self.prompts)} prompts, {STEPS} steps"

    def repeat(self) -> str:
        return _equal(self._called("latent", None)[0], self.latents[None])

    def _called(self, output_type: str, negative: str | None) -> Any:
        generators = [Generator().manual_seed(seed) for seed in range(len(self.prompts))]
        given = {} if negative is None else {"negative_prompt": [negative] * len(self.prompts)}
        arguments = {"num_inference_steps": STEPS, "generator": generators, "output_type": output_type}
        return self._pipeline(list(self.prompts), **arguments, **given, **self.call)


def _attempts(shared: Any, stock: _Stock) -> list[tuple[str, Callable[[], str]]]:
    """Return what is checked of a shared pipeline, with functions that return what they found."""
    count = len(stock.prompts)
    call = {"seed": list(range(count)), "num_inference_steps": STEPS, "batch_size": count, **stock.call}
    alone = {"groups": [[number] for number in range(count)], "share_ratio": 0.0, **call}

    def latents(negative: str | None) -> str:
        given = {} if negative is None else {"negative_prompt": negative}
        return _equal(shared(stock.prompts, output_type="latent", **given, **alone).images, stock.latents[negative])

    def decoded() -> str:
        return _equal(shared(stock.prompts, output_type="np", **alone).images, stock.decoded)

    def branch() -> str:
        together = {"groups": [list(range(count))], "share_ratio": 0.5, **call}
        out = shared(stock.prompts, output_type="latent", **together)
        if any(torch.equal(out.images[0], other) for other in out.images[1:]):
            raise UnsupportedError("the members of a group do not differ after their branch")
        return f"{out.cost.network_evaluations} evaluations instead of {out.cost.independent}"

    names = {None: "segments equal the stock run", NEGATIVE: "so with a negative prompt"}
    return [
        *((names[negative], functools.partial(latents, negative)) for negative in stock.negatives),
        ("decoded, too", decoded),
        ("a group branches from a shared trunk", branch),
    ]


def _until_failed(attempts: Sequence[tuple[str, Callable[[], str]]]) -> list[Check]:
    checks = []
    for what, attempt in attempts:
        try:
            checks.append(Check(what, True, attempt()))
        except Exception as error:  # of code that is not known here: whatever it raises is what was found
            said = str(error) if isinstance(error, SageError) else repr(error)
            said = said.split(";")[0] if isinstance(error, PlanError) else said  # no bug here, if the class is unknown
            checks.append(Check(what, False, " ".join(said.split())[:300]))
            break
    return checks


def _equal(found: Any, expected: Any) -> str:
    """Return that two results are equal; raise UnsupportedError with how much they differ."""
    one, other = (torch.as_tensor(np.asarray(x) if isinstance(x, list) else x).float() for x in (found, expected))
    if one.shape != other.shape:
        raise UnsupportedError(f"the shapes {tuple(one.shape)} and {tuple(other.shape)} differ")
    if not torch.equal(one, other):
        raise UnsupportedError(f"they differ by up to {(one - other).abs().max():.2g}")
    return "bit for bit"
