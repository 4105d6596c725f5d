"""A registered version, asked over HTTP, in Python and from the shell: MLflow's own server, started as a user does."""

import base64
import importlib.util
import io
import json
import os
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import sage.torchvision_ops  # noqa: F401

import pytest
import tiny
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook
from tracked import register
from waiting import wait_for

from flows.prompts import generate
from flows.tracking import content, promotion, registry, runs
from sage.errors import RegistryError
from sage.sampling import base
from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.seeds import image_seeds

pytestmark = pytest.mark.slow

TEXTS = ["red cat", "red dog", "", "blue house", "a big red cat", "red cat"]
POISON = 2
COMMAND = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "-m", "models:/sage@champion"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder whose registry has one champion."""
    folder = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    base.save(base.assemble(tiny.autoencoder(), tiny.unet(cross_attention_dim=384)), folder / "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SAGE_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("SAGE_CACHE", str(folder / "cache"))
        runs.client(runs.address()).search_experiments()
        register(folder / "weights")
        promotion.promote()
        yield folder


@pytest.fixture(scope="module")
def server(project):
    """The address of MLflow's server of the champion."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (project / "log").open("w") as log:
        command = [*COMMAND, "--port", str(port), "--workers", "1"]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: up(port), process=process, log=project / "log")
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.fixture(scope="module")
def champion(project):
    """The champion in this process, the same code as the server's."""
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model("models:/sage@champion")


@pytest.fixture
def computed():
    """The kinds of the networks and layers that this process calls, one for each call."""
    calls = []
    hook = register_module_forward_pre_hook(lambda module, inputs: calls.append(type(module).__name__))
    yield calls
    hook.remove()


def store() -> Path:
    return Path(runs.client(runs.address()).get_model_version("sage", "1").source.removeprefix("file://"))


