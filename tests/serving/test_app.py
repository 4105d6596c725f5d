"""The HTTP side, on a server whose model process draws nothing."""

import base64
import io
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from examples import python, ran
from PIL import Image
from served import PATH, without_model
from waiting import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    with without_model(tmp_path_factory.mktemp("quick")) as server:
        server.wait()
        yield server


def test_an_answer_has_an_image_for_each_prompt_in_order_and_says_what_it_cost(quick):
    answer = quick.ask(["red cat", "red dog"], n=2, seed=3).json()
    assert [item["revised_prompt"] for item in answer["data"]] == ["red cat", "red cat", "red dog", "red dog"]
    assert all(item["b64_json"] for item in answer["data"])
    assert len({item["seed"] for item in answer["data"]}) == 4
    assert answer["usage"] == {"evaluations": 18.0, "evaluations_alone": 24.0, "saved": 0.25}


def test_seeds_follow_from_the_seed_and_the_prompt_alone(quick):
    both = quick.ask(["red cat", "red dog"], seed=3).json()["data"]
    alone = quick.ask("red dog", seed=3).json()["data"]
    assert both[1]["seed"] == alone[0]["seed"]
    assert [item["seed"] for item in quick.ask("a", n=2, seeds=[5, 2**63 - 1]).json()["data"]] == [5, 2**63 - 1]


def test_one_poison_prompt_of_eight_is_one_error(quick):
    data = quick.ask(["a", "b", "c", "poison", "d", "", "e\0", "f"]).json()["data"]
    assert [number for number, item in enumerate(data) if "error" in item] == [3, 5, 6]
    assert [data[number]["error"]["code"] for number in (3, 5, 6)] == ["generation_failed", "no_caption", "bad_text"]


def test_what_is_written_for_web_uis_is_refused_by_name_unless_it_is_said_to_be_text(quick):
    prompts = [
        "a (red cat:1.3)",
        "a cat BREAK a dog",
        "a {red|blue} cat",
        "a __colour__ cat",
        "a <lora:sketch:0.8> cat",
    ]
    data = quick.ask([*prompts, "a cat (at 12:30)"]).json()["data"]
    codes = ["markup", "markup", "bad_template", "bad_template", "markup", None]
    assert [item.get("error", {}).get("code") for item in data] == codes
    assert "'{red|blue}' is a template" in data[2]["error"]["message"]
    assert "name the LoRA in the field lora" in data[4]["error"]["message"]
    refused = quick.ask("a cat", negative_prompt="(blurred:1.3)")
    assert refused.status_code == 422 and refused.json()["error"]["param"] == "negative_prompt"
    data = quick.ask(prompts, negative_prompt="(blurred:1.3)", literal=True).json()["data"]
    assert [item["revised_prompt"] for item in data] == prompts


def test_a_png_says_how_it_was_drawn_as_sage_generate_and_web_uis_write_it(quick):
    fields = {"negative_prompt": "blurred", "guidance_scale": 3.0, "seeds": [5, 6, 7]}
    data = quick.ask(["\0", "red cat, blau", "red dog"], **fields).json()["data"]
    images = [Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) for item in data[1:]]
    for image in images:
        image.load()
    assert json.loads(images[0].text["sage"]) == {
        "id": "1",
        "prompt": "red cat, blau",
        "negative_prompt": "blurred",
        "seed": 6,
        "group": "1",
        "shared_with": ["2"],
        "plan": {"steps": 6, "share_ratio": 0.34},
        "guidance_scale": 3.0,
        "scheduler": "unknown",
        "model": "0" * 64,
        "truncated_tokens": 0,
    }
    assert json.loads(images[1].text["sage"])["shared_with"] == ["1"]
    assert images[1].text["parameters"].splitlines() == [
        "red dog",
        "Negative prompt: blurred",
        "Steps: 6, Sampler: unknown, CFG scale: 3.0, Seed: 7, Size: 1x1, Model hash: 0000000000",
    ]


