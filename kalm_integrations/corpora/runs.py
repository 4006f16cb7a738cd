"""TREC run files: six columns, `query Q0 passage rank score tag`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from kalm_integrations.corpora.jsonl import parse_file
from kalm_integrations.errors import SettingsError
from kalm_integrations.files import written_beside

Run = dict[str, list[tuple[str, float]]]
"""Query id -> passage ids with their scores, best first."""


def read_run(path: Path) -> Run:
    """Read a run file. Scores decide the order, as in trec_eval; of equal ones, that of the file.

    Raises:
        SettingsError: a line is malformed, or names a passage twice for a query.
    """
    found: dict[str, dict[str, float]] = {}

    def parse_line(line: str) -> None:
        columns = line.split()
        try:
            query_id, _, passage_id, _, score, _ = columns
            value = float(score)
        except ValueError as error:
            msg = f"a line of a run must be 'query Q0 passage rank score tag', but got {line[:80]!r}"
            raise SettingsError(msg) from error
        if not math.isfinite(value):
            msg = f"a score in a run must be a finite number, but got {score}"
            raise SettingsError(msg)
        passages = found.setdefault(query_id, {})
        if passage_id in passages:
            msg = f"a run must name a passage once for each query, but {passage_id} comes twice for {query_id}"
            raise SettingsError(msg)
        passages[passage_id] = value

    for _ in parse_file(path, parse_line):
        pass
    return {query_id: sorted(passages.items(), key=lambda pair: -pair[1]) for query_id, passages in found.items()}


def write_run(path: Path, tag: str, rankings: Mapping[str, Sequence[str]]) -> None:
    """Write rankings, best first. The scores are falling whole numbers, so that every reader finds the same order."""
    name = "".join(character if character.isalnum() or character in "-_.+" else "_" for character in tag)
    with written_beside(path) as part, part.open("w", encoding="utf-8") as file:
        for query_id, passage_ids in rankings.items():
            for rank, passage_id in enumerate(passage_ids, 1):
                file.write(f"{query_id} Q0 {passage_id} {rank} {len(passage_ids) - rank} {name}\n")
