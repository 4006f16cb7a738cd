"""Collections in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/<split>.tsv."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
            for row in csv.DictReader(file, delimiter="\t"):
                try:
                    qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
                except (KeyError, TypeError, ValueError) as error:
                    msg = f"{qrels_path}: every line must be query-id, corpus-id and a whole score, but got {row}"
                    raise SettingsError(msg) from error
        passages = {row["_id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in _rows(folder / "corpus.jsonl")}
        queries = {row["_id"]: row["text"] for row in _rows(folder / "queries.jsonl") if row["_id"] in qrels}
        return cls(folder.name, passages, queries, qrels)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row["_id"], row["text"]
            except (ValueError, KeyError, TypeError) as error:
                msg = f"{path}:{number}: every line must be a JSON object with _id and text ({error})"
                raise SettingsError(msg) from error
            yield row
