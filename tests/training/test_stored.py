"""Rows in memory-mapped files: computed once, continued after a kill, never read before they are complete."""

import json
import threading

import sage.torchvision_ops  # noqa: F401

import pytest
import torch

from sage.training import stored as module
from sage.training.stored import stored

COUNT = 40


@pytest.fixture(autouse=True)
def few_together(monkeypatch):
    monkeypatch.setattr(module, "TOGETHER", 16)
    monkeypatch.setattr(module, "SAVED_EVERY", 0.0)


def rows(start, stop):
    numbers = torch.arange(start, stop)
    images = torch.rand(len(numbers), 4, 6, 5).to(memory_format=torch.channels_last)
    latents = numbers[:, None, None] + torch.rand(3, 2)
    return {"latents": latents, "mask": numbers % 2 == 0, "images": images, "half": latents.bfloat16()}


class Computed:
    """What is computed, from one set of random numbers, and which rows were asked for."""

    def __init__(self):
        self.whole, self.asked = rows(0, COUNT), []

    def __call__(self, start, stop):
        self.asked.append((start, stop))
        return {name: values[start:stop] for name, values in self.whole.items()}


def check(found, computed):
    assert found.keys() == computed.whole.keys()
    for name, values in computed.whole.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values)
        assert found[name].stride() == values.stride()


def test_rows_are_computed_once_and_are_the_same_from_the_files(tmp_path):
    computed, done = Computed(), []
    check(stored(tmp_path / "a", COUNT, computed, done.append), computed)
    assert computed.asked == [(0, 16), (16, 32), (32, 40)]
    check(stored(tmp_path / "a", COUNT, computed, done.append), computed)
    assert len(computed.asked) == 3
    assert done == [0, 16, 16, 8, 40]
    # A batch is a copy of its rows; nothing that is done with it comes into the files.
    batch = stored(tmp_path / "a", COUNT, computed)["latents"][torch.tensor([3, 1])]
    batch.zero_()
    check(stored(tmp_path / "a", COUNT, computed), computed)


def test_what_was_stopped_goes_on_where_rows_are_complete(tmp_path):
    computed = Computed()

    def stopped(start, stop):
        if start == 32:
            raise KeyboardInterrupt
        return computed(start, stop)

    with pytest.raises(KeyboardInterrupt):
        stored(tmp_path / "a", COUNT, stopped)
    # As if it had been killed while it appended.
    with (tmp_path / "a/latents").open("ab") as file:
        file.write(b"half a row")
    check(stored(tmp_path / "a", COUNT, computed), computed)
    assert computed.asked == [(0, 16), (16, 32), (32, 40)]


def test_what_is_not_noted_yet_is_computed_again(tmp_path, monkeypatch):
    computed = Computed()

    def stopped(start, stop):
        if start == 32:
            raise KeyboardInterrupt
        return computed(start, stop)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "SAVED_EVERY", 1000.0)
        stored(tmp_path / "a", COUNT, stopped)
    check(stored(tmp_path / "a", COUNT, computed), computed)
    assert computed.asked == [(0, 16), (16, 32), (0, 16), (16, 32), (32, 40)]


@pytest.mark.parametrize("fault", ["cut off", "missing"])
def test_files_that_lack_rows_are_computed_anew(fault, tmp_path):
    computed = Computed()
    stored(tmp_path / "a", COUNT, computed)
    file = tmp_path / "a/latents"
    file.unlink() if fault == "missing" else file.write_bytes(file.read_bytes()[:-1])
    check(stored(tmp_path / "a", COUNT, computed), computed)
    assert computed.asked[3:] == computed.asked[:3]


def test_of_two_processes_one_computes_and_the_other_waits(tmp_path):
    computed, begun, go = Computed(), threading.Event(), threading.Event()

    def slow(start, stop):
        begun.set()
        assert go.wait(10)
        return computed(start, stop)

    found = []
    first = threading.Thread(target=lambda: found.append(stored(tmp_path / "a", COUNT, slow)))
    first.start()
    assert begun.wait(10)
    second = threading.Thread(target=lambda: found.append(stored(tmp_path / "a", COUNT, computed)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert not computed.asked
    go.set()
    first.join(10)
    second.join(10)
    assert computed.asked == [(0, 16), (16, 32), (32, 40)]
    check(found[0], computed)
    check(found[1], computed)


def test_a_full_disk_is_an_error_that_leaves_the_complete_rows(tmp_path, monkeypatch):
    computed, real = Computed(), module._append

    def full(path, start, array):
        if start and path.name == "mask":
            raise OSError(28, "No space left on device", str(path))
        real(path, start, array)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(module, "_append", full)
        stored(tmp_path / "a", COUNT, computed)
    assert json.loads((tmp_path / "a/rows.json").read_text())["rows"] == 16
    check(stored(tmp_path / "a", COUNT, computed), computed)
    assert computed.asked == [(0, 16), (16, 32), (16, 32), (32, 40)]
