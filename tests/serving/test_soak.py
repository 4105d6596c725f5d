"""A short soak of `sage serve`; `python -m benchmarks.serving soak` sends 10,000 requests."""

import argparse

import pytest
import tiny

from benchmarks.serving import soak

pytestmark = pytest.mark.slow


def test_requests_of_all_kinds_leave_nothing_behind_and_are_all_counted(tmp_path):
    folder = tmp_path / "model"
    tiny.pipeline("stable_diffusion", tmp_path).save_pretrained(folder)
    rows = soak(argparse.Namespace(model=str(folder), batch_size=8, requests=400))
    assert [row for row in rows if row.held is False] == []
