"""What a held-out loss decides during training: which weights are kept, and when to stop early."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Keep = Literal["last", "best"]
# The value of a measurement that decides.
LOSS = "validation_loss"


@dataclass(frozen=True)
class Measured:
    """Held-out values of the averaged weights after `step` steps; `LOSS` is one of the names."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Validation:
    """When `sage.training.loop.fit` measures a held-out loss, and what it does with it.

    measure   returns named values, `LOSS` among them; must be a function of the network's weights alone
    every     steps between measurements; the weights before the first and after the last step are measured, too
    patience  number of measurements in a row without a new lowest loss after which training stops; None: it never does
    keep      "last": end with the weights of the last step; "best": of the lowest loss, the first if several are equal
    """

    measure: Callable[[], Mapping[str, float]]
    every: int
    patience: int | None = None
    keep: Keep = "last"

    def due(self, step: int, steps: int) -> bool:
        """Return whether to measure after `step` of `steps` steps."""
        return step % self.every == 0 or step == steps

    def ended(self, history: Sequence[Measured]) -> bool:
        """Return whether training stops early after these measurements."""
        return self.patience is not None and len(history) - 1 - _best(history) >= self.patience

    def kept(self, history: Sequence[Measured]) -> Measured:
        """Return the measurement whose weights are kept, if training ends with the last of these."""
        return history[_best(history) if self.keep == "best" else -1]


def _best(history: Sequence[Measured]) -> int:
    """Return the index of the lowest loss, the first if several are equal, and -1 without measurements."""
    return min(range(len(history)), key=lambda place: history[place].values[LOSS], default=-1)