def test_the_example_of_the_docs(quick):
    (code,) = python("docs/serving.md")
    names = ran(code, {}, address=("http://127.0.0.1:8000", quick.url))
    with names["client"]:
        assert [bool(item.b64_json) for item in names["answer"].data] == [True, True]
    assert names["answer"].usage.evaluations == 9


def test_a_url_gives_the_same_image(quick):
    item = quick.ask("red cat", response_format="url").json()["data"][0]
    image = httpx.get(item["url"])
    assert image.status_code == 200 and image.content.startswith(b"\x89PNG")
    assert httpx.get(item["url"].replace(".png", "x")).status_code == 404


def test_events_come_as_images_finish(quick):
    with quick.client.stream("POST", PATH, json={"prompt": ["a", "poison", "\0"], "stream": True}) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert [event["type"].split(".")[1] for event in events] == ["failed", "progress", "completed", "failed", "done"]
    assert [event["index"] for event in events if "index" in event] == [2, 0, 1]
    assert events[-1]["usage"]["evaluations"] == 4.5


def test_the_model_is_listed(quick):
    (model,) = quick.client.get("/v1/models").json()["data"]
    assert model["id"] == "quick" and model["size"] == "64x64"
    assert quick.ask("a", model="quick").status_code == 200
    assert quick.ask("a", model="dall-e-3").status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 10**6}, "n"),
        ({"n": 0}, "n"),
        ({"n": 10**400}, "n"),
        ({"n": True}, "n"),
        ({"steps": 10**9}, "steps"),
        ({"steps": 1000, "n": 60}, "steps"),
        ({"size": "1000000x1000000"}, "size"),
        ({"size": "63x64"}, "size"),
        ({"size": "8192x8192"}, "size"),
        ({"size": "0x0"}, "size"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"seed": 1, "seeds": [1]}, None),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": "a" * 2001}, "prompt"),
        ({"negative_prompt": "a" * 2001}, "prompt"),
        ({"negative_prompt": "\0"}, "negative_prompt"),
        ({"prompt": []}, None),
        ({"prompt": [None]}, None),
        ({"prompt": ""}, "prompt"),
        ({"share_ratio": 1}, "share_ratio"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"share": "tenant"}, "share"),
        ({"share": "all"}, "share"),
        ({"image_steps": 1, "branch_noise": 0}, "image_steps"),
        ({"image_steps": 6}, "image_steps"),
        ({"image_steps": 1, "share": "none"}, "image_steps"),
        ({"unknown": 1}, "unknown"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_exceeds_a_limit_is_refused_at_once_with_its_name(quick, fields, param):
    begin = time.monotonic()
    answer = quick.ask(**{"prompt": "a", **fields})
    assert time.monotonic() - begin < 1
    assert answer.status_code == 422
    assert param is None or answer.json()["error"]["param"] == param


TABLE = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"a"',
    b"{}",
    b'{"prompt": NaN}',
    b'{"prompt": "a", "guidance_scale": NaN}',
    b'{"prompt": "a", "guidance_scale": Infinity}',
    b'{"prompt": "a", "guidance_scale": 1e400}',
    b'{"prompt": "a", "seed": 1e400}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "n": -' + b"9" * 5000 + b"}",
    b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    b'{"prompt": ' + b"[" * 100_000,
    b'{"a":' * 1000 + b"1" + b"}" * 1000,
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\\ud800"}',
    b'{"\\ud800": "a"}',
    b'{"prompt": "a", "\xff": 1}',
    b'{"prompt": {"a": 1}}',
    b'{"prompt": 1}',
    b'{"prompt": true}',
    b'{"prompt": "a", "prompt": 1}',
    "\ufeff{}".encode("utf-16"),
    b"\0" * 100,
]


