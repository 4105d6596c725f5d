"""Generated bodies: whatever a client sends, the answer is its error, never the server's."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import PATH, without_model

from flows.serving import batch_lines
from flows.serving.requests import ImagesRequest, Limits, Model, RequestError

FIELDS = sorted(ImagesRequest.model_fields)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
# Nearly right: most fields as they should be, so that not all bodies fail at the first check.
PLAUSIBLE = st.fixed_dictionaries(
    {"prompt": st.text(max_size=30) | st.lists(st.text(max_size=30), max_size=4)},
    optional={
        "n": st.integers(-1, 5),
        "size": st.sampled_from(["64x64", "8x8", "0x8", "64", "99999x99999", "auto", "64x64\n", "\u0661x8"]),
        "seed": st.integers(-1, 2**64),
        "seeds": st.lists(st.integers(-1, 2**64), max_size=3),
        "steps": st.integers(-1, 2000),
        "guidance_scale": st.floats(),
        "share_ratio": st.floats(-0.5, 1.5),
        "branch_noise": st.floats(-0.5, 1.5),
        "image_steps": st.integers(-1, 8),
        "negative_prompt": st.text(max_size=30),
        "share": st.sampled_from(["none", "request", "tenant", ""]),
        "user": st.text(max_size=300),
        "lora": st.text(max_size=5) | st.dictionaries(st.text(max_size=5), st.floats(), max_size=3),
        "model": st.text(max_size=10),
        "response_format": st.sampled_from(["b64_json", "url", "png"]),
        "stream": st.booleans(),
        "literal": st.booleans(),
    },
)
BODIES = st.one_of(
    st.binary(max_size=100),
    ANYTHING.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(FIELDS), ANYTHING).map(lambda value: json.dumps(value).encode()),
    PLAUSIBLE.map(lambda value: json.dumps(value).encode()),
    PLAUSIBLE.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    with without_model(tmp_path_factory.mktemp("quick")) as server:
        server.wait()
        yield server


@pytest.mark.slow
@given(BODIES)
@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_body_is_a_server_error(quick, body):
    answer = quick.client.post(PATH, content=body, headers={"Content-Type": "application/json"}, timeout=5)
    assert answer.status_code in (200, 400, 404, 422)
    assert answer.status_code == 200 or set(answer.json()["error"]) == {"message", "type", "param", "code"}


@given(BODIES.map(lambda body: body.replace(b"\n", b" ")), st.sampled_from([b"", b'"body"', b'"custom_id"', b'"url"']))
@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_line_of_a_batch_is_more_than_an_error_item(line, key):
    if key:
        line = line.replace(b'"prompt"', key, 1)
    try:
        found = batch_lines.parsed(line)
        model = Model("m", "0" * 64, {"steps": 6, "guidance_scale": 1.0, "share_ratio": 0.3}, (64, 64), 8, 1)
        batch_lines.checked(0, found, 1, None, Limits(), model)
    except RequestError as error:
        assert error.status in (400, 404, 422) and str(error).isprintable()


@given(
    st.dictionaries(st.sampled_from(["content-type", "accept", "origin", "authorization", "x"]), st.binary(max_size=30))
)
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_no_header_is_a_server_error(quick, headers):
    try:
        answer = quick.client.post(PATH, content=b'{"prompt": "a"}', headers=headers, timeout=5)
    except httpx.LocalProtocolError:
        return  # the client does not send it
    assert answer.status_code < 500
