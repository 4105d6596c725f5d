import pytest
import torch
from test_fit import Killed, kill_at, state_of, train
from torch import nn

from sage.training.optimizers import optimizer


def state_size(name):
    """Numbers in the state of an optimizer after a step on a matrix of 64 x 32 and a vector of 32."""
    parameters = [nn.Parameter(torch.ones(64, 32)), nn.Parameter(torch.ones(32))]
    made = optimizer(name, parameters, 0.01, 0.0)
    sum(p.square().sum() for p in parameters).backward()
    made.step()
    return sum(value.numel() for p in parameters for key, value in made.state[p].items() if key != "step")


def test_adafactor_keeps_rows_and_columns_of_matrices_alone():
    assert state_size("adamw") == 2 * (64 * 32 + 32)
    assert state_size("adafactor") == 64 + 32 + 32


def test_adafactor_learns(tmp_path):
    seen = []
    train(
        tmp_path,
        on_step=lambda step, values: seen.append(values["loss"]),
        steps=200,
        learning_rate=0.05,
        optimizer="adafactor",
    )
    assert sum(seen[-20:]) < 0.5 * sum(seen[:20])


@pytest.mark.parametrize("stop", [7, 20])
def test_adafactor_resumes_to_the_same_bits(stop, tmp_path):
    whole, values = train(tmp_path / "whole", optimizer="adafactor")
    with pytest.raises(Killed):
        train(tmp_path / "parts", on_step=kill_at(stop), optimizer="adafactor")
    resumed, same = train(tmp_path / "parts", optimizer="adafactor")
    assert same == values and state_of(tmp_path / "whole") == state_of(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    other, _ = train(tmp_path / "adamw")
    assert not torch.equal(other[0].weight, whole[0].weight)
