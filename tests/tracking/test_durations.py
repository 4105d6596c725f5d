"""How long stages took, as `sage plan` shows it."""

import time

import sage.torchvision_ops  # noqa: F401

import pytest
from tracked import database, project  # noqa: F401

from flows.tracking import runs
from flows.tracking.durations import durations


@pytest.mark.usefixtures("project")
def test_the_last_finished_run_here_counts_and_its_other_settings_are_named(monkeypatch):
    with runs.stage_run("finetune", {"steps": 5, "weights": {"branch": 1.0}}):
        time.sleep(0.3)
    with pytest.raises(ZeroDivisionError), runs.stage_run("finetune", {"steps": 7}):
        raise ZeroDivisionError
    sections = {"finetune": {"steps": 9, "weights": {"branch": 1.0}, "seed": 0}, "generate": {}}
    found = durations(sections)
    assert found.keys() == {"finetune"} and found["finetune"].changed == ("steps",)
    assert 0.2 < found["finetune"].seconds < 60
    monkeypatch.setenv("SAGE_DEVICE", "cuda:3")  # another machine's
    assert durations(sections) == {}


def test_without_tracking_there_are_none_and_no_database_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAGE_TRACKING_URI", raising=False)
    assert durations({"finetune": {}}) == {} and not list(tmp_path.iterdir())
    monkeypatch.setenv("SAGE_TRACKING_URI", "off")
    assert durations({"finetune": {}}) == {}
