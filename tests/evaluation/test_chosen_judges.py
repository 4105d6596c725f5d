"""Features and judges by choice, on tiny random weights: arithmetic, names, and what cannot be had."""

import json
from pathlib import Path

import sage.torchvision_ops  # noqa: F401

import cleanfid.features
import cleanfid.fid
import numpy as np
import photographs
import pytest
import tiny_judges
import torch
from PIL import Image
from prepared_files import NOWHERE
from transformers import CLIPImageProcessor, CLIPModel, Dinov2Model

from flows.preflight import check_judges
from sage.config import load_params
from sage.data.dataset import Example
from sage.errors import CheckpointError, MetricError
from sage.evaluation import extractors, figures
from sage.evaluation.distances import frechet_distance
from sage.evaluation.judges import find_judge, open_judge, with_other_captions
from sage.evaluation.registry import label, named
from sage.files import sha256


@pytest.fixture
def images(tmp_path):
    random = np.random.default_rng(0)
    paths = []
    for number in range(6):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(paths[-1])
    return paths


@pytest.fixture
def clip(tmp_path):
    return tiny_judges.clip(tmp_path / "clip")


def examples(*texts):
    return [Example(str(k), NOWHERE, text, "family", (), {}) for k, text in enumerate(texts)]


# torch 2.13 deprecates TorchScript, the form of clean-fid's file.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")  # clean-fid's call of scipy
def test_inception_is_clean_fids_network_and_resizing_and_its_distance_is_fid(tmp_path, images, monkeypatch):
    weights = tiny_judges.inception(tmp_path / "inception-2015-12-05.pt")
    with pytest.raises(CheckpointError, match="no FID"):
        extractors.open_extractor(str(tmp_path))
    monkeypatch.setattr(extractors, "_INCEPTION_SHA256", sha256(weights))
    extract = extractors.open_extractor(str(tmp_path))
    found = extract(extractors.read_images(images))
    model = cleanfid.features.InceptionV3W(str(tmp_path), download=False).eval()
    theirs = cleanfid.fid.get_files_features(
        [str(path) for path in images], model, num_workers=0, device="cpu", mode="clean", verbose=False
    )
    assert found == pytest.approx(theirs, abs=1e-4)
    x, y = found[:3, :16], found[3:, :16]
    expected = cleanfid.fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-2)
    assert label("frechet_distance", extract.name) == "FID" and label("kernel_distance", extract.name) == "KID"
    assert label("frechet_distance", "efficientnet_lite0") == "Fréchet distance"


def test_the_clip_score_is_a_hundred_times_the_cosine_if_it_is_positive(clip, images):
    judge = open_judge(str(clip), [])
    prompts = examples("red cat", "blue dog", "a tall tree")
    found = judge(prompts, [images[:2], images[2:4], images[4:]]).values
    network, process = CLIPModel.from_pretrained(clip).eval(), CLIPImageProcessor.from_pretrained(clip)
    for row, example in enumerate(prompts):
        tokens = judge._tokenize([example.text], return_tensors="pt")
        pixels = process(
            [im.copy() for im in extractors.read_images(images[2 * row : 2 * row + 2])], return_tensors="pt"
        )
        with torch.no_grad():
            out = network(**tokens, **pixels)
        cosines = out.logits_per_text[0] / network.logit_scale.detach().exp()
        assert found[row] == pytest.approx(100 * cosines.clamp(min=0).numpy(), abs=1e-3)
    assert found.max() > 0
    assert named("efficientnet_lite0", judge.name)["alignment"].title == "CLIP score"


def test_a_vision_model_gives_its_pooled_features(tmp_path, images):
    folder = tiny_judges.dinov2(tmp_path / "dino")
    extract = extractors.open_extractor(str(folder))
    found = extract(extractors.read_images(images))
    pixels = CLIPImageProcessor.from_pretrained(folder)(
        [im.copy() for im in extractors.read_images(images)], return_tensors="pt"
    )
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(folder).eval()(**pixels).last_hidden_state[:, 0]
    assert found == pytest.approx(expected.numpy(), abs=1e-4)
    assert extract.name.startswith(f"{folder} (") and "Dinov2Model" in extract.description