@pytest.mark.parametrize("body", TABLE, ids=range(len(TABLE)))
def test_a_malformed_body_is_the_clients_error(quick, body):
    answer = quick.client.post(PATH, content=body, headers={"Content-Type": "application/json"}, timeout=5)
    assert answer.status_code == 422
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_other_ways_to_send_too_much_or_nothing(quick):
    post = quick.client.post
    assert post(PATH, content=b'{"prompt": "a"}').status_code == 415
    assert post(PATH, data={"prompt": "a"}).status_code == 415
    assert post(PATH, json={"prompt": "a" * (1 << 20)}).status_code == 413
    headers = {"Content-Type": "application/json"}
    assert post(PATH, content=(b" " * 65536 for _ in range(1000)), headers=headers).status_code == 413
    assert post(PATH, json={"prompt": "a"}, headers={"X-Long": "a" * (17 << 10)}).status_code in (400, 431)
    assert quick.client.get(PATH).headers["Allow"] == "POST"
    assert quick.client.put("/v1/batches").headers["Allow"] == "GET, POST"
    assert quick.client.put("/v1/batches").status_code == 405
    assert quick.client.get("/nothing").json()["error"]["code"] == "http_error"
    assert quick.ask("a").status_code == 200


@pytest.mark.parametrize("length", ["-1", "abc", "9" * 30, "1e3"])
def test_a_wrong_content_length_is_no_server_error(quick, length):
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", quick.port), timeout=5) as connection:
        connection.sendall(head.encode() + b'{"prompt": "a"}')
        assert connection.recv(100).split()[1] in (b"400", b"413", b"422")
    assert quick.ask("a").status_code == 200


def test_other_hosts_and_origins_are_refused(quick):
    for headers, status in [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": quick.url}, 200),
        ({"Host": "localhost:1"}, 200),
    ]:
        assert quick.client.post(PATH, json={"prompt": "a"}, headers=headers).status_code == status, headers


def test_the_log_has_one_line_a_request_without_prompts_or_control_characters(quick):
    quick.ask("canary \x1b[31m \u202e <script>")
    quick.client.get("/healthz")
    quick.client.get("/canary%0d%0a")
    wait_for(lambda: quick.lines()[-1]["route"] == "none", 60)
    lines = quick.lines()[-2:]
    assert [(line["route"], line["status"]) for line in lines] == [(PATH, 200), ("none", 404)]
    assert lines[0]["images"] == 1 and lines[0]["evaluations"] == 4.5
    assert b"canary" not in quick.log.read_bytes()


