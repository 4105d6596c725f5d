"""Batches over HTTP, on a server whose model process draws nothing: each accepted line gets a result."""

import base64
import io
import json
import os
import signal
import time

import httpx
import openai
import pytest
from PIL import Image
from served import without_model
from waiting import wait_for

pytestmark = pytest.mark.slow

TYPE = {"Content-Type": "application/jsonl"}


def lines(*values):
    return b"\n".join(value if isinstance(value, bytes) else json.dumps(value).encode() for value in values)


def prompts(count, **fields):
    return lines(*({"custom_id": f"c{number}", "prompt": f"a{number} cat", **fields} for number in range(count)))


def accept(server, body, **headers):
    return server.client.post("/v1/batches", content=body, headers=TYPE | headers)


def batch(server, name):
    return server.client.get(f"/v1/batches/{name}").json()


def ended(server, name, seconds=20):
    wait_for(lambda: batch(server, name)["status"] in ("completed", "cancelled"), seconds)
    return batch(server, name)


def results(server, name, **params):
    answer = server.client.get(f"/v1/batches/{name}/results", params=params)
    assert answer.headers["content-type"].startswith("application/jsonl")
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    with without_model(folder, "--batches", str(folder / "batches")) as server:
        server.wait()
        yield server


def test_each_line_has_a_result_as_it_finishes(quick):
    accepted = accept(quick, prompts(300))
    assert accepted.status_code == 202 and accepted.json()["status"] == "in_progress"
    assert accepted.json()["request_counts"]["total"] == 300
    found = results(quick, accepted.json()["id"])  # waits until the batch has ended
    assert sorted(one["line"] for one in found) == list(range(300))
    assert all(one["custom_id"] == f"c{one['line']}" and one["error"] is None for one in found)
    assert all(len(one["response"]["body"]["data"]) == 1 for one in found)
    assert ended(quick, accepted.json()["id"]) | {"id": ""} == accepted.json() | {
        "id": "",
        "status": "completed",
        "request_counts": {"total": 300, "completed": 300, "failed": 0},
        "completed_at": batch(quick, accepted.json()["id"])["completed_at"],
        "expires_at": batch(quick, accepted.json()["id"])["completed_at"] + 30 * 86400,
        "usage": {"evaluations": 1350.0, "evaluations_alone": 1800.0, "saved": 0.25},
        "results": f"/v1/batches/{accepted.json()['id']}/results",
    }
    assert quick.metric("sage_batches_open") == 0


def test_bad_lines_are_error_items_and_the_others_are_drawn(quick):
    before = quick.metric('sage_batch_lines_total{outcome="failed"}')
    body = lines(
        {"custom_id": "good", "prompt": "red cat", "n": 2},
        b"{",
        {"custom_id": "none", "prompt": ""},
        {"custom_id": "large", "prompt": "a", "size": "63x64"},
        {"custom_id": "poison", "prompt": ["poison", "red dog"]},
        {"custom_id": "lost", "prompt": "poison"},
        {"custom_id": "stream", "prompt": "a", "stream": True},
        {"prompt": "a", "unknown": 1},
        b'{"custom_id": "nan", "prompt": "a", "guidance_scale": NaN}',
        b"\xff\xfe",
        b"",
        {"custom_id": "openai", "method": "POST", "url": "/v1/images/generations", "body": {"prompt": "red cat"}},
        {"custom_id": "other", "method": "POST", "url": "/v1/chat/completions", "body": {"prompt": "red cat"}},
        {"custom_id": "markup", "prompt": "a (red cat:1.3)"},
        {"custom_id": "text", "prompt": "a (red cat:1.3) {a|b}", "literal": True},
    )
    name = accept(quick, body).json()["id"]
    found = {one["line"]: one for one in results(quick, name)}
    assert sorted(found) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14]
    errors = {one["custom_id"]: one["error"]["code"] for one in found.values() if one["error"]}
    assert {line for line, one in found.items() if one["error"] is None} == {0, 4, 11, 14}
    assert errors["markup"] == "markup"
    assert errors["none"] == "no_caption" and errors["lost"] == "generation_failed" and errors["large"]
    assert found[3]["error"]["param"] == "size" and found[8]["error"]["param"] == "guidance_scale"
    assert found[1]["error"]["code"] == found[9]["error"]["code"] == "invalid_json"
    assert all((one["error"] is None) != (one["response"] is None) for one in found.values())
    data = found[4]["response"]["body"]["data"]
    assert [item.get("error", {}).get("code") for item in data] == ["generation_failed", None]
    assert len(found[0]["response"]["body"]["data"]) == 2
    assert ended(quick, name)["request_counts"] == {"total": 14, "completed": 4, "failed": 10}
    assert quick.metric('sage_batch_lines_total{outcome="failed"}') - before == 10


