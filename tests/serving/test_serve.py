"""`sage serve` with a real model in a real process, asked by the official OpenAI client."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import psutil
import pytest
import tiny
from PIL import Image
from served import sage
from waiting import wait_for

from sage.sampling.pipeline import SharedSamplingPipeline
from sage.sampling.plan import Plan

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.pipeline("stable_diffusion", tmp_path_factory.mktemp("tokens")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with sage(model, tmp_path_factory.mktemp("serve"), "--deterministic") as running:
        running.wait()
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
        yield found


def pixels(b64):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def test_openais_client_gets_the_pipelines_own_images(client, model):
    extra = {"seeds": [5, 6], "steps": 4, "guidance_scale": 3.0}
    answer = client.images.generate(model="sage", prompt="red cat", n=2, size="16x16", extra_body=extra)
    pipe = SharedSamplingPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    plan = Plan.independent(2, 4)
    wanted = pipe(["red cat"] * 2, plan=plan, seed=[5, 6], num_inference_steps=4, guidance_scale=3.0, batch_size=1)
    for item, image in zip(answer.data, wanted.images, strict=True):
        assert np.array_equal(pixels(item.b64_json), np.asarray(image))
    assert answer.usage.evaluations == 16


def test_openais_client_streams(client):
    events = list(client.images.generate(prompt="red cat", stream=True, extra_body={"steps": 3, "seed": 1}))
    assert events[-2].type == "image_generation.completed" and pixels(events[-2].b64_json).shape == (16, 16, 3)


def test_openais_client_lists_the_model_and_gets_its_errors(client, model):
    assert [one.id for one in client.models.list()] == [str(model)]
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.images.generate(prompt="red cat", size="15x16")
    assert refused.value.param == "size"


def test_a_clients_image_is_the_same_with_and_without_others(server):
    def ask(prompt, seed):
        return server.ask(prompt, seed=seed).json()["data"][0]["b64_json"]

    alone = ask("tall tree", 7)
    with ThreadPoolExecutor(21) as pool:
        others = [pool.submit(ask, "tall trees", number) for number in range(20)]
        beside = pool.submit(ask, "tall tree", 7)
        assert beside.result() == alone
        assert len({other.result() for other in others}) == 20


def test_prompts_of_one_request_share_and_say_with_whom(server):
    prompts = ["a red cat on a mat", "the stock market fell", "a red cat on a rug"]
    answer = server.ask(prompts, steps=4, share_ratio=0.5, guidance_scale=1.0).json()
    assert [item["shared_with"] for item in answer["data"]] == [[2], [], [0]]
    assert answer["usage"] == {"evaluations": 10.0, "evaluations_alone": 12.0, "saved": pytest.approx(1 / 6, abs=1e-6)}
    answer = server.ask(prompts, steps=4, share_ratio=0.5, guidance_scale=1.0, share="none").json()
    assert answer["usage"]["saved"] == 0


def test_a_tenants_reworded_prompt_begins_where_the_first_branched(server):
    settings = {"share": "tenant", "user": "u", "steps": 4, "share_ratio": 0.5, "branch_noise": 1.0}
    first = server.ask("a red cat on a mat", **settings).json()["data"][0]
    again = server.ask("a red cat on a rug", **settings).json()["data"][0]
    other = server.ask("a red cat on a rug", **{**settings, "user": "v"}).json()["data"][0]
    assert [item["prefix"] for item in (first, again, other)] == [None, "similar", None]
    assert again["evaluations"] == first["evaluations"] / 2
    assert server.metric('sage_prefixes_total{start="similar"}') == 1
    assert server.metric("sage_prefixes_bytes") > 0


def test_prefixes_on_disk_survive_a_restart_even_by_a_kill(model, tmp_path):
    settings = {"share": "tenant", "user": "u", "steps": 4, "share_ratio": 0.5, "branch_noise": 1.0}
    arguments = (model, tmp_path, "--prefix-folder", str(tmp_path / "prefixes"))

    def asked(prompt, **changes):
        item = server.ask(prompt, **settings | changes).json()["data"][0]
        return item["prefix"], item["evaluations"]

    with sage(*arguments) as server:
        server.wait()
        first = asked("a red cat on a mat")
        wait_for(lambda: server.metric("sage_prefix_files") >= 1, 60)
        (path,) = (tmp_path / "prefixes").glob("*.safetensors")
    with sage(*arguments) as server:
        server.wait()
        assert asked("a red cat on a rug") == ("similar", first[1] / 2)
        assert asked("a red cat on a rug", user="v") == first
    path.write_bytes(path.read_bytes()[:-1])
    with sage(*arguments) as server:
        server.wait()
        assert asked("a red cat on a rug") == first
        assert server.metric("sage_prefix_files_damaged") == 1


def test_tenants_use_each_others_prefixes_only_if_the_server_is_told_so(model, tmp_path):
    settings = {"share": "tenant", "steps": 4, "share_ratio": 0.5, "branch_noise": 1.0}
    with sage(model, tmp_path, "--prefixes-across-tenants") as server:
        server.wait()
        server.ask("a red cat on a mat", user="u", **settings)
        assert server.ask("a red cat on a rug", user="v", **settings).json()["data"][0]["prefix"] == "similar"


def test_what_cannot_be_drawn_is_the_clients_error(server):
    assert server.ask("a", size="16x16", branch_noise=1.0, steps=1).status_code == 200
    assert server.ready()["ready"]


def test_only_the_loopback_address_listens(server):
    family = psutil.Process(server.process.pid)
    members = [family, *family.children(recursive=True)]
    listening = [c.laddr for one in members for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening == [("127.0.0.1", server.port)]


def test_a_model_that_is_missing_is_said_at_once(tmp_path):
    with sage(tmp_path / "nothing", tmp_path) as server:
        assert server.process.wait(90) == 1
        assert "cannot be served" in server.log.read_text()
