"""The command line: `kalm`.

Heavy imports stand inside the commands, so that help comes at once.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kalm_integrations import __version__
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, Passage, RankedPassage
from kalm_integrations.corpora.jsonl import PassageFields, Row, parse_lines, parse_object, to_json
from kalm_integrations.errors import SettingsError
from kalm_integrations.evaluation import commands as evaluation
from kalm_integrations.terminal import (
    STREAM,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OneLineErrors,
    RevisionOption,
    holds_json,
    name_of,
    note,
    open_input,
    open_output,
    open_reranker,
    print_facts,
    print_json,
    print_table,
    printable,
)
from kalm_integrations.training import commands as training

if TYPE_CHECKING:
    from rich.table import Table

ROWS_PER_BATCH = 256
"""Rows that `encode` holds in memory at a time: enough to make batches of similar length."""

app = typer.Typer(
    name="kalm",
    cls=OneLineErrors,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RatioOption = Annotated[int | None, typer.Option(help="Tokens per stored state.", show_default="4")]
PayloadStoreOption = Annotated[
    Path | None, typer.Option(help="Folder of an LMDB store for encodings that are too long for their row.")
]
TextFieldOption = Annotated[str, typer.Option(help="Field of a JSONL row that holds the passage.")]
TitleFieldOption = Annotated[
    str, typer.Option(help="Field that is put before the passage if a row has it, as in BEIR; '' for none.")
]
SkipBadOption = Annotated[bool, typer.Option("--skip-bad", help="Report bad lines and go on with the rest.")]


def main() -> None:
    """Run the command line."""
    app(prog_name="kalm")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kalm-integrations {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def kalm(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Rerank passages with KaLM-Reranker-V1, encoding each passage once."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@dataclass(frozen=True)
class _Candidate:
    """A passage to rank, and the row it came in."""

    line: int
    row: Row
    text: str

    @property
    def passage(self) -> Passage:
        return Passage(self.text, self.row.get(ENCODING_KEY))


@app.command()
def rerank(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="The query.")],
    passages: Annotated[
        Path,
        typer.Argument(
            metavar="PASSAGES",
            help="File of passages, or - for standard input: JSONL if it is named .jsonl or .ndjson, one passage a line if it "
            "is named .txt; otherwise JSONL if it begins with a brace.",
        ),
    ] = STREAM,
    model: ModelOption = "pico",
    top_k: Annotated[int | None, typer.Option(min=1, help="How many to show at most.", show_default="all")] = None,
    score_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Leave out passages that score less.", show_default="none")
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="What makes a passage relevant.", show_default="the checkpoint's")
    ] = None,
    ratio: RatioOption = None,
    text_field: TextFieldOption = "text",
    title_field: TitleFieldOption = "title",
    payload_store: PayloadStoreOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    skip_bad: SkipBadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rank passages for a query, best first.

    A JSONL row that carries an encoding (made by `kalm encode` or by an adapter) is scored from it, without running the
    encoder. Rows without one, or with one of another text or model, are encoded now.
    """
    if not query.strip():
        msg = "the query must hold a word at least, but is empty"
        raise SettingsError(msg)
    with open_input(passages) as file:
        is_json, lines = holds_json(passages, file)
        fields = PassageFields(text_field, title_field or None) if is_json else None
        candidates = list(_read_candidates(lines, name_of(passages), fields, skip_bad))
    reranker = open_reranker(
        model, revision=revision, device=device, dtype=dtype, compression_ratio=ratio, payload_store=_existing(payload_store)
    )
    ranked = reranker.rank(query, [c.passage for c in candidates], top_k, score_threshold, instruction)
    stats = reranker.stats
    if as_json:
        results = [_to_dict(passage, candidates[passage.index]) for passage in ranked]
        print_json({"query": query, "results": results, "stats": asdict(stats)})
        return
    if ranked:
        print_table(_ranking_table(ranked, candidates))
    oddities = (("coarser than asked for", stats.coarser), ("stale", stats.stale), ("corrupt", stats.corrupt))
    details = "".join(f", {count:,} {name}" for name, count in oddities if count)
    note(
        f"{len(ranked):,} of {len(candidates):,} passages; encodings: {stats.metadata_hits:,} stored ones used, "
        f"{stats.passages_encoded:,} made now{details}"
    )


