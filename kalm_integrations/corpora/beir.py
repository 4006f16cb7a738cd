"""Collections in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/<split>.tsv."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kalm_integrations.corpora.jsonl import PassageFields, parse_file, parse_object
from kalm_integrations.errors import SettingsError

logger = logging.getLogger(__name__)

HEADER = ("query-id", "corpus-id", "score")
"""The first line of qrels."""

FROM_TREC = """awk -v OFS='\\t' 'BEGIN {print "query-id", "corpus-id", "score"} {print $1, $3, $4}'"""
"""Converts TREC's qrels."""


@dataclass(frozen=True)
class Collection:
    """A test collection; passages are title and text, joined by a space as BEIR does."""

    name: str
    passages: dict[str, str]
    queries: dict[str, str]
    """Queries that have judgements."""
    qrels: dict[str, dict[str, int]]
    """Query id -> passage id -> grade."""

    @classmethod
    def read(cls, folder: Path, split: str = "test", oddities: Counter[str] | None = None) -> Collection:
        """Read a BEIR folder.

        Of a passage that is judged repeatedly for a query, the highest grade counts. Judgements of passages that are not in
        the corpus stay, because measures know them as relevant passages that were not found.

        Args:
            folder: what to read.
            split: which judgements.
            oddities: takes the numbers of what is odd and no error, by its description; None logs them in a line.

        Raises:
            SettingsError: a file or the split is missing, or a line is malformed.
        """
        qrels_path = folder / "qrels" / f"{split}.tsv"
        for path in (folder / "corpus.jsonl", folder / "queries.jsonl"):
            if not path.is_file():
                msg = f"a BEIR folder must hold {path.name}, but {folder} does not"
                raise SettingsError(msg)
        if not qrels_path.is_file():
            splits = ", ".join(sorted(p.stem for p in folder.glob("qrels/*.tsv"))) or "none"
            msg = f"split {split!r} must be a file in {folder / 'qrels'}, but it has: {splits}"
            raise SettingsError(msg)
        found: Counter[str] = Counter()
        qrels = _read_qrels(qrels_path, found)
        passages = _read(folder / "corpus.jsonl", PassageFields(), "passage", found)
        queries = _read(folder / "queries.jsonl", PassageFields(title=None), "query", found)
        judged = {query_id: query for query_id, query in queries.items() if query_id in qrels}
        found["judged queries missing from queries.jsonl"] += len(qrels) - len(judged)
        found["judged passages missing from corpus.jsonl"] += sum(
            p not in passages for grades in qrels.values() for p in grades
        )
        found["blank queries"] += sum(not query.strip() for query in judged.values())
        found["blank passages"] += sum(not passage.strip() for passage in passages.values())
        if oddities is not None:
            oddities.update(found)
        elif told := describe_counts(found):
            logger.warning("%s: %s", qrels_path, told)
        return cls(folder.resolve().name, passages, judged, qrels)


def describe_counts(counts: Counter[str]) -> str:
    """Return numbers by their descriptions as text; nothing if all are 0."""
    return "; ".join(f"{what}: {n:,}" for what, n in counts.items() if n)


def _read_qrels(path: Path, oddities: Counter[str]) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        try:
            problem = _problem_of_header(reader.fieldnames or HEADER)
            for row in reader if problem is None else ():
                grades, passage_id, grade = qrels.setdefault(row["query-id"], {}), row["corpus-id"], int(row["score"])
                oddities["repeated judgements"] += passage_id in grades
                grades[passage_id] = max(grade, grades.get(passage_id, grade))
        except (TypeError, ValueError, csv.Error) as error:
            rule = "a line must be query-id, corpus-id and a whole score, under a header that says so"
            msg = f"{path}:{reader.line_num}: {rule} ({error!r})"
            raise SettingsError(msg) from error
    if problem is not None:
        msg = f"{path} must begin with a line of {', '.join(HEADER)}, with tabs between them, but {problem}"
        raise SettingsError(msg)
    return qrels


def _problem_of_header(names: Sequence[str]) -> str | None:
    """Return what is wrong with the first line of qrels, and the remedy."""
    if set(HEADER) <= set(names):
        return None
    fields = " ".join(names).split()
    if len(fields) == 4 and fields[3].lstrip("-").isdigit():
        return f"has TREC's four columns; this converts them: {FROM_TREC}"
    if len(fields) == 3 and fields[2].lstrip("-").isdigit():
        return "begins with a judgement; write that line above it"
    return f"begins with {', '.join(map(repr, names))}; name the columns so"


def _read(path: Path, fields: PassageFields, kind: str, oddities: Counter[str]) -> dict[str, str]:
    """Return text by id, from a file of JSON lines."""

    def parse_line(line: str) -> tuple[str, str]:
        row = parse_object(line)
        row_id = row.get("_id")
        # Some tools number their rows; qrels have text, anyway.
        if not isinstance(row_id, (str, int)) or isinstance(row_id, bool):
            msg = f"a line must have a string or a whole number as '_id', but has {row_id!r}"
            raise SettingsError(msg)
        return str(row_id), fields.read(row)

    texts: dict[str, str] = {}
    for row_id, text in parse_file(path, parse_line):
        oddities[f"repeated {kind} ids, of which the last counts"] += row_id in texts
        texts[row_id] = text
    return texts
