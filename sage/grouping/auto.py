"""The groups that a call of the pipeline forms; by default as the shipped `params.yaml` does."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sage.errors import ConfigurationError, DataError
from sage.grouping.boilerplate import distinct
from sage.grouping.embedding import embed
from sage.grouping.groups import Groups
from sage.grouping.policy import ENCODER, Policy
from sage.grouping.share_key import Keys

DEFAULT = Policy(max_size=6, near_duplicate=0.999, threshold=0.5, by="text")
# Groups by first prediction that save as much as DEFAULT on the captions of this project (docs/grouping.md).
PREDICTION_THRESHOLD = 0.88


@dataclass(frozen=True, eq=False)
class Grouping(Policy):
    """How a call of the pipeline groups its prompts: a policy, and what the similarity of prompts is measured on.

        pipe(prompts, groups=Grouping(threshold=0.8, guard=["number"]))

    Of `threshold`, `saving` and `max_damage` at most one is given; without them the threshold is that of `params.yaml`,
    or PREDICTION_THRESHOLD with `by="prediction"`: similarity is then measured on the model's own first predictions,
    which cost a network evaluation a prompt. `by="distilled"` costs none: an encoder distilled from them, which `sage
    distil` writes beside `model`, stands for them, and without a threshold groups are as many as by text.

    encoder     "minilm", or a name or folder that SentenceTransformer loads
    embeddings  instead of `encoder`: one row for each prompt, shape (n, d), an array or a tensor on any device
    model       path of the model; `max_damage` needs its measured damage, `by="distilled"` its distilled encoder
    """

    max_size: int = DEFAULT.max_size
    near_duplicate: float = DEFAULT.near_duplicate
    encoder: str = ENCODER
    embeddings: np.ndarray | None = None
    model: Path | str | None = None

    def __post_init__(self) -> None:
        """Raise ConfigurationError if more than one of threshold, saving and max_damage is given."""
        given = {name: getattr(self, name) for name in ("threshold", "saving", "max_damage")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) > 1:
            raise ConfigurationError(f"give one of threshold, saving and max_damage, not all of {given}")
        if self.by in ("prediction", "distilled") and self.encoder != ENCODER:
            raise ConfigurationError(f"by={self.by!r} compares no texts; leave out encoder={self.encoder!r}, or by")
        if self.by == "distilled" and self.model is None and self.embeddings is None:
            raise ConfigurationError("by='distilled' needs the path of the model that was distilled; give model=")
        if not given and self.by != "distilled":
            default = PREDICTION_THRESHOLD if self.by == "prediction" else DEFAULT.threshold
            object.__setattr__(self, "threshold", default)

    def of_rows(self, rows: Sequence[int], count: int) -> "Grouping":
        """Return the grouping of some of `count` prompts, by their numbers; raise DataError for other embeddings."""
        if self.embeddings is None:
            return self
        tensor: Any = self.embeddings
        found = tensor.detach().float().cpu().numpy() if hasattr(tensor, "detach") else np.asarray(tensor)
        if found.ndim != 2 or len(found) != count:
            raise DataError(
                f"the embeddings have shape {found.shape}, but there are {count} prompts; give one row for each"
            )
        return replace(self, embeddings=found[list(rows)])

    def groups(
        self,
        prompts: Sequence[str] | None,
        keys: Keys,
        share_ratio: float,
        made_for: tuple[str, float, float] | None = None,
    ) -> Groups:
        """Return groups of similar prompts, a partition of their indices.

        prompts      the prompts, or None if the pipeline was given prompt embeddings only
        keys         one share key for each prompt (`sage.grouping.share_key`)
        share_ratio  what `saving` and `max_damage` refer to
        made_for     scheduler, first timestep and guidance scale, for which a distilled encoder must be made

        Raises ConfigurationError if prompts are needed and None.
        """
        if prompts is None and (self.embeddings is None or self.guard):
            raise ConfigurationError(
                "prompt_embeds cannot be grouped; give groups=[[0, 1], ...], groups=Grouping(embeddings=...) without a "
                "guard, a plan, or share_ratio=0 for none"
            )
        model, policy = None if self.model is None else Path(self.model), self
        if self.embeddings is not None:
            rows = np.asarray(self.embeddings)
        elif self.by == "distilled":
            assert prompts is not None and model is not None
            encoder = _distilled(model)
            rows = (encoder if made_for is None else encoder.check(made_for)).embed(prompts)
            if self.threshold is self.saving is self.max_damage is None:
                policy = replace(self, threshold=encoder.threshold)
        else:
            assert prompts is not None
            rows = embed(distinct(prompts), self.encoder)
        threshold = policy.choose_threshold(rows, share_ratio, model, prompts, keys)
        return self.form(prompts or [""] * len(keys), rows, threshold, keys)


@functools.lru_cache(maxsize=1)
def _distilled(model: Path) -> Any:
    """Return a model's distilled encoder; the last one stays, because to check it is to hash the model's weights."""
    from sage.grouping.distilled import read_distilled  # late: it needs torch

    return read_distilled(model)
