"""`sage generate --server` against real servers: the same folder as the command makes on this machine."""

import json
import signal
import subprocess
import sys
import threading
from email.utils import formatdate
from functools import partial

import httpx
import pytest
import tiny
from served import PATH, sage, without_model
from waiting import PATIENCE, wait_for

from flows.prompts import generate as prompts
from flows.prompts import remote
from flows.prompts.remote import Server, ServerError, Waits
from sage.errors import ConfigurationError, DataError, DivergedError
from sage.files import sha256_tree

pytestmark = pytest.mark.slow

TEXTS = ["red cat", "tall tree", "red dog", "tall trees", "red cat", "blue house", "a big red cat"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    with without_model(tmp_path_factory.mktemp("quick")) as server:
        server.wait()
        yield server


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAGE_DEVICE", "cpu")
    monkeypatch.delenv(remote.TOKEN, raising=False)


@pytest.fixture
def generate(tmp_path):
    def call(lines, server, out="out", **more):
        source = tmp_path / "prompts.txt"
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        options = {"steps": None, "share_ratio": None, "guidance_scale": None, "batch_size": None, "plan": False}
        prompts.main(str(source), tmp_path / out, **{"server": server, **options, **more})
        return tmp_path / out

    return call


@pytest.fixture
def waits(monkeypatch):
    def call(**seconds):
        monkeypatch.setattr(prompts, "Server", partial(Server, waits=Waits(**seconds)))

    return call


def lines_of(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_the_folder_is_the_one_that_this_machine_makes(generate, tmp_path):
    tiny.pipeline("stable_diffusion", tmp_path).save_pretrained(tmp_path / "model")
    settings = {"steps": 4, "share_ratio": 0.5, "guidance_scale": 3.0, "seed": 1, "negative_prompt": "blue"}
    settings |= {"branch_noise": 1.0, "image_steps": 1}  # two of the prompts are equal
    local = generate(TEXTS, None, "local", model=str(tmp_path / "model"), batch_size=1, **settings)
    with sage(tmp_path / "model", tmp_path, "--deterministic") as server:
        server.wait()
        far = generate(TEXTS, server.url, "far", **settings)
        whole = sha256_tree(far)
        for name in ("000004.png", "000006.png", "manifest.jsonl", "contact.jpg"):
            (far / name).unlink()
        generate(TEXTS, server.url + "/v1", "far", **settings)
        assert sha256_tree(far) == whole
    for folder in (local, far):
        (folder / "run.json").unlink()
    assert sha256_tree(far) == sha256_tree(local)
    assert any(line["shared_with"] for line in lines_of(far))


def test_a_prompt_that_the_server_refuses_is_an_error_and_costs_no_other(generate, quick, capsys):
    lines = lines_of(generate(["red cat", "x" * 2001, "poison", "", "red dog"], quick.url))
    assert [line.get("error", "")[:17] for line in lines] == ["", "too_long: a promp", "generation_failed", ""]
    assert [line["prompt"] for line in lines if "file" in line] == ["red cat", "red dog"]
    said = capsys.readouterr()
    assert "not drawn: 000002: too_long: a prompt has 2001 characters; at most 2000" in said.err
    assert "2 images in" in said.out and "2 prompts were not drawn" in said.out


def test_a_prompt_that_is_too_long_costs_no_member_of_its_group(generate, quick):
    long = "red cat " * 300
    lines = lines_of(generate([long, "red cat red cat", "red cat"], quick.url))
    assert [line.get("error", "")[:8] for line in lines] == ["too_long", "", ""]
    assert [line["shared_with"] for line in lines[1:]] == [["000003"], ["000002"]]


def test_what_the_command_takes_as_text_the_server_draws_as_text(generate, quick):
    lines = lines_of(generate(["a (red cat:1.3)", "a {red|blue} cat"], quick.url, literal=True))
    assert [line["prompt"] for line in lines] == ["a (red cat:1.3)", "a {red|blue} cat"]


def test_if_nothing_is_drawn_the_command_fails(generate, quick):
    with pytest.raises(DataError, match="the server drew none of 1 prompts: generation_failed: poison"):
        generate(["poison"], quick.url)


def test_the_cost_is_shown_first_and_with_plan_nothing_else_happens(generate, quick, tmp_path, capsys):
    before = quick.metric('sage_images_total{outcome="drawn"}')
    generate(TEXTS, quick.url, plan=True)
    assert "network evaluations instead of 42" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert quick.metric('sage_images_total{outcome="drawn"}') == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 2000}, "refused the run with 422 invalid_request: steps"),
        ({"model": "models:/sage@champion"}, "serves quick, not models:/sage@champion"),
        ({"batch_size": 4}, "--batch-size is the server's own"),
    ],
)
def test_what_the_server_cannot_do_for_any_prompt_stops_the_run(generate, quick, options, says):
    with pytest.raises(ConfigurationError, match=says):
        generate(TEXTS, quick.url, **options)


