"""What `kalm rerank` and `kalm encode` read, and which bad rows they name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tools.command_line import QUERY, Run, assert_fails, read_jsonl

from kalm_integrations.corpora.candidates import read_candidates
from kalm_integrations.corpora.jsonl import PassageFields

LONG = "word " * 40_000
"""Longer than the csv module takes by itself."""


@pytest.mark.parametrize(
    ("name", "content", "texts", "numbers"),
    [
        ("p", '\n{"text": "a"}\n{"text": "b"}\n', ["a", "b"], [2, 3]),
        ("p", "a\r\n \nb", ["a", "b"], [1, 3]),
        ("p", "\ufeffa\n{b", ["a", "{b"], [1, 2]),
        ("p", '\ufeff{"text": "a"}\n', ["a"], [1]),
        ("p", "[1] a\n[2] b", ["[1] a", "[2] b"], [1, 2]),
        ("p", '\ufeff \n[{"text": "a"},\n{"text": "b"}]', ["a", "b"], [1, 2]),
        ("p", '[\n\n  {"text": "a"}\n]\n', ["a"], [1]),
        ("p.json", '[{"text": "a"}]', ["a"], [1]),
        ("p.json", "[]", [], []),
        ("p.jsonl", '[{"text": "a"}]', ["a"], [1]),
        ("p.ndjson", '{"text": "a"}\n', ["a"], [1]),
        ("p.txt", '{"text": "a"}\n[', ['{"text": "a"}', "["], [1, 2]),
        ("p.csv", '\ufeffid,text,n\r\n1,"a, ""b""\r\nc",\r\n\r\n2,naïve,3\r\n', ['a, "b"\r\nc', "naïve"], [2, 5]),
        ("p.csv", f"text\n{LONG}\n", [LONG], [2]),
        ("p.TSV", '\ttitle\ttext\n0\tt\t"a\tb"\n1\t\tc\n', ["t a\tb", "c"], [2, 3]),
        ("p.csv", "", [], []),
    ],
)
def test_a_file_is_known_by_its_name_or_else_by_its_beginning(
    tmp_path: Path, name: str, content: str, texts: list[str], numbers: list[int]
) -> None:
    """Gzipped or not; numbers are of lines, and of objects in an array."""
    plain, zipped = tmp_path / name, tmp_path / f"{name}.gz"
    plain.write_bytes(content.encode())
    zipped.write_bytes(gzip.compress(content.encode()))
    for path in (plain, zipped):
        found = list(read_candidates(path, PassageFields(), takes_plain_lines=True))
        assert [(candidate.text, candidate.number) for candidate in found] == list(zip(texts, numbers, strict=True))


@pytest.mark.parametrize("content", [b'{"text": "a"}\n{"text": "b"}', b'[{"text": "a"}, {"text": "b"}]', b"a\nb\n"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_stream_is_known_by_its_beginning(run: Run, model: Any, content: bytes, compress: Any) -> None:
    results = json.loads(run("rerank", QUERY, "--json", *model, stdin=compress(content)).stdout)["results"]
    assert sorted((result["row"]["text"], result["line"]) for result in results) == [("a", 1), ("b", 2)]


UNREADABLE = [
    (b"PAR1\x15\x04", "is Parquet"),
    (b"PK\x03\x04", "is a ZIP archive or an Excel workbook"),
    ('{"text": "a"}'.encode("utf-16"), "is UTF-16 (iconv -f UTF-16 -t UTF-8 converts it)"),
    ('{"text": "a"}'.encode("utf-16-le"), "is binary, or UTF-16"),
    (gzip.compress(b"PAR1\x15\x04"), "is Parquet"),
]


@pytest.mark.parametrize(("content", "kind"), UNREADABLE)
@pytest.mark.parametrize("command", [("encode",), ("rerank", QUERY), ("inspect",)])
def test_what_is_no_text_is_refused_with_what_is_read(run: Run, command: tuple[str], content: bytes, kind: str) -> None:
    message = f"must be UTF-8 text, gzipped or not (JSON lines, a JSON array, CSV, TSV or plain lines), but {kind}"
    assert_fails(run(*command, stdin=content), f"standard input {message}")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data[:-8] + b"\0" * 8, lambda data: data[:12] + b"\xff" * 9]
)
def test_damaged_gzip_is_refused(run: Run, damage: Any) -> None:
    Path("p.jsonl.gz").write_bytes(damage(gzip.compress(b'{"text": "a"}\n' * 99)))
    assert_fails(run("encode", "p.jsonl.gz"), "p.jsonl.gz must be a whole gzip file, but is damaged")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"text,n\na,1\nb\n", "p.csv:3: a row must have the 2 fields of the first row, but has 1"),
        ("p.csv", b'text\n"a\n"\n"b\nc\n', "p.csv:4: a row must be CSV, but it cannot be parsed (unexpected end of data)"),
        ("p.csv", b"text\n\xff\n", "p.csv:2: a line must be UTF-8, but is not"),
        ("p.csv", b"a,a\nx,y\n", "p.csv:1: the first row must have the names of the fields, each once, but has: 'a', 'a'"),
        ("p.csv", b"body\nx\n", "p.csv:2: a row must have its passage under 'text', but has the keys: 'body'"),
        ("p.json", b'[{"text": "a"}, 5]', "p.json, object 2: it must be a JSON object, but has type int"),
        ("p.json", b'[{"text": "a"}', "p.json must be a JSON array of objects, for it begins with a bracket, but cannot be"),
        ("p.json", b'{\n"text": "a"\n}', "p.json:1: a line must be a JSON object, but it cannot be parsed (Expecting"),
        (
            "p.dat",
            b"text,n\na,1\n",
            "p.dat:1: a line must be a JSON object, but it cannot be parsed (Expecting value: character 1)",
        ),
        ("p.dat", b"text,n\na,1\n", "; CSV and TSV are known by a file name that ends in .csv or .tsv"),
        ("p.json", b'{\n"text": "a"\n}', "; jq -c . writes each object on a line of its own"),
    ],
)
def test_bad_row_of_other_formats_is_named_too(run: Run, name: str, content: bytes, message: str) -> None:
    Path(name).write_bytes(content)
    assert_fails(run("encode", name), message)


def test_skip_bad_goes_on_behind_bad_rows_of_csv(run: Run, model: Any) -> None:
    Path("p.csv").write_bytes(b'text\na\nb,c\n"d"e\n\xff\nf\n')
    result = run("encode", "p.csv", "--skip-bad", *model)
    assert [row["text"] for row in read_jsonl(result.stdout)] == ["a", "f"]
    assert [line.split(":")[2] for line in result.stderr.splitlines() if "left out" in line] == ["3", "4", "5"]


BAD_LINES = [
    b"{no",
    b"[1]",
    b'{"x": 1}',
    b'{"text": 5}',
    b'{"text": "a", "title": 3}',
    b'{"text": "\xff"}',
]


@pytest.mark.parametrize("line", BAD_LINES)
@pytest.mark.parametrize("source", ["-", "p.jsonl"])
@pytest.mark.parametrize("command", [("encode",), ("rerank", QUERY)])
def test_bad_line_is_named_and_ends_the_command(run: Run, model: Any, command: tuple[str], source: str, line: bytes) -> None:
    content = b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n'
    Path("p.jsonl").write_bytes(content)
    name = "standard input" if source == "-" else source
    assert_fails(run(*command, source, *model, stdin=content), f"{name}:3: ")


@pytest.mark.parametrize("source", ["-", "p.jsonl"])
def test_skip_bad_reports_each_bad_line_once(run: Run, model: Any, source: str) -> None:
    content = b"\n".join([b'{"text": "a"}', *BAD_LINES, b'{"text": "b"}'])
    Path("p.jsonl").write_bytes(content)
    result = run("encode", source, "--skip-bad", *model, stdin=content)
    assert result.exit_code == 0
    assert [row["text"] for row in read_jsonl(result.stdout)] == ["a", "b"]
    reported = [line.split(":")[2] for line in result.stderr.splitlines() if "left out" in line]
    assert reported == [str(number) for number in range(2, 2 + len(BAD_LINES))]