def up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def post(address: str, body: bytes, kind: str = "application/json") -> tuple[int, str]:
    request = urllib.request.Request(address, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def ask(address: str, prompts: list[object], **params: object) -> list[dict[str, object]]:
    status, answer = post(address, json.dumps({"inputs": prompts, "params": params}).encode())
    assert status == 200, answer
    return json.loads(answer)["predictions"]


def pixels(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as image:
        return image.tobytes()


def test_http_python_and_shell_give_the_same_pictures(server, project):
    import mlflow.pyfunc

    over_http = ask(server, TEXTS, seed=7)
    loaded = mlflow.pyfunc.load_model("models:/sage@champion")
    assert loaded.predict(TEXTS, params={"seed": 7}) == over_http
    (project / "prompts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    command = [sys.executable, "-c", "from flows.cli import main; main()", "generate", "prompts.jsonl", "--out", "out"]
    done = subprocess.run(
        [*command, "--model", "models:/sage@champion", "--seed", "7"], capture_output=True, text=True, cwd=project
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (project / "out/manifest.jsonl").read_text().splitlines()]
    assert len(over_http) == len(lines) == len(TEXTS)
    for item, line in zip(over_http, lines, strict=True):
        assert item.get("error") == line.get("error")
        if "error" not in item:
            assert pixels(base64.b64decode(item["png"])) == pixels((project / "out" / line["file"]).read_bytes())
            assert (item["prompt"], item["seed"], item["group"]) == (line["prompt"], line["seed"], line["group"])


def test_each_prompt_gets_its_item_in_order_and_poison_costs_its_own(server):
    items = ask(server, TEXTS)
    assert [item.get("prompt") for item in items] == [*TEXTS[:POISON], None, *TEXTS[POISON + 1 :]]
    assert items[POISON] == {"error": "no_caption: the caption has no visible character"}
    groups = {}
    for number, item in enumerate(items):
        if number != POISON:
            groups.setdefault(item["group"], []).append(number)
    assert sum(map(len, groups.values())) == len(TEXTS) - 1
    assert max(map(len, groups.values())) > 1
    for members in groups.values():
        for number in members:
            assert items[number]["shared_with"] == [other for other in members if other != number]
    # Two steps of which half are shared, with and without text: two evaluations a group and two a prompt.
    spent = sum(item["network_evaluations"] for item in items if "png" in item)
    assert spent == pytest.approx(2 * len(groups) + 2 * (len(TEXTS) - 1))
    assert [item["independent"] for item in items if "png" in item] == [4] * (len(TEXTS) - 1)
    alone = ask(server, [text for number, text in enumerate(TEXTS) if number != POISON])
    assert alone[0]["png"] == items[0]["png"]
    long = ask(server, ["a" * 2001, "half \ud800", "nul \0", "red cat"])
    assert [item.get("error", "").split(":")[0] for item in long] == ["too_long", "bad_text", "bad_text", ""]


def test_parameters_are_obeyed(server):
    one = ask(server, ["red cat", "blue house"], seeds=[1, 2], steps=3, share_ratio=0.0, guidance_scale=1.0)
    assert [item["seed"] for item in one] == [1, 2]
    assert [item["network_evaluations"] for item in one] == [3, 3]
    assert ask(server, ["red cat"])[0]["seed"] == image_seeds(0, ["red cat"])[0]
    assert ask(server, ["red cat"], seed=1)[0]["png"] != ask(server, ["red cat"], seed=2)[0]["png"]


@pytest.mark.parametrize(
    ("prompts", "params", "reason"),
    [
        ([], {}, "0 prompts"),
        (["a"] * 65, {}, "65 prompts"),
        (["a"] * 60, {"steps": 100}, "60 prompts of 100 steps"),
        (["a"], {"steps": 10**9}, "steps is 1000000000"),
        (["a"], {"steps": 0}, "steps is 0"),
        (["a"], {"steps": -1}, "steps is -1"),
        (["a"], {"steps": "ten"}, "steps"),
        (["a"], {"share_ratio": 1.0}, "share_ratio"),
        (["a"], {"share_ratio": float("nan")}, "share_ratio"),
        (["a"], {"guidance_scale": float("inf")}, "guidance_scale"),
        (["a"], {"seed": -1}, "a seed is below 0"),
        (["a"], {"seed": 2**64}, "seed"),
        (["a", "b"], {"seeds": [1]}, "1 seeds were given for 2 prompts"),
        (["a"], {"seeds": [None]}, "a seed"),
        (["a"], {"negative_prompt": "b" * 2001}, "negative_prompt"),
        ([1, None], {}, "Failed to validate"),
        ("one text", {}, "list"),
    ],
)
def test_what_asks_too_much_or_nonsense_is_refused_before_anything_is_computed(
    server, champion, computed, prompts, params, reason
):
    status, answer = post(server, json.dumps({"inputs": prompts, "params": params}).encode())
    assert status == 400, answer
    assert reason in answer
    if isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts):
        with pytest.raises(MlflowException):
            champion.predict(prompts, params=params)
        assert not computed
        champion.predict(["red cat"])
        assert "UNet2DConditionModel" in computed


BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "null": b"null",
    "no inputs": b"{}",
    "inputs null": b'{"inputs": null}',
    "inputs an object": b'{"inputs": {"a": 1}}',
    "a number too large": b'{"inputs": ["a"], "params": {"steps": 1e400}}',
    "parameters a list": b'{"inputs": ["a"], "params": [1]}',
    "bad UTF-8": b'{"inputs": ["\xff"]}',
    "five megabytes": b'{"inputs": ["' + b"a" * 5_000_000 + b'", 1]}',
}


# MLflow's server answers these with 500 before the model sees them.
UNREADABLE = {
    "a number of 5,000 digits": b'{"inputs": ["a"], "params": {"seed": ' + b"9" * 5000 + b"}}",
    "depth 1,000": b'{"inputs": ' + b"[" * 1000 + b"]" * 1000 + b"}",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_body_that_json_cannot_read_is_refused_and_the_server_goes_on(server, name):
    status, _ = post(server, UNREADABLE[name])
    assert status >= 400
    assert "error" not in ask(server, ["red cat"])[0]


@pytest.mark.parametrize("name", BODIES)
def test_a_malformed_body_is_a_fault_of_the_client(server, name):
    status, answer = post(server, BODIES[name])
    assert 400 <= status < 500, answer
    assert ask(server, ["red cat"])[0]["png"]


def test_another_kind_of_content_is_refused(server):
    assert post(server, b"red cat", "text/plain")[0] == 415
    assert post(server, b'{"inputs": ["a"]}', "application/json; charset=latin-1")[0] == 415


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("artifacts/model/unet/diffusion_pytorch_model.safetensors", b"\0", b"\1"),
        ("code/sage/grouping/policy.py", b"FLOOR = 0.0", b"FLOOR = 0.1"),
        # As one who makes the files agree with each other.
        ("MLmodel", b"share_ratio: 0.5", b"share_ratio: 0.6"),
    ],
)
def test_what_was_overwritten_after_registration_is_not_loaded(project, name, before, after):
    import mlflow.pyfunc

    file = store() / name
    whole = file.read_bytes()
    assert before in whole
    try:
        file.write_bytes(after.join(whole.rsplit(before, 1)))
        with pytest.raises(RegistryError, match="version 1 of sage is damaged"):
            mlflow.pyfunc.load_model("models:/sage@champion")
        with pytest.raises(RegistryError, match="version 1 of sage is damaged"):
            generate.open_model("models:/sage@champion")
    finally:
        file.write_bytes(whole)
    assert generate.open_model("models:/sage@1")[2]["share_ratio"] == 0.5


