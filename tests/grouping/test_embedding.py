"""The packaged encoder itself: what it is told, what it remembers, and what no prompt may break."""

import numpy as np
import pytest

from sage.grouping import embedding
from sage.grouping.embedding import embed

PROMPTS = ["a red fox", "the fox is red", "a stock market crash", "a red fox"]


@pytest.fixture(scope="module")
def plain():
    return embed(PROMPTS)


def test_rows_have_length_one_and_follow_meaning(plain):
    assert plain.shape == (4, 384) and plain.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1, atol=1e-5)
    assert np.array_equal(plain[0], plain[3])
    assert plain[0] @ plain[1] > 0.8 > 0.3 > plain[0] @ plain[2]


def test_rows_do_not_depend_on_the_order(plain):
    assert np.array_equal(embed(PROMPTS[::-1]), plain[::-1])


def test_the_cache_gives_the_same_rows_without_the_model(tmp_path, plain, monkeypatch):
    cache = tmp_path / "new" / "embeddings.sqlite"
    assert np.array_equal(embed(PROMPTS, cache=cache), plain)
    monkeypatch.setattr(embedding, "_load", lambda encoder: pytest.fail("the model was loaded"))
    assert np.array_equal(embed(PROMPTS[2:], cache=cache), plain[2:])
    # Keyed by model too: another identity finds nothing.
    assert embedding._recall(cache, "another model", PROMPTS) == {}


def test_progress_counts_every_prompt_once(tmp_path):
    cache = tmp_path / "embeddings.sqlite"
    for _ in range(2):
        told = []
        embed(PROMPTS, cache=cache, batch_size=2, progress=told.append)
        assert sum(told) == len(PROMPTS)


def test_any_text_embeds():
    texts = ["", " ", "\x00", "\ud800", "\u72d7\u5728\u8dd1", "\u0643\u0644\u0628", "\U0001f98a", "word " * 200_000]
    rows = embed(texts)
    assert np.isfinite(rows).all() and rows.shape == (len(texts), 384)


def test_no_prompts_have_no_rows():
    assert len(embed([])) == 0
