"""Encoding a corpus: read ahead, encoded window by window, written behind; what is done is kept."""

from __future__ import annotations

import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from kalm_integrations.bulk.outputs import FileOutput, NoRows, Output, StreamOutput, check_columns
from kalm_integrations.bulk.places import check_place, file_output, is_same, n_bytes_of
from kalm_integrations.bulk.reading import are_encoded
from kalm_integrations.bulk.repeats import RepeatedTexts
from kalm_integrations.bulk.rows import RowCounts, RowEncoder
from kalm_integrations.bulk.scanning import COMPRESSED, STORED, WHOLE, Scan, estimate_bytes, scan
from kalm_integrations.bulk.sources import Block, Source, cut_windows, open_source
from kalm_integrations.bulk.state import Progress, WorkFolder, check_same, encoder_settings
from kalm_integrations.bulk.threads import ReadAhead, WriteBehind
from kalm_integrations.core.base import Reranker
from kalm_integrations.core.openmp import release_helpers
from kalm_integrations.core.types import Metadata
from kalm_integrations.corpora.jsonl import PassageFields
from kalm_integrations.corpora.text import STREAM
from kalm_integrations.errors import EncodingTooLargeError, KalmError, OutputError, SettingsError

ROWS_PER_WINDOW = 4096
ROWS_PER_STREAMED_WINDOW = 256
"""Of standard input, so that what comes slowly goes on soon."""
CHARACTERS_PER_WINDOW = 2**20
"""Some 260,000 tokens: what bounds the states in memory."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """What is known before anything is encoded."""

    n_rows: int | None
    """Of the corpus, if it is no stream."""
    done: Progress
    """By earlier runs."""
    estimated_bytes: int | None
    """Of the whole output, or of the payload store where there is no other; None where only a service knows."""


@dataclass(frozen=True)
class BulkReport:
    """What became of a corpus."""

    counts: RowCounts
    """Of all rows, those that earlier runs have done included."""
    n_bytes: int
    """Of the output."""
    resumed_rows: int
    """Rows that earlier runs had done."""
    seconds: float
    was_complete: bool = False
    """Whether the output was there already, whole, so that nothing was done."""

    def to_dict(self) -> dict[str, Any]:
        """Return the facts, for JSON."""
        return asdict(self)


def encode_corpus(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    reranker: Reranker,
    *,
    fields: PassageFields | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    report: Report | None = None,
    on_start: Callable[[Start], object] | None = None,
    on_progress: Callable[[Progress], object] | None = None,
) -> BulkReport:
    """Encode all passages of a corpus, in memory that does not grow with it; stopped and called again, it goes on.

    Rows keep their order and all that they have. Those that carry a valid encoding keep it, and the same text is encoded once
    (of a stream: as long as the reranker's cache has it). A file grows in a folder beside it, named `.partial`, until it is
    whole. However a run ends, another one with the same arguments goes on after the last window of rows that was written,
    and the result equals that of one run.

    Args:
        source: JSON lines, a JSON array (loaded whole), CSV or TSV, gzipped or not; a Parquet file or folder; a folder that
            `save_to_disk` of Hugging Face datasets wrote; or - for standard input.
        output: a file of JSON lines, gzipped if it is named .gz, which may be the source; a folder of Parquet files, if it is
            named .parquet; - for standard output; or None to write no rows, where the reranker's `payload_store` takes the
            encodings (`storage_mode="reference"`).
        reranker: makes the encodings.
        fields: which fields make a row's passage; None takes `text`, behind `title` if there is one.
        settings: whatever else the encodings depend on, for JSON: a run goes on only with the same. `max_inline_bytes` is used
            to estimate.
        overwrite: replace an output that is there, and begin anew what was begun with other settings.
        report: takes the message about a bad row, which is left out. None stops at the first, before anything is encoded.
        on_start: told what is known beforehand.
        on_progress: told, in another thread, of every window that was written.

    Raises:
        SettingsError: a row is bad, the output is there already or another run has it, or a run cannot go on with it.
        EncodingTooLargeError: an encoding is longer than `max_inline_bytes` allows; the message names its row.
        OutputError: the output cannot be written any more, as on a full disk. What was written is kept.
        MissingExtraError: Parquet or datasets need a package that is not installed.
        EngineError: the model fails, or the service does not answer.
    """
    started = time.perf_counter()
    fields = fields or PassageFields()
    corpus = open_source(Path(source), fields)
    path = None if output is None else Path(output)
    check_columns(corpus.schema, path, corpus.name)
    given = {
        **encoder_settings(reranker),
        "ratio": getattr(reranker, "compression_ratio", None),
        "codec": getattr(reranker, "storage_codec", None),
        **(settings or {}),
        "text_field": fields.text,
        "title_field": fields.title,
        "skip_bad": report is not None,
        "window": [ROWS_PER_WINDOW, CHARACTERS_PER_WINDOW],
    }
    with ExitStack() as stack:
        folder = None
        if path is not None and path != STREAM and (path.is_dir() or path.is_file() or not path.exists()):
            check_place(path, corpus)
            folder = WorkFolder(Path(os.path.realpath(path)))
            stack.callback(folder.close)
        run = _Run(corpus, path, folder, RowEncoder(reranker, fields), given, report)
        done = run.prepare(overwrite=overwrite)
        if done is None:
            n_bytes = 0 if folder is None else n_bytes_of(folder.target)
            return BulkReport(RowCounts(), n_bytes, 0, time.perf_counter() - started, was_complete=True)
        if on_start is not None:
            on_start(run.start(done))
        progress = run.encode(done, on_progress or (lambda _: None))
    return BulkReport(progress.counts, progress.n_bytes, done.rows, time.perf_counter() - started)


class _Run:
    """One run over a corpus."""

    def __init__(
        self,
        corpus: Source,
        path: Path | None,
        folder: WorkFolder | None,
        encoder: RowEncoder,
        settings: dict[str, Any],
        report: Report | None,
    ) -> None:
        """Hold what the run works with; `folder` is None where the output cannot be gone on with."""
        self._corpus = corpus
        self._path = path
        self._folder = folder
        self._encoder = encoder
        self._settings = settings
        self._report = report
        self._is_parquet = folder is not None and folder.target.suffix == ".parquet"
        self._scan: Scan | None = None
        self._progress = Progress()

    def prepare(self, *, overwrite: bool) -> Progress | None:
        """Read the corpus once, and return what earlier runs have done; None if the output is there already, whole.

        Raises:
            SettingsError: the run cannot go on with what is there.
        """
        begun = None if self._folder is None else self._folder.load()
        if self._folder is not None and begun is not None and begun[1].is_complete:
            # Ended between the last row and the last step; the corpus may be replaced by the output by now.
            output = file_output(self._folder, None)
            kept = {name: begun[0].get(name) for name in self._settings}
            if not output.grown.exists() and not self._folder.target.exists():
                # Somebody has removed what was in place already.
                self._folder.clear()
                begun = None
            elif kept == self._settings:
                self._publish(self._folder, output)
                return None
        if not self._corpus.is_stream:
            with tempfile.TemporaryDirectory(prefix="kalm-") as temporary:
                place = Path(temporary) if self._folder is None else self._folder.path
                self._scan = scan(self._corpus, place, self._report, with_schema=self._is_parquet)
            if self._report is not None:
                # Bad rows have been reported now.
                self._report = lambda _: None
            self._settings |= {"input_rows": self._scan.n_rows, "input": self._scan.identity}
        if self._folder is None:
            return Progress()
        if begun is not None:
            try:
                self._check_begun(self._folder, begun[0], begun[1])
            except SettingsError:
                if not overwrite:
                    raise
                self._folder.clear()
            else:
                return begun[1]
        if not overwrite and self._folder.target.exists() and not is_same(self._corpus.path, self._folder.target):
            self._check_finished(self._folder.target)
            return None
        return Progress()

    def _check_begun(self, folder: WorkFolder, settings: Mapping[str, Any], progress: Progress) -> None:
        if self._corpus.is_stream:
            msg = (
                f"the output {str(folder.target)!r} has {progress.rows:,} rows of an earlier run, which cannot be gone on "
                "with from a stream: it is not read a second time; give the same rows as a file, or overwrite=True "
                "(--overwrite) to begin anew"
            )
            raise SettingsError(msg)
        check_same(settings, self._settings, folder.target)

    def _check_finished(self, target: Path) -> None:
        """Check that an output has this model's encoding for every row of the corpus.

        Raises:
            SettingsError: it is something else.
        """
        try:
            if not self._corpus.is_stream:
                texts = (row.text for block in self._corpus.scan(self._report) for row in block.candidates)
                if are_encoded(target, texts, self._encoder.reranker, self._encoder.fields):
                    return
        except SettingsError:
            pass  # No rows, or other ones.
        msg = (
            f"the output {str(target)!r} is there already, and is not these rows with encodings of this model; name another, "
            "or overwrite=True (--overwrite) to replace it"
        )
        raise SettingsError(msg)

    def start(self, done: Progress) -> Start:
        """Return what is known before anything is encoded."""
        if self._scan is None:
            return Start(None, done, None)
        limit = self._settings.get("max_inline_bytes")
        is_compressed = self._is_parquet or (self._path is not None and self._path.suffix == ".gz")
        shares = STORED if self._path is None else COMPRESSED if is_compressed else WHOLE
        estimate = estimate_bytes(self._encoder.reranker, self._scan, limit, shares)
        return Start(self._scan.n_rows, done, estimate)

    def encode(self, done: Progress, on_progress: Callable[[Progress], object]) -> Progress:
        """Encode what is not done, and put the output in its place.

        Raises:
            OutputError: it cannot be written.
        """
        with ExitStack() as stack:
            output = self._open_output(stack, done)
            self._progress = done

            def write(item: tuple[Block, list[Metadata], RowCounts]) -> None:
                window, metadata, counts = item
                progress = self._progress
                with self._writing():
                    n_bytes = output.write(progress.windows, window, metadata)
                    made = replace(
                        progress,
                        windows=progress.windows + 1,
                        rows=progress.rows + len(window),
                        n_bytes=progress.n_bytes + n_bytes,
                        counts=progress.counts.plus(counts),
                    )
                    if self._folder is not None:
                        self._folder.save(self._settings, made)
                self._progress = made
                on_progress(made)

            with WriteBehind(write) as writer:
                self._encode_windows(done.windows, writer, stack)
            if self._folder is not None and isinstance(output, FileOutput):
                with self._writing():
                    output.finish(self._progress.windows)
                    self._progress = replace(self._progress, is_complete=True)
                    self._folder.save(self._settings, self._progress)
                    self._publish(self._folder, output)
        return self._progress

    def _encode_windows(
        self, n_done: int, writer: WriteBehind[tuple[Block, list[Metadata], RowCounts]], stack: ExitStack
    ) -> None:
        encoder = self._encoder
        repeats = self._open_repeats(n_done, stack)
        for number, window in enumerate(self._windows(n_done, stack), n_done):
            texts = [candidate.text for candidate in window.candidates]
            repeating, known = (set[str](), dict[str, str]()) if repeats is None else repeats.find(texts)
            before = set(known)
            encoder.counts = RowCounts()
            # Loading the model, and the window before, left some.
            release_helpers()
            metadata = self._encode_window(window, texts, known)
            if repeats is not None:
                with self._writing():
                    repeats.add(((text, known[text]) for text in repeating - before), number)
            writer.put((window, metadata, encoder.counts))

    def _encode_window(self, window: Block, texts: list[str], known: dict[str, str]) -> list[Metadata]:
        if self._path is None:
            self._encoder.fill_store(texts)
            return []
        try:
            return self._encoder.encode_texts(texts, [candidate.row for candidate in window.candidates], known)
        except EncodingTooLargeError as error:
            if error.index is None:
                raise
            # Users count rows of the corpus.
            msg = f"{window.candidates[error.index].place}: {error.reason}"
            raise EncodingTooLargeError(msg) from error

    def _windows(self, n_done: int, stack: ExitStack) -> Iterable[Block]:
        n_rows = ROWS_PER_STREAMED_WINDOW if self._corpus.is_stream else ROWS_PER_WINDOW
        windows = islice(cut_windows(self._corpus.read(self._report), n_rows, CHARACTERS_PER_WINDOW), n_done, None)
        # A thread that waits for a stream could not be ended.
        return windows if self._corpus.is_stream else stack.enter_context(ReadAhead(windows))

    def _open_repeats(self, n_done: int, stack: ExitStack) -> RepeatedTexts | None:
        if self._scan is None or self._path is None or not len(self._scan.repeated):
            return None
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="kalm-")) if self._folder is None else self._folder.path
        return stack.enter_context(closing(RepeatedTexts(Path(place) / "repeated", self._scan.repeated, n_done)))

    def _open_output(self, stack: ExitStack, done: Progress) -> Output:
        if self._path is None:
            return NoRows()
        if self._folder is None:
            file: BinaryIO = sys.stdout.buffer if self._path == STREAM else stack.enter_context(self._path.open("wb"))
            return StreamOutput(file, str(self._path))
        output = file_output(self._folder, None if self._scan is None else self._scan.schema)
        output.resume(done.windows, done.n_bytes)
        return output

    def _publish(self, folder: WorkFolder, output: FileOutput) -> None:
        output.publish()
        folder.remove()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            if isinstance(error, (KalmError, BrokenPipeError)):
                raise
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: Exception) -> OutputError:
        progress = self._progress
        reason = getattr(error, "strerror", None) or str(error)
        kept = (
            f"{progress.rows:,} rows are kept in {self._folder.path}: make room, and run the same again to go on"
            if self._folder is not None and progress.windows
            else "nothing is kept"
        )
        return OutputError(f"the output {str(self._path)!r} cannot be written any more ({reason}); {kept}")
