from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml

from sage import config
from sage.config import Params, Scheduler, load_params
from sage.errors import ConfigurationError
from sage.grouping.auto import DEFAULT
from sage.grouping.policy import Policy
from sage.sampling import weights
from sage.sampling.loop import HISTORY
from sage.sampling.pipeline import SHARE_RATIO

SHIPPED = Path(__file__).parents[1] / "params.yaml"
# A value that says: this key is to go.
GONE = object()


def changed(folder: Path, **changes: object) -> Path:
    """Return the shipped file with changes, each named by its path with "__" between the keys."""
    values = yaml.safe_load(SHIPPED.read_text())
    for path, value in changes.items():
        place = values
        *parents, last = path.split("__")
        for key in parents:
            place = place[int(key) if key.isdigit() else key]
        if value is GONE:
            del place[last]
        else:
            place[last] = value
    target = folder / "params.yaml"
    target.write_text(yaml.safe_dump(values))
    return target


def test_the_schedulers_are_the_supported_ones():
    # EDM and cosine schedulers come with a pipeline: they are made with no other scheduler's configuration.
    assert set(get_args(Scheduler)) == {name for name in HISTORY if not name.startswith(("EDM", "Cosine"))}


def test_the_precisions_are_those_of_pipelines():
    assert get_args(config.Precision) == get_args(weights.Precision)


def test_a_base_is_kept_in_less_than_float32_only_below_an_adapter(tmp_path):
    assert load_params(SHIPPED).finetune.kept_in == "fp32"
    adapted = changed(tmp_path, finetune__adapter={"rank": 4}, finetune__precision="fp8")
    assert load_params(adapted).finetune.kept_in == "fp8"


def test_the_shipped_file_is_valid_and_frozen():
    params = load_params(SHIPPED)
    with pytest.raises(ValueError, match="frozen"):
        params.group.threshold = 0.1


@pytest.mark.parametrize("base", ["models/base", "/my models/sdxl", "../x.safetensors", f"hub/owner/name@{'a' * 40}"])
def test_a_base_is_a_path_or_a_pin(tmp_path, base):
    assert load_params(changed(tmp_path, base=base)).base == base