def test_lines_share_within_the_batch_unless_they_or_their_users_say_otherwise(quick):
    body = lines(
        {"prompt": "red cat"},
        {"prompt": "blue cat"},
        {"prompt": "red dog", "n": 2},
        {"prompt": "red owl", "share": "none"},
        {"prompt": "red ape", "user": "u"},
        {"prompt": "red ant", "user": "u"},
        {"prompt": "red elk", "steps": 7},
    )
    found = {one["line"]: one["response"]["body"]["data"] for one in results(quick, accept(quick, body).json()["id"])}
    assert [data[0]["shared_with_lines"] for _, data in sorted(found.items())] == [[2], [], [0], [], [5], [4], []]
    assert [item["shared_with"] for item in found[2]] == [[1], [0]]
    told = []
    for item in (found[0][0], found[2][1]):
        with Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) as image:
            image.load()
            told.append(json.loads(image.text["sage"]))
    assert [(one["id"], one["group"], sorted(one["shared_with"])) for one in told] == [
        ("0.0", "0.0", ["2.0", "2.1"]),
        ("2.1", "0.0", ["0.0", "2.0"]),
    ]


def test_results_go_on_from_where_a_client_left(quick):
    name = accept(quick, prompts(20)).json()["id"]
    whole = results(quick, name)
    assert results(quick, name, skip=15) == whole[15:]
    assert results(quick, name, skip=20) == results(quick, name, skip=99) == []
    assert quick.client.get(f"/v1/batches/{name}/results", params={"skip": -1}).status_code == 422
    refused = quick.client.get(f"/v1/batches/{name}/results", params={"wait": "perhaps"}).json()
    assert refused["error"]["param"] == "wait"
    events = []
    headers = {"Accept": "text/event-stream", "Last-Event-ID": "17"}
    with quick.client.stream("GET", f"/v1/batches/{name}/results", headers=headers) as answer:
        for line in answer.iter_lines():
            events.append(line)
    assert [line[4:] for line in events if line.startswith("id: ")] == ["18", "19", "20"]
    told = [json.loads(line[6:]) for line in events if line.startswith("data: ")]
    assert [one["type"] for one in told] == ["batch.result"] * 3 + ["batch.done"]
    assert told[0]["line"] == whole[17]["line"] and told[-1]["status"] == "completed"


def test_what_is_no_batch_is_refused_at_once(quick):
    assert accept(quick, b"").json()["error"]["code"] == "invalid_batch"
    assert accept(quick, b"\n\n").status_code == 422
    assert accept(quick, b"not json\n{").status_code == 422
    assert accept(quick, prompts(10_001)).status_code == 422
    assert accept(quick, lines(*[{"prompt": ["a"] * 64, "n": 64}] * 13)).status_code == 422
    assert accept(quick, b" " * (33 << 20)).status_code == 413
    assert quick.client.post("/v1/batches", json={"prompt": "a"}).status_code == 415
    for name in ("batch_" + "0" * 32, "..", "%2e%2e%2f", "batch_x"):
        assert quick.client.get(f"/v1/batches/{name}").status_code == 404
        assert quick.client.get(f"/v1/batches/{name}/results").status_code == 404
        assert quick.client.post(f"/v1/batches/{name}/cancel").status_code == 404


def test_openais_client_finds_lists_and_cancels_batches(quick):
    name = accept(quick, prompts(5)).json()["id"]
    ended(quick, name)
    with openai.OpenAI(base_url=quick.url + "/v1", api_key="none", max_retries=0) as client:
        assert client.batches.retrieve(name).status == "completed"
        assert client.batches.retrieve(name).request_counts.completed == 5
        assert name in [one.id for one in client.batches.list()]
        assert client.batches.cancel(name).status == "completed"  # it had ended
        with pytest.raises(openai.NotFoundError):
            client.batches.retrieve("batch_" + "0" * 32)


def test_a_cancelled_batch_keeps_its_results_and_draws_no_more(tmp_path):
    with without_model(tmp_path, "--batches", str(tmp_path / "b"), "--seconds", "0.05") as server:
        server.wait()
        name = accept(server, prompts(500)).json()["id"]
        wait_for(lambda: batch(server, name)["request_counts"]["completed"] > 3, 60)
        assert server.client.post(f"/v1/batches/{name}/cancel").json()["status"] in ("cancelling", "cancelled")
        counts = ended(server, name, 5)["request_counts"]
        assert 3 < counts["completed"] < 100 and counts["failed"] == 0
        assert len(results(server, name)) == counts["completed"]
        assert server.ask("a").status_code == 200
        time.sleep(0.3)
        assert batch(server, name)["request_counts"] == counts and batch(server, name)["status"] == "cancelled"


