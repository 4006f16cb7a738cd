"""Collections in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/<split>.tsv."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from kalm_integrations.corpora.jsonl import PassageFields, parse_file, parse_object
from kalm_integrations.errors import SettingsError


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
    def read(cls, folder: Path, split: str = "test") -> Collection:
        """Read a BEIR folder.

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
        qrels: dict[str, dict[str, int]] = {}
        with qrels_path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            try:
                for row in reader:
                    qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
            except (KeyError, TypeError, ValueError, csv.Error) as error:
                rule = "a line must be query-id, corpus-id and a whole score, under a header that says so"
                msg = f"{qrels_path}:{reader.line_num}: {rule} ({error!r})"
                raise SettingsError(msg) from error
        passages = _read(folder / "corpus.jsonl", PassageFields())
        queries = _read(folder / "queries.jsonl", PassageFields(title=None))
        judged = {query_id: query for query_id, query in queries.items() if query_id in qrels}
        return cls(folder.resolve().name, passages, judged, qrels)


def _read(path: Path, fields: PassageFields) -> dict[str, str]:
    """Return text by id, from a file of JSON lines."""

    def parse_line(line: str) -> tuple[str, str]:
        row = parse_object(line)
        if not isinstance(row.get("_id"), str):
            msg = f"a line must have a string as '_id', but has {row.get('_id')!r}"
            raise SettingsError(msg)
        return row["_id"], fields.read(row)

    return dict(parse_file(path, parse_line))
