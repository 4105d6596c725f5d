"""The table of what the server holds: the tests that it names exist, and one failure leaves the other rows."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from benchmarks import serving
from benchmarks.serving import Row

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("test", [test for tests in serving.TESTS.values() for test in tests])
def test_the_tests_that_hold_a_row_exist(test):
    path, _, name = test.partition("::")
    assert f"def {name or 'test_'}" in (ROOT / path).read_text()


def test_a_measurement_that_fails_is_a_row_that_was_not_held_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    def broken(options):
        raise SystemExit("not within 60 s")

    measurements = {"half": broken, "slow": lambda options: [Row("errors", "0", "at most 0", True), Row("p50", "1 s")]}
    monkeypatch.setattr(serving, "MEASUREMENTS", measurements)
    monkeypatch.setattr(sys, "argv", ["serving", "all", "--into", str(tmp_path / "rows.json")])
    with pytest.raises(SystemExit) as ended:
        serving.main()
    assert ended.value.code == 1
    text = (tmp_path / "rows.md").read_text()
    assert text.startswith("1 of 2 held: models/base, batches of 8, ") and text in capsys.readouterr().out
    assert "| half is measured | SystemExit: not within 60 s | measured | **no** | `python -m benchmarks" in text
    assert (
        "| errors | 0 | at most 0 | yes | `python -m benchmarks.serving slow` |\n| p50 | 1 s |  |  | the same |" in text
    )
    assert list(json.loads((tmp_path / "rows.json").read_text())) == ["half", "slow"]


@pytest.mark.slow
def test_a_row_of_tests_is_held_only_if_they_ran(tmp_path, monkeypatch):
    for name, body in [("passes", "pass"), ("skips", "import pytest; pytest.skip()"), ("fails", "assert 0")]:
        (tmp_path / f"test_{name}.py").write_text(f"def test_it():\n    {body}\n")
    tests = {name: [str(tmp_path / f"test_{name}.py")] for name in ("passes", "skips", "fails", "misses")}
    monkeypatch.setattr(serving, "TESTS", tests)
    monkeypatch.chdir(tmp_path)
    rows = serving.held_by_tests(argparse.Namespace())
    assert [row.held for row in rows] == [True, None, False, False]
    assert [row.measured for row in rows] == ["1 passed", "1 skipped", "1 failed", "no tests ran"]