@app.command()
def encode(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="JSONL file, or - for standard input.")] = STREAM,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="JSONL file to write, which may be the input, or - for standard output.")
    ] = STREAM,
    model: ModelOption = "pico",
    ratio: RatioOption = None,
    codec: Annotated[str | None, typer.Option(help="fp32, fp16, bf16, int8 or int4.", show_default="fp16")] = None,
    max_inline_bytes: Annotated[
        int | None, typer.Option(help="Take for each passage the finest ratio whose encoding is not longer.")
    ] = None,
    payload_store: PayloadStoreOption = None,
    text_field: TextFieldOption = "text",
    title_field: TitleFieldOption = "title",
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    skip_bad: SkipBadOption = False,
) -> None:
    """Add an encoding to every row of a JSONL file.

    Rows keep their order and their fields; `kalm_encoding` (the encoding) and `kalm_fp` (what made it, short, for stores to
    filter on) are added. An encoding belongs to the exact text that was encoded: if the store that the rows go to holds the
    text without its title, leave the title out here too. A file, unlike a stream, is checked to its end before anything is
    encoded.
    """
    fields = PassageFields(text_field, title_field or None)
    total = None
    if source.is_file():
        with open_input(source) as lines:
            total = sum(1 for _ in _read_candidates(lines, name_of(source), fields, skip_bad))
    reranker = open_reranker(
        model,
        revision=revision,
        device=device,
        dtype=dtype,
        compression_ratio=ratio,
        storage_codec=codec,
        max_inline_bytes=max_inline_bytes,
        payload_store=payload_store,
    )
    from tqdm.auto import tqdm

    started = time.perf_counter()
    n_rows = 0
    with (
        open_input(source) as lines,
        open_output(output) as file,
        tqdm(desc="Encoding", total=total, unit="row", disable=None) as progress,
    ):
        rows = _read_candidates(lines, name_of(source), fields, skip_bad, quiet=total is not None)
        while batch := list(islice(rows, ROWS_PER_BATCH)):
            encodings = reranker.encode_to_metadata([candidate.text for candidate in batch])
            for candidate, encoding in zip(batch, encodings, strict=True):
                file.write(to_json({**candidate.row, **encoding}) + b"\n")
            n_rows += len(batch)
            progress.update(len(batch))
    stats = reranker.stats
    note(
        f"{n_rows:,} rows written in {time.perf_counter() - started:.1f} s; {stats.passages_encoded:,} passages encoded, "
        f"{stats.truncated:,} of them cut to the model's limit"
    )


