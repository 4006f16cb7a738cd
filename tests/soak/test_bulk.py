"""Bulk runs that are killed again and again, over corpora of all shapes; `make soak` goes on for a tenth of its time."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from tools.bulk import content, encode_with_stub, in_child, run_to_the_end, write_rows

SHARE = 0.1
MAX_KILLS = 12


def test_runs_that_are_killed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each corpus ends with the bytes of one run, whatever its size, its repetitions, and the format."""
    monkeypatch.chdir(tmp_path)
    end = time.monotonic() + SHARE * float(os.environ.get("KALM_SOAK_SECONDS", "0"))
    draw = random.Random(0)
    n_rounds = n_killed = 0
    while not n_rounds or time.monotonic() < end:
        n_rounds += 1
        name = draw.choice(("out.jsonl", "out.jsonl.gz", "out.parquet"))
        source, one, output = Path("corpus.jsonl"), Path("one") / name, Path("killed") / name
        one.parent.mkdir()
        output.parent.mkdir()
        n_rows = draw.randint(1, 400)
        write_rows(source, n_rows, draw.randint(1, n_rows))
        seconds = run_to_the_end(partial(encode_with_stub, source, one))
        for _ in range(draw.randint(1, MAX_KILLS)):
            child = in_child(partial(encode_with_stub, source, output))
            time.sleep(draw.uniform(0, 1.2 * seconds))
            os.kill(child, signal.SIGKILL)
            n_killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        run_to_the_end(partial(encode_with_stub, source, output))
        assert content(output) == content(one), (n_rounds, name)
        assert [path.name for path in output.parent.iterdir()] == [name]
        shutil.rmtree(one.parent)
        shutil.rmtree(output.parent)
    print(f"{n_rounds} corpora, {n_killed} runs killed")
