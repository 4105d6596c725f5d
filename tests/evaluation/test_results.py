"""metrics/evaluate.json: what is read is what was written, byte for byte."""

import csv
import json
from pathlib import Path

import pytest
from evaluated import changed, results, verdict

from sage.errors import MetricError
from sage.evaluation.results import Results, headline, parse, parse_figure, read, write, write_frontier

SHIPPED = Path(__file__).parents[2] / "metrics/evaluate.json"


def test_the_shipped_results_are_written_again_byte_for_byte(tmp_path):
    write(tmp_path / "evaluate.json", read(SHIPPED))
    assert (tmp_path / "evaluate.json").read_bytes() == SHIPPED.read_bytes()


def test_results_of_an_older_or_a_newer_version_are_read():
    older = results() | {"run_id": "r"}
    assert parse(older, "it") == parse(results(), "it")
    older["arms"]["sage"]["seconds_per_image"] = {"value": 0.1, "low": None, "high": None, "n": 8}
    assert parse(older, "it").arms["sage"]["seconds_per_image"].value == 0.1


def test_every_problem_is_listed_up_to_some(tmp_path):
    found = changed("worse_by", to=3) | {"passed": 1, "saving": "much"}
    with pytest.raises(MetricError) as refused:
        parse(found, "it")
    assert str(refused.value).splitlines() == [
        "it is damaged or not of this version, with 3 problem(s):",
        "  saving: Input should be a valid number, found 'much'",
        "  worse_by: Input should be a valid dictionary, found 3",
        "  passed: Input should be a valid boolean, found 1",
    ]
    with pytest.raises(MetricError, match=r"\n  and 4 more$"):
        parse({}, "it")
    assert len([field for field in Results.model_fields.values() if field.is_required()]) == 12


def test_a_missing_file_and_one_that_is_not_json_are_said(tmp_path):
    with pytest.raises(MetricError, match="does not exist"):
        read(tmp_path / "evaluate.json")
    for text in ("", "{", "\x00"):
        (tmp_path / "evaluate.json").write_text(text)
        with pytest.raises(MetricError, match="is not JSON"):
            read(tmp_path / "evaluate.json")
    (tmp_path / "evaluate.json").write_bytes(b"\xff\xfe")
    with pytest.raises(MetricError, match="is not JSON"):
        read(tmp_path / "evaluate.json")


def test_numbers_beyond_the_finite_are_refused(tmp_path):
    (tmp_path / "evaluate.json").write_text(json.dumps(results()).replace("0.25", "1e999"))
    with pytest.raises(MetricError, match="saving: Input should be a finite number"):
        read(tmp_path / "evaluate.json")


def test_a_figure_of_a_registered_version_is_read_or_none():
    assert parse_figure('{"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}').value == 0.5
    assert [parse_figure(text) for text in ("", "{}", "3", '{"value": NaN, "low": 0, "high": 0, "n": 1}')] == [None] * 4


def test_the_headline_is_a_dozen_figures_of_the_shipped_results():
    shipped = read(SHIPPED)
    found = headline(shipped)
    assert 12 <= len(found) <= 15 and all(isinstance(value, (int, float)) for value in found.values())
    ours = shipped.arms["sage"]
    assert all(found[name] == ours[name].value for name in ("kernel_distance", "alignment", "nfe_per_image"))
    assert found["alignment_worse_by"] == shipped.worse_by["independent"]["alignment"].relative.value
    assert (found["saving"], found["gates_passed"], found["gates_failed"]) == (shipped.saving, len(shipped.gates), 0)
    assert found["blank_images"] == 0


def test_the_headline_leaves_out_what_was_not_measured_and_counts_failed_gates_and_blank_images():
    found = changed("arms", "sage", "alignment", "value", to=None) | {"blank": {"sage": 3, "independent": 1}}
    found["gates"] = [verdict("alignment", passed=False), verdict("kernel_distance")]
    told = headline(parse(found, "it"))
    assert "alignment" not in told and told["kernel_distance"] == 0.21
    assert (told["gates_passed"], told["gates_failed"], told["blank_images"]) == (1, 1, 3)


def test_the_frontier_has_a_line_for_each_arm(tmp_path):
    write_frontier(tmp_path / "plots/frontier.csv", parse(results(), "it"))
    with (tmp_path / "plots/frontier.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["arm"], first["nfe_per_image"], second["arm"]) == ("Independent", "16.0", "SAGE")
    assert [second[f"kernel_distance{end}"] for end in ("", "_low", "_high")] == ["0.21", "0.2", "0.22"]
    assert second["seed_diversity"] == ""  # not measured here
