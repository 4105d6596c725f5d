"""Judges of alignment: a folder says which it is, and the attribute judge scores only what a prompt asks for."""

import json

import sage.torchvision_ops  # noqa: F401

import numpy as np
import pytest
import tiny_judges
from PIL import Image
from prepared_files import NOWHERE

from sage.data.dataset import Example
from sage.errors import CheckpointError, MetricError
from sage.evaluation import attributes
from sage.evaluation.attributes import STYLE, AttributeClassifier, AttributeJudge
from sage.evaluation.judges import AttributesJudge, find_clip, open_judge
from sage.evaluation.registry import label

LABELS = {"dots": {"color": ["red", "blue"], "ring": ["a ring", ""]}}
ACCURACY = {STYLE: {STYLE: 1.0}, "dots": {"color": 1.0, "ring": 1.0}}


class Reader(AttributeClassifier):
    """Reads the colour from the red channel, and always a ring."""

    def forward(self, pixels):
        red = pixels[:, 0].mean((1, 2))
        one = red.new_ones(len(red), 1)
        return one, red.new_tensor([[1, 0]]) * red[:, None], red.new_tensor([[1.0, 0]]).expand(len(red), 2)


@pytest.fixture
def images(tmp_path):
    paths = []
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        paths.append(tmp_path / f"{name}.png")
        Image.new("RGB", (64, 64), color).save(paths[-1])
    return paths


def example(**asked):
    return Example("p", NOWHERE, "a dot", "dots", (), asked)


def test_an_image_scores_the_share_of_what_its_prompt_asks_for(images):
    judge = AttributesJudge(AttributeJudge(Reader(LABELS, 8), ACCURACY), "tests")
    prompts = [example(color="red"), example(color="red", ring="a ring")]
    found = judge(prompts, [images, images])
    assert found.values == pytest.approx(np.array([[1, 1 / 2], [1, 2 / 3]]))
    assert found.parts.keys() == {STYLE, "color", "ring"}
    assert found.parts["color"].tolist() == [[1, 0], [1, 0]]
    assert np.isnan(found.parts["ring"][0]).all()
    assert found.parts["ring"][1].tolist() == [1, 1]


def test_prompts_whose_attributes_are_unknown_are_refused(images):
    judge = AttributesJudge(AttributeJudge(Reader(LABELS, 8), ACCURACY), "tests")
    with pytest.raises(MetricError, match="1 prompts, first p, have no known attributes"):
        judge([example()], [images])


def test_a_folder_says_which_judge_it_holds(tmp_path):
    attributes.save(AttributeJudge(AttributeClassifier(LABELS, 8), ACCURACY), tmp_path / "attributes", "tests")
    clip = str(tiny_judges.clip(tmp_path / "clip"))
    assert open_judge(f"{tmp_path}/attributes", []).name == "attributes right"
    assert label("alignment", "attributes right") == "attributes right"
    assert open_judge(clip, []).name == "CLIP score"
    assert str(find_clip(clip)) == clip
    with pytest.raises(CheckpointError, match="a list of prompts has none; give a CLIP"):
        find_clip(f"{tmp_path}/attributes")
    config = json.loads((tmp_path / "attributes/config.json").read_text())
    del config["labels"]
    (tmp_path / "attributes/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="neither the model_type of a CLIP nor the labels"):
        open_judge(f"{tmp_path}/attributes", [])
    with pytest.raises(CheckpointError, match="no folder"):
        open_judge(f"{tmp_path}/nothing", [])