def test_metrics_are_what_the_client_counted(tmp_path):
    with without_model(tmp_path, "--queue", "3", "--seconds", "0.05") as server, ThreadPoolExecutor(12) as pool:
        server.wait()
        answers = list(pool.map(lambda number: server.ask(["a"] * (1 + number % 2)), range(60)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        for answer in answers:
            assert answer.status_code == 200 or int(answer.headers["Retry-After"]) >= 1
        drawn = sum(len(answer.json()["data"]) for answer in answers if answer.status_code == 200)
        for status in (200, 429):
            line = f'sage_requests_total{{route="{PATH}",status="{status}"}}'
            assert server.metric(line) == statuses.count(status)
        assert server.metric('sage_images_total{outcome="drawn"}') == drawn
        assert server.metric('sage_rejected_total{reason="queue_full"}') == statuses.count(429)
        assert server.metric("sage_evaluations_total") == 4.5 * drawn
        assert server.metric("sage_images_open") == 0
        # More than the server ever holds at a time: to ask again would be of no use.
        refused = server.ask(["a"] * 5)
        assert refused.status_code == 413 and "Retry-After" not in refused.headers
        assert "5 images were asked for, but the server holds 4 at a time" in refused.json()["error"]["message"]
        assert server.ask(["a"] * 4).status_code == 200


@pytest.mark.slow
def test_a_client_that_leaves_makes_room(tmp_path):
    with without_model(tmp_path, "--seconds", "0.3", "--queue", "15") as server:
        server.wait()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + PATH, json={"prompt": ["a"] * 15}, timeout=0.5)
        wait_for(lambda: server.metric("sage_images_open") == 0, 2)
        begin = time.monotonic()
        assert server.ask("a").status_code == 200
        assert time.monotonic() - begin < 2
        assert server.metric('sage_images_total{outcome="cancelled"}') >= 12


def test_tokens_name_tenants(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("# who may ask\nalice:secret-a\nbob:secret-b\n")
    with without_model(tmp_path, "--tokens", str(tokens)) as server:
        server.wait()
        assert server.ask("a").status_code == 401
        assert server.client.get("/v1/models").status_code == 401
        for token, status in [("secret-a", 200), ("secret-b", 200), ("alice:secret-a", 401), ("x", 401)]:
            server.client.headers["Authorization"] = f"Bearer {token}"
            assert server.ask("a", share="tenant").status_code == status
        assert server.client.get("/healthz").status_code == 200
    assert "secret" not in server.log.read_text()


@pytest.mark.slow
def test_sigterm_answers_what_was_accepted_and_ends_with_code_0(tmp_path):
    with without_model(tmp_path, "--seconds", "0.2") as server, ThreadPoolExecutor(16) as pool:
        server.wait()
        waiting = [pool.submit(server.ask, "a") for _ in range(16)]
        drawn = 'sage_images_total{outcome="drawn"}'
        wait_for(lambda: server.metric("sage_images_open") + server.metric(drawn) == 16, 5, every=0.01)
        server.process.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in waiting] == [200] * 16
        assert server.process.wait(10) == 0


@pytest.mark.slow
def test_a_second_sigterm_ends_at_once(tmp_path):
    with without_model(tmp_path, "--seconds", "5") as server, ThreadPoolExecutor(1) as pool:
        server.wait()
        lost = pool.submit(server.ask, ["a"] * 10)
        wait_for(lambda: server.metric("sage_images_open") == 10, 60)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
        assert lost.result().status_code == 503


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_lost_model_process_is_said_and_replaced(tmp_path, number):
    with without_model(tmp_path, "--seconds", "1") as server, ThreadPoolExecutor(1) as pool:
        server.wait()
        lost = server.ready()["worker_pid"]
        answer = pool.submit(server.ask, ["a"] * 20)
        wait_for(lambda: server.metric("sage_images_open") == 20, 60)
        os.kill(lost, number)
        wait_for(lambda: not server.ready()["ready"], 2, every=0.02)
        assert answer.result().status_code == 503
        assert answer.result().json()["error"]["code"] == "worker_lost"
        assert server.wait(20) and server.ready()["worker_pid"] != lost
        assert server.ask("a").status_code == 200
        assert server.metric("sage_worker_restarts") == 1


@pytest.mark.slow
def test_five_crashes_end_the_server(tmp_path):
    with without_model(tmp_path) as server:
        for _ in range(5):
            server.wait()
            assert server.ask("crash").status_code == 503
        assert server.process.wait(20) == 1
        assert "5 times" in server.log.read_text()


def test_a_model_that_cannot_be_loaded_ends_the_server_with_the_reason(tmp_path):
    with without_model(tmp_path, "--model", "broken") as server:
        assert server.process.wait(20) == 1
        assert "broken cannot be served" in server.log.read_text()


@pytest.mark.slow
def test_another_version_is_served_without_a_failed_request_and_a_bad_one_not_at_all(tmp_path):
    alias = tmp_path / "alias"
    alias.write_text("1")

    def version():
        return server.client.get("/v1/models").json()["data"][0]["version"]

    with without_model(tmp_path, "--model", str(alias), "--seconds", "0.02") as server, ThreadPoolExecutor(4) as pool:
        server.wait()
        first, going, statuses = server.ready()["worker_pid"], [True], []

        def load():
            while going:
                statuses.append(server.ask(["a"] * 3).status_code)

        loads = [pool.submit(load) for _ in range(4)]
        alias.write_text("2")
        wait_for(lambda: version() == "2", 60)
        wait_for(lambda: not Path(f"/proc/{first}").exists(), 60)
        alias.write_text("bad")
        wait_for(lambda: server.ready()["refused_version"] is not None, 60)
        assert version() == "2" and server.ready()["ready"]
        going.clear()
        [one.result() for one in loads]
        assert len(statuses) > 20 and set(statuses) == {200}
        os.kill(server.ready()["worker_pid"], signal.SIGKILL)
        wait_for(lambda: server.metric("sage_worker_restarts") == 1, 60)
        server.wait()
        assert version() == "2"
        alias.write_text("3")
        wait_for(lambda: version() == "3", 60)
        assert server.ready()["refused_version"] is None
