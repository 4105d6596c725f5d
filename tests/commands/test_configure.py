"""The files of configs/ are valid changes of params.yaml, and `sage configure` makes them as `dvc exp run -S` does."""

import shutil
from pathlib import Path

import pytest
import yaml

from flows.commands import configure
from sage.config import Params, load_params
from sage.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").iterdir())


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(values, changes):
    """Return the shipped parameters with the values of a file of settings."""
    return {
        name: section | changes.get(name, {}) if isinstance(section, dict) else changes.get(name, section)
        for name, section in values.items()
    }


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_file_is_a_valid_change_of_the_shipped_parameters(file):
    assert file.suffix == ".yaml" and "# Memory: " in file.read_text()
    shipped, changes = yaml.safe_load(Path("params.yaml").read_text()), yaml.safe_load(file.read_text())
    assert set(changes) <= set(shipped)
    for section, values in changes.items():
        assert set(values) <= set(shipped[section]), "configs change what is there"
        assert all(shipped[section][key] != value for key, value in values.items()), "only what differs"
    found = Params.model_validate(changed(shipped, changes))
    assert found.finetune.adapter is not None and found.finetune.batch_size % found.finetune.accumulate == 0


@pytest.mark.slow
def test_settings_of_a_file_and_further_ones_change_the_parameters_and_no_comment():
    file = ROOT / "configs/sd15_lora_16gb.yaml"
    before = Path("params.yaml").read_text()
    changes = configure.apply(file, ["base=/models/sd15", "finetune.steps=1000"])
    assert "finetune.adapter={rank: 16}" in changes and "base=/models/sd15" in changes
    found = load_params()
    assert found.base == "/models/sd15" and found.finetune.steps == 1000
    assert found.finetune.adapter.rank == 16 and found.generate.scheduler == "DDIMScheduler"
    expected = changed(yaml.safe_load(before), yaml.safe_load(file.read_text())) | {"base": "/models/sd15"}
    expected["finetune"] |= {"steps": 1000}
    assert found == Params.model_validate(expected)
    after = Path("params.yaml").read_text()
    assert before.count("#") == after.count("#")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("finetune: {stepps: 3}", "stepps"),
        ("finetune: {steps: -1}", "finetune.steps"),
        ("- finetune", "has no settings"),
        ("", "has no settings"),
        ("finetune: {", "cannot be read as YAML"),
    ],
)
def test_what_is_no_valid_change_is_named_and_changes_nothing(text, said, tmp_path):
    (tmp_path / "wrong.yaml").write_text(text)
    before = Path("params.yaml").read_bytes()
    with pytest.raises(ConfigurationError, match=said):
        configure.apply(tmp_path / "wrong.yaml")
    assert Path("params.yaml").read_bytes() == before
