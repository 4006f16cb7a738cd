"""Runs that end before their time: killed, stopped, out of room, or beside another one. What was written is kept."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tools.bulk import BatchReranker, content, encode_with_stub, in_child, run_to_the_end, write_rows
from tools.command_line import KALM, TEXTS, run_process, write_jsonl
from tools.waiting import until

from kalm_integrations.bulk import Progress, encode_corpus, read_encoded
from kalm_integrations.bulk.state import WorkFolder

N_KILLS = 20
NAMES = ("out.jsonl", "out.jsonl.gz", "out.parquet")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_is_removed_before_the_last_step_is_made_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run was killed when its output was in place and its folder was not gone yet."""
    source, output = Path("corpus.jsonl"), Path(name)
    write_rows(source, 20, 10)
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", lambda self: None)
        encode_with_stub(source, output)
    expected = content(output)
    for path in [output] if output.is_file() else output.iterdir():
        path.unlink()
    if output.exists():
        output.rmdir()
    encode_with_stub(source, output)
    assert content(output) == expected


@pytest.mark.parametrize("name", NAMES)
def test_runs_that_are_killed_end_as_one_run_does(name: str) -> None:
    """kill -9 at random moments: every row once, in order, and every byte as if nothing had happened."""
    source = Path("corpus.jsonl")
    rows = write_rows(source, 160, 60)
    expected, output = Path("one") / name, Path(name)
    expected.parent.mkdir()
    seconds = run_to_the_end(lambda: encode_with_stub(source, expected))
    draw = random.Random(name)
    n_killed = 0
    for _ in range(N_KILLS):
        if output.exists():
            assert content(output) == content(expected)
            for path in [output] if output.is_file() else output.iterdir():
                path.unlink()
            if output.exists():
                output.rmdir()
        child = in_child(lambda: encode_with_stub(source, output))
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        n_killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert n_killed
    run_to_the_end(lambda: encode_with_stub(source, output))
    assert content(output) == content(expected)
    found = list(read_encoded(output))
    assert [(row["_id"], row["text"]) for row in found] == [(row["_id"], row["text"]) for row in rows]
    assert sorted(path.name for path in Path().iterdir()) == sorted(["corpus.jsonl", "one", name])


def test_a_run_goes_on_after_what_is_done() -> None:
    """What is encoded after a kill is what had not been written, and repeated texts are not encoded again."""
    source, output = Path("corpus.jsonl"), Path("out.jsonl")
    write_rows(source, 200, 50)

    def end_in_the_middle(progress: Progress) -> None:
        if progress.windows == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    child = in_child(lambda: encode_corpus(source, output, BatchReranker(), on_progress=end_in_the_middle))
    os.waitpid(child, 0)

    def go_on() -> None:
        reranker = BatchReranker()
        report = encode_corpus(source, output, reranker)
        assert report.resumed_rows == 6 * 16
        assert report.counts.rows == 200
        assert reranker.stats.passages_encoded == 0, "all texts are among the first rows"

    run_to_the_end(go_on)


def test_a_second_run_on_an_output_is_refused_until_the_first_is_gone() -> None:
    source, output = Path("corpus.jsonl"), Path("out.parquet")
    write_rows(source, 20, 20)

    def hold() -> None:
        folder = WorkFolder(output.resolve())
        Path("held").touch()
        time.sleep(60)
        folder.close()

    child = in_child(hold)
    until(lambda: Path("held").exists())
    with pytest.raises(ValueError, match=r"must have one run at a time, but another one is writing .*out\.parquet"):
        encode_corpus(source, output, BatchReranker())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert encode_corpus(source, output, BatchReranker()).counts.rows == 20


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_keeps_what_was_written(name: str) -> None:
    """The system refuses to let files grow, as a full disk does."""
    source, output = Path("corpus.jsonl"), Path(name)
    write_rows(source, 400, 400)
    padding = {"x": "".join(random.Random(0).choices("abcdefghijklmnop", k=1500))}
    rows = [{**row, **(padding if index > 200 else {})} for index, row in enumerate(read_encoded(source))]
    write_jsonl(source, rows)
    limit = {"out.jsonl": 100_000, "out.jsonl.gz": 14_000, "out.parquet": 3_800}[name]
    child = in_child(lambda: encode_with_stub(source, output), max_file_bytes=limit)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    said = Path("error.txt").read_text(encoding="utf-8")
    assert "OutputError" in said
    assert "cannot be written any more (File too large)" in said
    assert "run the same again to go on" in said
    kept = int(said.partition(" rows are kept in")[0].rpartition(" ")[2])
    assert 0 < kept < 400
    assert not output.exists()

    def go_on() -> None:
        assert encode_corpus(source, output, BatchReranker()).resumed_rows == kept

    run_to_the_end(go_on)
    assert len(list(read_encoded(output))) == 400


def test_a_full_device_is_an_error_of_one_line() -> None:
    write_rows(Path("corpus.jsonl"), 20, 20)
    done = run_process("encode", "corpus.jsonl", "-o", "/dev/full")
    assert done.returncode == 2
    last = done.stderr.decode().splitlines()[-1]
    assert last.startswith("kalm: error: the output '/dev/full' cannot be written any more (No space left on device)")


def test_memory_does_not_grow_with_the_corpus() -> None:
    """Ten times the rows take no more: the peak of a child, with windows of the same size."""

    def peak(n_rows: int) -> int:
        source = Path(f"{n_rows}.jsonl")
        with source.open("w", encoding="utf-8") as file:
            for number in range(n_rows):
                file.write(f'{{"_id": {number}, "text": "{number} {"word " * 60}"}}\n')
        reader, writer = os.pipe()

        def work() -> None:
            encode_corpus(source, Path(f"{n_rows}.out.jsonl"), BatchReranker())
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            os.write(writer, status.partition("VmHWM:")[2].split()[0].encode())

        run_to_the_end(lambda: (Path("/proc/self/clear_refs").write_text("5"), work()))
        os.close(writer)
        with os.fdopen(reader) as pipe:
            return int(pipe.read())

    small = peak(2_000)
    assert peak(20_000) < small + 8_192, "KiB"


def test_the_command_goes_on_after_kill_and_stop(tiny_checkpoint: Path) -> None:
    """With a model, in processes of their own: kill -9, then SIGTERM, then to the end; bytes as of one run."""
    # So long that two rows are encoded together, and quick for all that.
    long = " ".join(TEXTS * 5_000)
    source = write_jsonl(Path("corpus.jsonl"), [{"text": f"{number} {long}"} for number in range(12)])
    command = ["encode", str(source), "--model", str(tiny_checkpoint), "--codec", "fp32", "--long-passages", "cut"]
    assert run_process(*command, "-o", "one.jsonl").returncode == 0
    manifest = Path("out.jsonl.partial/_manifest")
    for stop, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)):
        before = manifest.read_bytes() if manifest.exists() else b""
        with subprocess.Popen([*KALM, *command, "-o", "out.jsonl"], stderr=subprocess.PIPE) as child:
            until(lambda before=before: manifest.exists() and manifest.read_bytes() != before)
            child.send_signal(stop)
            _, said = child.communicate(timeout=60)
        assert child.returncode == code
    assert b"rows are kept; the same command goes on after them" in said
    done = run_process(*command, "-o", "out.jsonl")
    assert done.returncode == 0
    assert b"going on after" in done.stderr
    assert Path("out.jsonl").read_bytes() == Path("one.jsonl").read_bytes()
    again = run_process(*command, "-o", "out.jsonl")
    assert (again.returncode, b"is there already" in again.stderr) == (0, True)
