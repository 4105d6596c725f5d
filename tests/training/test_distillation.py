"""Distillation: the components of first predictions, the loss in latents, and that a network learns them from texts."""

import numpy as np
import pytest
import tiny
import torch

from sage.evaluation.spaces import variance_explained
from sage.grouping.distilled import CoefficientNetwork, Distilled, padded
from sage.grouping.embedding import token_states
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.training.distillation import States, distillation_loss, held_out_loss, principal_components
from sage.training.loop import Schedule, fit

TEXTS = [f"{one} {other}" for one in ("red", "blue", "big", "old") for other in ("cat", "dog", "tree", "house", "sea")]


def states_of(texts):
    found = [None] * len(texts)
    for numbers, states in token_states(texts):
        for own, state in zip(numbers, states, strict=True):
            for number in own:
                found[number] = state.half().numpy()
    return found


def test_components_in_pieces_are_those_of_the_whole_and_orthonormal():
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 4)) @ random.normal(size=(4, 30)) + 3
    found = principal_components([x[:20], x[20:45], x[45:]], 4)
    np.testing.assert_allclose(found.directions @ found.directions.T, np.eye(4), atol=1e-8)
    np.testing.assert_allclose(found.mean, x.mean(0), atol=1e-8)
    np.testing.assert_allclose(found.predictions(found.coefficients(x)), x, atol=1e-4)
    np.testing.assert_allclose(found.deviations, found.coefficients(x).std(0, ddof=1), rtol=1e-4)
    # The mean, in the components and what is orthogonal to them, keeps its length.
    assert np.linalg.norm(found.mean_in_components) == pytest.approx(np.linalg.norm(x.mean(0)), rel=1e-5)


def test_the_loss_is_the_mean_squared_error_in_latents():
    random = np.random.default_rng(0)
    x = random.normal(size=(10, 30))
    components = principal_components([x], 9)
    coefficients, states = components.coefficients(x), States([random.normal(size=(3, 8))] * 10)

    def network(states, there):  # is wrong by one in the second component, and in nothing else
        off = torch.zeros(10, 9)
        off[:, 1] = 1
        return torch.from_numpy(coefficients)[order] + off

    order = torch.arange(10)
    expected = np.square(components.predictions(coefficients + np.eye(9)[1]) - x).mean()
    held_out = held_out_loss(network, states, torch.from_numpy(coefficients), 30)
    assert held_out["validation_loss"] == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(1 / 30, rel=1e-4)


def test_states_are_padded_as_the_encoder_pads_them():
    found = states_of(TEXTS)
    wanted, there = padded([torch.from_numpy(found[number]) for number in (3, 0, 19)])
    states, mask = States(found)[torch.tensor([3, 0, 19])]
    assert torch.equal(mask, there) and torch.equal(states, wanted)
    # Also if the last of all is padded.
    states, mask = States([np.ones((2, 4)), np.ones((1, 4))])[torch.tensor([0, 1])]
    assert mask.tolist() == [[True, True], [True, False]] and states.sum(2).tolist() == [[4, 4], [4, 0]]


@pytest.mark.slow
def test_a_network_explains_most_of_what_a_tiny_model_predicts_of_the_texts_it_learned(tmp_path):
    pipe = SharedSamplingPipeline.from_pipe(tiny.pipeline("stable_diffusion", tmp_path))
    call = {"num_inference_steps": 4, "guidance_scale": 1.0}
    x = pipe.first_predictions(TEXTS, **call).x_0.flatten(1).numpy()
    components = principal_components([x], 16)
    torch.manual_seed(0)
    network = CoefficientNetwork(384, 16, width=64, hidden=64)
    network.scale.copy_(torch.from_numpy(components.deviations))
    targets = torch.from_numpy(components.coefficients(x))
    loss = distillation_loss(network, States(states_of(TEXTS)), targets, x.shape[1], batch_size=10, seed=0)
    fit(network, loss, Schedule(150, 3e-3, warmup=10, decay=50, ema=0.9), work=tmp_path / "work", identity={})
    made_for = pipe.made_for(4, 1.0)
    assert made_for == pipe.first_predictions(TEXTS[:1], **call).made_for
    encoder = Distilled(network.requires_grad_(False), components.mean_in_components, x.shape[1], made_for, {})
    assert variance_explained(x, components.predictions(encoder.coefficients(TEXTS))) > 0.9
