"""The device that SAGE_DEVICE names is the one that computes, or the command says that it is not there."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from flows import machine
from flows.commands import doctor
from sage.errors import ConfigurationError


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Forget accelerate's process-wide state, and that this process may be one of several."""
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert machine.embedding_cache() == Path("work/cache/embeddings.sqlite") and not caplog.text
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAGE_CACHE", str(tmp_path / "file/cache"))
    assert machine.embedding_cache() is None and "embeddings are not cached" in caplog.text


ABSENT = ["banana", "cuda:x", "xpu", "mps" if not torch.backends.mps.is_available() else "cuda"]
ABSENT += ["cuda", f"cuda:{torch.cuda.device_count() or 1}"] if not torch.cuda.is_available() else ["cuda:99"]


@pytest.mark.parametrize("name", ABSENT)
def test_a_device_that_is_not_there_is_an_error_of_one_line(name, monkeypatch):
    monkeypatch.setenv("SAGE_DEVICE", name)
    for computes in (machine.device, machine.accelerator):
        with pytest.raises(ConfigurationError, match=rf"device {name} .*SAGE_DEVICE to one of cpu") as found:
            computes()
        assert "\n" not in str(found.value)
    (finding,) = doctor._device()
    assert name in finding.what and finding.remedy.startswith("set SAGE_DEVICE to one of cpu")


def test_training_takes_the_device_that_is_named(monkeypatch):
    assert machine.accelerator().device.type == torch.device(machine.device()).type
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(machine, "device", lambda: "meta")  # it stands for a card that accelerate would not choose
    assert machine.accelerator().device == torch.device("meta")
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(machine, "device", lambda: "cuda:1")
    assert machine.accelerator().device == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["cuda:1", "mps"])
def test_one_device_is_not_enough_for_several_processes(name, monkeypatch):
    monkeypatch.setattr(machine, "device", lambda: name)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigurationError, match=f"SAGE_DEVICE={name} is one device .* for a card each"):
        machine.accelerator()
