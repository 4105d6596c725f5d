"""Sentence embeddings of prompts, with a cache on disk keyed by encoder and text."""

import functools
import hashlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sage.errors import DataError
from sage.files import sha256_tree
from sage.packaged import minilm_folder

if TYPE_CHECKING:
    from torch import Tensor

# Far more than any sentence encoder reads (MiniLM: 256 tokens), yet short enough for every tokenizer.
MAX_CHARACTERS = 20_000

log = logging.getLogger(__name__)
# Loads and runs an encoder in one thread at a time: its tokenizer is not made for several.
_ENCODING = threading.Lock()
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_T = TypeVar("_T")


def embed(
    prompts: Sequence[str],
    encoder: str = "minilm",
    *,
    cache: Path | None = None,
    batch_size: int = 128,
    progress: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Return the prompts' sentence embeddings: float32, shape (n, d), rows of length 1 ((0, 0) without prompts).

    prompts     texts; each is truncated at the encoder's token limit; equal prompts get equal rows
    encoder     "minilm" (the packaged all-MiniLM-L6-v2, English), or a name or folder that SentenceTransformer loads
    cache       SQLite file of embeddings computed before; None: no cache. A damaged file is renamed and made anew
    batch_size  prompts per call of the encoder
    progress    called with the number of prompts finished since its last call

    The last encoder stays loaded, and threads may call at once. Raises DataError if the cache cannot be opened.
    """
    # Batch composition changes the rounding, so sort: the result must not depend on the order of the prompts.
    texts = sorted({_clean(prompt) for prompt in prompts}, key=lambda text: (len(text), text))
    if not texts:
        return np.zeros((0, 0), np.float32)
    vectors: dict[str, np.ndarray] = {}
    missing = texts
    if cache is not None:
        identity = _identity(encoder)
        vectors = _recall(cache, identity, texts)
        missing = [text for text in texts if text not in vectors]
    progress(len(prompts) - len(missing))
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        with _ENCODING:
            rows = _load(encoder).encode(
                batch, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
            )
        found = dict(zip(batch, np.asarray(rows, np.float32), strict=True))
        if cache is not None:
            _remember(cache, identity, found)
        vectors |= found
        progress(len(batch))
    return np.stack([vectors[_clean(prompt)] for prompt in prompts])


def token_states(
    prompts: Sequence[str], *, batch_size: int = 128, progress: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[list[list[int]], "list[Tensor]"]]:
    """Yield the states of MiniLM's tokens in batches of different texts, in an order that the texts alone decide.

    A batch has, for each of its texts, the numbers of the prompts that have it, and its states, (tokens, 384) on the
    CPU: of at most 256 tokens, the first and the last of which mark the ends. `progress` is called with the number of
    prompts of each batch, after it was used.
    """
    places: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        places.setdefault(_clean(prompt), []).append(number)
    # Batch composition changes the rounding, so sort: the result must not depend on the order of the prompts.
    texts = sorted(places, key=lambda text: (len(text), text))
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        with _ENCODING:
            states = _load("minilm").encode(
                batch, batch_size=batch_size, output_value="token_embeddings", show_progress_bar=False
            )
        numbers = [places[text] for text in batch]
        yield numbers, states
        progress(sum(map(len, numbers)))


def _clean(prompt: str) -> str:
    """Return the text to encode: at most MAX_CHARACTERS, with lone surrogates replaced."""
    return prompt[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


@functools.lru_cache(maxsize=1)
def _load(encoder: str) -> Any:
    # Imported here because it takes seconds, and cached prompts need no model.
    import sage.torchvision_ops  # noqa: F401

    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(_folder(encoder) or encoder), device="cpu", model_kwargs={"use_safetensors": True})


def _folder(encoder: str) -> Path | None:
    """Return the encoder's folder, or None if its name is left for SentenceTransformer to resolve."""
    if encoder == "minilm":
        return minilm_folder()
    return Path(encoder) if Path(encoder).is_dir() else None


def _identity(encoder: str) -> str:
    """Return the encoder's part of the cache key: the hash of its files if it is a folder, else its name."""
    folder = _folder(encoder)
    return sha256_tree(folder) if folder else encoder


def _key(identity: str, text: str) -> bytes:
    return hashlib.sha256(f"{identity}\0{text}".encode()).digest()


def _recall(cache: Path, identity: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    def read(connection: sqlite3.Connection) -> dict[str, np.ndarray]:
        found = {}
        for text in texts:
            query = connection.execute("SELECT vector FROM vectors WHERE key = ?", (_key(identity, text),))
            row = np.frombuffer((query.fetchone() or [b""])[0], np.uint8)
            # SQLite does not notice every damage, but rows have length 1.
            vector = row[: len(row) // 4 * 4].view(np.float32)
            if abs(np.linalg.norm(vector) - 1) < 1e-3:
                found[text] = vector
        return found

    return _with(cache, read)


def _remember(cache: Path, identity: str, vectors: dict[str, np.ndarray]) -> None:
    rows = [(_key(identity, text), vector.tobytes()) for text, vector in vectors.items()]
    _with(cache, lambda connection: connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows))


def _with(cache: Path, use: Callable[[sqlite3.Connection], _T]) -> _T:
    """Return what `use` makes of the cache; if its file is damaged, of a new one."""
    try:
        return _open(cache, use)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGED:
            raise DataError(f"the embedding cache {cache} cannot be used: {error}; name another file") from error
        aside = cache.with_name(f"{cache.name}.damaged")
        log.warning("the embedding cache %s is damaged (%s); it is renamed to %s and made anew", cache, error, aside)
    cache.with_name(f"{cache.name}-journal").unlink(missing_ok=True)
    cache.replace(aside)
    return _open(cache, use)


def _open(cache: Path, use: Callable[[sqlite3.Connection], _T]) -> _T:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(cache, timeout=60)) as connection, connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID"
        )
        return use(connection)
