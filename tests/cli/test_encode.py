"""`kalm encode`: rows in, the same rows with encodings out."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import pty
import select
import struct
import subprocess
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tools.command_line import KALM, QUERY, TEXTS, Run, assert_fails, read_jsonl, write_jsonl

from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.bulk.encoding import ROWS_PER_STREAMED_WINDOW, ROWS_PER_WINDOW
from kalm_integrations.core.settings import DEFAULT_CODEC


def test_encode_adds_encodings_and_nothing_else(run: Run, model: Any, make_reranker: Callable[..., KalmReranker]) -> None:
    """Rows keep their order, fields and characters, half surrogate pairs included; the passage is BEIR's title and text."""
    rows = [
        {"_id": i, "title": "Ünïcödé", "text": text, "n": [1, {"x": 1.5}], "kalm_fp": "old"} for i, text in enumerate(TEXTS)
    ]
    rows[1]["title"] = ""
    del rows[2]["title"]
    rows[3]["text"] += "\ud800"
    result = run("encode", write_jsonl(Path("p.jsonl"), rows), "--ratio", 8, "--codec", "int8", *model)
    passages = [f"Ünïcödé {TEXTS[0]}", TEXTS[1], TEXTS[2], f"Ünïcödé {TEXTS[3]}\ud800"]
    expected = make_reranker(compression_ratio=8, storage_codec="int8").encode_to_metadata(passages)
    assert read_jsonl(result.stdout) == [{**row, **metadata} for row, metadata in zip(rows, expected, strict=True)]
    assert "Ünïcödé" in result.stdout
    assert "4 rows written" in result.stderr


def test_encode_reads_the_fields_it_is_told(run: Run, model: Any, make_reranker: Callable[..., KalmReranker]) -> None:
    rows = [{"title": "t", "body": " spaces stay "}]
    result = run("encode", *model, "--text-field", "body", "--title-field", "", stdin=json.dumps(rows[0]))
    reranker = make_reranker(storage_codec=DEFAULT_CODEC)
    assert read_jsonl(result.stdout) == [{**rows[0], **reranker.encode_to_metadata([" spaces stay "])[0]}]


def test_encode_keeps_to_the_length_limit(run: Run, model: Any, tmp_path: Path) -> None:
    """The finest ratio that fits; a payload store takes what does not fit at any, and rerank and inspect read it."""
    rows = [{"text": " ".join(TEXTS * n)} for n in (1, 4, 12)]
    write_jsonl(Path("p.jsonl"), rows)
    encodings = [
        row["kalm_encoding"] for row in read_jsonl(run("encode", "p.jsonl", "--max-inline-bytes", 1400, *model).stdout)
    ]
    assert all(len(encoding) <= 1400 for encoding in encodings)
    ratios = [EncodedPassage.from_metadata(encoding).compression_ratio for encoding in encodings]
    assert ratios == sorted(set(ratios))
    options = ("--max-inline-bytes", 200, "--payload-store", tmp_path / "store", *model)
    assert run("encode", "p.jsonl", "-o", "r.jsonl", *options).exit_code == 0
    references = [row["kalm_encoding"] for row in read_jsonl(Path("r.jsonl").read_text())]
    assert all(reference.startswith("kalm1r.") for reference in references)
    store = ("--payload-store", tmp_path / "store")
    assert json.loads(run("rerank", QUERY, "r.jsonl", "--json", *store, *model).stdout)["stats"]["metadata_hits"] == 3
    assert json.loads(run("inspect", "r.jsonl", "--json", *store).stdout)["encodings"] == 3
    assert_fails(run("inspect", "r.jsonl"), "no payload_store was given")


def test_encode_replaces_a_file_only_when_all_is_written(run: Run, model: Any) -> None:
    """The output may be the input; a failure leaves it as it was and nothing beside it."""
    path = write_jsonl(Path("p.jsonl"), [{"text": text} for text in TEXTS])
    before = path.read_bytes()
    Path("p.jsonl.part").write_text("the user's own")
    assert_fails(run("encode", path, "-o", path, "--max-inline-bytes", 5, *model), "max_inline_bytes=5")
    assert path.read_bytes() == before
    result = run("encode", path, "-o", path, *model)
    assert (result.exit_code, result.stdout) == (0, "")
    assert sorted(p.name for p in Path().iterdir()) == ["p.jsonl", "p.jsonl.part"]
    assert Path("p.jsonl.part").read_text() == "the user's own"
    assert all("kalm_encoding" in row for row in read_jsonl(path.read_text()))