def test_inception_is_downloaded_once_and_verified(tmp_path, monkeypatch, caplog):
    weights = tmp_path / "theirs.pt"
    weights.write_bytes(b"weights")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(extractors, "inception_url", weights.as_uri())
    with pytest.raises(CheckpointError, match=r"cannot be downloaded from .*theirs.pt: invalid hash value"):
        extractors.find_extractor("inception")
    assert not list((tmp_path / "hub").rglob("*.pt"))
    monkeypatch.setattr(extractors, "_INCEPTION_SHA256", sha256(weights))
    found = extractors.find_extractor("inception")
    assert f"{found} is missing; it is downloaded once, from {weights.as_uri()}" in caplog.messages
    weights.unlink()
    caplog.clear()
    assert extractors.find_extractor("inception") == found and not caplog.messages
    found.unlink()
    with pytest.raises(CheckpointError, match="FID needs it; put the file there"):
        extractors.find_extractor("inception")


def test_a_download_from_the_hub_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="no folder some/clip, and"):
        find_judge("some/clip", [])
    assert caplog.messages == ["the hub cache lacks some/clip, which is downloaded once"]
    caplog.clear()
    photographs.cached(tmp_path, "some/clip", tiny_judges.clip)
    assert find_judge("some/clip", []).name == photographs.COMMIT and not caplog.messages


def test_what_cannot_be_had_is_named_before_work_starts(tmp_path, clip, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shipped = load_params().evaluate.model_copy(update={"references": None})

    def check(**changes):
        check_judges(shipped.model_copy(update=changes), examples("red cat"))

    check(alignment=str(clip))
    with pytest.raises(CheckpointError, match="no folder some/model, and as a name on the hub"):
        check(features="some/model", alignment=str(clip))
    with pytest.raises(CheckpointError, match="no folder openai/clip-vit-large-patch14, and"):
        check(alignment="clip")
    with pytest.raises(CheckpointError, match=r"no folder some/clip@v1, and .* it cannot be had"):
        check(alignment="some/clip@v1")
    with pytest.raises(CheckpointError, match=rf"no folder {tmp_path}/nothing\.$"):
        check(alignment=f"{tmp_path}/nothing")
    (clip / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="save its image processor"):
        check(alignment=str(clip))
    with pytest.raises(CheckpointError, match="save its image processor"):
        check(features=str(clip), alignment=str(clip))
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="type 'bert', which judges no alignment"):
        check(alignment=str(clip))
    (clip / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        check(alignment=str(clip))
    (clip / "model.safetensors").rename(clip / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        check(alignment=str(clip))


def test_figures_are_asked_for_by_the_judge_of_attributes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"no folder models/attributes, the judge of attributes\. Run `sage pretrain attributes`"
    ):
        find_judge("attributes", [])
    folder = Path("models/attributes")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text(json.dumps({"labels": {}}))
    assert find_judge("attributes", []) == folder
    with pytest.raises(MetricError, match="no known attributes"):
        find_judge("attributes", examples("red cat"))


def test_a_judge_that_does_not_tell_captions_apart_is_warned_of():
    groups = [[k] for k in range(40)]
    bootstrap = figures.Bootstrap.over(groups, 200, 0.95, 0)
    random = np.random.default_rng(0)
    own, other, differs = random.normal(1, 0.1, 40), random.normal(0, 0.1, 40), np.ones(40, bool)
    found, warning = figures.other_captions(own, other, differs, groups, bootstrap)
    assert warning is None and found.value == pytest.approx(other.mean()) and found.n == 40
    differs[:10] = False
    found, warning = figures.other_captions(other, own, differs, groups, bootstrap)
    assert found.n == 30 and "30 real pictures score" in warning and "does not tell captions apart" in warning
    others, differ = with_other_captions(examples("a", "b", "a", "c"))
    assert [example.text for example in others] == ["a", "c", "a", "b"]
    assert differ.tolist() == [False, True, False, True]
