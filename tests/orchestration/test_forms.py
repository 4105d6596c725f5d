from pathlib import Path

import pytest
from pydantic import ValidationError

from flows.orchestration.forms import STAGES, Batch, Judged, Promotion, Range
from flows.versioning import repository

ROOT = Path(__file__).parents[2]


def test_the_form_knows_the_stages_of_the_graph():
    assert list(STAGES) == repository.stages(ROOT / "dvc.yaml")


@pytest.mark.parametrize("form", [Range, Judged, Promotion, Batch])
def test_every_field_has_a_title_and_help(form):
    fields = form.model_json_schema()["properties"]
    assert all(field["title"] != name and field["description"] for name, field in fields.items())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"from_stage": "evaluate", "until": "prepare"}, "from_stage evaluate comes after until prepare"),
        ({"until": "training"}, "until"),
        ({"from": "group"}, "from"),
        ({"overrides": ["finetune.steps"]}, "overrides.0"),
        ({"overrides": ["finetune.steps=1; rm -rf x", "--force=1"]}, "overrides.1"),
        ({"overrides": ["a.b=1"] * 51}, "overrides"),
    ],
)
def test_a_bad_range_names_what_is_wrong(values, said):
    with pytest.raises(ValidationError) as caught:
        Range(**values)
    problems = [".".join(map(str, problem["loc"])) + " " + problem["msg"] for problem in caught.value.errors()]
    assert any(said in problem for problem in problems)


@pytest.mark.parametrize(
    "override", ["a.b=1", "+a.b=1", "++a.b=1", "~a.b", "~a.b=1", "a.b=", "a.b=[1,2]", "params.yaml:a.b=1", "a=x=y"]
)
def test_the_form_takes_what_dvc_takes(override):
    assert Range(overrides=[override]).overrides == [override]


@pytest.mark.parametrize("override", ["", "=1", "+a", "~", "~~a", "-a=1", "other.yaml:a=1", "a b=1", "a=1\nb=2"])
def test_the_form_refuses_what_dvc_refuses_or_another_file(override):
    with pytest.raises(ValidationError):
        Range(overrides=[override])


@pytest.mark.parametrize(
    "values",
    [{"version": "models:/other/1"}, {"version": "../1"}, {"wait_hours": 0}, {"prompts": []}, {"prompts": [""]}],
)
def test_a_bad_promotion_is_refused(values):
    with pytest.raises(ValidationError):
        Promotion(**values)


SERVED = {"prompts": "p.txt", "out": "out", "server": "http://127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"shards": 2}, "leave out shards, judge and batch_size"),
        ({"judge": "clip"}, "leave out shards, judge and batch_size"),
        ({"batch_size": 2}, "leave out shards, judge and batch_size"),
        ({"out": "s3://a/b"}, "paths on the worker"),
        ({"prompts": "s3://a/b.txt"}, "paths on the worker"),
        ({"server": "http://a:secret@host"}, "server"),
        ({"server": "host:8000"}, "server"),
        ({"expand": "some"}, "expand"),
    ],
)
def test_a_batch_for_a_server_is_one_that_it_can_draw(values, said):
    assert Batch(**SERVED).server == SERVED["server"]
    with pytest.raises(ValidationError, match=said):
        Batch(**SERVED | values)
