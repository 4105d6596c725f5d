"""The packaged encoder itself: what it is told, what it remembers, and what no prompt may break."""

import sqlite3
import threading

import numpy as np
import pytest

from sage.errors import DataError
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


def test_the_encoder_is_loaded_once_also_by_threads(plain, monkeypatch):
    embedding._load.cache_clear()
    loads = []
    folder = embedding._folder

    def counted(encoder):
        loads.append(encoder)
        return folder(encoder)

    monkeypatch.setattr(embedding, "_folder", counted)
    rows = [None] * 4
    threads = [
        threading.Thread(target=lambda k=k: rows.__setitem__(k, embed([PROMPTS[k % 3], "a dog " * k])))
        for k in range(len(rows))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["minilm"]
    for k, found in enumerate(rows):
        np.testing.assert_allclose(found[0], plain[k % 3], atol=1e-5)


@pytest.mark.parametrize("damage", ["not a database", "overwritten", "cut"])
def test_a_damaged_cache_is_named_kept_aside_and_made_anew(tmp_path, plain, caplog, damage):
    cache = tmp_path / "embeddings.sqlite"
    many = PROMPTS + [f"word {number}" for number in range(40)]
    expected = embed(many, cache=cache)
    whole = cache.read_bytes()
    content = {
        "not a database": b"something else " * 999,
        "overwritten": whole[:4096] + b"\xff" * (len(whole) - 4096),
        "cut": whole[: len(whole) // 3],
    }[damage]
    cache.write_bytes(content)
    found = embed(many, cache=cache)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert f"{cache} is damaged" in caplog.text
    assert (tmp_path / "embeddings.sqlite.damaged").read_bytes() == content
    assert np.array_equal(embed(many, cache=cache), found)


def test_a_damaged_row_is_made_anew(tmp_path, plain):
    cache = tmp_path / "embeddings.sqlite"
    embed(PROMPTS, cache=cache)
    with sqlite3.connect(cache) as connection:
        connection.execute("UPDATE vectors SET vector = substr(vector, 1, 701)")
    connection.close()
    np.testing.assert_allclose(embed(PROMPTS, cache=cache), plain, atol=1e-5)


def test_a_cache_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder cannot be used: unable to open"):
        embed(PROMPTS, cache=tmp_path / "folder")
