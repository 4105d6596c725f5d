"""Prefixes on disk: found again by another process, never damaged, bounded in bytes."""

import os
import time

import numpy as np
import pytest
import torch

from flows.serving.prefix_files import PrefixFiles
from flows.serving.prefixes import Prefixes
from sage.sampling.continuous import Prefix

KIND = ('["key", "user"]', ("guidance_scale", 3.0), ("negative_prompt", ""), ("steps", 6))


def prefix(value=0.0, step=2, dtype=torch.float32):
    history = [None, torch.full((1, 10), value + 2, dtype=dtype)]
    state = {"model_outputs": history, "_step_index": step, "lower_order_nums": 1}
    return Prefix(step, torch.full((1, 10), value, dtype=dtype), torch.full((10,), value + 1, dtype=dtype), state)


def written(folder, prompts, limit=1 << 20, identity="model"):
    """Write a prefix for each prompt, in order; return the files."""
    files = PrefixFiles(folder, limit, identity)
    for number, prompt in enumerate(prompts):
        files.put((KIND, (prompt,), 2), prefix(number), np.eye(4)[number % 4])
        files.flush()
    return files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_process_finds_the_same_prefix(tmp_path, dtype):
    key = (KIND, ("a cat", "a caf\u00e9 \ud800"), 2)
    first = PrefixFiles(tmp_path, 1 << 20, "model")
    first.put(key, prefix(5.0, dtype=dtype), np.eye(4)[1])
    first.flush()
    again = PrefixFiles(tmp_path, 1 << 20, "model")
    found, embedding = again.get(key)
    torch.testing.assert_close(vars(found), vars(prefix(5.0, dtype=dtype)), rtol=0, atol=0)
    assert np.array_equal(embedding, np.eye(4)[1])
    assert [listed for listed, _ in again.entries(10)] == [key]
    first.put(key, prefix(6.0, dtype=dtype), np.eye(4)[1])
    first.flush()
    assert (first.files, first.bytes) == (1, again.bytes) == (again.files, again.bytes) and not again.damaged


def test_only_the_model_and_key_that_left_a_prefix_find_it(tmp_path):
    written(tmp_path, ["a"])
    assert PrefixFiles(tmp_path, 1 << 20, "other").get((KIND, ("a",), 2)) is None
    assert not list(PrefixFiles(tmp_path, 1 << 20, "other").entries(10))
    files = PrefixFiles(tmp_path, 1 << 20, "model")
    assert files.get((KIND, ("a",), 1)) is None and files.get(((None, *KIND[1:]), ("a",), 2)) is None
    assert files.get((KIND, ("a",), 2)) is not None


def test_every_damage_is_noticed_and_the_file_dropped(tmp_path):
    rng = np.random.default_rng(0)
    key = (KIND, ("a",), 2)
    for number in range(40):
        files = written(tmp_path, ["a"])
        (path,) = tmp_path.glob("*.safetensors")
        content = bytearray(path.read_bytes())
        if number < 30:
            content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        else:
            content = content[: int(rng.integers(len(content)))]
        path.write_bytes(content)
        assert files.get(key) is None, number
        assert files.damaged == 1 and not path.exists()
        assert files.get(key) is None and files.damaged == 1


def test_a_damaged_header_is_dropped_at_the_start(tmp_path):
    written(tmp_path, ["a", "b"])
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(b"\0" * 100)
    files = PrefixFiles(tmp_path, 1 << 20, "model")
    assert len(list(files.entries(10))) == 1 and files.damaged == 1 and not path.exists()


def test_the_least_recently_used_are_deleted_above_the_limit(tmp_path):
    size = written(tmp_path, ["a"]).bytes
    files = written(tmp_path, ["b", "c"], limit=int(3.3 * size))
    for age, prompt in enumerate("cba"):
        os.utime(files._path((KIND, (prompt,), 2)), (time.time() - 100 - age,) * 2)
    assert files.get((KIND, ("a",), 2)) is not None
    files.put((KIND, ("d",), 2), prefix(), np.eye(4)[3])
    files.flush()
    left = [prompt for prompt in "abcd" if files.get((KIND, (prompt,), 2))]
    assert left == ["a", "d"] and files.bytes <= 0.9 * files.limit
    assert PrefixFiles(tmp_path, int(1.5 * size), "model").files == 1


def test_what_a_killed_writer_left_is_removed_and_files_are_private(tmp_path):
    written(tmp_path / "p", ["a"])
    old, new = tmp_path / "p" / ".x.safetensors.tmp-1", tmp_path / "p" / ".y.safetensors.tmp-2"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (time.time() - 1000,) * 2)
    PrefixFiles(tmp_path / "p", 1 << 20, "model")
    assert not old.exists() and new.exists()
    (path,) = (tmp_path / "p").glob("*.safetensors")
    assert path.stat().st_mode & 0o077 == 0 and (tmp_path / "p").stat().st_mode & 0o077 == 0


def test_a_disk_that_cannot_be_written_costs_only_the_cache(tmp_path, capfd):
    files = PrefixFiles(tmp_path / "p", 1 << 20, "model")
    cache = Prefixes(10_000, files)
    (tmp_path / "p").rmdir()
    (tmp_path / "p").write_text("no folder")
    cache.put(KIND, ["a"], prefix(step=1))
    files.flush()
    assert files.failed == 1 and "Error" in capfd.readouterr().err
    assert cache.first(KIND, "a") is not None and cache.figures.unwritten == 1
    assert cache.first(KIND, "b") is None


def test_what_memory_has_no_room_for_is_read_from_disk(tmp_path):
    cache = Prefixes(150, PrefixFiles(tmp_path, 1 << 20, "model"))  # one prefix has 120 bytes
    for number, prompt in enumerate("abc"):
        cache.put(KIND, [prompt], prefix(number), np.eye(4)[number])
    cache._files.flush()
    assert len(cache) == 1 and cache.bytes == 120
    again = Prefixes(150, PrefixFiles(tmp_path, 1 << 20, "model"))
    for known in (cache, again):
        found = known.similar(KIND, "d", np.eye(4)[0], 0.5, 1.1)
        assert found.latents[0, 0] == 0.0 and len(known) == 1
    assert again.similar(("other", *KIND[1:]), "d", np.eye(4)[0], 0.5, 1.1) is None


def test_a_file_that_another_process_deleted_is_a_miss(tmp_path):
    cache = Prefixes(150, written(tmp_path, ["a", "b"]))
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert cache.similar(KIND, "c", np.eye(4)[0], 0.5, 1.1) is None
    assert cache.first(KIND, "a") is None and cache.figures.damaged == 0
