"""The distilled encoder: from text to the model's first prediction without an evaluation of its network.

`sage distil` trains it (`sage.training.distillation`) and writes it beside the model. It reads the token states of
MiniLM, so it serves models of every family, and returns coefficients in the principal components of the training
prompts' first predictions. Rows have the geometry of `FirstPredictions.embeddings` (`sage.grouping.sphere`).

| symbol | meaning |
|---|---|
| d, k | number of latents of a prediction, and of principal components |
| C, mean | components, orthonormal, (d, k), and mean of the training prompts' first predictions, (d,) |
| c | coefficients of a prompt, (k,): its first prediction is about mean + C c |
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sage.torchvision_ops  # noqa: F401

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from sage.errors import ConfigurationError
from sage.files import new_file
from sage.grouping.cost import model_digest
from sage.grouping.embedding import token_states
from sage.grouping.sphere import on_sphere

FILE = "distilled.safetensors"
_REMEDY = "Run `sage distil --model {}`, or set group.by to text."

MadeFor = tuple[str, float, float]


class CoefficientNetwork(nn.Module):
    """From token states to coefficients: a linear layer for each token, attention pooling, two layers.

    tokens   width of the token states
    outputs  k
    width    of the tokens inside; `queries` learned queries pool them
    hidden   width of the layer before the output
    """

    def __init__(self, tokens: int, outputs: int, width: int = 256, queries: int = 4, hidden: int = 512) -> None:
        """Initialise the layers at random; `scale`, the standard deviations of the coefficients, is 1."""
        super().__init__()
        self.token = nn.Linear(tokens, width)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.hidden = nn.Sequential(nn.LayerNorm(queries * width), nn.Linear(queries * width, hidden))
        self.output = nn.Linear(hidden, outputs)
        self.register_buffer("scale", torch.ones(outputs))

    scale: Tensor

    def forward(self, states: Tensor, there: Tensor) -> Tensor:
        """Return coefficients (n, k) of token states (n, t, tokens); `there` (n, t) is False for padding."""
        x = F.gelu(self.token(states))
        score = x @ self.queries.T / x.shape[2] ** 0.5
        weight = score.masked_fill(~there[..., None], -torch.inf).softmax(1)
        pooled = (weight.transpose(1, 2) @ x).flatten(1)
        found: Tensor = self.output(F.gelu(self.hidden(pooled))) * self.scale
        return found


@dataclass(frozen=True)
class Distilled:
    """An encoder distilled from a model's first predictions.

    network   from token states to coefficients
    mean      the mean first prediction, in the components and, last, the length of what is orthogonal to them, (k + 1,)
    latents   d
    made_for  scheduler, first timestep and guidance scale of the predictions
    measured  figures on the validation split, by name
    """

    network: CoefficientNetwork
    mean: np.ndarray
    latents: int
    made_for: MadeFor
    measured: Mapping[str, float]

    @property
    def threshold(self) -> float:
        """The cosine that forms as many groups of the validation captions as the default does by text."""
        return self.measured["distilled.threshold"]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that was learned, by name."""
        named = {name: tensor.detach().contiguous() for name, tensor in self.network.state_dict().items()}
        return named | {"mean": torch.from_numpy(self.mean)}

    @property
    def sha256(self) -> str:
        """The hash of the tensors."""
        return _hash(self.tensors)

    def embed(
        self, prompts: Sequence[str], *, batch_size: int = 128, progress: Callable[[int], None] = lambda n: None
    ) -> np.ndarray:
        """Return the prompts' rows: float32, shape (n, k + 2), of length 1; equal prompts get equal rows.

        They do not depend on the order of the prompts, and on batches only in rounding. `progress` is called with the
        number of prompts finished since its last call.
        """
        rows = np.empty((len(prompts), len(self.mean) + 1), np.float32)
        for numbers, coefficients in self._coefficients(prompts, batch_size, progress):
            # Exact inner products of mean + C c in k + 1 dimensions: the components, and the rest of the mean.
            rest = np.zeros((len(coefficients), 1))
            found = on_sphere(np.concatenate([coefficients, rest], axis=1) + self.mean, self.latents)
            for own, row in zip(numbers, found, strict=True):
                rows[own] = row
        return rows

    def coefficients(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the prompts' coefficients: float32, shape (n, k)."""
        rows = np.empty((len(prompts), len(self.mean) - 1), np.float32)
        for numbers, coefficients in self._coefficients(prompts):
            for own, row in zip(numbers, coefficients, strict=True):
                rows[own] = row
        return rows

    def check(self, made_for: MadeFor) -> "Distilled":
        """Return this encoder; raise ConfigurationError if its model predicted under other settings than these."""
        if made_for != self.made_for:
            named = ("scheduler", "first timestep", "guidance scale")
            other = [
                f"{name} {found}, not {wanted}"
                for name, found, wanted in zip(named, self.made_for, made_for, strict=True)
                if found != wanted
            ]
            raise ConfigurationError(
                f"the distilled encoder is for {' and '.join(other)}; run `sage distil` with these settings, or group "
                "by text"
            )
        return self

    @torch.no_grad()
    def _coefficients(
        self, prompts: Sequence[str], batch_size: int = 128, progress: Callable[[int], None] = lambda n: None
    ) -> Iterator[tuple[list[list[int]], np.ndarray]]:
        for numbers, states in token_states(prompts, batch_size=batch_size, progress=progress):
            yield numbers, self.network(*padded(states)).numpy()


def padded(states: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return token states of texts as one tensor (n, t, width), and which of it are tokens, (n, t)."""
    lengths = torch.tensor([len(own) for own in states])
    return pad_sequence(list(states), batch_first=True).float(), torch.arange(int(lengths.max())) < lengths[:, None]


def kept_at(model: Path) -> Path:
    """Return the file with a model's distilled encoder, beside the model.

    Not in its folder, whose hash names the model, and is that of an output of the graph.
    """
    return model.with_name(f"{model.name}.{FILE}")


def write_distilled(model: Path, encoder: Distilled, how: Mapping[str, Any]) -> None:
    """Write the encoder beside its model; `how` adds the settings of the training, for the record."""
    facts = {
        "model": model_digest(model),
        "made_for": list(encoder.made_for),
        "latents": encoder.latents,
        "sha256": encoder.sha256,
        "measured": dict(encoder.measured),
        "how": dict(how),
    }
    with new_file(kept_at(model)) as temporary:
        temporary.write_bytes(save(encoder.tensors, {"facts": json.dumps(facts, allow_nan=False)}))


def read_distilled(model: Path) -> Distilled:
    """Return the encoder distilled from a model: a folder, a file or a pin.

    Raises ConfigurationError if there is none, or if it is damaged or of other weights.
    """
    path, remedy = kept_at(model), _REMEDY.format(model)
    if not model.exists():
        raise ConfigurationError(
            f"group.by distilled needs the encoder distilled from a model, but {model} is no folder, file or pin here; "
            "pin a model on a hub by `sage base`, or set group.by to text"
        )
    if not path.is_file():
        raise ConfigurationError(f"there is no {path}, so {model} has no distilled encoder. {remedy}")
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _hash(tensors) != facts["sha256"]:
            raise ValueError("its hash is another")
        mean = tensors.pop("mean").numpy()
        scheduler, timestep, scale = facts["made_for"]
        made_for = scheduler, timestep, scale
        encoder = Distilled(_network(tensors), mean, facts["latents"], made_for, facts["measured"])
        distilled_from = facts["model"]
    except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} is damaged: {error!r}. {remedy}") from error
    if distilled_from != model_digest(model):
        raise ConfigurationError(f"{path} was distilled from other weights than {model} has now. {remedy}")
    return encoder


def _network(tensors: Mapping[str, Tensor]) -> CoefficientNetwork:
    (width, tokens), (outputs, hidden) = tensors["token.weight"].shape, tensors["output.weight"].shape
    network = CoefficientNetwork(tokens, outputs, width, len(tensors["queries"]), hidden)
    network.load_state_dict(dict(tensors))
    return network.eval().requires_grad_(False)


def _hash(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    return found.hexdigest()
