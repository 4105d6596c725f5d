"""LoRAs by name: read from files, worn for one call alone."""

import numpy as np
import pytest
import tiny
from lora_files import save

from sage.errors import ConfigurationError, DataError, UnsupportedError
from sage.sampling import adapters
from sage.sampling.pipeline import SharedSamplingPipeline

CALL = {"num_inference_steps": 3, "output_type": "np", "seed": [1], "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pipeline with two LoRAs, and what it draws without them."""
    folder = tmp_path_factory.mktemp("loras")
    stock = tiny.pipeline("stable_diffusion", folder)
    plain = SharedSamplingPipeline.from_pipe(stock)("red cat", **CALL).images
    files = {"a": save(stock, folder / "a", 1), "b": save(stock, folder / "b", 2, text=True).parent}
    pipe = SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", folder))
    return pipe, plain, files, adapters.load(pipe, files)


@pytest.mark.slow
def test_a_pipeline_wears_one_some_or_none_and_then_draws_as_if_it_had_no_other(made):
    pipe, plain, _, hashes = made
    assert set(hashes) == {"a", "b"} and len({*hashes.values()}) == 2
    wearer = adapters.Wearer(pipe)
    drawn = {}
    for worn in ((("a", 1.0),), (), (("b", 1.0),), (("a", 0.5), ("b", 1.0)), (("a", 0.5),), (("a", 1.0),)):
        wearer.wear(worn)
        found = pipe("red cat", **CALL).images
        assert np.array_equal(drawn.setdefault(worn, found), found)
    assert np.array_equal(drawn[()], plain)
    assert all(np.abs(drawn[one] - drawn[other]).max() > 1e-3 for one in drawn for other in drawn if one != other)
    with pytest.raises(ConfigurationError, match="no LoRA c; loaded are a, b"):
        wearer.wear((("c", 1.0),))


def test_what_cannot_be_worn_is_refused(made, tmp_path):
    pipe, _, files, _ = made
    with pytest.raises(DataError, match="there is no"):
        adapters.load(pipe, {"c": tmp_path / "missing"})
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match="cannot be loaded"):
        adapters.load(pipe, {"c": tmp_path / "broken.safetensors"})
    with pytest.raises(UnsupportedError, match="takes no LoRA"):
        adapters.load(object(), files)
