"""Data in a remote: pushed, pulled and verified, with real DVC, a folder and a real S3 server as remotes."""

import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner
from waiting import wait_for

from flows import cli
from flows.versioning import integrity, repository
from sage.errors import DataError, SageError
from sage.files import sha256

GRAPH = """
stages:
  copy:
    cmd: python step.py
    deps: [step.py]
    outs: [made, one.bin]
"""
STEP = """
from pathlib import Path
Path("made/deep").mkdir(parents=True)
for number in range(20):
    Path("made" if number % 2 else "made/deep", f"{number}.bin").write_bytes(bytes([number]) * 100)
Path("one.bin").write_bytes(b"one" * 50)
"""
FILES = 21
KEYS = {"AWS_ACCESS_KEY_ID": "sage", "AWS_SECRET_ACCESS_KEY": "not-a-secret-1", "AWS_DEFAULT_REGION": "us-east-1"}


def dvc(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], check=True, capture_output=True)


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A repository with a stage that was run, and what it made in the cache."""
    folder = tmp_path_factory.mktemp("template") / "project"
    folder.mkdir()
    (folder / "dvc.yaml").write_text(GRAPH)
    (folder / "step.py").write_text(STEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        git("init", "-q")
        dvc("init", "-q")
        repository.reproduce(lambda text: None)
        git("add", ".")
        git("commit", "-qm", "start")
    return folder


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    """A copy of it, with a folder as its default remote."""
    folder = tmp_path / "project"
    shutil.copytree(template, folder)
    monkeypatch.chdir(folder)
    dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
    dvc("remote", "modify", "store", "verify", "true")
    git("commit", "-qam", "remote")
    return folder


def objects(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "files/md5").rglob("*") if path.is_file())


def flip(path: Path, mode: int, chance: random.Random) -> None:
    """Flip one bit anywhere in a file."""
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    path.chmod(mode)


@pytest.mark.slow
def test_what_is_whole_is_found_whole_everywhere(project):
    integrity.push()
    copies = FILES + 1  # the listing of the folder is an object too
    assert integrity.verify("") == (2 * copies + FILES, [])


def flip_all(paths: list[Path]) -> None:
    """Flip a bit in each, half of them protected as DVC leaves them, half not."""
    chance = random.Random(0)
    for number, path in enumerate(paths):
        flip(path, (0o444, 0o644)[number % 2], chance)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["cache", "remote"])
def test_every_flipped_bit_is_found_and_named(project, tmp_path, place):
    integrity.push()
    flip_all(objects({"cache": Path(".dvc/cache"), "remote": tmp_path / "store"}[place]))
    findings = integrity.verify("")[1]
    assert {(finding.place, finding.state) for finding in findings} == {(place, "corrupt")}
    files = {str(path) for path in [*Path("made").rglob("*.bin"), Path("one.bin")]}
    # The folder is its listing, an object too; that of the other copy names the files.
    assert {finding.path for finding in findings} == files | {"made"}


@pytest.mark.slow
def test_the_work_tree_is_read_and_what_cannot_be_known_is_said(project):
    flip_all(sorted(Path("made").rglob("*.bin")))
    Path("made/more.bin").write_bytes(b"more")
    Path("one.bin").unlink()
    shown = CliRunner().invoke(cli.app, ["verify"])
    assert shown.exit_code == 1
    lines = shown.stdout.splitlines()
    assert sum(line.startswith("work tree: made/") and line.endswith(".bin: corrupt") for line in lines) == FILES - 1
    assert {"work tree: made/more.bin: extra", "work tree: one.bin: missing"} < set(lines)
    assert lines[-1] == f"{2 * FILES + 1} copies re-hashed, {FILES + 1} not as they should be"
    flip_all(objects(Path(".dvc/cache")))
    assert {(f.place, f.path, f.state.split(":")[0]) for f in integrity.verify()[1]} == {
        ("cache", "made", "corrupt"),
        ("cache", "one.bin", "corrupt"),
        ("work tree", "made", "unknown"),
        ("work tree", "one.bin", "missing"),
    }


@pytest.mark.slow
def test_a_damaged_output_is_refused_and_its_message_says_what_mends_it(project):
    integrity.check_output(Path("made"))
    integrity.check_output(Path("one.bin"))
    for path in ("made", "one.bin"):
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
    chance = random.Random(0)
    for path in objects(Path(".dvc/cache")):
        if b"relpath" not in path.read_bytes():
            flip(path, 0o444, chance)
    # DVC restores the damage and finds nothing wrong.
    assert repository.reproduce(lambda text: None)["copy"].state == "restored"
    assert repository.stale() == []
    for path in ("made", "made/", "one.bin", Path("made").resolve()):
        with pytest.raises(DataError, match=r"not .* as in dvc.lock.*`sage verify --repair`, .* then `sage run`"):
            integrity.check_output(Path(path))
    assert CliRunner().invoke(cli.app, ["verify", "--repair"]).exit_code == 1  # everything is missing
    assert repository.reproduce(lambda text: None)["copy"].state == "executed"
    assert integrity.verify()[1] == []
    integrity.check_output(Path("made"))
    integrity.check_output(Path("one.bin"))


@pytest.mark.slow
def test_a_damaged_cache_is_repaired_from_an_intact_work_tree(project):
    flip_all(objects(Path(".dvc/cache")))
    assert CliRunner().invoke(cli.app, ["verify", "--repair"]).exit_code == 0
    assert integrity.verify() == (2 * FILES + 1, [])
    assert repository.stale() == []
    assert integrity.repair() == []


def test_what_is_no_output_of_the_graph_is_not_judged_and_a_damaged_lock_is_named(project):
    Path("other").write_text("mine")
    integrity.check_output(Path("other"))
    integrity.check_output(Path("nothing"))
    for cut_off in ("", "{{", "stages:\n  copy:\n    outs:\n    - path: made\n"):
        Path("dvc.lock").write_text(cut_off)
        with pytest.raises(DataError, match="git checkout"):
            integrity.check_output(Path("made"))


@pytest.mark.slow
def test_nothing_damaged_is_pushed_or_accepted(project, tmp_path):
    mode, chance = 0o444, random.Random(1)
    damaged = objects(Path(".dvc/cache"))[3]
    whole = damaged.read_bytes()
    flip(damaged, mode, chance)
    with pytest.raises(DataError, match="nothing was pushed"):
        integrity.push()
    assert not (tmp_path / "store").exists()
    damaged.chmod(0o644)
    damaged.write_bytes(whole)
    integrity.push()
    # Damage in the remote does not come back.
    flip(tmp_path / "store" / damaged.relative_to(".dvc/cache"), mode, chance)
    for path in (".dvc/cache", "made"):
        shutil.rmtree(path)
    with pytest.raises(SageError):
        integrity.pull()


@pytest.mark.slow
def test_a_failed_push_changes_no_pointer(project):
    before = {path: sha256(Path(path)) for path in ("dvc.lock", ".dvc/config", "dvc.yaml")}
    dvc("remote", "modify", "--local", "store", "url", "/proc/none")
    with pytest.raises(SageError, match="push failed"):
        integrity.push()
    assert {path: sha256(Path(path)) for path in before} == before
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    assert changed == ""


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """The address of an S3 server of our own, which wants the key, and the folder where it keeps a bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "s3"
    (folder / "sage").mkdir(parents=True)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    command = [Path(sys.executable).with_name("rclone"), "serve", "s3", folder, "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", f"{KEYS['AWS_ACCESS_KEY_ID']},{KEYS['AWS_SECRET_ACCESS_KEY']}", "--vfs-cache-mode", "off"]
    with (tmp_path / "s3.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"RCLONE_CONFIG": "/dev/null"})
    try:
        wait_for(lambda: listens(port), process=process, log=tmp_path / "s3.log")
        yield f"http://127.0.0.1:{port}", folder / "sage"
    finally:
        process.terminate()
        process.wait(10)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_an_s3_store_holds_it_and_a_fresh_clone_runs_nothing_again(project, s3, tmp_path, monkeypatch):
    address, bucket = s3
    dvc("remote", "add", "--default", "s3", "s3://sage/data")
    dvc("remote", "modify", "s3", "endpointurl", address)
    dvc("remote", "modify", "s3", "verify", "true")
    git("commit", "-qam", "s3")
    integrity.push()
    assert len(objects(bucket / "data")) == FILES + 1
    git("clone", "-q", str(project), str(tmp_path / "clone"))
    monkeypatch.chdir(tmp_path / "clone")
    assert not Path("made").exists()
    integrity.pull()
    assert repository.stale() == []
    assert {name: outcome.state for name, outcome in repository.reproduce(lambda text: None).items()} == {
        "copy": "up to date"
    }
    assert integrity.verify("") == (2 * (FILES + 1) + FILES, [])
    flip(objects(bucket / "data")[0], 0o644, random.Random(0))
    assert [finding.place for finding in integrity.verify("")[1]] == ["remote"]
    # Who has no key gets nothing, and is told.
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(SageError, match="DVC cannot read cache and remote"):
        integrity.verify("")