@pytest.mark.parametrize("number", ["1e-05", "1.0e-5", "0.00001"])
def test_a_number_is_a_number_however_dvc_writes_it(tmp_path, number):
    text = (
        changed(tmp_path, finetune__learning_rate=0.125)
        .read_text()
        .replace("learning_rate: 0.125", f"learning_rate: {number}")
    )
    (tmp_path / "params.yaml").write_text(text)
    assert load_params(tmp_path / "params.yaml").finetune.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": GONE}, ["base: Field required"]),
        ({"base": "hub/owner/name"}, ["named with its commit; `sage base OWNER/NAME` pins it"]),
        ({"base": "hub/owner/name@main"}, ["named with its commit; `sage base OWNER/NAME` pins it"]),
        ({"base": "~/models/sdxl"}, ["give a path without ~"]),
        ({"base": 'a"; rm -r "b'}, ["give a path without ~"]),
        ({"base": ""}, ["give a path without ~"]),
        ({"sample": {}}, ["sample: unknown key; allowed are", "prepare, "]),
        (
            {"group__treshold": 0.8},
            ["group.treshold: unknown key; allowed are threshold, saving, max_damage, max_size, near_duplicate, guard"],
        ),
        (
            {"finetune__weights__diffsion": 1.0},
            ["finetune.weights.diffsion: unknown key; allowed are diffusion, shared"],
        ),
        ({"evaluate__gates__0__metrik": "x"}, ["evaluate.gates.0.metrik: unknown key; allowed are metric, reference"]),
        ({"prepare__seed": GONE}, ["prepare.seed: Field required"]),
        ({"evaluate": GONE}, ["evaluate: Field required"]),
        ({"group": None}, ["group: ", "found None"]),
        (
            {"prepare__source": "imagenet"},
            ["prepare.source: ", "'figures', 'folder' or 'kohya'", "found 'imagenet'"],
        ),
        (
            {"prepare__source": "folder", "evaluate__references": 4},
            [
                "prepare.source is 'folder'",
                "evaluate.alignment is 'attributes'; set it to clip",
                "evaluate.references is 4; set it to null",
            ],
        ),
        ({"prepare__image_size": "64"}, ["prepare.image_size: ", "valid integer", "found '64'"]),
        ({"prepare__words": 0.5}, ["prepare.words: unknown key"]),
        ({"prepare__image_size": 4}, ["prepare.image_size: ", "greater than or equal to 8"]),
        ({"prepare__test": 1.0}, ["prepare.test: ", "less than 1"]),
        ({"prepare__test": float("nan")}, ["prepare.test: "]),
        ({"prepare__test": 0.6, "prepare__validation": 0.4}, ["prepare: ", "leave nothing to train on"]),
        ({"prepare__resize": "stretch"}, ["prepare.resize: ", "'pad' or 'crop'"]),
        ({"prepare__buckets": {"step": 24, "max_aspect": 2.0}}, ["buckets.step 24 does not divide image_size 64"]),
        ({"prepare__buckets": {"step": 16, "max_aspect": 0.5}}, ["prepare.buckets.max_aspect: ", "or equal to 1"]),
        ({"prepare__buckets": {"step": 16}}, ["prepare.buckets.max_aspect: Field required"]),
        ({"finetune__shuffle_tags": {"keep": 1, "orders": 1}}, ["finetune.shuffle_tags.orders: ", "or equal to 2"]),
        (
            {"finetune__shuffle_tags": {"keep": 1, "orders": 4}, "finetune__weights__diffusion": 0.0},
            ["shuffle_tags has no effect", "weights.diffusion and weights.consistency are 0.0"],
        ),
        ({"finetune__steps": True}, ["finetune.steps: ", "valid integer", "found True"]),
        ({"finetune__learning_rate": float("inf")}, ["finetune.learning_rate: "]),
        ({"finetune__learning_rate": -1.0}, ["finetune.learning_rate: ", "greater than 0"]),
        ({"finetune__soft_target": "median"}, ["finetune.soft_target: ", "'mean' or 'posterior'"]),
        (
            {f"finetune__weights__{name}": 0.0 for name in ("diffusion", "shared", "branch", "consistency")},
            ["finetune.weights: ", "nothing to train"],
        ),
        ({"generate__seeds": [1, 1]}, ["generate: ", "seeds [1, 1] repeat"]),
        ({"generate__image_steps": 6}, ["generate: ", "image_steps 6 needs", "more steps (found 6)"]),
        ({"generate__image_steps": 1, "generate__branch_noise": 0.0}, ["generate: ", "above 0 (found 0.0)"]),
        ({"generate__branch_noise": 1.5}, ["generate.branch_noise: ", "less than or equal to 1", "found 1.5"]),
        ({"generate__seeds": []}, ["generate.seeds: "]),
        ({"generate__split": "train"}, ["generate.split: ", "'validation' or 'test'"]),
        ({"generate__steps": 1_000_000_000}, ["generate.steps: ", "less than or equal to 1000"]),
        ({"evaluate__gates": []}, ["evaluate.gates: "]),
        (
            {"evaluate__gates__0__metric": "fid"},
            ["evaluate.gates.0.metric: Input should be ", "'kernel_distance'", " or 'seed_diversity', found 'fid'"],
        ),
        (
            {"evaluate__gates__0__metric": "frechet_distance"},
            ["evaluate.gates.0.metric: Input should be ", "found 'frechet_distance'"],
        ),
        (
            {"evaluate__gates__0__reference": "sage"},
            [
                "evaluate.gates.0.reference: Input should be 'independent', 'independent_same_nfe' or 'shared', "
                "found 'sage'"
            ],
        ),
        ({"evaluate__confidence": 1.0}, ["evaluate.confidence: "]),
    ],
)
def test_a_bad_value_is_named_by_its_path(tmp_path, changes, said):
    with pytest.raises(ConfigurationError) as caught:
        load_params(changed(tmp_path, **changes))
    assert all(part in str(caught.value) for part in said), caught.value
    assert "has 1 problem(s)" in str(caught.value)


def test_all_problems_are_said_at_once(tmp_path):
    path = changed(tmp_path, group__treshold=1, prepare__source="x", generate__steps="many", evaluate__seed=-1)
    with pytest.raises(ConfigurationError) as caught:
        load_params(path)
    lines = str(caught.value).splitlines()
    assert "has 4 problem(s)" in lines[0]
    assert {line.split(":")[0].strip() for line in lines[1:]} == {
        "group.treshold",
        "prepare.source",
        "generate.steps",
        "evaluate.seed",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("group: [", "is not YAML"),
        ("", "(top): "),
        ("- 1", "(top): "),
        ("prepare: !!python/object/apply:os.system ['touch executed']", "is not YAML"),
    ],
)
def test_a_file_of_another_form_is_refused_and_never_executed(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=said.replace("(", r"\(").replace(")", r"\)")):
        load_params()
    assert not Path("executed").exists()


def test_a_missing_file_says_where_to_stand(tmp_path):
    with pytest.raises(ConfigurationError, match="top folder"):
        load_params(tmp_path / "params.yaml")


def test_no_value_hides_in_the_code():
    """A default would be a parameter outside params.yaml, which DVC does not see change; None is the absence of one."""
    models = [Params]
    for model in models:
        for name, field in model.model_fields.items():
            assert field.is_required() or field.default is None, f"{model.__name__}.{name} has a default"
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            models += [kind for kind in kinds if hasattr(kind, "model_fields")]
    assert len(models) > 8


def test_the_librarys_operating_point_is_the_shipped_one():
    """What must stand twice, for a library does not read params.yaml, is the same."""
    shipped = load_params(SHIPPED)
    assert Policy(**shipped.group.model_dump()) == replace(DEFAULT, guard=[])
    assert shipped.generate.share_ratio == SHARE_RATIO
