"""docs/troubleshooting.md: each message on the page is what the code says, and each that is provoked here is on the page."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore
from markdown_it import MarkdownIt
from tools.paths import DOCS
from typer.testing import CliRunner

from kalm_integrations import KalmReranker, Passage, RemoteReranker
from kalm_integrations.cli import app
from kalm_integrations.core import opening
from kalm_integrations.core.checkpoint.locate import BUILT_IN
from kalm_integrations.errors import KalmError
from kalm_integrations.langchain import KalmPassageEncoder, KalmRerank

PAGE = DOCS / "troubleshooting.md"


def messages_on_the_page() -> list[str]:
    tokens = MarkdownIt().parse(PAGE.read_text(encoding="utf-8"))
    return [token.content.strip() for token in tokens if token.type == "fence" and token.info == "text"]


def pattern_of(message: str) -> str:
    """A regular expression for a message whose names and numbers are `…`."""
    return ".+".join(map(re.escape, message.split("…")))


class PineconeVectorStore(InMemoryVectorStore):
    """Known by its name."""


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(KalmError) as caught:
        call()
    return str(caught.value)


def command_error(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    return done.stderr.strip().splitlines()[-1].removeprefix("kalm: error: ")


def process_error(code: str, **environment: str) -> str:
    """What is raised where another environment is needed."""
    code = f"from kalm_integrations.errors import KalmError\ntry:\n    {code}\nexcept KalmError as error:\n    print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(DOCS.parent), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.strip()


def open_pico(**settings: Any) -> KalmReranker:
    return KalmReranker.from_pretrained("pico", **settings)


def pico_without(name: str, folder: Path) -> Path:
    return shutil.copytree(BUILT_IN / "pico", folder / f"without-{name}", ignore=shutil.ignore_patterns(name))


def provoke_installation(patch: pytest.MonkeyPatch) -> Iterator[str]:
    block = "import sys; sys.modules['langchain_core'] = None; import kalm_integrations.langchain"
    yield process_error(block)
    patch.setitem(sys.modules, "fastapi", None)
    yield command_error("serve")
    yield error_of(lambda: open_pico(device="cuda:9"))
    yield error_of(lambda: open_pico(dtype="float16"))


def provoke_checkpoints(folder: Path, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    yield error_of(lambda: KalmReranker.from_pretrained("nanno"))
    yield error_of(lambda: KalmReranker.from_pretrained("./nano"))
    nano = "from kalm_integrations import KalmReranker; KalmReranker.from_pretrained('nano')"
    yield process_error(nano, HF_HOME=str(folder))
    yield process_error(nano, HF_HOME=str(folder), HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    yield error_of(lambda: KalmReranker.from_pretrained(pico_without("config.json", folder)))
    yield error_of(lambda: KalmReranker.from_pretrained(pico_without("*.safetensors", folder)))
    bert = folder / "bert"
    bert.mkdir()
    (bert / "config.json").write_text(json.dumps({"model_type": "bert"}))
    yield error_of(lambda: KalmReranker.from_pretrained(bert))
    opening._warn_of_ratio.cache_clear()
    yield logged(caplog, lambda: open_pico(compression_ratio=64))


def provoke_queries(folder: Path) -> Iterator[str]:
    reranker = open_pico()
    yield error_of(lambda: reranker.rank("q", "one passage"))
    yield error_of(lambda: reranker.rank("q", [{"text": "a row"}]))
    (folder / "passages.jsonl").write_text('{"body": "a"}\n')
    yield command_error("rerank", " ", "passages.jsonl")
    yield command_error("rerank", "q", "passages.jsonl")
    yield error_of(lambda: KalmRerank(top_k=3))


def provoke_encodings(folder: Path, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    yield error_of(lambda: open_pico(storage_codec="rot5"))
    yield error_of(lambda: open_pico(compression_ratio=0))
    store = PineconeVectorStore(DeterministicFakeEmbedding(size=4))
    long = [Document(page_content="Otters eat fish. " * 60)]
    yield error_of(lambda: KalmPassageEncoder(store=store, storage_codec="fp32").transform_documents(long))
    yield error_of(lambda: open_pico(max_inline_bytes=100).encode_to_metadata(["Otters eat fish."]))
    encoded = open_pico(max_passage_tokens=77).encode_passages(["Otters eat fish."])
    yield error_of(lambda: open_pico().rank("q", encoded))
    yield error_of(lambda: KalmRerank(on_missing="error").compress_documents([Document("a")], "q"))
    whole: Any = open_pico().encode_to_metadata(["Otters eat fish."])[0]
    yield logged(caplog, lambda: open_pico().rank("q", [Passage("Otters eat fish.", whole)]))


def provoke_services() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield command_error("serve", "--port", str(taken.getsockname()[1]))
        port = taken.getsockname()[1]
    yield error_of(lambda: RemoteReranker(f"http://127.0.0.1:{port}", max_retries=0).rank("q", ["a"]))
    yield error_of(lambda: RemoteReranker("localhost:8080"))
    yield error_of(lambda: KalmReranker.from_pretrained("http://localhost:8080"))


def logged(caplog: pytest.LogCaptureFixture, call: Callable[[], object]) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "kalm_integrations"):
        call()
    [record] = [record for record in caplog.records if record.name.startswith("kalm_integrations")]
    return record.getMessage()


def test_messages_are_what_the_code_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    said = [
        *provoke_checkpoints(tmp_path, caplog),
        *provoke_queries(tmp_path),
        *provoke_encodings(tmp_path, caplog),
        *provoke_services(),
        *provoke_installation(monkeypatch),
    ]
    patterns = {message: re.compile(pattern_of(message)) for message in messages_on_the_page()}
    unsaid = [message for message, pattern in patterns.items() if not any(pattern.fullmatch(each) for each in said)]
    assert unsaid == [], "messages on the page that the code does not say (any more)"
    missing = [each for each in said if not any(pattern.fullmatch(each) for pattern in patterns.values())]
    assert missing == [], "messages that are not on the page"


def test_no_pattern_takes_everything() -> None:
    """A message on the page must name its rule, or its test would pass whatever the code says."""
    assert min(len(message.replace("…", "")) for message in messages_on_the_page()) > 40
