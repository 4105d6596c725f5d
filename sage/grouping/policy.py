"""The grouping policy: how similar the prompts of a group are, how many they may be, and what keeps them apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from sage.errors import ConfigurationError
from sage.grouping.cost import read_damage
from sage.grouping.groups import Groups, Tree, group, tree
from sage.grouping.guard import Kind, guard
from sage.grouping.share_key import Keys, group_apart, tree_apart
from sage.grouping.thresholds import threshold_for_saving

ENCODER = "minilm"
# The spaces in which prompts are compared: embeddings of their text, the model's own first predictions of them, or what
# an encoder distilled from these takes them for.
By = Literal["text", "prediction", "distilled"]
# Lowest threshold that a target saving may lead to: with MiniLM the cosine of unrelated prompts is around 0.
FLOOR = 0.0


@dataclass(frozen=True)
class Policy:
    """How to group prompts; exactly one of `threshold`, `saving` and `max_damage` sets how similar a group must be.

    max_size        largest number of prompts in a group
    near_duplicate  pairs with this cosine or more never share a group
    threshold       lowest cosine that a pair in a group may have
    saving          fraction of the network evaluations to save; the threshold follows from the prompts
    max_damage      largest measured damage of sharing (`sage.grouping.cost`); the threshold follows from the model
    guard           kinds of difference between prompts that never share a group (`sage.grouping.guard`); None: none
    by              the space of the embeddings, to which threshold and damage refer: "text"; "prediction", the
                    model's first predictions (`sage.sampling.first_prediction`); or "distilled", from an encoder
                    distilled from them (`sage.grouping.distilled`); None: text
    """

    max_size: int
    near_duplicate: float
    threshold: float | None = None
    saving: float | None = None
    max_damage: float | None = None
    guard: Sequence[Kind] | None = None
    by: By | None = None

    @property
    def space(self) -> str:
        """The name of the space in files: that of the sentence encoder, "prediction" or "distilled"."""
        return ENCODER if self.by in (None, "text") else str(self.by)

    def choose_threshold(
        self,
        embeddings: np.ndarray,
        share_ratio: float,
        model: Path | None = None,
        texts: Sequence[str] | None = None,
        keys: Keys | None = None,
    ) -> float:
        """Return the cosine threshold for prompts with these embeddings, shape (n, d).

        `saving` and `max_damage` refer to sampling that shares the fraction `share_ratio` of its steps, counted in
        whole steps: `shared_steps(ratio, steps) / steps`. `max_damage` also needs `model`, the path of one whose damage
        was measured; `saving` with a guard needs `texts`, as the guard splits groups; `keys` are as for `form`. Raises
        ConfigurationError if the prompts do not allow the saving, if the model has no valid measurement or exceeds the
        damage everywhere, or if the policy is empty.
        """
        if self.saving is not None:
            nested = tree_apart(embeddings, keys, lambda rows: tree(rows, FLOOR, self.max_size, self.near_duplicate))
            threshold = threshold_for_saving(nested, self.saving, share_ratio)
            if not self.guard:
                return threshold
            return self._after_guard(embeddings, texts, keys, nested, threshold, share_ratio)
        if self.max_damage is not None:
            if model is None or not model.exists():
                raise ConfigurationError(
                    f"group.max_damage {self.max_damage} needs the damage measured on a model, but "
                    f"{model or 'this model'} is no folder, file or pin here. Give group.threshold instead."
                )
            return read_damage(model, share_ratio, self.max_size, self.space).threshold(self.max_damage)
        if self.threshold is None:
            raise ConfigurationError("the grouping policy is empty; give one of threshold, saving and max_damage")
        return self.threshold

    def _after_guard(
        self,
        embeddings: np.ndarray,
        texts: Sequence[str] | None,
        keys: Keys | None,
        nested: Tree,
        highest: float,
        share_ratio: float,
    ) -> float:
        """Return the threshold, `highest` or lower, at which the groups that the guard leaves save `saving`.

        embeddings, texts    of the prompts
        keys                 their share keys, or None
        nested               their tree, whose similarities are the candidates
        highest              the threshold that meets the budget without the guard
        share_ratio          fraction of the steps that is shared
        """
        if texts is None or self.saving is None:
            raise ConfigurationError("a budget with a guard depends on the prompts' words; give texts")

        def saving(threshold: float) -> float:
            return share_ratio * (1 - len(self.form(texts, embeddings, threshold, keys)) / len(texts))

        candidates = sorted({similarity for _, _, similarity in nested.merges if similarity < highest}, reverse=True)
        candidates.insert(0, highest)
        wanted = self.saving * (1 - 1e-9)
        # Bisect: a lower threshold saves more, but for a few groups that the guard splits otherwise.
        low, high = 0, len(candidates) - 1
        if saving(candidates[high]) < wanted:
            raise ConfigurationError(
                f"a saving of {self.saving} was asked for, but these prompts allow {saving(candidates[high]):.4f} at "
                f"share ratio {share_ratio:.4g} after the guard {list(self.guard or ())}; ask for less, guard less, or "
                "raise the share ratio or the maximum group size"
            )
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if saving(candidates[middle]) >= wanted else (middle + 1, high)
        return candidates[high]

    def form(self, texts: Sequence[str], embeddings: np.ndarray, threshold: float, keys: Keys | None = None) -> Groups:
        """Return the groups of prompts at a threshold, with this policy's max_size, near_duplicate and guard.

        `keys` holds one share key for each prompt; prompts whose keys differ never share (`sage.grouping.share_key`).
        """
        groups = group_apart(embeddings, keys, lambda rows: group(rows, threshold, self.max_size, self.near_duplicate))
        return guard(texts, groups, self.guard) if self.guard else groups


def figures(groups: Groups, worst: Sequence[float]) -> dict[str, float]:
    """Return a summary: number of prompts and groups, mean group size, lowest similarity, saving at share ratio 1.

    `worst` holds the cosine of each group's least similar pair (`worst_similarity`).
    """
    prompts = sum(map(len, groups))
    return {
        "prompts": prompts,
        "groups": len(groups),
        "mean_size": round(prompts / max(len(groups), 1), 4),
        "worst_similarity": round(min(worst, default=1.0), 4),
        "saving": round(1 - len(groups) / max(prompts, 1), 4),
    }
