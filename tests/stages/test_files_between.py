"""What one stage writes and another reads: the groups of prompts, and the manifest of images."""

import json

import pytest
from PIL import Image
from prepared_files import NOWHERE

from sage.data.dataset import Example
from sage.data.groups import read_groups, read_threshold, write_groups
from sage.errors import DataError, MetricError
from sage.evaluation.manifest import MANIFEST, Line, image_path, read_manifest, write_manifest

EXAMPLES = [Example(f"p{k}", NOWHERE, f"text {k}", "family") for k in range(5)]


def test_groups_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "test.json"
    write_groups(
        path, [[0, 3], [1, 2], [4]], [0.712345, 0.9, 1.0], EXAMPLES, encoder="minilm", threshold=0.5, max_size=6
    )
    assert read_groups(path, EXAMPLES) == ([[0, 3], [1, 2], [4]], [0.7123, 0.9, 1.0])
    assert read_threshold(path) == 0.5
    assert list(json.loads(path.read_text())) == ["encoder", "threshold", "max_size", "groups"]
    # By id, not by place: another order of the prompts is the same partition.
    assert read_groups(path, EXAMPLES[::-1])[0] == [[4, 1], [3, 2], [0]]


ALL = [example.id for example in EXAMPLES]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"groups": 3}', '{"groups": [{}]}']
    + [json.dumps({"groups": [{"ids": ALL} | more]}) for more in ({}, {"similarity": "x"}, {"similarity": None})],
)
def test_a_damaged_file_of_groups_is_said(tmp_path, text):
    path = tmp_path / "test.json"
    path.write_text(text)
    for read in (lambda: read_groups(path, EXAMPLES), lambda: read_threshold(path)):
        with pytest.raises(DataError, match=r"test.json is damaged"):
            read()
    path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        read_threshold(path)


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    for arm in ("independent", "sage"):
        for name in ("a", "b"):
            path = image_path(tmp_path, arm, 7, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2), "red" if name == "a" else "blue").save(path)
    write_manifest(tmp_path, ["independent", "sage"], ["a", "b"], [[1], [0]], [7])
    lines = read_manifest(tmp_path)
    assert [(line.arm, line.seed, line.id, line.group) for line in lines] == [
        ("independent", 7, "a", 1),
        ("independent", 7, "b", 0),
        ("sage", 7, "a", 1),
        ("sage", 7, "b", 0),
    ]
    assert lines[0].sha256 == lines[2].sha256 != lines[1].sha256
    first = (tmp_path / MANIFEST).read_text().splitlines()[0]
    assert Line(**json.loads(first)) == lines[0]
    assert list(json.loads(first)) == ["arm", "seed", "id", "group", "sha256"]


@pytest.mark.parametrize("text", ["{", "3", '{"arm": "sage"}', '{"arm": "sage", "x": 1}'])
def test_a_damaged_manifest_names_its_line(tmp_path, text):
    good = '{"arm": "sage", "seed": 0, "id": "a", "group": null, "sha256": "0"}'
    (tmp_path / MANIFEST).write_text(f"{good}\n{text}\n")
    with pytest.raises(MetricError, match=r"manifest.jsonl, line 2 is damaged"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(MetricError, match="is missing"):
        read_manifest(tmp_path)
