"""Sentence embeddings of prompts, with a cache on disk keyed by encoder and text."""

import functools
import hashlib
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from sage.files import sha256_tree
from sage.packaged import minilm_folder

# Far more than any sentence encoder reads (MiniLM: 256 tokens), yet short enough for every tokenizer.
MAX_CHARACTERS = 20_000


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
    cache       SQLite file of embeddings computed before; None: no cache
    batch_size  prompts per call of the encoder
    progress    called with the number of prompts finished since its last call
    """
    # Batch composition changes the rounding, so sort: the result must not depend on the order of the prompts.
    texts = sorted({_clean(prompt) for prompt in prompts}, key=lambda text: (len(text), text))
    if not texts:
        return np.zeros((0, 0), np.float32)
    vectors: dict[str, np.ndarray] = {}
    missing = texts
    identity = _identity(encoder)
    if cache is not None:
        vectors = _recall(cache, identity, texts)
        missing = [text for text in texts if text not in vectors]
    progress(len(prompts) - len(missing))
    if missing:
        model = _load(encoder)
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            rows = model.encode(batch, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
            found = dict(zip(batch, np.asarray(rows, np.float32), strict=True))
            if cache is not None:
                _remember(cache, identity, found)
            vectors |= found
            progress(len(batch))
    return np.stack([vectors[_clean(prompt)] for prompt in prompts])


def _clean(prompt: str) -> str:
    """Return the text to encode: at most MAX_CHARACTERS, with lone surrogates replaced."""
    return prompt[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")


@functools.lru_cache(maxsize=1)
def _load(encoder: str):  # type: ignore[no-untyped-def]
    # Imported here because it takes seconds, and cached prompts need no model.
    import sage.torchvision_ops  # noqa: F401

    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(_folder(encoder) or encoder), device="cpu")


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


def _open(cache: Path) -> sqlite3.Connection:
    cache.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(cache, timeout=60)
    connection.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB NOT NULL) WITHOUT ROWID")
    return connection


def _recall(cache: Path, identity: str, texts: Sequence[str]) -> dict[str, np.ndarray]:
    found = {}
    with closing(_open(cache)) as connection:
        for text in texts:
            query = connection.execute("SELECT vector FROM vectors WHERE key = ?", (_key(identity, text),))
            if row := query.fetchone():
                found[text] = np.frombuffer(row[0], np.float32)
    return found


def _remember(cache: Path, identity: str, vectors: dict[str, np.ndarray]) -> None:
    rows = [(_key(identity, text), vector.tobytes()) for text, vector in vectors.items()]
    with closing(_open(cache)) as connection, connection:
        connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", rows)
