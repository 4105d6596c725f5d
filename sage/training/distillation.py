"""Distilling first predictions: a small network learns a model's first predictions of prompts from their texts.

Targets are coefficients in principal components of the predictions. The loss is the squared error of the coefficients,
which are orthonormal, divided by the number of latents: the mean squared error in latents, without the part that no
component holds.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sage.training.loop import Losses
from sage.training.pretraining import batch
from sage.training.selection import LOSS

_BATCH = 1024  # held-out texts in a call of the network


@dataclass(frozen=True)
class Components:
    """Principal components of first predictions: mean (d,), components (k, d) and coefficients' deviations (k,)."""

    mean: np.ndarray
    directions: np.ndarray
    deviations: np.ndarray

    def coefficients(self, predictions: np.ndarray) -> np.ndarray:
        """Return the coefficients of predictions (n, d): float32, shape (n, k)."""
        found: np.ndarray = ((predictions - self.mean) @ self.directions.T).astype(np.float32)
        return found

    def predictions(self, coefficients: np.ndarray) -> np.ndarray:
        """Return the predictions, (n, d), that have these coefficients."""
        found: np.ndarray = self.mean + coefficients @ self.directions
        return found

    @property
    def mean_in_components(self) -> np.ndarray:
        """The mean in the components and, last, the length of what is orthogonal to them: float32, (k + 1,)."""
        inside = self.directions @ self.mean
        rest = np.linalg.norm(self.mean - inside @ self.directions)
        found: np.ndarray = np.append(inside, rest).astype(np.float32)
        return found


def principal_components(pieces: Iterable[np.ndarray], count: int) -> Components:
    """Return at most `count` principal components of predictions, given in pieces (n, d) of at least `count` rows.

    One piece is in memory at a time. With fewer than d components they are those of an incremental analysis
    (scikit-learn's IncrementalPCA), which depend a little on the order of the pieces.
    """
    from sklearn.decomposition import IncrementalPCA

    analysis = IncrementalPCA(count)
    for piece in pieces:
        analysis.partial_fit(np.asarray(piece, np.float64))
    deviations = np.sqrt(analysis.explained_variance_)
    return Components(analysis.mean_, analysis.components_, deviations)


class States:
    """Token states of texts, one after another in half precision; indexing by texts gives a padded batch."""

    def __init__(self, states: Sequence[np.ndarray]) -> None:
        """Take the states of each text, (tokens, width)."""
        self._rows = torch.from_numpy(np.concatenate(states))
        self._lengths = torch.tensor([len(own) for own in states])
        self._starts = self._lengths.cumsum(0) - self._lengths

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._lengths)

    def __getitem__(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states of these texts, (n, t, width) float32, and which of them are tokens, (n, t)."""
        lengths, place = self._lengths[texts, None], torch.arange(int(self._lengths[texts].max()))
        there = place < lengths
        rows = self._starts[texts, None] + torch.minimum(place, lengths - 1)
        return self._rows[rows].float() * there[..., None], there


def distillation_loss(
    network: nn.Module, states: States, coefficients: Tensor, latents: int, *, batch_size: int, seed: int
) -> Callable[[int], Losses]:
    """Return the loss of step k: the mean squared error in latents of a batch of texts.

    network       from token states and which of them are there to coefficients
    states        token states of the texts
    coefficients  their targets, (n, k)
    latents       d
    batch_size    texts in a step
    seed          seed of the order of the texts
    """

    def loss(step: int) -> Losses:
        texts = batch(len(coefficients), batch_size, seed, step)
        error = network(*states[texts]) - coefficients[texts]
        return {"loss": error.square().sum(1).mean() / latents}

    return loss


@torch.no_grad()
def held_out_loss(network: nn.Module, states: States, coefficients: Tensor, latents: int) -> dict[str, float]:
    """Return the mean squared error in latents of texts that are not trained on, as `Validation.measure` does."""
    total = 0.0
    for texts in torch.split(torch.arange(len(states)), _BATCH):
        total += float((network(*states[texts]) - coefficients[texts]).square().sum())
    return {LOSS: total / (len(states) * latents)}
