import diffusers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from sage.errors import UnsupportedError
from sage.sampling import base
from sage.sampling.loop import HISTORY, check_scheduler
from sage.sampling.schedulers import exchanged


@pytest.mark.parametrize("name", [name for name in HISTORY if not name.startswith(("Flow", "EDM", "Cosine"))])
def test_another_scheduler_keeps_noise_and_prediction_type(name):
    own = DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_end=0.012, prediction_type="v_prediction")
    found = exchanged(own, name)
    check_scheduler(found)
    assert type(found) is getattr(diffusers, name)
    assert found.config["prediction_type"] == "v_prediction" and not found.config.get("clip_sample")
    torch.testing.assert_close(found.alphas_cumprod, own.alphas_cumprod)
    assert exchanged(found, name) is found and exchanged(own, None) is own


def test_clipping_that_was_chosen_stays():
    own = EulerDiscreteScheduler.from_config({**EulerDiscreteScheduler().config, "clip_sample": True})
    assert exchanged(own, "DDIMScheduler").config["clip_sample"]


@pytest.mark.parametrize("name", [name for name in HISTORY if not name.startswith(("Flow", "EDM", "Cosine"))])
def test_zero_terminal_snr_stays_or_is_refused(name):
    try:
        found = exchanged(base.new_scheduler(), name)
    except UnsupportedError as error:
        assert f"{name} cannot replace DPMSolverMultistepScheduler" in str(error)
    else:
        assert found.alphas_cumprod[-1] <= 2**-24


def test_flow_matching_is_not_mixed_with_others():
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert exchanged(flow, "FlowMatchEulerDiscreteScheduler") is flow
    for own, name in ((flow, "DDIMScheduler"), (base.new_scheduler(), "FlowMatchEulerDiscreteScheduler")):
        with pytest.raises(UnsupportedError, match=f"{name} cannot replace {type(own).__name__}"):
            exchanged(own, name)
