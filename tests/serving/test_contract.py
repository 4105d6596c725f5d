"""The OpenAPI document keeps its word: generated requests get the answers that it describes, and never a 5xx."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from served import PATH, without_model

pytestmark = pytest.mark.slow

CHECKS = [
    not_a_server_error,
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]
OPERATIONS = [
    ("GET", "/v1/models"),
    ("GET", "/images/{name}"),
    ("POST", PATH),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches"),
    ("GET", "/v1/batches/{name}"),
    ("POST", "/v1/batches/{name}/cancel"),
    ("GET", "/v1/batches/{name}/results"),
]


@schemathesis.serializer("application/jsonl")
def as_lines(context, value):
    return {"data": value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")}


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contract")
    with without_model(folder, "--batches", str(folder / "batches")) as server:
        server.wait()
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_operation_is_asked(api):
    assert {(found.ok().method.upper(), found.ok().path) for found in api.get_all_operations()} == set(OPERATIONS)


POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
# Only these have something that can be wrong.
MODES = [(POSITIVE, *one) for one in OPERATIONS] + [(NEGATIVE, "POST", PATH), (NEGATIVE, *OPERATIONS[-1])]


@pytest.mark.parametrize(("mode", "method", "path"), MODES, ids=str)
def test_generated_requests_get_answers_as_described(api, method, path, mode):
    @given(api[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def ask(case):
        case.call_and_validate(checks=CHECKS, timeout=10)

    ask()
