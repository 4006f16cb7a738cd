"""`kalm encode`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_integrations.cli import options
from kalm_integrations.cli.inputs import Candidate, read_candidates, report_bad
from kalm_integrations.cli.streams import STREAM, open_output
from kalm_integrations.cli.terminal import format_bytes, note
from kalm_integrations.core.types import ENCODING_KEY, Metadata
from kalm_integrations.corpora.jsonl import PassageFields, to_json
from kalm_integrations.errors import EncodingTooLargeError, SettingsError

if TYPE_CHECKING:
    from kalm_integrations.core.base import Reranker
    from kalm_integrations.core.reranker import KalmReranker
    from kalm_integrations.remote.reranker import RemoteReranker

ROWS_PER_BATCH = 256
"""Rows that are held in memory at a time: enough to make batches of similar length."""

MAX_RETRIES = 12
"""How often a service is asked again: for half a minute at least, in which one can be started anew."""


def encode(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="File of rows, gzipped or not, or - for standard input: CSV or TSV with a header row if it is named .csv or "
            ".tsv; otherwise JSONL, or a JSON array, which is loaded whole.",
        ),
    ] = STREAM,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="JSONL file to write, gzipped if it is named .gz; it may be the input. Or - for standard output.",
        ),
    ] = STREAM,
    model: options.Model = "pico",
    ratio: options.Ratio = None,
    codec: options.Codec = None,
    max_inline_bytes: Annotated[
        int | None, typer.Option(help="Take for each passage the finest ratio whose encoding is not longer.")
    ] = None,
    payload_store: options.PayloadStore = None,
    text_field: options.TextField = "text",
    title_field: options.TitleField = "title",
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Address of a service that encodes, with its model and settings, and keeps the encodings in its store.",
            show_default="none",
        ),
    ] = None,
    api_key_env: options.ApiKeyEnv = None,
    skip_bad: options.SkipBad = False,
) -> None:
    """Add an encoding to every row of a file.

    Rows keep their order and their fields; `kalm_encoding` (the encoding) and `kalm_fp` (what made it, short, for stores to
    filter on) are added. An encoding belongs to the exact text that was encoded: if the store that the rows go to holds the
    text without its title, leave the title out here too. A file, unlike a stream, is checked to its end before anything is
    encoded.
    """
    from tqdm.auto import tqdm

    if output.suffix in (".csv", ".tsv"):
        msg = f"the output is JSON lines and must not be named {output.suffix}, but got {str(output)!r}; name it .jsonl"
        raise SettingsError(msg)
    fields = PassageFields(text_field, title_field or None)
    report: Callable[[str], None] | None = report_bad if skip_bad else None
    with open_output(output) as file:
        total = None
        if source.is_file():
            total = sum(1 for _ in read_candidates(source, fields, report))
            # Bad rows have been reported now.
            report = (lambda _: None) if skip_bad else None
        settings: dict[str, Any] = {
            "revision": revision,
            "device": device,
            "dtype": dtype,
            "compression_ratio": ratio,
            "storage_codec": codec,
            "max_inline_bytes": max_inline_bytes,
            "payload_store": payload_store,
        }
        if server is None:
            reranker: KalmReranker | RemoteReranker = options.open_reranker(model, **settings)
        else:
            settings["model"] = None if model == "pico" else model
            reranker = options.open_service(server, api_key_env, MAX_RETRIES, **settings)
        started = time.perf_counter()
        n_rows = n_bytes = n_references = 0
        rows = read_candidates(source, fields, report)
        with tqdm(desc="Encoding", total=total, unit="row", disable=None) as progress:
            while batch := list(islice(rows, ROWS_PER_BATCH)):
                for candidate, metadata in zip(batch, _encode(reranker, batch), strict=True):
                    file.write(to_json({**candidate.row, **metadata}) + b"\n")
                    n_bytes += len(metadata[ENCODING_KEY])
                    n_references += metadata[ENCODING_KEY].startswith("kalm1r.")
                n_rows += len(batch)
                size = f"about {format_bytes(n_bytes / n_rows * total)}" if total else format_bytes(n_bytes)
                progress.set_postfix_str(size, refresh=False)
                progress.update(len(batch))
    stats = reranker.stats
    # A service keeps to itself what it had encoded before, and what it cut.
    done = (
        f"{stats.passages_encoded:,} passages encoded, {stats.truncated:,} of them cut to the model's limit"
        if server is None
        else f"{stats.passages_encoded:,} passages sent to {server}"
    )
    note(f"{n_rows:,} rows written in {time.perf_counter() - started:.1f} s; {done}")
    if n_rows:
        ratios = f"{reranker.compression_ratio}{' or coarser' if max_inline_bytes is not None else ''}"
        sizes = (
            f"the encodings take {n_bytes:,} characters of metadata, {n_bytes / n_rows:,.0f} a passage on average, at ratio "
            f"{ratios} in {reranker.storage_codec}"
        )
        if n_references and payload_store is not None:
            on_disk = sum(path.stat().st_size for path in payload_store.iterdir())
            sizes += f"; {n_references:,} have their payload in {payload_store}, which takes {format_bytes(on_disk)}"
        note(sizes)


def _encode(reranker: Reranker, batch: Sequence[Candidate]) -> list[Metadata]:
    """Encode passages.

    Raises:
        EncodingTooLargeError: one does not fit; the message names its line.
    """
    try:
        return reranker.encode_to_metadata([candidate.text for candidate in batch])
    except EncodingTooLargeError as error:
        if error.index is None:
            raise
        # The core counts within the batch; users count lines.
        msg = f"{batch[error.index].place}: {error.reason}"
        raise EncodingTooLargeError(msg) from error
