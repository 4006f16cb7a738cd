"""`kalm encode`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalm_integrations.cli import options
from kalm_integrations.cli.on_ray import Engine, encode_on_ray
from kalm_integrations.cli.terminal import describe_windows, format_bytes, note, report_bad
from kalm_integrations.corpora.jsonl import PassageFields
from kalm_integrations.corpora.text import STREAM
from kalm_integrations.errors import SettingsError

if TYPE_CHECKING:
    from types import FrameType

    from kalm_integrations.bulk import BulkReport, Progress, Start
    from kalm_integrations.core.reranker import KalmReranker
    from kalm_integrations.remote.reranker import RemoteReranker

MAX_RETRIES = 12
"""How often a service is asked again: for half a minute at least, in which one can be started anew."""

NOTED_BYTES = 10_000_000
"""An output that is not larger surprises nobody."""


def encode(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT",
            help="File of rows, gzipped or not, or - for standard input: CSV or TSV with a header row if it is named .csv or "
            ".tsv; otherwise JSONL, or a JSON array, which is loaded whole. Or a Parquet file, a folder of them, or the "
            "folder of a Hugging Face dataset (save_to_disk).",
        ),
    ] = STREAM,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="JSONL file to write, gzipped if it is named .gz; it may be the input. Or a folder of Parquet files, if it "
            "is named .parquet. Or - for standard output.",
        ),
    ] = STREAM,
    model: options.Model = "pico",
    ratio: options.Ratio = None,
    codec: options.Codec = None,
    max_inline_bytes: Annotated[
        int | None, typer.Option(help="Take for each passage the finest ratio whose encoding is not longer.")
    ] = None,
    long_passages: options.LongPassages = None,
    max_windows: options.MaxWindows = None,
    payload_store: options.PayloadStore = None,
    store_only: Annotated[
        bool, typer.Option("--store-only", help="Write no rows: all encodings go into --payload-store, found there by text.")
    ] = False,
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
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an output that is there, and begin anew what was begun with other settings or rows."
        ),
    ] = False,
    engine: Annotated[
        Engine, typer.Option(help="local encodes here; ray on a Ray cluster, into a folder of Parquet files (extra ray).")
    ] = Engine.LOCAL,
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster.", show_default="RAY_ADDRESS, or one on this machine")
    ] = None,
    id_field: Annotated[str, typer.Option(help="Field with a row's id, by which Ray knows what is done.")] = "id",
    actors: Annotated[int | None, typer.Option(help="Processes with the model on Ray.", show_default="as many as fit")] = None,
    num_cpus: Annotated[float, typer.Option(help="Cores of an actor.")] = 1.0,
    num_gpus: Annotated[float, typer.Option(help="GPUs of an actor; with 0.5 two share one.")] = 0.0,
) -> None:
    """Add an encoding to every row of a corpus.

    Rows keep their order and their fields; `kalm_encoding` (the encoding) and `kalm_fp` (what made it, short, for stores to
    filter on) are added. Rows that carry a valid encoding keep it, and the same text is encoded once. An encoding belongs to
    the exact text that was encoded: if the store that the rows go to holds the text without its title, leave the title out
    here too. A file, unlike a stream, is checked to its end before anything is encoded. The output grows beside its place, in
    a folder named .partial; the same command goes on with it after a stop, a crash or a full disk.
    """
    from kalm_integrations.bulk import encode_corpus

    if store_only and (payload_store is None or output != STREAM):
        msg = "--store-only needs --payload-store, and no --output: the encodings go into the store alone"
        raise SettingsError(msg)
    fields = PassageFields(text_field, title_field or None)
    settings: dict[str, Any] = {
        "revision": revision,
        "device": device,
        "dtype": dtype,
        "compression_ratio": ratio,
        "storage_codec": codec,
        "max_inline_bytes": max_inline_bytes,
        "long_passages": long_passages,
        "max_windows": max_windows,
        "payload_store": payload_store,
    }
    if engine is Engine.RAY:
        if server is not None or skip_bad or store_only or overwrite or STREAM in (source, output):
            msg = "--engine ray takes a file or folder and --output, and no --server, --skip-bad, --store-only or --overwrite"
            raise SettingsError(msg)
        encode_on_ray(
            source,
            output,
            model,
            fields=fields,
            id_field=id_field,
            address=address,
            actors=actors,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            **settings,
        )
        return
    if server is None:
        # The texts of a file are encoded once without it.
        cache_bytes = None if source == STREAM else 0
        mode = "reference" if store_only else None
        reranker: KalmReranker | RemoteReranker = options.open_reranker(
            model, **settings, cache_bytes=cache_bytes, storage_mode=mode
        )
    else:
        settings["model"] = None if model == "pico" else model
        settings["storage_mode"] = "reference" if store_only else None
        reranker = options.open_service(server, api_key_env, MAX_RETRIES, **settings)
    given = {
        "dtype": dtype,
        "max_inline_bytes": max_inline_bytes,
        "payload_store": None if payload_store is None else str(payload_store.resolve()),
    }
    bar = _Bar(payload_store if store_only else output)
    with bar.stopped_by_signals():
        report = encode_corpus(
            source,
            None if store_only else output,
            reranker,
            fields=fields,
            settings=given,
            overwrite=overwrite,
            report=report_bad if skip_bad else None,
            on_start=bar.start,
            on_progress=bar.show,
        )
    if report.was_complete:
        what = f"{output} is there already, with an encoding of this model for every row"
        note(f"{what}: nothing was done; --overwrite makes it anew")
        return
    _summarise(report, reranker, server, payload_store, is_coarser_allowed=max_inline_bytes is not None)


class _Bar:
    """The progress bar, and what is said before it and when it is stopped."""

    def __init__(self, target: Path | None) -> None:
        self._target = target
        self._is_kept = target != STREAM
        self._n_done: int | None = None
        self._total: int | None = None
        self._estimate: int | None = None

    def start(self, start: Start) -> None:
        """Say what the output will take, and begin the bar."""
        from tqdm.auto import tqdm

        self._n_done, self._total, self._estimate = start.done.rows, start.n_rows, start.estimated_bytes
        if start.done.rows:
            note(f"going on after {start.done.rows:,} of {start.n_rows:,} rows, which an earlier run has written")
        if start.estimated_bytes is not None and start.estimated_bytes > NOTED_BYTES:
            note(f"{start.n_rows:,} rows with their encodings will take about {format_bytes(start.estimated_bytes)}")
        self._bar = tqdm(desc="Encoding", total=start.n_rows, initial=start.done.rows, unit="row", disable=None)

    def show(self, progress: Progress) -> None:
        """Draw what is done."""
        size = format_bytes(progress.n_bytes or progress.counts.characters)
        if self._total and progress.n_bytes:
            size += f" of about {format_bytes(progress.n_bytes / progress.rows * self._total)}"
        self._bar.set_postfix_str(size, refresh=False)
        self._bar.update(progress.rows - (self._n_done or 0))
        self._n_done = progress.rows

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """End the bar, and turn signals that ask to stop into an exit that says what is kept."""
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, _interrupt) if is_main else None
        try:
            yield
        except KeyboardInterrupt as stop:
            if self._n_done and self._is_kept:
                total = "" if self._total is None else f" of {self._total:,}"
                note(f"stopped: {self._n_done:,}{total} rows are kept; the same command goes on after them")
            else:
                note("stopped")
            raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from stop
        finally:
            if hasattr(self, "_bar"):
                self._bar.close()
            if is_main:
                signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which is taken as Ctrl-C is."""


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _summarise(
    report: BulkReport,
    reranker: KalmReranker | RemoteReranker,
    server: str | None,
    payload_store: Path | None,
    *,
    is_coarser_allowed: bool,
) -> None:
    stats, counts = reranker.stats, report.counts
    # A service keeps to itself what it had encoded before, and how.
    done = (
        f"{stats.passages_encoded:,} passages encoded, {describe_windows(stats.windowed, stats.truncated)}"
        if server is None
        else f"{stats.passages_encoded:,} passages sent to {server}"
    )
    if counts.passed_through:
        done += f"; {counts.passed_through:,} had a valid encoding"
    if counts.repeated:
        done += f"; {counts.repeated:,} have the text of another row"
    note(f"{counts.rows - report.resumed_rows:,} rows written in {report.seconds:.1f} s; {done}")
    if counts.rows:
        ratios = f"{reranker.compression_ratio}{' or coarser' if is_coarser_allowed else ''}"
        average = counts.characters / counts.rows
        sizes = (
            f"the encodings take {counts.characters:,} characters of metadata, {average:,.0f} a passage on average, at ratio "
            f"{ratios} in {reranker.storage_codec}"
        )
        if counts.references and payload_store is not None:
            on_disk = sum(path.stat().st_size for path in payload_store.iterdir())
            sizes += f"; {counts.references:,} have their payload in {payload_store}, which takes {format_bytes(on_disk)}"
        note(sizes)
