"""`kalm inspect`: what encodings hold, and how long they would be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tools.command_line import TEXTS, Run, assert_fails

from kalm_integrations import EncodedPassage, KalmReranker


def test_inspect_tells_what_an_encoding_holds(run: Run, make_reranker: Callable[..., KalmReranker]) -> None:
    """Lengths at other ratios and codecs are those that encoding at them gives."""
    reranker = make_reranker(compression_ratio=8, storage_codec="int8")
    [encoding] = reranker.encode_passages([" ".join(TEXTS * 5)])
    printed = json.loads(run("inspect", encoding.to_metadata(), "--json").stdout)
    lengths = printed.pop("lengths")
    assert printed == {
        "encodings": 1,
        "fingerprint": reranker.fingerprint,
        "ratio": 8,
        "codec": "int8",
        "width": 48,
        "in_windows": 0,
        "windows": 0,
        "tokens": encoding.n_tokens,
        "characters": len(encoding.to_metadata()),
    }
    assert list(lengths) == ["8", "16", "32", "64", "128"]
    for ratio, codec in (("8", "int8"), ("16", "rot4"), ("128", "fp32")):
        other = make_reranker(compression_ratio=int(ratio), storage_codec=codec)
        assert lengths[ratio][codec] == len(other.encode_to_metadata([" ".join(TEXTS * 5)])[0]["kalm_encoding"])
    table = run("inspect", encoding.to_metadata()).stdout
    assert reranker.fingerprint in table
    assert f"{lengths['16']['rot4']:,.0f}" in table


def test_inspect_adds_up_files_and_streams(run: Run, make_reranker: Callable[..., KalmReranker]) -> None:
    """Lines may be encodings or rows; only ratios that all can be pooled to are listed."""
    values = [
        make_reranker(compression_ratio=ratio).encode_to_metadata([text])[0]["kalm_encoding"]
        for text, ratio in zip(TEXTS, (1, 4, 4, 16), strict=True)
    ]
    lines = "\n".join([values[0], values[1], json.dumps({"kalm_encoding": values[2]}), values[3]])
    Path("encodings").write_text(lines)
    for result in (run("inspect", "encodings", "--json"), run("inspect", "--json", stdin=lines)):
        printed = json.loads(result.stdout)
        assert printed["encodings"] == 4
        assert printed["ratio"] == "4 (2), 1 (1), 16 (1)"
        assert printed["characters"] == sum(map(len, values))
        assert list(printed["lengths"]) == ["16", "32", "64", "128"]
        at_32 = [len(EncodedPassage.from_metadata(value).pool(32).to_metadata()) for value in values]
        assert printed["lengths"]["32"]["fp32"] == sum(at_32) / 4
    odd = make_reranker(compression_ratio=3).encode_to_metadata(["a"])[0]["kalm_encoding"]
    without_table = run("inspect", stdin=f"{lines}\n{odd}")
    assert (without_table.exit_code, "fp16" in without_table.stdout) == (0, False)
    cut = lines.replace(values[1], values[1][:-1])
    assert_fails(run("inspect", stdin=cut), "standard input:2: a passage encoding must")
    assert json.loads(run("inspect", "--skip-bad", "--json", stdin=cut).stdout)["encodings"] == 3


def test_payload_store_is_not_made_by_reading(run: Run, tmp_path: Path) -> None:
    assert run("inspect", "kalm1.a.b", "--payload-store", tmp_path / "s").exit_code == 2
    assert not (tmp_path / "s").exists()