@pytest.mark.parametrize(
    "address", ["localhost:8000", "ftp://x", "http://", "http://a:secret@x", "http://x/?token=secret"]
)
def test_an_address_that_is_none_is_refused_and_its_secrets_are_not_shown(address):
    with pytest.raises(ConfigurationError) as refused:
        Server(address)
    assert "secret@" not in str(refused.value)


def test_a_full_server_is_asked_again_until_all_is_drawn_and_for_less_if_a_group_is_too_large(generate, tmp_path):
    with without_model(tmp_path, "--queue", "3", "--seconds", "0.05") as server:
        server.wait()
        lines = lines_of(generate([*TEXTS, *(f"red cat {number}" for number in range(4))], server.url))
        assert all("file" in line for line in lines)
        for reason in ("queue_full", "too_many_images"):
            assert server.metric(f'sage_rejected_total{{reason="{reason}"}}') > 0


def test_a_server_that_comes_back_is_asked_again(generate, tmp_path, waits, capsys):
    waits(first=0.1, longest=0.2, quiet=0.0)
    with without_model(tmp_path, "--seconds", "0.3") as server:
        server.wait()
        command = list(server.process.args)
        again = []

        def kill():
            wait_for(lambda: list((tmp_path / "out").glob("0*.png")))
            server.process.kill()
            server.process.wait()
            again.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            lines = lines_of(generate([f"{text} {n}" for n, text in enumerate(TEXTS)], server.url))
        finally:
            killer.join()
            for process in again:
                process.kill()
                process.wait()
        assert len(lines) == len(TEXTS) and all("file" in line for line in lines)
        assert f"waiting for {server.url}: " in capsys.readouterr().err


def test_a_server_that_does_not_answer_ends_the_run_with_code_75(generate, tmp_path):
    with without_model(tmp_path) as server:
        server.wait()
        url = server.url
    with pytest.raises(ServerError, match=r"does not answer .*start `sage serve` there") as gone:
        generate(TEXTS, url)
    assert gone.value.exit_code == 75


def test_patience_ends(generate, tmp_path, waits):
    waits(patience=2.0)
    with without_model(tmp_path, "--seconds", "60", "--queue", "0") as server:
        server.wait()
        body = {"prompt": "a", "stream": True}
        with server.client.stream("POST", PATH, json=body):  # takes the only place
            wait_for(lambda: b"sage_images_open 1.0" in httpx.get(server.url + "/metrics").content)
            with pytest.raises(ServerError, match="did not answer for 2 s, at last: status 429"):
                generate(TEXTS, server.url)


def test_another_model_ends_the_run(generate, tmp_path):
    alias = tmp_path / "alias"
    alias.write_text("1")
    with without_model(tmp_path, "--model", str(alias), "--seconds", "0.2") as server:
        server.wait()

        def move():
            wait_for(lambda: list((tmp_path / "out").glob("0*.png")))
            alias.write_text("2")

        mover = threading.Thread(target=move)
        mover.start()
        with pytest.raises(DataError, match=r"now serves model 0000.*start a new run in another folder"):
            generate([f"{text} {n}" for n in range(20) for text in TEXTS], server.url)
        mover.join()
        wait_for(lambda: server.client.get("/v1/models").json()["data"][0]["version"] == "2")
        with pytest.raises(ConfigurationError, match="holds images of another run, with model"):
            generate([f"{text} {n}" for n in range(20) for text in TEXTS], server.url)


