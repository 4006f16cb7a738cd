"""The benchmarks of large stores run end to end at toy size; the committed page is what they make of the committed results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks import large_backfill, large_page, large_reads, machine
from benchmarks.large_encodings import Encodings

SIZES = (40, 2, (3,))
"""Passages, queries and candidates."""
MARKS = "".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in ("large reads", "large backfill"))


def measured(**stores: Any) -> dict[str, Any]:
    return {"machine": machine.describe("cpu"), "stores": stores}


@pytest.fixture(scope="module")
def encodings(tmp_path_factory: pytest.TempPathFactory) -> Encodings:
    return Encodings(tmp_path_factory.mktemp("width"))


def test_a_payload_store_is_read_in_both_ways_and_by_processes_at_once(encodings: Encodings):
    """Every read finds every encoding: the program itself asserts that."""
    made = large_reads.measure_lmdb(encodings, *SIZES, seconds=0.1, n_processes=(2,))
    assert {(row["way"], row["state"], row["k"]) for row in made["rows"]} == {
        (way, state, 3) for way in ("reference", "by text") for state in ("warm", "cold")
    }
    assert all(value > 0 for row in made["rows"] for value in (*row["read"], *row["cpu"]))
    [run] = made["processes"]
    assert len(run["latencies"]) == len(run["cpu"]) == 2
    page = large_page.updated_page(measured(lmdb=made), None, MARKS)
    assert "| (at hand) | LMDB, by text | 3 |" in page
    assert "| LMDB | payloads | 40 |" in page
    assert page.count(large_page.NOT_MEASURED) == 1


def test_a_store_of_documents_is_read_in_all_ways(encodings: Encodings):
    *_, made = large_reads.measure_documents("chroma", encodings, *SIZES)
    assert {(row["way"], row["state"]) for row in made["rows"]} == {
        (way, state) for way in ("inline", "reference", "by text") for state in ("warm", "cold")
    }
    assert [fill["way"] for fill in made["fills"]] == ["inline", "reference"]
    assert made["fills"][0]["disk"] > made["fills"][1]["disk"] > 0


def test_a_backfill_is_measured_beside_queries(tmp_path: Path):
    """All documents are written in the end, and each part has queries."""
    made = large_backfill.measure_store("qdrant", 150, seconds=0.3, limit=60)
    parts = {part["part"]: part for part in made["parts"]}
    assert list(parts) == ["before", "held back", "as fast as it can", "after"]
    assert all(part["latencies"] for part in parts.values())
    assert sum(part.get("documents", 0) for part in parts.values()) == 150
    assert made["grown"] > 0
    assert "| Qdrant, local mode | 150 |" in large_page.updated_page(None, measured(qdrant=made), MARKS)


def test_committed_page_is_rendered_from_committed_results(tmp_path: Path):
    """`render` changes nothing."""
    page = tmp_path / "page.md"
    page.write_text(large_page.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    large_page.render(page=page)
    assert page.read_text(encoding="utf-8") == large_page.PAGE.read_text(encoding="utf-8")
