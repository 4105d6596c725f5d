import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sage.errors import CheckpointError
from sage.evaluation.alignment import DualEncoder, load_alignment, retrieval, save, text_image_cosines, train
from sage.evaluation.extractors import WIDTH


@pytest.fixture(scope="module")
def pairs():
    """Features and embeddings that tell of the same 6 hidden numbers."""
    random = np.random.default_rng(0)
    hidden = random.normal(size=(200, 6))
    features = hidden @ random.normal(size=(6, 20)) * 3 + 5
    embeddings = hidden @ random.normal(size=(6, 12))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return features.astype(np.float32), embeddings.astype(np.float32)


def fit(pairs, seed=0):
    return train(pairs[0][:150], pairs[1][:150], seed, width=8, steps=150, batch_size=64, learning_rate=1e-2, dropout=0)


@pytest.fixture(scope="module")
def model(pairs):
    return fit(pairs)


def test_pairs_never_trained_on_find_each_other(pairs, model):
    features, embeddings = (side[150:] for side in pairs)
    assert min(retrieval(model, features, embeddings, 5)) > 0.7
    assert max(retrieval(DualEncoder(20, 12, 8), features, embeddings, 5)) < 0.4
    own = text_image_cosines(model, features[:, None], embeddings)
    foreign = text_image_cosines(model, features[:, None], np.roll(embeddings, 1, 0))
    assert own.shape == (50, 1)
    assert own.mean() > foreign.mean() + 0.5


@pytest.mark.parametrize("alike", [0, 1])
def test_pairs_that_share_a_side_are_not_told_apart(pairs, alike):
    """All pictures the same, or all texts: nothing is wrong, so nothing is learned."""
    sides = [side[:20].copy() for side in pairs]
    sides[alike][:] = sides[alike][0]
    first, last = (train(*sides, 0, width=8, steps=steps, weight_decay=0).state_dict() for steps in (2, 9))
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_each_seed_of_a_prompt_has_its_own_cosine(pairs, model):
    features = np.stack([pairs[0][:4], pairs[0][4:8]], 1)
    found = text_image_cosines(model, features, pairs[1][:4])
    assert found[:, 1] == pytest.approx(text_image_cosines(model, features[:, 1:], pairs[1][:4])[:, 0], abs=1e-6)


def test_retrieval_counts_the_k_nearest():
    model = DualEncoder(2, 2, 2)
    for head in (model.image, model.text):
        head.weight.data, head.bias.data = torch.eye(2), torch.zeros(2)
    angles = np.array([0.0, 1.0, 2.0])
    images = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    texts = images[[0, 2, 1]]
    assert retrieval(model, images, texts, 1) == pytest.approx((1 / 3, 1 / 3))
    assert retrieval(model, images, texts, 2) == pytest.approx((1, 1))


def test_the_same_seed_gives_the_same_weights_whatever_else_was_drawn(pairs, model):
    torch.manual_seed(5)
    again = fit(pairs)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(fit(pairs, seed=1).image.weight, model.image.weight)


def test_a_saved_model_comes_back_and_keeps_its_card(pairs, model, tmp_path):
    save(model, tmp_path / "alignment", "pairs")
    (tmp_path / "alignment" / "README.md").write_text("card")
    save(model, tmp_path / "alignment", "pairs")
    assert (tmp_path / "alignment" / "README.md").read_text() == "card"
    assert json.loads((tmp_path / "alignment" / "config.json").read_text())["trained_on"] == "pairs"
    loaded = load_alignment(tmp_path / "alignment")
    assert (loaded.images(pairs[0]) == model.images(pairs[0])).all()
    assert (loaded.texts(pairs[1]) == model.texts(pairs[1])).all()


def test_a_damaged_a_foreign_and_a_missing_model_are_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors, config\.json"):
        load_alignment(tmp_path)
    save(model, tmp_path / "alignment", "pairs")
    config = tmp_path / "alignment" / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps(facts | {"image_features": "inception"}))
    with pytest.raises(CheckpointError, match="trained on inception"):
        load_alignment(tmp_path / "alignment")
    config.write_text(json.dumps(facts))
    weights = tmp_path / "alignment" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_alignment(tmp_path / "alignment")


def test_the_model_in_the_repository_loads_and_fits_the_extractors():
    model = load_alignment(Path(__file__).parents[2] / "models" / "alignment")
    assert (model.image.in_features, model.text.in_features) == (WIDTH, 384)


def test_the_model_in_the_repository_says_what_it_was_trained_on():
    root = Path(__file__).parents[2]
    images = json.loads((root / "metrics/prepare.json").read_text())["splits"]["train"]
    assert (
        f"{images} images of Twemoji" in json.loads((root / "models/alignment/config.json").read_text())["trained_on"]
    )
