"""`sage pretrain` on a handful of pictures: the autoencoder, then the denoiser, into a folder that loads."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from prepared_files import write_split

from flows.commands import pretrain
from sage.evaluation import attributes
from sage.files import sha256_tree
from sage.sampling import base

SHIPPED = Path(__file__).parents[2] / "params.yaml"
NAMES = ["red cat", "red dog", "blue cat", "tall tree"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with prepared pictures and the shipped parameters, but for two steps of each training."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        images = [Image.fromarray(random.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in NAMES]
        rows = ({"id": f"{i}", "text": NAMES[i], "image": image} for i, image in enumerate(images))
        write_split(tmp_path / "data/prepared" / split, rows)
    values = yaml.safe_load(SHIPPED.read_text())
    for part in values["pretrain"].values():
        part |= {"steps": 2, "warmup": 1, "decay": 1, "batch_size": 2}
    values["pretrain"]["denoiser"]["compile"] = False
    values["pretrain"]["attributes"]["figures"] = 8
    values["prepare"]["figures"]["styles"] = ["planets", "moods"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


@pytest.mark.slow
def test_the_attribute_judge_says_what_it_reads_reliably(project, capsys):
    pretrain.attribute_judge()
    said = capsys.readouterr().out
    assert "planets: moons " in said
    assert "of 11 attributes reach 98% on 2 unseen figures" in said
    judge = attributes.load_judge(project / "models/attributes")
    assert list(judge.classifier.labels) == ["planets", "moods"]


@pytest.mark.slow
def test_it_leaves_a_base_that_loads_and_keeps_the_card(project, capsys):
    card = project / "models/base/README.md"
    card.parent.mkdir(parents=True)
    card.write_text("what was measured")
    (card.parent / "damage.json").write_text("{}")
    pretrain.whole_base()
    said = capsys.readouterr().out
    assert "reconstruction of 4 unseen pictures" in said
    assert "autoencoder: 2 steps in 0 minutes" in said and "denoiser: 2 steps in 0 minutes" in said
    assert base.load(card.parent).unet.config.in_channels == base.LATENT_CHANNELS
    assert card.read_text() == "what was measured"
    # Measured on other weights.
    assert not (card.parent / "damage.json").exists()
    # Another one goes on from it: not from nothing, and not from its state.
    further = project / "further"
    pretrain.denoiser(start=card.parent, work=project / "work/further", out=further)
    before, after = (base.load(folder).unet.state_dict() for folder in (card.parent, further))
    distance = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
    assert 0 < distance < 0.1 * sum(float(value.square().sum()) for value in before.values()) ** 0.5
    # Again from the state that is kept: the same weights.
    whole = sha256_tree(card.parent)
    pretrain.denoiser()
    assert sha256_tree(card.parent) == whole
