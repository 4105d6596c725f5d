"""Embeddings for benchmarks/grouping.py, in parts on disk, so that a kill costs one part and sizes share them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import sage.torchvision_ops  # noqa: F401

import numpy as np
import typer

from benchmarks.captions import captions
from flows.prompts.files import read_prompts
from flows.terminal import progress, run
from sage.data.templates import Syntax
from sage.files import new_file
from sage.grouping.embedding import embed
from sage.packaged import minilm_folder

WORK = Path("work/grouping")
PART = 10_000
# Beyond, only speed is asked: bfloat16 is twice as fast, its vectors have a cosine of 0.998 or more with the others.
SINGLE_PRECISION = 50_000
_BATCH = 128


def embeddings(size: int, prompts: Path | None) -> np.ndarray:
    """Return embeddings of composed captions, or of the first prompts of a list."""
    items = read_prompts(str(prompts), Syntax(literal=True)) if prompts else []
    listed = [item.prompt for item in items if item.error is None]
    texts = listed[:size] or list(captions(size))
    if len(texts) < size:
        raise typer.BadParameter(f"{prompts} has {len(texts)} prompts, fewer than {size}")
    folder = WORK / (prompts.stem if prompts else "composed")
    parts = []
    fast = None
    with progress(size, "embeddings") as advance:
        for start in range(0, size, PART):
            path = folder / f"{start // PART:05d}.npy"
            part = texts[start : start + PART]
            if not path.exists() or len(np.load(path, mmap_mode="r")) < len(part):
                if start >= SINGLE_PRECISION and fast is None:
                    fast = _Bfloat16()
                with new_file(path) as temporary, temporary.open("wb") as file:
                    np.save(file, embed(part) if fast is None or start < SINGLE_PRECISION else fast(part))
            parts.append(path)
            advance(len(part))
    rows = np.empty((size, np.load(parts[0], mmap_mode="r").shape[1]), np.float32)
    for start, path in zip(range(0, size, PART), parts, strict=True):
        rows[start : start + PART] = np.load(path, mmap_mode="r")[: size - start]
    return rows


class _Bfloat16:
    """MiniLM in bfloat16, its means and lengths in single precision."""

    def __init__(self) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(minilm_folder()), device="cpu").to(torch.bfloat16)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        found = self.model.encode(
            list(texts), batch_size=_BATCH, convert_to_numpy=False, convert_to_tensor=True, show_progress_bar=False
        )
        rows = found.float().numpy()
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def tf_idf(texts: Sequence[str]) -> np.ndarray:
    """Return counts of words, weighted by how rare they are, each row of length 1."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return np.asarray(TfidfVectorizer().fit_transform(texts).toarray(), np.float32)


def word_vectors(texts: Sequence[str]) -> np.ndarray:
    """Return the mean of MiniLM's input vectors over the tokens of each text, each row of length 1."""
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm_folder()), device="cpu")[0]
    tokens = model.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt", add_special_tokens=False)
    mask = tokens["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        states = model.auto_model.embeddings.word_embeddings(tokens["input_ids"])
    rows = ((states * mask).sum(1) / mask.sum(1)).numpy()
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def main(size: Annotated[int, typer.Argument(help="How many composed captions.")]) -> None:
    """Make and keep embeddings before anything is timed; interrupted, it goes on where it was."""
    embeddings(size, None)


if __name__ == "__main__":
    run(main)
