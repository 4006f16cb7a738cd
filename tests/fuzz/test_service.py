"""Requests of all kinds to the service: those that its own description allows, bodies of any JSON, and bodies of any bytes.

None is answered by a failure, each error says what is wrong in a few words, and the service answers as before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tools.fuzzing import rounds
from tools.services import in_process

from kalm_integrations import KalmReranker
from kalm_integrations.serving.app import create_app
from kalm_integrations.serving.settings import ServiceSettings

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
PATHS = ["/v2/rerank", "/v1/rerank", "/rerank", "/v1/score", "/v1/encodings"]
QUIET = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
RIGHT = {"query": "otters", "documents": ["the Rhine", "otters"]}

TEXT = st.text(st.characters(codec=None), max_size=30)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["query", "documents", "texts", "passages", "model", "top_n", "instruction", "return_documents", "raw_scores"]
FIELDS += [
    "return_text",
    "truncate",
    "truncation_direction",
    "max_tokens_per_doc",
    "client",
    "rank_fields",
    "priority",
]
NEARLY_RIGHT: dict[str, st.SearchStrategy] = {
    "query": TEXT,
    "documents": st.lists(TEXT | st.fixed_dictionaries({"text": TEXT}), max_size=4),
    "texts": st.lists(TEXT, max_size=4),
    "passages": st.lists(
        st.fixed_dictionaries({"text": TEXT}, optional={"encoding": TEXT | st.none(), "held": TEXT | st.none()}), max_size=4
    ),
    "top_n": st.integers(-1, 9),
}
BODIES = st.fixed_dictionaries({}, optional={name: NEARLY_RIGHT.get(name, VALUES) | VALUES for name in FIELDS}) | VALUES


@pytest.fixture(scope="module")
def url(tiny_checkpoint: Path) -> Iterator[str]:
    reranker = KalmReranker.from_pretrained(tiny_checkpoint)
    app = create_app(ServiceSettings.make(model="fake", max_documents=50), lambda _: reranker)
    with in_process(app) as found:
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as found:
        right = [result["index"] for result in found.post("/v2/rerank", json=RIGHT).json()["results"]]
        yield found
        assert [result["index"] for result in found.post("/v2/rerank", json=RIGHT).json()["results"]] == right


def test_what_the_description_allows_is_answered_as_it_says(url: str):
    operations = [result.ok() for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]
    assert {operation.path for operation in operations} >= set(PATHS)
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(QUIET, max_examples=max(10, rounds(150) // len(operations)))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS, timeout=60)

        check()


def assert_answered(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404, 413, 422), response.text
    if response.status_code != 200:
        assert list(response.json()) == ["detail"]
        assert len(response.json()["detail"]) < 1000


@given(path=st.sampled_from(PATHS), body=BODIES)
@settings(QUIET, max_examples=rounds(300))
def test_any_json_is_answered(client: httpx.Client, path: str, body: object):
    # As bytes, which hold halves of surrogate pairs, NaN and Infinity as well.
    content = json.dumps(body).encode()
    assert_answered(client.post(path, content=content, headers={"content-type": "application/json"}))


@given(path=st.sampled_from(PATHS), body=st.binary(max_size=200), kind=st.sampled_from(["application/json", "text/plain", ""]))
@settings(QUIET, max_examples=rounds(100))
def test_any_bytes_are_answered(client: httpx.Client, path: str, body: bytes, kind: str):
    assert_answered(client.post(path, content=body, headers={"content-type": kind}))


@given(lines=st.lists(BODIES.map(lambda body: json.dumps(body).encode()) | st.binary(max_size=50), max_size=5))
@settings(QUIET, max_examples=rounds(100))
def test_any_lines_are_answered(client: httpx.Client, lines: list[bytes]):
    headers = {"content-type": "application/x-ndjson"}
    answer = client.post("/v1/encodings", content=b"\n".join(lines), headers=headers)
    assert answer.status_code == 200
    given_lines = [line for line in b"\n".join(lines).split(b"\n") if line.strip()]
    answers = [json.loads(line) for line in answer.text.splitlines()]
    assert len(answers) == len(given_lines)
    assert all("detail" in line or "encodings" in line for line in answers)
