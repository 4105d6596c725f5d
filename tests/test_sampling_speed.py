"""The verdicts of `benchmarks/sampling.py` follow its limits."""

import sys
from typing import Any

import pytest
import torch

from benchmarks import sampling
from benchmarks.sampling import LIMITS, measure, tiny_flux, tiny_stable_diffusion, verdicts


def figures(over_stock: float = 1.0, promise: float = 1.0, outside: float = 0.01, late: float = 1.0) -> dict[str, Any]:
    ratios = {
        "0.0": {"saving": 0.0, "share_of_promise": 0.5, "outside_networks": 0.01},
        "0.4": {"saving": 0.25, "share_of_promise": 1.0, "outside_networks": outside},
        "0.6": {"saving": 0.33, "share_of_promise": promise, "outside_networks": 0.01},
    }
    streams = [
        {"prompts": 2_500, "ms_a_prompt": 1.0, "memory_mib": 3.0},
        {"prompts": 10_000, "ms_a_prompt": late, "memory_mib": 5.0},
    ]
    return {"ratio_0_over_stock": over_stock, "ratios": ratios, "free": {"FLUX.1": {"streams": streams}}}


def failed(**changes: float) -> list[int]:
    """Return the places of the limits that are not kept."""
    return [number for number, (_, _, kept) in enumerate(verdicts(figures(**changes))) if not kept]


def test_each_limit_is_of_the_worst_case():
    assert [what for what, _, _ in verdicts(figures())] == list(LIMITS) and not failed()
    assert failed(over_stock=1.03) == [0] and failed(promise=0.94) == [1]
    assert failed(outside=0.04) == [2] and failed(late=1.2) == [3]


def test_only_what_was_measured_is_judged():
    free = {"free": figures()["free"]}
    assert [value for _, value, _ in verdicts(free)] == [1.0, 0.5]


@pytest.mark.parametrize("size", ["--sd15", "--flux"])
def test_a_model_of_full_size_needs_an_accelerator(size, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sampling", size])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        sampling.main()
    assert f"{size} needs an accelerator (CUDA), and there is none here" in capsys.readouterr().err


@pytest.mark.parametrize("tiny", [tiny_stable_diffusion, tiny_flux])
def test_what_is_measured_is_judged(tiny):
    """The whole measurement, of networks that take no time worth judging."""
    stock, call = tiny(8)
    given = {name: call.pop(name) for name in list(call) if torch.is_tensor(call[name])}
    call |= {"num_inference_steps": 2, "output_type": "latent"}
    found = measure(stock, None, given, 8, [4, 8], [0.0, 0.5], 3, 1, call)
    assert found["ratios"]["0.5"]["saving"] > found["ratios"]["0.0"]["saving"] == 0
    assert 0 < found["ratios"]["0.5"]["outside_networks"] < 1
    assert [what for what, _, _ in verdicts(found)] == list(LIMITS)[:3]
