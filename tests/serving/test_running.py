"""`kalm serve` as a process: how it starts, stops, fails, and shares its work among workers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import httpx
import psutil
import pytest
from tools.command_line import KALM, assert_fails, run_process
from tools.services import Running, kalm_serve, number, wait_until_ready
from tools.waiting import until
from typer.testing import CliRunner

from kalm_integrations.cli import app as cli

TEXTS = [f"passage number {n} about otters" for n in range(20)]
BODY = {"query": "otters", "documents": TEXTS}


def n_answered(service: Running) -> float:
    return number(service.url, "kalm_requests_total", endpoint="/v2/rerank")


def test_a_signal_to_stop_waits_for_what_runs(tmp_path):
    with kalm_serve(tmp_path) as service:
        answers = []

        def ask(number):
            many = [f"{text} {number} {n}" for n in range(5) for text in TEXTS]
            answers.append(httpx.post(f"{service.url}/v2/rerank", json={**BODY, "documents": many}, timeout=120))

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        # A connection that is not accepted yet is refused by a service that stops. Whoever asks for the numbers counts too.
        until(lambda: number(service.url, "kalm_requests_in_progress") + n_answered(service) > len(threads))
        until(lambda: number(service.url, "kalm_queue_items") > 0)
        service.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert service.process.wait(60) == 0
    assert [answer.status_code for answer in answers] == [200] * 3
    assert all(len(answer.json()["results"]) == 100 for answer in answers)


def test_workers_share_their_numbers_and_end_well(tmp_path):
    with kalm_serve(tmp_path, "--workers", 2) as service:
        # A new connection each, which whichever worker is free accepts.
        for _ in range(20):
            assert httpx.post(f"{service.url}/v2/rerank", json=BODY).status_code == 200
        counts = {n_answered(service) for _ in range(10)}
        assert counts == {20}
        assert number(service.url, "kalm_pairs_scored_total") == 20 * len(TEXTS)
        assert len(TEXTS) <= number(service.url, "kalm_passages_encoded_total") <= 2 * len(TEXTS)
        until(lambda: number(service.url, "kalm_ready") >= 2, 60)
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 0
        assert "Traceback" not in service.log.read_text()


def test_a_worker_that_dies_is_replaced(tmp_path):
    with kalm_serve(tmp_path, "--workers", 2) as service:
        children = psutil.Process(service.process.pid).children()
        assert len(children) == 2
        httpx.post(f"{service.url}/v2/rerank", json=BODY)
        children[0].kill()
        until(lambda: len({child.pid for child in psutil.Process(service.process.pid).children()} - {children[0].pid}) >= 2)
        wait_until_ready(service.url, service.process)
        assert n_answered(service) == 1
        others = psutil.Process(service.process.pid).children()
        # Nobody is left behind, however the parent ends.
        service.process.kill()
        psutil.wait_procs(others, timeout=60)
        assert not any(child.is_running() for child in others)


def test_the_model_may_be_missing(tmp_path):
    for workers in (1, 2):
        done = run_process("serve", "--port", 0, "--model", tmp_path / "none", "--workers", workers)
        assert done.returncode == 2
        assert b"kalm: error: " in done.stderr
        assert str(tmp_path / "none").encode() in done.stderr
        assert b"Traceback" not in done.stderr


def test_a_signal_that_comes_first_stops_it_too():
    with subprocess.Popen([*KALM, "serve", "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert b"http://" in process.stdout.readline()
        process.terminate()
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--api-key-env", "KALM_NO_SUCH_KEY"], "'KALM_NO_SUCH_KEY' is unset or empty"),
        (["--port", "99999"], "65535"),
        (
            ["--host", "127.0.0.999", "--api-key-env", "HOME"],
            "host and port must be an address that this machine can listen on",
        ),
        (["--codec", "zip"], "storage_codec must be one of"),
        (["--timeout", "-1"], "timeout"),
        (["--max-store-bytes", "1000000000"], "bounds a store, but store is None"),
        (["--name", ""], "must not be empty"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(arguments, message):
    done = run_process("serve", *arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"kalm: error: ")
    assert message in done.stderr.decode()


@pytest.mark.parametrize("module", ["fastapi", "prometheus_client", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    message = f"needs {module}, which is not installed; run: pip install 'kalm-integrations[serve]'"
    assert_fails(CliRunner().invoke(cli, ["serve", "--port", "0"], catch_exceptions=False), message)


def test_a_port_that_is_taken_is_an_error_and_a_service_without_a_key_is_warned_of(service):
    port = service.url.rpartition(":")[2]
    warning = b"kalm: warning: everybody who reaches 0.0.0.0 may ask"
    for options, is_warned in (((), True), (("--api-key-env", "HOME"), False)):
        done = run_process("serve", "--host", "0.0.0.0", "--port", port, *options)
        assert done.returncode == 2
        assert b"host and port must be an address" in done.stderr
        assert (warning in done.stderr) == is_warned
    assert b"warning" not in run_process("serve", "--port", port).stderr


def test_each_request_is_a_line_of_json(service):
    httpx.post(f"{service.url}/v1/rerank", json={**BODY, "top_n": 1})
    expected = {"method": "POST", "path": "/v1/rerank", "status": 200, "n_documents": 20}
    # It is written when the answer has been sent.
    until(lambda: any(line.items() >= expected.items() for line in logged(service)))


def logged(service: Running) -> list[dict]:
    return [json.loads(line) for line in service.log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
