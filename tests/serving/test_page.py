"""docs/serving.md: what it asks with curl is answered as it shows, and what it names is there."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any, NamedTuple

import httpx
import pytest
from markdown_it import MarkdownIt
from tools.paths import ROOT
from tools.services import Running

from kalm_integrations.serving.errors import HUNG_UP, MEANINGS
from kalm_integrations.serving.metrics import Metrics

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


class Shown(NamedTuple):
    path: str
    body: str
    answer: Any


def shown() -> list[Shown]:
    """The requests of the page that are curl alone, and the answers that it shows."""
    found = []
    for token in MarkdownIt().parse(PAGE):
        if token.type == "fence" and token.info == "console" and token.content.startswith("$ curl"):
            command, _, answer = token.content.rpartition("'\n")
            _, url, _, header, _, body = shlex.split(command[2:].replace("\\\n", " ") + "'")
            assert header == "Content-Type: application/json"
            found.append(Shown(url.removeprefix("http://127.0.0.1:8080"), body, json.loads(answer)))
    return found


def assert_alike(found: Any, right: Any) -> None:
    if isinstance(right, dict):
        assert list(found) == list(right)
        for name in right:
            assert_alike(found[name], right[name])
    elif isinstance(right, list):
        assert len(found) == len(right)
        for one, other in zip(found, right, strict=True):
            assert_alike(one, other)
    elif isinstance(right, float):
        assert found == pytest.approx(right, abs=1e-5)
    elif isinstance(right, str) and "…" in right:
        assert isinstance(found, str)
    else:
        assert found == right


@pytest.mark.parametrize("request_of_page", shown(), ids=lambda request: request.path)
def test_requests_are_answered_as_shown(service: Running, request_of_page: Shown):
    path, body, answer = request_of_page
    found = httpx.post(f"{service.url}{path}", content=body, headers={"content-type": "application/json"})
    assert_alike(found.raise_for_status().json(), answer)


def test_all_formats_are_shown():
    assert [request.path for request in shown()] == ["/v2/rerank", "/v1/rerank", "/rerank", "/v2/rerank", "/v1/encodings"]


def test_the_table_of_errors_is_that_of_the_code():
    assert {int(status) for status in re.findall(r"^\| (\d{3}) \|", PAGE, re.MULTILINE)} == MEANINGS.keys() - {400}
    assert str(HUNG_UP) in PAGE


def test_the_metrics_of_the_page_are_those_of_the_service():
    text = Metrics().render().decode()
    kinds = dict(re.findall(r"^# TYPE (kalm_\w+) (\w+)$", text, re.MULTILINE))
    section = PAGE.partition("## Numbers and logs")[2].partition("## Traces")[0]
    named = set(re.findall(r"`(kalm_\w+)", section))
    assert named <= kinds.keys() | {"kalm_integrations"}
    ends = {name for name in kinds if not any(name.endswith(end.strip("…")) for end in re.findall(r"`(…_\w+)`", section))}
    assert ends <= named
