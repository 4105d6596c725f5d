"""The distilled encoder: its space is that of first predictions, its rows are a text's own, its file is checked."""

import dataclasses

import numpy as np
import pytest
import torch
from encoders import random_encoder
from safetensors.torch import load_file, save_file

from sage.errors import ConfigurationError
from sage.grouping.auto import Grouping
from sage.grouping.distilled import (
    Distilled,
    kept_at,
    padded,
    read_distilled,
    write_distilled,
)
from sage.grouping.doubts import doubts
from sage.grouping.embedding import token_states
from sage.grouping.groups import group
from sage.sampling.first_prediction import FirstPredictions
from sage.training.distillation import principal_components

PROMPTS = ["a red fox", "two foxes in deep snow, painted", "", "a red fox", "\U0001f98a", "a stock market crash"]
MADE_FOR = ("DDIMScheduler", 999.0, 1.0)


@pytest.fixture(scope="module")
def encoder():
    return random_encoder(MADE_FOR)


@pytest.fixture
def model(tmp_path, encoder):
    """A model's folder with its encoder beside it."""
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet/weights.safetensors").write_text("weights")
    write_distilled(folder, encoder, {"settings": {"steps": 2}})
    return folder


def test_rows_with_exact_coefficients_have_the_geometry_of_first_predictions():
    random = np.random.default_rng(0)
    x_0 = (random.normal(size=(40, 6)) @ random.normal(size=(6, 64)) / 5 + random.normal(size=64) / 2).astype(
        np.float32
    )
    components = principal_components([x_0], 6)
    coefficients = components.coefficients(x_0)
    np.testing.assert_allclose(components.predictions(coefficients), x_0, atol=1e-4)

    class Exact(torch.nn.Module):
        """Returns the coefficients of the prompts in the order in which it is asked: that of their texts."""

        def forward(self, states, there):
            return torch.from_numpy(coefficients)

    exact = Distilled(Exact(), components.mean_in_components, 64, MADE_FOR, {})
    found = exact.embed([f"{number:02d}" for number in range(40)])
    wanted = FirstPredictions(torch.from_numpy(x_0).reshape(40, 4, 4, 4), 0, True, MADE_FOR).embeddings()
    assert found.shape == (40, 8) and found.dtype == np.float32
    np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_rows_do_not_depend_on_the_order_or_the_company(encoder):
    told = []
    rows = encoder.embed(PROMPTS, progress=told.append)
    assert sum(told) == len(PROMPTS)
    assert np.array_equal(rows[0], rows[3]) and not np.allclose(rows[0], rows[1], atol=1e-3)
    assert np.array_equal(encoder.embed(PROMPTS[::-1]), rows[::-1])
    pairs = encoder.embed(PROMPTS, batch_size=2)
    assert np.array_equal(encoder.embed(PROMPTS[::-1], batch_size=2), pairs[::-1])
    np.testing.assert_allclose(pairs, rows, atol=1e-4)
    np.testing.assert_allclose(encoder.embed(PROMPTS, batch_size=1), rows, atol=1e-4)
    np.testing.assert_allclose(encoder.embed(PROMPTS[:1])[0], rows[0], atol=1e-4)
    assert encoder.embed([]).shape == (0, 7)


def test_padding_is_masked(encoder):
    (_, (short, *_, long)), *_ = token_states(["a fox", "a fox in deep snow beside a frozen lake"])
    states, there = padded([short, long])
    assert there.sum(1).tolist() == [len(short), len(long)]
    with torch.no_grad():
        together = encoder.network(states, there)
        alone = encoder.network(short[None], torch.ones(1, len(short), dtype=torch.bool))
        wrong = encoder.network(states, torch.ones_like(there))
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)
    assert (wrong[0] - alone[0]).abs().max() > 0.01


def test_what_is_written_is_read_and_no_part_of_the_model(model, encoder):
    assert kept_at(model).parent == model.parent
    found = read_distilled(model)
    assert (found.made_for, found.latents, found.threshold) == (MADE_FOR, 64, 0.97)
    assert found.sha256 == encoder.sha256
    assert np.array_equal(found.embed(PROMPTS), encoder.embed(PROMPTS))
    write_distilled(model, dataclasses.replace(encoder, measured={"distilled.threshold": 0.5}), {})
    assert read_distilled(model).threshold == 0.5


def test_what_does_not_fit_is_refused_by_name(model, encoder):
    assert read_distilled(model).check(MADE_FOR)
    for made_for, said in (
        (("EulerDiscreteScheduler", 999.0, 1.0), "scheduler DDIMScheduler, not EulerDiscreteScheduler; run `sage dist"),
        (("DDIMScheduler", 999.0, 4.0), r"guidance scale 1\.0, not 4\.0"),
        (("DDIMScheduler", 801.0, 4.0), r"first timestep 999\.0, not 801\.0 and guidance scale 1\.0, not 4\.0"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            encoder.check(made_for)
    (model / "unet/weights.safetensors").write_text("others")
    with pytest.raises(ConfigurationError, match=r"distilled from other weights than .*Run `sage distil --model "):
        read_distilled(model)
    kept_at(model).unlink()
    with pytest.raises(ConfigurationError, match=r"no distilled encoder\. Run `sage distil --model "):
        read_distilled(model)
    with pytest.raises(ConfigurationError, match="owner/name is no folder, file or pin here"):
        read_distilled(model.parent / "owner/name")


def test_a_damaged_file_is_refused(model):
    path = kept_at(model)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    tensors = load_file(path)
    for damaged in (whole[:-8], whole[:20], b"", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ConfigurationError, match=r"is damaged: .* Run `sage distil"):
            read_distilled(model)
    save_file(tensors, path)  # without its facts
    with pytest.raises(ConfigurationError, match=r"is damaged: .* Run `sage distil"):
        read_distilled(model)


def test_grouping_reads_the_encoder_of_its_model(model, encoder):
    with pytest.raises(ConfigurationError, match="needs the path of the model that was distilled; give model="):
        Grouping(by="distilled")
    with pytest.raises(ConfigurationError, match="by='distilled' compares no texts; leave out encoder='other'"):
        Grouping(by="distilled", model=model, encoder="other")
    keys = [0] * len(PROMPTS)
    rows = encoder.embed(PROMPTS)
    # Without a threshold, the one that the encoder was measured to need.
    wanted = group(rows, 0.97, 6, 0.999)
    assert Grouping(by="distilled", model=model).groups(PROMPTS, keys, 0.3, MADE_FOR) == wanted
    loose = Grouping(by="distilled", model=model, threshold=-1.0, near_duplicate=1.0)
    assert loose.groups(PROMPTS, keys, 0.3) == group(rows, -1.0, 6, 1.0) != wanted
    with pytest.raises(ConfigurationError, match="guidance scale"):
        loose.groups(PROMPTS, keys, 0.3, ("DDIMScheduler", 999.0, 4.0))


def test_the_encoder_reads_whole_prompts_and_latin_ones_best(encoder):
    prompts = ["masterpiece, best quality, a fox"] * 9 + ["\u72d7\u5728\u8dd1"]
    (doubt,) = doubts(prompts, encoder.embed(prompts), 0.5, "distilled")
    assert "1 prompts are in a script other than Latin" in doubt
    assert len(doubts(prompts, encoder.embed(prompts), 0.5, "text")) > 1