def test_encode_names_the_line_that_does_not_fit(run: Run, model: Any) -> None:
    """Of the file, not of the batch: blank lines count, and earlier batches do."""
    short, long = "a\n" * ROWS_PER_WINDOW, " ".join(TEXTS * 400)
    Path("p.csv").write_text(f"text\n{short}\n{long}\n{short}", encoding="utf-8")
    result = run("encode", "p.csv", "-o", "out.jsonl", "--codec", "fp32", "--max-inline-bytes", 500, *model)
    assert_fails(result, f"p.csv:{ROWS_PER_WINDOW + 3}: an encoding must fit max_inline_bytes=500, but this one takes ")
    assert not Path("out.jsonl").exists()


def test_encode_writes_gzip_where_the_name_says_so(run: Run, model: Any) -> None:
    """JSON lines of whatever was read, which the other commands read in turn."""
    Path("p.csv").write_text("_id,text\n1,a\n2,b\n")
    assert run("encode", "p.csv", "-o", "out.jsonl.gz", *model).exit_code == 0
    rows = read_jsonl(gzip.decompress(Path("out.jsonl.gz").read_bytes()).decode())
    assert [(row["_id"], row["text"]) for row in rows] == [("1", "a"), ("2", "b")]
    assert json.loads(run("inspect", "out.jsonl.gz", "--json").stdout)["encodings"] == 2
    assert json.loads(run("rerank", QUERY, "out.jsonl.gz", "--json", *model).stdout)["stats"]["metadata_hits"] == 2


def test_encode_says_what_the_encodings_take(run: Run, model: Any, tmp_path: Path) -> None:
    """In all and on average, at which ratio and codec; and what the payload store takes."""
    write_jsonl(Path("p.jsonl"), [{"text": text} for text in TEXTS])
    result = run("encode", "p.jsonl", "-o", "out.jsonl", *model)
    total = sum(len(row["kalm_encoding"]) for row in read_jsonl(Path("out.jsonl").read_text()))
    average = f"{total:,} characters of metadata, {total / 4:,.0f} a passage on average"
    assert f"the encodings take {average}, at ratio 4 in {DEFAULT_CODEC}\n" in result.stderr
    result = run("encode", "p.jsonl", "--payload-store", "store", "--max-inline-bytes", 200, *model)
    on_disk = sum(path.stat().st_size for path in Path("store").iterdir())
    assert f" on average, at ratio 4 or coarser in {DEFAULT_CODEC}; 4 have" in result.stderr
    assert f"; 4 have their payload in store, which takes {on_disk / 1000:.1f} kB\n" in result.stderr
    assert "take" not in run("encode", *model).stderr


def test_encode_tells_a_terminal_early_how_much_it_will_write(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Beside the progress bar, from the first window on: what is written, and of how much."""
    n_rows = ROWS_PER_WINDOW + 400
    path = write_jsonl(tmp_path / "p.jsonl", [{"text": TEXTS[number % 4]} for number in range(n_rows)])
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    command = [
        *KALM,
        "encode",
        str(path),
        "-o",
        str(tmp_path / "out.jsonl"),
        "--codec",
        "fp16",
        "--model",
        str(tiny_checkpoint),
    ]
    every_batch = {**os.environ, "TQDM_MININTERVAL": "0"}  # a bar is drawn ten times a second else
    with subprocess.Popen(command, stderr=its, env=every_batch) as encoder:
        os.close(its)
        shown = b""
        # Linux ends a terminal that nobody writes to any more with an error, other systems with nothing.
        with suppress(OSError):
            while data := os.read(ours, 2**16):
                shown += data
    os.close(ours)
    assert encoder.returncode == 0
    size = (tmp_path / "out.jsonl").stat().st_size
    first = next(line for line in shown.decode().split("\r") if f"| {ROWS_PER_WINDOW}/{n_rows} " in line)
    assert f" MB of about {size / 1e6:.1f} MB]" in first


def test_commands_work_in_a_pipe(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In real processes: encode writes while its input is still open, and rerank reads what it wrote."""
    command = [*KALM, "encode", "--model", str(tiny_checkpoint)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as encoder:
        rows = [{"_id": str(i), "text": f"{TEXTS[i % 4]} {i}"} for i in range(ROWS_PER_STREAMED_WINDOW)]
        encoder.stdin.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        encoder.stdin.flush()
        ready, _, _ = select.select([encoder.stdout], [], [], 120)
        assert ready, "a full batch must be written before the input ends"
        output, _ = encoder.communicate(timeout=120)
    assert encoder.returncode == 0
    command = [*KALM, "rerank", QUERY, "--top-k", "5", "--json", "--model", str(tiny_checkpoint)]
    done = subprocess.run(command, input=output, capture_output=True, check=True, cwd=tmp_path)
    printed = json.loads(done.stdout)
    assert len(printed["results"]) == 5
    assert (printed["stats"]["passages_encoded"], printed["stats"]["metadata_hits"]) == (0, ROWS_PER_STREAMED_WINDOW)
