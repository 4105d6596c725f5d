"""Faults while training state is written, and files that would run code when read; with the rest of test_checkpoint."""

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from faults import in_child

from flows.terminal import exit_on_error
from sage import files
from sage.config import load_params
from sage.errors import CheckpointError, ConfigurationError, DataError
from sage.sampling import base
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.training import checkpoint

IDENTITY = {"rate": 0.1}
NOBODY = 65534


def save(folder, step, keep=1):
    return checkpoint.save(folder, step, {"a": torch.full((500,), float(step))}, {"losses": {}}, IDENTITY, keep)


def fail_sync():
    def fsync(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    files.os.fsync = fsync


def no_more_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    while True:
        try:
            os.open("/dev/null", os.O_RDONLY)
        except OSError:
            return


def become_nobody():
    if os.geteuid() == 0:  # who may write anywhere
        os.seteuid(NOBODY)


@pytest.fixture
def folder():
    """A folder that others may enter, unlike pytest's own."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o555)
    yield path
    path.chmod(0o755)
    shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("effect", "cause"),
    [(fail_sync, "Input/output error"), (no_more_files, "Too many open files"), (become_nobody, "Permission denied")],
)
def test_a_save_that_fails_names_path_and_cause_and_leaves_the_one_before(effect, cause, folder, tmp_path):
    folder.chmod(0o755)
    before = save(folder, 1)
    data, said = before.read_bytes(), tmp_path / "said"
    folder.chmod(0o555)

    def work():
        sys.stderr = said.open("w")
        effect()
        exit_on_error(lambda: save(folder, 2))

    assert in_child(work) == 2
    assert cause in said.read_text() and str(folder) in said.read_text()
    assert list(folder.iterdir()) == [before] and before.read_bytes() == data
    folder.chmod(0o755)
    assert checkpoint.latest(folder, IDENTITY).step == 1
    save(folder, 3)
    assert [path.name[:13] for path in folder.iterdir()] == ["step-00000003"]


# Nothing that is read is executed


class Bomb:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


@pytest.fixture
def sentinel(tmp_path):
    path = tmp_path / "sentinel"
    yield path
    assert not path.exists()


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "sentinel")))
    assert (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("as_zip", [False, True])
def test_a_pickle_as_checkpoint_is_refused_though_its_name_is_right(as_zip, sentinel, tmp_path):
    bomb = tmp_path / "bomb"
    if as_zip:
        torch.save({"weights": Bomb(sentinel)}, bomb)
    else:
        bomb.write_bytes(pickle.dumps(Bomb(sentinel)))
    data, work = bomb.read_bytes(), tmp_path / "work"
    work.mkdir()
    (work / f"step-00000009.{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"step-00000009\S+ is no checkpoint of this project"):
        checkpoint.latest(work, IDENTITY)


def own(folder):
    base.save(base.assemble(tiny.autoencoder(), tiny.unet(cross_attention_dim=384)), folder)


def stock(folder):
    with tempfile.TemporaryDirectory() as place:
        tiny.pipeline("stable_diffusion", Path(place)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "part"),
    [(own, "unet"), (own, "vae"), (stock, "unet"), (stock, "vae"), (stock, "text_encoder")],
)
def test_pickled_weights_of_a_base_are_refused(make, part, sentinel, tmp_path):
    make(tmp_path / "base")
    [weights] = (tmp_path / "base" / part).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({"weights": Bomb(sentinel)}, weights.with_name(name))
    with pytest.raises(DataError, match="cannot be loaded"):
        SharedSamplingPipeline.from_pretrained(tmp_path / "base")


@pytest.mark.parametrize("make", [own, stock])
def test_code_beside_a_base_is_not_run(make, sentinel, tmp_path):
    folder = tmp_path / "base"
    make(folder)
    code = f"import pathlib\npathlib.Path({str(sentinel)!r}).touch()\n"
    for part in ("unet", "vae", *(["text_encoder"] if make is stock else [])):
        (folder / part / "evil.py").write_text(code + "class Evil: pass\n")
        path = folder / part / "config.json"
        config = json.loads(path.read_text())
        config |= {"auto_map": {"AutoModel": "evil.Evil"}, "_attn_implementation_internal": "evil/kernel"}
        path.write_text(json.dumps(config))
    pipe = None
    try:
        pipe = SharedSamplingPipeline.from_pretrained(folder)
    except DataError as error:
        assert "cannot be loaded" in str(error)
    assert pipe is None or pipe.unet.__class__.__module__.startswith("diffusers.")


def test_yaml_with_code_is_refused(sentinel, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(f"finetune: !!python/object/apply:os.system ['touch {sentinel}']\n")
    with pytest.raises(ConfigurationError, match="is not YAML"):
        load_params(path)