def test_a_version_answers_where_the_project_is_not_installed(project, champion, tmp_path):
    folder = shutil.copytree(store(), tmp_path / "version")
    code = (
        "import json, sys; from importlib.util import find_spec; import mlflow.pyfunc\n"
        "assert not find_spec('sage') and not find_spec('flows')\n"
        "print(json.dumps(mlflow.pyfunc.load_model(sys.argv[1]).predict(['red cat'], params={'seed': 7})))"
    )
    # Without site, the packages are found but not what makes an editable project importable.
    installed = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    command = [sys.executable, "-S", "-c", code, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, env=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == champion.predict(["red cat"], params={"seed": 7})


def test_bytecode_that_python_leaves_in_the_store_is_no_damage(project):
    code = "import mlflow.pyfunc; mlflow.pyfunc.load_model('models:/sage@champion')"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", code], env=kept, check=True, capture_output=True)
    assert list((store() / "__pycache__").glob("served.*.pyc"))
    assert generate.open_model("models:/sage@1")[2]["share_ratio"] == 0.5


def test_bytecode_that_somebody_left_in_the_store_is_never_run(project, tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    # Python takes such bytecode without a look at its source.
    sources = [store() / "served.py", store() / "code/sage/grouping/policy.py"]
    planted = [importlib.util.cache_from_source(str(source)) for source in sources]
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    for path in planted:
        py_compile.compile(str(tmp_path / "evil.py"), path, doraise=True, invalidation_mode=mode)
    try:
        version = registry.fetch("1", tmp_path / "fetched")
        assert not list(version.folder.rglob("*.pyc"))
        assert content.draws(version)
        assert not (tmp_path / "ran").exists()
    finally:
        for path in planted:
            Path(path).unlink()


@pytest.mark.filterwarnings("ignore:.*type hint is inferred as AnyType:UserWarning")  # of mlflow's own classes
def test_an_image_that_is_not_finite_is_the_error_of_its_prompt(tmp_path, monkeypatch):
    from flows.tracking import served

    monkeypatch.setenv("SAGE_CACHE", str(tmp_path))
    pipe = SharedSamplingPipeline.from_pipe(tiny.stable_diffusion(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    tiny.overflow_at("q", pipe)
    model = served.SharedSampling()
    model._pipeline, model._alone = pipe, threading.Lock()
    settings = {"steps": 2, "share_ratio": 0.5, "guidance_scale": 1.0, "branch_noise": 0.0, "batch_size": 4}
    limits = {"prompts": 9, "characters": 99, "steps": 99}
    group = {"threshold": 0.5, "max_size": 6, "near_duplicate": 0.999}
    config = {"sampling": settings, "limits": limits, "group": group}
    items = model.predict(SimpleNamespace(model_config=config), ["red cat", "q", "blue house"])
    assert [set(item) == {"error"} for item in items] == [False, True, False]
    assert items[1]["error"].startswith("not_finite: the latents from step 0 of 2 on; check the weights")
