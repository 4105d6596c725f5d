"""The losses by step, as a file."""

import pytest

from sage.errors import MetricError
from sage.training.curves import Point, points, read_curves, write_curves
from sage.training.selection import Measured

REPORTS = [(10, {"loss": 0.5, "diffusion": 0.25, "gradient_norm": 3.0}), (12, {"loss": 0.4, "diffusion": 0.125})]
HISTORY = [Measured(0, {"validation_loss": 0.75, "validation_t0_249": 1 / 3})]


def test_what_is_read_is_what_was_written_to_six_digits(tmp_path):
    found = points(REPORTS, HISTORY)
    write_curves(tmp_path / "plots/losses.csv", found)
    assert (tmp_path / "plots/losses.csv").read_text().splitlines() == [
        "step,set,term,value",
        "10,training,loss,0.5",
        "10,training,diffusion,0.25",
        "12,training,loss,0.4",
        "12,training,diffusion,0.125",
        "0,held-out,loss,0.75",
        "0,held-out,t0_249,0.333333",
    ]
    assert read_curves(tmp_path / "plots/losses.csv") == [*found[:-1], Point(0, "held-out", "t0_249", 0.333333)]


@pytest.mark.parametrize("text", ["step,set\n1,training\n", "step,set,term,value\n1,training,loss,much\n"])
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "losses.csv"
    with pytest.raises(MetricError, match=r"losses.csv does not exist. Run `dvc repro finetune`"):
        read_curves(path)
    path.write_text(text)
    with pytest.raises(MetricError, match=r"losses.csv is damaged: .* Run `dvc repro --force finetune`"):
        read_curves(path)
