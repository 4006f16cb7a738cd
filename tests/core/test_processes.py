"""Several processes over the same folders, one of which is killed in the middle of its work."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kalm_integrations import KalmReranker

QUERY = "what do otters eat?"
TEXTS = [f"Passage {i}: otters eat fish and crabs." for i in range(12)]

WORK = """
import json, sys
from kalm_integrations import KalmReranker, Passage
folder, stores, texts, rounds = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
for number in range(rounds):
    settings = {"storage_mode": "reference", "payload_store": stores + "/payloads", "prefix_store": stores + "/prefixes"}
    reranker = KalmReranker.from_pretrained(folder, storage_codec="fp32", prefix_cache_bytes=0, **settings)
    some = [text + f" {sys.argv[5]} {number}" for text in texts[:4]]
    made = [metadata["kalm_encoding"] for metadata in reranker.encode_to_metadata([*texts, *some])]
    scores = reranker.score("what do otters eat?", [Passage(*pair) for pair in zip([*texts, *some], made)])
    print(json.dumps([scores[: len(texts)], reranker.stats.corrupt, reranker.stats.store_failures]), flush=True)
"""


def start(folder: Path, stores: Path, rounds: int, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORK, str(folder), str(stores), json.dumps(TEXTS), str(rounds), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_process_that_is_killed_spoils_nothing_for_the_others(tiny_checkpoint: Path, tmp_path: Path):
    right = KalmReranker.from_pretrained(tiny_checkpoint, storage_codec="fp32", prefix_cache_bytes=0).score(QUERY, TEXTS)
    victim = start(tiny_checkpoint, tmp_path, 10_000, "victim")
    others = [start(tiny_checkpoint, tmp_path, 5, name) for name in ("a", "b")]
    assert victim.stdout is not None
    for _ in range(3):
        assert victim.stdout.readline()
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    for process in others:
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
        assert len(output.splitlines()) == 5
        for line in output.splitlines():
            scores, n_corrupt, n_failures = json.loads(line)
            assert (n_corrupt, n_failures) == (0, 0)
            assert scores == pytest.approx(right, abs=1e-5)
    after = KalmReranker.from_pretrained(
        tiny_checkpoint,
        storage_codec="fp32",
        prefix_cache_bytes=0,
        payload_store=tmp_path / "payloads",
        prefix_store=tmp_path / "prefixes",
    )
    assert after.score(QUERY, TEXTS) == pytest.approx(right, abs=1e-5)
    assert after.stats.store_failures == 0
