"""What the commands that rank passages for a query share: arguments, the reranker that is asked, and results as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_integrations.cli import options
from kalm_integrations.cli.terminal import note, report_bad
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, RankedPassage, RuntimeStats
from kalm_integrations.corpora.candidates import Candidate, read_candidates
from kalm_integrations.corpora.jsonl import PassageFields
from kalm_integrations.errors import SettingsError
from kalm_integrations.remote.address import is_address

if TYPE_CHECKING:
    from kalm_integrations.core.base import Reranker

Query = Annotated[str, typer.Argument(metavar="QUERY", help="The query.")]
Passages = Annotated[
    Path,
    typer.Argument(
        metavar="PASSAGES",
        help="File of passages, gzipped or not, or - for standard input: CSV or TSV with a header row if it is named .csv "
        "or .tsv, one passage a line if it is named .txt, JSONL if it is named .jsonl or .ndjson; otherwise JSONL or a "
        "JSON array if it begins like one, else one passage a line.",
    ),
]
Instruction = Annotated[str | None, typer.Option(help="What makes a passage relevant.", show_default="the checkpoint's")]


def check_query(query: str) -> None:
    """Check a query.

    Raises:
        SettingsError: there is no word in it.
    """
    if not query.strip():
        msg = "the query must hold a word at least, but is empty"
        raise SettingsError(msg)


def read_passages(path: Path, text_field: str, title_field: str, *, skip_bad: bool) -> list[Candidate]:
    """Return the rows of a file.

    Raises:
        SettingsError: a row is bad and not to be skipped, or the file cannot be read at all.
    """
    fields = PassageFields(text_field, title_field or None)
    return list(read_candidates(path, fields, report_bad if skip_bad else None, takes_plain_lines=True))


def open_model(model: str, api_key_env: str | None, payload_store: Path | None, **settings: Any) -> Reranker:
    """Open a checkpoint, or a service by its address.

    Raises:
        SettingsError: a setting breaks a rule, or is without effect beside an address.
    """
    settings["payload_store"] = options.existing(payload_store)
    if is_address(model):
        return options.open_service(model, api_key_env, **settings)
    return options.open_reranker(model, **settings)


def names_of(candidates: Sequence[Candidate]) -> tuple[str, list[str]]:
    """Return what rows are called by, `_id` if all have one, else their line; and each one's name."""
    if all("_id" in candidate.row for candidate in candidates):
        return "_id", [str(candidate.row["_id"]) for candidate in candidates]
    return "line", [str(candidate.number) for candidate in candidates]


def to_dict(passage: RankedPassage, candidate: Candidate) -> dict[str, Any]:
    """Return a result for JSON: numbers plain, the row without its encoding; the text is in the row."""
    numbers = {name: value for name, value in passage.to_dict().items() if name != "text"}
    if passage.window is not None:
        numbers["window"] = dict(zip(("start", "end"), passage.window, strict=True))
    row = {key: value for key, value in candidate.row.items() if key not in (ENCODING_KEY, FINGERPRINT_KEY)}
    return {**numbers, "line": candidate.number, "row": row}


def note_encodings(n_shown: int, n_passages: int, stats: RuntimeStats) -> None:
    """Say how many passages are shown, and where the encodings came from."""
    oddities = (
        ("of these in windows", stats.windowed),
        ("of these not read to the end", stats.truncated),
        ("coarser than asked for", stats.coarser),
        ("stale", stats.stale),
        ("corrupt", stats.corrupt),
    )
    details = "".join(f", {count:,} {name}" for name, count in oddities if count)
    note(
        f"{n_shown:,} of {n_passages:,} passages; encodings: {stats.metadata_hits:,} stored ones used, "
        f"{stats.passages_encoded:,} made now{details}"
    )