@app.command()
def inspect(
    value: Annotated[
        str,
        typer.Argument(
            metavar="ENCODING|FILE",
            help="An encoding, or a file (- for standard input) whose lines are encodings or JSONL rows with `kalm_encoding`.",
        ),
    ] = str(STREAM),
    payload_store: PayloadStoreOption = None,
    skip_bad: SkipBadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what encodings hold, and their size.

    The size is given for every codec and for every ratio that all of them can be pooled to, in characters of the metadata
    string; of several encodings it is the mean.
    """
    from kalm_integrations.core.passages.encoding import EncodedPassage
    from kalm_integrations.core.passages.stores import LmdbPayloadStore
    from kalm_integrations.inspection import EncodingSummary

    folder = _existing(payload_store)
    store = None if folder is None else LmdbPayloadStore(folder)
    summary = EncodingSummary()

    def parse(line: str) -> None:
        encoding = _encoding_of(line)
        summary.add(len(encoding), EncodedPassage.from_metadata(encoding, store))

    def read(lines: Iterable[bytes], source: str) -> None:
        for _ in parse_lines(lines, source, parse, _report_bad if skip_bad else None):
            pass

    if value.startswith(("kalm1", "{")):
        read([os.fsencode(value)], "argument")
    else:
        with open_input(Path(value)) as file:
            read(file, name_of(Path(value)))
    if not summary.n_encodings:
        msg = f"there must be an encoding to inspect, but {name_of(Path(value))} holds none"
        raise SettingsError(msg)
    lengths = summary.lengths()
    if as_json:
        print_json({**summary.facts(), "lengths": lengths})
        return
    n = summary.n_encodings
    means = {
        name: f"{total:,} ({total / n:,.1f} on average)" if n > 1 else f"{total:,}"
        for name, total in (("tokens", summary.n_tokens), ("characters", summary.n_characters))
    }
    print_facts({**summary.facts(), **means})
    if lengths:
        typer.echo()
        print_table(_lengths_table(lengths))


app.add_typer(evaluation.app, name="eval")
app.command()(evaluation.calibrate)


@app.command()
def demo(
    model: ModelOption = "pico",
    part: Annotated[
        Literal["reranking", "frameworks"] | None, typer.Option(help="Show one part only.", show_default=False)
    ] = None,
) -> None:
    """Show the package at work on a sample.

    Reranking first, then storing encodings and querying again under LangChain, LlamaIndex and Haystack.
    """
    from kalm_integrations.demo import main as run

    run(model, part)


for command in (training.train, training.mine, training.average):
    app.command()(command)


@app.command()
def info(
    model: ModelOption = "pico",
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show checkpoint, device and memory.

    The checkpoint is loaded for this, so that the memory of its weights can be counted.
    """
    import torch
    import transformers

    reranker = open_reranker(model, revision=revision, device=device, dtype=dtype)
    reranker.warm_up()
    runtime = reranker.runtime
    checkpoint = runtime.checkpoint
    calibration = checkpoint.defaults.calibration
    facts = {
        "model": model,
        "folder": str(checkpoint.folder),
        "fingerprint": reranker.fingerprint,
        "encoder_layers": len(checkpoint.encoder_config.layer_types),
        "decoder_layers": len(checkpoint.decoder_config.layer_types),
        "width": checkpoint.encoder_config.hidden_width,
        "vocabulary": checkpoint.encoder_config.vocabulary_size,
        "device": str(runtime.device),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "weight_bytes": runtime.nbytes,
        "calibration": None if calibration is None else calibration.model_dump(),
        "versions": f"kalm-integrations {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
    }
    if as_json:
        print_json(facts)
        return
    memory = f"{runtime.nbytes:,} ({runtime.nbytes / 2**20:,.1f} MiB) in memory"
    print_facts({**facts, "weight_bytes": memory, "calibration": calibration or "none"})


def _existing(payload_store: Path | None) -> Path | None:
    """Return the folder of a store that is only read, which must not be made by looking into it."""
    if payload_store is not None and not payload_store.is_dir():
        msg = f"a payload store that is read must be an existing folder, but got {str(payload_store)!r}"
        raise SettingsError(msg)
    return payload_store


def _read_candidates(
    lines: Iterable[bytes], source: str, fields: PassageFields | None, skip_bad: bool, quiet: bool = False
) -> Iterator[_Candidate]:
    """Read passages from JSON lines with `fields`, or from plain lines without."""

    def parse(line: str) -> tuple[Row, str]:
        if fields is None:
            return {"text": line}, line
        row = parse_object(line)
        return row, fields.read(row)

    report = (_ignore if quiet else _report_bad) if skip_bad else None
    for number, (row, text) in parse_lines(lines, source, parse, report):
        yield _Candidate(number, row, text)


def _report_bad(message: str) -> None:
    note(f"left out {message}")


def _ignore(message: str) -> None:
    """Take the message about a bad line that was reported before."""


def _to_dict(passage: RankedPassage, candidate: _Candidate) -> dict[str, Any]:
    """Return a result for JSON: numbers plain, the row without its encoding."""
    row = {key: value for key, value in candidate.row.items() if key not in (ENCODING_KEY, FINGERPRINT_KEY)}
    return {**asdict(passage), "line": candidate.line, "row": row}


def _ranking_table(ranked: Sequence[RankedPassage], candidates: Sequence[_Candidate]) -> Table:
    from rich.table import Table
    from rich.text import Text

    has_ids = all("_id" in candidate.row for candidate in candidates)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rank", "score", "margin", "_id" if has_ids else "line"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("passage")
    for rank, passage in enumerate(ranked, 1):
        candidate = candidates[passage.index]
        name = str(candidate.row["_id"] if has_ids else candidate.line)
        numbers = (str(rank), f"{passage.score:.4f}", f"{passage.margin:+.2f}")
        # Cut in the cell, not by the column, so that a narrow terminal leaves the numbers whole.
        text = Text(printable(candidate.text), no_wrap=True, overflow="ellipsis")
        table.add_row(*numbers, Text(printable(name)), text)
    return table


def _encoding_of(line: str) -> str:
    """Return the encoding in a line: the line itself, or a field of a JSON row."""
    if not line.startswith("{"):
        return line.strip()
    encoding = parse_object(line).get(ENCODING_KEY)
    if not isinstance(encoding, str):
        msg = f"a row must have an encoding under {ENCODING_KEY!r}, but this one has none"
        raise SettingsError(msg)
    return encoding


def _lengths_table(lengths: dict[int, dict[str, float]]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ratio", justify="right")
    for codec in next(iter(lengths.values())):
        table.add_column(codec, justify="right")
    for ratio, by_codec in lengths.items():
        table.add_row(str(ratio), *(f"{length:,.0f}" for length in by_codec.values()))
    return table


if __name__ == "__main__":
    main()