def test_tenants_do_not_see_each_others_batches(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("alice:a\nbob:b\n")
    alice, bob = {"Authorization": "Bearer a"}, {"Authorization": "Bearer b"}
    with without_model(
        tmp_path, "--tokens", str(tokens), "--batches", str(tmp_path / "batches"), "--seconds", "0.1"
    ) as server:
        server.wait()
        assert accept(server, prompts(1)).status_code == 401
        name = accept(server, prompts(100), **alice).json()["id"]
        for path in (f"/v1/batches/{name}", f"/v1/batches/{name}/results"):
            assert server.client.get(path, headers=bob).status_code == 404
            assert server.client.get(path).status_code == 401
        assert server.client.post(f"/v1/batches/{name}/cancel", headers=bob).status_code == 404
        assert server.client.get("/v1/batches", headers=bob).json()["data"] == []
        assert [one["id"] for one in server.client.get("/v1/batches", headers=alice).json()["data"]] == [name]
        # Another tenant's batch does not wait for the end of this one.
        other = accept(server, prompts(5), **bob).json()["id"]
        wait_for(lambda: server.client.get(f"/v1/batches/{other}", headers=bob).json()["status"] == "completed", 60)
        assert server.client.get(f"/v1/batches/{name}", headers=alice).json()["status"] == "in_progress"
        for _ in range(15):
            assert accept(server, prompts(1000), **alice).status_code == 202
        refused = accept(server, prompts(1), **alice)
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 0
        assert accept(server, prompts(1), **bob).status_code == 202


def test_a_server_without_a_folder_says_how_to_have_batches(tmp_path):
    with without_model(tmp_path) as server:
        server.wait()
        assert "--batches" in accept(server, prompts(1)).json()["error"]["message"]


def images(found):
    return {one["line"]: [item["seed"] for item in one["response"]["body"]["data"]] for one in found}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_batch_goes_on_after_the_server_ended(tmp_path, number):
    folder, body = str(tmp_path / "b"), prompts(60) + b"\n{\n" + lines({"prompt": "a0 dog"}, {"prompt": "a59 dog"})
    arguments = ("--batches", folder, "--seconds", "0.03")
    with without_model(tmp_path, *arguments) as server:
        server.wait()
        name = accept(server, body).json()["id"]
        wait_for(lambda: batch(server, name)["request_counts"]["completed"] > 5, 60)
        seen = []
        with server.client.stream("GET", f"/v1/batches/{name}/results") as answer:
            try:
                for line in answer.iter_lines():
                    seen.append(json.loads(line))
                    if len(seen) == 8:
                        os.kill(server.process.pid, number)
            except httpx.HTTPError:
                assert number == signal.SIGKILL
        server.process.wait(20)
    with without_model(tmp_path, *arguments) as server:
        server.wait()
        rest = results(server, name, skip=len(seen))
        assert sorted(one["line"] for one in seen + rest) == list(range(63))
        assert ended(server, name)["request_counts"] == {"total": 63, "completed": 62, "failed": 1}
        assert results(server, name) == seen + rest
        # The same seeds and groups as if nothing had happened.
        drawn = [one for one in seen + rest if one["response"]]
        mates = {one["line"]: one["response"]["body"]["data"][0]["shared_with_lines"] for one in drawn}
        assert mates[0] == [61] and mates[61] == [0] and mates[59] == [62] and mates[62] == [59]
    torn = tmp_path / "b" / name / "results.jsonl"
    assert torn.read_bytes().count(b"\n") == 63


@pytest.mark.slow
def test_a_torn_result_is_drawn_again(tmp_path):
    folder = tmp_path / "b"
    with without_model(tmp_path, "--batches", str(folder), "--seconds", "0.05") as server:
        server.wait()
        name = accept(server, prompts(40)).json()["id"]
        wait_for(lambda: batch(server, name)["request_counts"]["completed"] > 5, 60)
        server.process.kill()
        server.process.wait()
    with (folder / name / "results.jsonl").open("ab") as file:
        file.write(b'{"line": 39, "custom')
    with (folder / name / "index.jsonl").open("ab") as file:
        file.write(b"[39, tr")
    with without_model(tmp_path, "--batches", str(folder)) as server:
        server.wait()
        assert sorted(one["line"] for one in results(server, name)) == list(range(40))


@pytest.mark.slow
def test_a_line_that_ends_the_model_process_is_an_error_and_the_others_are_drawn(tmp_path):
    body = lines(*[{"prompt": f"a{number} cat"} for number in range(10)], {"prompt": "crash"})
    with without_model(tmp_path, "--batches", str(tmp_path / "b")) as server:
        server.wait()
        name = accept(server, body).json()["id"]
        found = {one["line"]: one for one in results(server, name)}
        assert len(found) == 11 and found[10]["error"]["code"] == "worker_lost"
        assert all(found[line]["error"] is None for line in range(10))
        assert server.metric("sage_worker_restarts") == 3


@pytest.mark.slow
def test_two_servers_of_one_folder_share_the_work_and_neither_draws_it_twice(tmp_path):
    arguments = ("--batches", str(tmp_path / "b"), "--seconds", "0.05")
    with without_model(tmp_path, *arguments) as first, without_model(tmp_path, *arguments) as second:
        first.wait()
        second.wait()
        name = accept(first, prompts(60)).json()["id"]
        other = accept(second, prompts(10)).json()["id"]
        assert len(results(first, other)) == 10
        assert second.client.post(f"/v1/batches/{other}/cancel").json()["status"] == "completed"
        wait_for(lambda: batch(second, name)["request_counts"]["completed"] > 5, 60)
        first.process.kill()
        # The other one takes it over.
        assert sorted(one["line"] for one in results(second, name)) == list(range(60))
        assert second.metric("sage_batches_open") == 0
