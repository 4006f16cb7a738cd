"""Helper threads of PyTorch, counted by the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TASKS = Path("/proc/self/task")

pytestmark = pytest.mark.skipif(not TASKS.exists(), reason="only Linux lists a process's threads here")

COUNTED = """
import os, sys, time, torch
from kalm_integrations.core.openmp import release_helpers
torch.set_num_threads(4)
n_tasks = lambda: len(os.listdir("/proc/self/task"))
compute = lambda: torch.ones(10**6).sum().item()
"""


def run(code: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", COUNTED + code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "4"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_helpers_go_and_come_back():
    alone, computed, released, again = map(
        int,
        run("print(n_tasks()); compute(); print(n_tasks()); release_helpers(); print(n_tasks()); compute(); print(n_tasks())"),
    )
    assert (computed - alone, released - alone, again - alone) == (3, 0, 3)


def test_a_thread_without_helpers_has_nothing_to_release():
    alone, released = map(int, run("print(n_tasks()); release_helpers(); release_helpers(); print(n_tasks())"))
    assert released == alone


def test_a_child_does_not_wait_for_helpers_that_only_its_parent_has():
    code = """
import threading
compute()
child = os.fork()
if child == 0:
    release_helpers()  # of the thread that was forked: must not hang
    def on_a_new_thread():
        compute(); before = n_tasks(); release_helpers(); os._exit(0 if n_tasks() == before - 3 else 1)
    threading.Thread(target=on_a_new_thread).start()
    time.sleep(60)
print(os.waitpid(child, 0)[1])
"""
    assert run(code) == ["0"]


def test_other_openmps_are_left_alone():
    code = """
from pathlib import Path
Path.glob = lambda *_: []
compute(); before = n_tasks(); release_helpers(); print(n_tasks() - before)
"""
    assert run(code) == ["0"]


def test_bulk_encoding_waits_without_helpers(tmp_path: Path):
    code = """
from kalm_integrations import KalmReranker
from kalm_integrations.bulk import encode_corpus
folder = sys.argv[1]
with open(f"{folder}/in.jsonl", "w") as file:
    for number in range(6000):
        file.write('{"text": "otters eat fish %d"}\\n' % number)
reranker = KalmReranker.from_pretrained("pico")
reranker.encode_to_metadata(["otters"])
compute()
seen = [n_tasks()]
encode = reranker.encode_to_metadata
reranker.encode_to_metadata = lambda texts: (seen.append(n_tasks()), encode(texts))[1]
encode_corpus(f"{folder}/in.jsonl", f"{folder}/out.jsonl", reranker)
print(*(count - seen[0] for count in seen[1:]))
"""
    # Three helpers less, and at most two threads more, which read ahead and write behind.
    first, second = map(int, run(code, str(tmp_path)))
    assert first < 0
    assert second < 0