def test_the_token_is_sent_and_never_shown(generate, tmp_path, monkeypatch, capfd):
    (tmp_path / "tokens").write_text("ann:canary-secret\n")
    with without_model(tmp_path, "--tokens", str(tmp_path / "tokens")) as server:
        server.wait()
        with pytest.raises(ConfigurationError, match=r"401 invalid_api_key.*set SAGE_SERVER_TOKEN"):
            generate(TEXTS, server.url)
        monkeypatch.setenv(remote.TOKEN, "wrong-secret")
        with pytest.raises(ConfigurationError, match="401") as refused:
            generate(TEXTS, server.url)
        monkeypatch.setenv(remote.TOKEN, "canary-secret\n")
        out = generate(TEXTS, server.url)
        assert len(lines_of(out)) == len(TEXTS)
        written = b"".join(path.read_bytes() for path in out.iterdir())
        shown = "".join(capfd.readouterr()) + str(refused.value) + server.log.read_text()
        assert "secret" not in shown and b"secret" not in written


def test_a_token_that_is_none_is_refused_without_showing_it(monkeypatch):
    monkeypatch.setenv(remote.TOKEN, "canary\nsecret")
    with pytest.raises(ConfigurationError, match="characters that no token has") as refused:
        Server("http://x")
    assert "canary" not in str(refused.value)


def test_images_that_are_not_finite_are_errors_as_on_this_machine(generate, quick, monkeypatch, capfd):
    picture = Server._picture

    def diverged(self, group, place, item):
        if group[0] in lost:
            item = {"error": {"code": "generation_failed", "message": "DivergedError: values that are not finite"}}
        return picture(self, group, place, item)

    monkeypatch.setattr(Server, "_picture", diverged)
    lost = {1}
    generate(["red cat", "stock market"], quick.url)
    said = capfd.readouterr()
    assert "not drawn: 000002: generation_failed: DivergedError: values that are not finite" in said.err
    assert "1 prompts were not drawn" in said.out
    lost = {0, 1}
    with pytest.raises(DivergedError, match="the server drew none of 2 prompts"):
        generate(["blue cat", "stock exchange"], quick.url, "again")


def test_a_terminated_command_does_not_wait_for_its_images(generate, tmp_path):
    with without_model(tmp_path, "--seconds", "10") as server:
        server.wait()
        generate([f"red cat {number}" for number in range(100)], server.url, plan=True)  # embeds the prompts
        source = tmp_path / "prompts.txt"
        command = [sys.executable, "-m", "flows.prompts.generate", str(source)]
        process = subprocess.Popen([*command, "--out", str(tmp_path / "out"), "--server", server.url])
        wait_for(lambda: server.metric("sage_images_open") > 8, process=process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 143
        assert len(list((tmp_path / "out").glob("0*.png"))) < 50
        wait_for(lambda: server.metric("sage_images_open") == 0)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), ("0", 0), ("99999999", 600), ("", None), ("soon", None), (formatdate(0, usegmt=True), 0)],
)
def test_retry_after_is_seconds_or_a_date(value, seconds):
    assert remote._retry_after(httpx.Response(429, headers={"Retry-After": value}), 600) == seconds


def test_help_imports_no_torch():
    code = "import sys, flows.prompts.generate; print([name for name in ('torch', 'httpx') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_server_that_groups_by_its_distilled_encoder_is_refused_by_name(monkeypatch):
    async def alone(self):
        group = {"by": "distilled", "threshold": 0.9, "max_size": 6, "near_duplicate": 0.999}
        return {"sha256": "a" * 64, "settings": {"steps": 4, "group": group}}

    monkeypatch.setattr(Server, "_alone", alone)
    with pytest.raises(
        ConfigurationError, match=r"http://127\.0\.0\.1:1.* distilled encoder of its model, which is not"
    ):
        Server("http://127.0.0.1:1", None).opened()
