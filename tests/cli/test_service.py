"""`kalm rerank --model URL` and `kalm encode --server URL`: the same rows and scores as with the model at hand."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tools.command_line import KALM, QUERY, TEXTS, Run, assert_fails, read_jsonl, write_jsonl
from tools.stub_service import Service, refusal, serve

from kalm_integrations import KalmReranker
from kalm_integrations.core.settings import DEFAULT_CODEC
from kalm_integrations.remote import conversation, reranker


@pytest.fixture
def service(make_reranker: Callable[..., KalmReranker], monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service on the tiny checkpoint."""
    monkeypatch.delenv("KALM_API_KEY", raising=False)
    monkeypatch.setattr(conversation, "FIRST_PAUSE", 0.001)
    with serve(make_reranker(storage_codec=DEFAULT_CODEC)) as running:
        yield running


def test_encode_by_a_service_writes_what_encode_writes(run: Run, model: Any, service: Service) -> None:
    rows = [{"_id": i, "title": "Ünïcödé", "text": text, "n": [1]} for i, text in enumerate([*TEXTS, TEXTS[0]])]
    write_jsonl(Path("p.jsonl"), rows)
    there = run("encode", "p.jsonl", "--server", service.url)
    assert read_jsonl(there.stdout) == read_jsonl(run("encode", "p.jsonl", *model).stdout)
    assert f"4 passages sent to {service.url}" in there.stderr
    assert "at ratio 4 in" in there.stderr
    assert run("encode", "p.jsonl", "-o", "p.jsonl", "--server", service.url).exit_code == 0
    assert read_jsonl(Path("p.jsonl").read_text()) == read_jsonl(there.stdout)


def test_encode_goes_on_with_a_service_that_is_busy_or_gone_for_a_while(
    run: Run, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reranker, "TEXTS_PER_REQUEST", 1)
    service.instead.extend([refusal(503), lambda _: (0, {}, b""), lambda _: None, refusal(429), lambda _: (0, {}, b"")])
    result = run("encode", write_jsonl(Path("p.jsonl"), [{"text": text} for text in TEXTS]), "--server", service.url)
    assert [row["text"] for row in read_jsonl(result.stdout)] == TEXTS
    # Once with every text, once for what the service is, and once more after every failure.
    assert len(service.sent("/v1/encodings")) + len(service.sent("/v1/kalm")) == 4 + 1 + 4


def test_rerank_by_a_service(run: Run, model: Any, service: Service) -> None:
    write_jsonl(Path("p.jsonl"), [{"text": text} for text in TEXTS])
    run("encode", "p.jsonl", "-o", "e.jsonl", "--server", service.url)
    for name in ("p.jsonl", "e.jsonl"):
        there, here = (
            json.loads(run("rerank", QUERY, name, "--json", "--top-k", 3, *options).stdout)
            for options in (("--model", service.url), model)
        )
        assert [row["index"] for row in there["results"]] == [row["index"] for row in here["results"]]
        assert [row["row"] for row in there["results"]] == [row["row"] for row in here["results"]]
        assert [row["score"] for row in there["results"]] == pytest.approx([row["score"] for row in here["results"]], abs=1e-6)
    assert there["stats"]["metadata_hits"] == 4


def test_the_key_comes_from_the_environment(run: Run, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.key = "hunter2"
    monkeypatch.setenv("MY_KEY", "hunter2")
    write_jsonl(Path("p.jsonl"), [{"text": text} for text in TEXTS])
    for command in (("encode", "p.jsonl", "--server", service.url), ("rerank", QUERY, "p.jsonl", "--model", service.url)):
        assert_fails(run(*command), "401: a key is needed")
        assert_fails(run(*command, "--api-key-env", "MY_KEI"), "MY_KEI is not set")
        assert run(*command, "--api-key-env", "MY_KEY").exit_code == 0


@pytest.mark.parametrize(
    "options",
    [("--ratio", 8), ("--codec", "int8"), ("--model", "nano"), ("--device", "cpu"), ("--payload-store", "s")],
    ids=str,
)
def test_what_the_service_decides_is_refused(run: Run, options: Any) -> None:
    write_jsonl(Path("p.jsonl"), [{"text": "a"}])
    assert_fails(run("encode", "p.jsonl", "--server", "http://localhost:1", *options), "brings its own settings")


def test_other_commands_need_the_model_itself(run: Run) -> None:
    write_jsonl(Path("p.jsonl"), [{"text": "a"}])
    assert_fails(run("info", "--model", "http://localhost:1"), "kalm rerank --model")
    assert_fails(run("encode", "p.jsonl", "--model", "http://localhost:1"), "--server")
    assert_fails(run("encode", "p.jsonl", "--server", "localhost:1"), "http://host:port")
    assert_fails(run("rerank", "q", "p.jsonl", "--model", "http://me:hunter2@localhost:1"), "KALM_API_KEY")


def test_nothing_heavy_is_loaded(service: Service, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"text": text} for text in TEXTS])
    code = (
        "import sys; from kalm_integrations.cli import app\n"
        f"for command in (['encode', 'p.jsonl', '-o', 'e.jsonl', '--server', {service.url!r}],\n"
        f"                ['rerank', 'q', 'e.jsonl', '--model', {service.url!r}]):\n"
        "    try: app(command)\n"
        "    except SystemExit as done: assert not done.code, done.code\n"
        "loaded = {'torch', 'transformers', 'tokenizers'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([KALM[0], "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=tmp_path, env=os.environ)
