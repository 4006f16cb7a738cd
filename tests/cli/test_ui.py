"""`kalm ui`: where the page is, and what it has from the start."""

from __future__ import annotations

import re
import signal
import socket
import stat
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from tools.command_line import TEXTS, Run, assert_fails, run_process, write_jsonl
from tools.services import kalm_serve
from tools.waiting import until


def test_it_serves_the_page_with_a_file_until_it_is_stopped(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"title": "T", "body": text} for text in TEXTS])
    options = (tmp_path / "p.jsonl", "--port", 0, "--text-field", "body", "--candidates", 3, "--ratio", 8)
    with kalm_serve(tmp_path, *options, command="ui") as service:
        assert "kalm ui" in httpx.get(service.url, follow_redirects=True).raise_for_status().text
        facts = httpx.get(f"{service.url}/ui/facts").raise_for_status().json()
        assert facts["collection"]["first_stage"] == "BM25"
        assert (facts["collection"]["n_passages"], facts["collection"]["limit"], facts["ratio"]) == (4, 3, 8)
        answer = httpx.post(f"{service.url}/ui/rank", json={"query": "super bowl"}).raise_for_status().json()
        assert answer["passages"][0]["text"] == f"T {TEXTS[2]}"
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 0
        # No access log, unless it is asked for.
        assert "/ui/rank" not in service.log.read_text()


def test_a_taken_port_is_an_error_only_if_it_was_asked_for(tmp_path: Path) -> None:
    with socket.socket() as taken:
        with suppress(OSError):  # by somebody else
            taken.bind(("127.0.0.1", 8080))
            taken.listen()
        done = run_process("ui", "--port", 8080)
        assert done.returncode == 2
        assert b"host and port must be an address" in done.stderr
        with kalm_serve(tmp_path, command="ui") as service:
            assert not re.search(r":8080\b", service.url)


def test_it_opens_the_browser_if_it_is_told_to(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    browser = tmp_path / "browser"
    browser.write_text(f"#!{sys.executable}\nimport sys\nopen({str(seen)!r}, 'w').write(sys.argv[1])\n")
    browser.chmod(browser.stat().st_mode | stat.S_IXUSR)
    with kalm_serve(tmp_path, "--port", 0, "--open", command="ui", BROWSER=f"{browser} %s") as service:
        until(lambda: seen.exists() and seen.read_text() == f"{service.url}/ui/")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "none.jsonl"),
        (["bad.jsonl"], "bad.jsonl:1: a row must have its passage under 'text'"),
        (["--codec", "zip"], "storage_codec must be one of"),
        (["--candidates", "0"], "--candidates"),
        (["--api-key-env", "KALM_NO_SUCH_KEY"], "'KALM_NO_SUCH_KEY' is unset or empty"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_served(run: Run, arguments: list[str], message: str) -> None:
    write_jsonl(Path("bad.jsonl"), [{"txt": "a"}])
    assert_fails(run("ui", "--port", 0, *arguments), message)


@pytest.mark.parametrize("module", ["fastapi", "prometheus_client", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = f"kalm ui needs {module}, which is not installed; run: pip install 'kalm-integrations[serve]'"
    assert_fails(run("ui", "--port", 0), message)
