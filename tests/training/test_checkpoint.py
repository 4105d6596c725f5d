import errno
import json
import logging
import pickle
import random

import pytest
import torch
from faults import at_line, fill_disk, in_child, kill
from safetensors.torch import load_file

from sage.errors import CheckpointError
from sage.training import checkpoint

IDENTITY = {"rate": 0.1, "data": "abc"}


def save(folder, step, keep=2, identity=IDENTITY):
    tensors = {"weights.a": torch.full((3, 2), float(step)), "optimizer.a.step": torch.tensor(float(step))}
    return checkpoint.save(folder, step, tensors, {"losses": {"loss": 1 / step}}, identity, keep)


def step_of(saved):
    """The step of a checkpoint, or None, having checked that what is in it belongs together."""
    if saved is None:
        return None
    assert torch.equal(saved.tensors["weights.a"], torch.full((3, 2), float(saved.step)))
    assert saved.state == {"losses": {"loss": 1 / saved.step}}
    return saved.step


def test_the_newest_comes_back_as_it_was_saved(tmp_path):
    assert checkpoint.latest(tmp_path / "none", IDENTITY) is None
    for step in (1, 20, 300):
        save(tmp_path, step)
    assert step_of(checkpoint.latest(tmp_path, IDENTITY)) == 300
    assert [path.name[:13] for path in checkpoint.complete(tmp_path)] == ["step-00000300", "step-00000020"]


def test_the_name_is_what_sha256sum_prints_and_the_file_is_plain_safetensors(tmp_path):
    from sage.files import sha256

    path = save(tmp_path, 5)
    assert path.name == f"step-00000005.{sha256(path)}.safetensors"
    assert load_file(path)["weights.a"].tolist() == [[5, 5]] * 3


def test_another_configuration_is_refused_with_the_differences(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"data: saved 'abc', now None; rate: saved 0.1, now 0.2; x: saved None"):
        checkpoint.latest(tmp_path, {"rate": 0.2, "x": (1, 2)})
    save(tmp_path / "pairs", 1, identity={"pair": (1, 2)})
    assert checkpoint.latest(tmp_path / "pairs", {"pair": [1, 2]}) is not None


def damage_somewhere(data, place):
    return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


def test_every_damage_is_detected_before_parsing_and_the_one_before_taken(tmp_path, caplog, monkeypatch):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    whole = path.read_bytes()
    places = random.Random(0).sample(range(len(whole)), 50)
    damaged = [damage_somewhere(whole, place) for place in places]
    damaged += [whole[: len(whole) * share // 100] for share in (0, 10, 50, 99)] + [whole + b"x"]
    damaged += [pickle.dumps(IDENTITY)]
    parsed = []
    parse = checkpoint._parse
    monkeypatch.setattr(checkpoint, "_parse", lambda path, *rest: parsed.append(path) or parse(path, *rest))
    for data in damaged:
        path.write_bytes(data)
        with caplog.at_level(logging.WARNING):
            assert step_of(checkpoint.latest(tmp_path, IDENTITY)) == 1
        assert path.name in caplog.text
        caplog.clear()
    assert path not in parsed and len(parsed) == len(damaged)
    path.unlink()
    assert step_of(checkpoint.latest(tmp_path, IDENTITY)) == 1


def test_a_damaged_later_one_does_not_crowd_out_the_good(tmp_path):
    save(tmp_path, 1, keep=1)
    late = save(tmp_path, 9, keep=9)
    late.write_bytes(b"damaged")
    assert step_of(checkpoint.latest(tmp_path, IDENTITY)) == 1
    save(tmp_path, 2, keep=1)
    assert [path.name[:13] for path in checkpoint.complete(tmp_path)] == ["step-00000002"]
    assert step_of(checkpoint.latest(tmp_path, IDENTITY)) == 2


def test_strangers_in_the_folder_are_left_alone(tmp_path):
    strangers = ["notes.txt", "step-00000009.safetensors", "step-00000009.tmp", "custom_checkpoint_0.pkl"]
    for name in strangers:
        (tmp_path / name).write_bytes(pickle.dumps(0))
    save(tmp_path, 1, keep=1)
    assert step_of(checkpoint.latest(tmp_path, IDENTITY)) == 1
    assert {path.name for path in tmp_path.iterdir()} >= set(strangers)


def test_state_that_is_not_json_leaves_the_older_one(tmp_path):
    save(tmp_path, 1, keep=1)
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path, 2, {"a": torch.ones(1)}, {"losses": {"loss": float("nan")}}, IDENTITY, 1)
    assert step_of(checkpoint.latest(tmp_path, IDENTITY)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("effect", [kill, fill_disk])
def test_a_fault_at_any_line_of_a_save_leaves_a_good_checkpoint(effect, tmp_path):
    keep = 1

    def save_with_fault(number):
        at_line(number, effect)
        save(tmp_path, 3, keep)

    number, ended, before, after = 0, 1, 0, 0
    while ended:
        number += 1
        for path in tmp_path.iterdir():
            path.unlink()
        for step in (1, 2):
            save(tmp_path, step, keep)
        ended = in_child(lambda: save_with_fault(number))  # noqa: B023
        found = step_of(checkpoint.latest(tmp_path, IDENTITY))
        assert found in (2, 3), number
        before, after = before + (found == 2), after + (found == 3)
        save(tmp_path, 4, keep)
        assert len(list(tmp_path.iterdir())) == 1, number
    assert before > 25 and after > 5  # the sweep saw both sides of the rename


def test_a_disk_without_room_is_told_with_the_path(tmp_path):
    with pytest.raises(OSError, match="Not a directory") as caught:
        (tmp_path / "file").write_text("")
        save(tmp_path / "file" / "work", 1)
    assert caught.value.errno == errno.ENOTDIR and "file" in str(caught.value)


def test_a_manifest_is_json_in_the_header(tmp_path):
    data = save(tmp_path, 7).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["manifest"])["identity"] == IDENTITY
