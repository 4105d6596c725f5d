"""How a list of prompts is grouped: how alike, how many at most, and which differences never share a group."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sage.errors import ConfigurationError
from sage.grouping.cost import read_damage
from sage.grouping.groups import Groups, group, tree
from sage.grouping.guard import Kind, guard
from sage.grouping.thresholds import threshold_for_saving

ENCODER = "minilm"
# A budget accepts no pair below this cosine: with MiniLM, unrelated prompts lie around 0.
FLOOR = 0.0


@dataclass(frozen=True)
class Policy:
    """A grouping policy; exactly one of `threshold`, `saving` and `max_damage` says how alike prompts of a group are.

    threshold       cosine similarity that every pair of a group reaches
    saving          share of the network evaluations to save; the threshold follows from the prompts
    max_damage      largest measured damage of sharing (`sage.grouping.cost`); the threshold follows from the model
    max_size        prompts in a group at most
    near_duplicate  pairs from this cosine on never share a group
    guard           kinds of differences that part prompts although their embeddings are alike
    """

    max_size: int
    near_duplicate: float
    threshold: float | None = None
    saving: float | None = None
    max_damage: float | None = None
    guard: Sequence[Kind] | None = None

    def choose_threshold(self, embeddings: np.ndarray, share_ratio: float, model: Path | None = None) -> float:
        """Return the cosine threshold for these prompts, embeddings of shape (n, d).

        `model` is the folder whose measured damage `max_damage` reads. Raises ConfigurationError if the prompts do not
        allow the saving, if damage was not measured on this model, or if no model folder is given.
        """
        if self.saving is not None:
            return threshold_for_saving(
                tree(embeddings, FLOOR, self.max_size, self.near_duplicate), self.saving, share_ratio
            )
        if self.max_damage is not None:
            if model is None or not model.is_dir():
                raise ConfigurationError(
                    f"group.max_damage {self.max_damage} needs what sharing costs the model, which is measured on a "
                    f"model folder; {model or 'this model'} is none. Give group.threshold instead."
                )
            return read_damage(model, share_ratio, self.max_size).threshold(self.max_damage)
        if self.threshold is None:
            raise ConfigurationError("a grouping policy needs one of threshold, saving and max_damage; none was given")
        return self.threshold

    def form(self, texts: Sequence[str], embeddings: np.ndarray, threshold: float) -> Groups:
        """Return the groups of prompts at a threshold, under this policy's cap, near-duplicate rule and guard."""
        groups = group(embeddings, threshold, self.max_size, self.near_duplicate)
        return guard(texts, groups, self.guard) if self.guard else groups


def figures(groups: Groups, worst: Sequence[float]) -> dict[str, float]:
    """Return the number of prompts and groups, mean size, least similarity, and the saving at share ratio 1.

    `worst` holds each group's least similar pair.
    """
    prompts = sum(map(len, groups))
    return {
        "prompts": prompts,
        "groups": len(groups),
        "mean_size": round(prompts / max(len(groups), 1), 4),
        "worst_similarity": round(min(worst, default=1.0), 4),
        "saving": round(1 - len(groups) / max(prompts, 1), 4),
    }
