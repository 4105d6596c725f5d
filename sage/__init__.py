"""SAGE: semantic-aware shared sampling for text-to-image diffusion (arXiv 2509.15865).

Similar prompts form a group; a group runs its first denoising steps as one sample, then branches into one per prompt.

    SharedSamplingPipeline   diffusers pipeline that takes a list of prompts and shares their early steps
    expand                   templates such as "{red|blue} vase" -> prompts, and which of them belong together
    embed, group             prompts -> sentence embeddings -> groups of similar prompts
    Grouping                 how a call of the pipeline forms its groups
    StreamingGrouper         groups for prompts that arrive one by one
    Plan, plan_for_budget    which prompts share which steps; a plan that saves a given fraction of the evaluations
    SageError                base class of all errors that this library raises

Names are imported on first use, so `import sage` loads neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sage.data.templates import expand as expand
    from sage.errors import SageError as SageError
    from sage.grouping.auto import Grouping as Grouping
    from sage.grouping.embedding import embed as embed
    from sage.grouping.groups import group as group
    from sage.grouping.online import StreamingGrouper as StreamingGrouper
    from sage.sampling.budget import plan_for_budget as plan_for_budget
    from sage.sampling.pipeline import SharedSamplingPipeline as SharedSamplingPipeline
    from sage.sampling.plan import Plan as Plan

_HOME = {
    "Grouping": "sage.grouping.auto",
    "Plan": "sage.sampling.plan",
    "SageError": "sage.errors",
    "SharedSamplingPipeline": "sage.sampling.pipeline",
    "StreamingGrouper": "sage.grouping.online",
    "embed": "sage.grouping.embedding",
    "expand": "sage.data.templates",
    "group": "sage.grouping.groups",
    "plan_for_budget": "sage.sampling.budget",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module 'sage' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
