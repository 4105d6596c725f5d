import warnings

import pytest
import torch

from sage.precision import autocast


def product(context):
    with context:
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_bfloat16_is_used_where_the_processor_computes_in_it(monkeypatch):
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=supported: supported)
        assert product(autocast()) == dtype
        assert product(autocast(enabled=False)) == torch.float32


def test_another_device_is_not_asked(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: pytest.fail("asked"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns where there is no such device
        assert autocast("cuda").fast_dtype == torch.bfloat16
