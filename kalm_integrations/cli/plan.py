"""`kalm plan`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kalm_integrations.cli import completion, options
from kalm_integrations.cli.terminal import format_bytes, format_seconds, make_table, print_facts, print_json, print_table

if TYPE_CHECKING:
    from rich.table import Table

    from kalm_integrations.planning.migration import Migration
    from kalm_integrations.planning.plans import Plan

_LONG = 1_000_000
"""Characters from which on the table counts thousands."""


def plan(
    passages: Annotated[int, typer.Option(help="How many passages the collection has.")] = 1_000_000,
    tokens: Annotated[int, typer.Option(help="Tokens of a passage, on average.")] = 256,
    model: Annotated[
        str,
        typer.Option(
            help="nano, small, large, nano-r2, small-r2, large-r2, pico or a local folder; only its shape is read, nothing is "
            "fetched.",
            autocompletion=completion.models,
        ),
    ] = "nano",
    ratio: options.Ratio = None,
    codec: options.Codec = None,
    max_passage_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a window, or where passages are cut.", show_default="the model's, or 1,024"),
    ] = None,
    long_passages: options.LongPassages = None,
    max_windows: options.MaxWindows = None,
    prefix_dtype: Annotated[
        str | None,
        typer.Option(
            help="What prefix states are kept in.",
            show_default="the dtype of the run",
            autocompletion=completion.prefix_dtypes,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16.", show_default="float32", autocompletion=completion.dtypes),
    ] = None,
    speed: Annotated[
        float | None,
        typer.Option(
            help="Speed of the machine to plan for, in that of the benchmarks' (2 cores of an AMD EPYC).",
            show_default="this machine's CPU, measured for a second",
        ),
    ] = None,
    migrate: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What the collection is encoded with now; says what changing over to --model takes.",
            show_default="none",
            autocompletion=completion.models,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say what a collection will take.

    Characters of metadata, bytes in stores and in memory, what stores with a limit allow, and time on a CPU. Bytes are of the
    encodings: text, vectors and other metadata come on top.
    """
    from kalm_integrations.planning.migration import plan_migration
    from kalm_integrations.planning.plans import make_plan

    made = make_plan(
        model,
        passages,
        tokens,
        ratio=ratio,
        codec=codec,
        prefix_dtype=prefix_dtype,
        dtype=dtype,
        speed=speed,
        max_passage_tokens=max_passage_tokens,
        long_passages=long_passages,
        max_windows=max_windows,
    )
    migration = None if migrate is None else plan_migration(migrate, made)
    if as_json:
        print_json(asdict(made) | ({} if migration is None else {"migration": asdict(migration)}))
        return
    print_facts(_facts(made))
    changed = () if migration is None else (_migration(migration, made),)
    for table in (_lengths(made), _stores(made), _limits(made), _seconds(made), *changed):
        print()
        print_table(table)


def _facts(made: Plan) -> dict[str, object]:
    memory = made.memory
    return {
        "collection": f"{made.passages:,} passages of {made.tokens:,} tokens, {made.states:,} states each",
        **_long_passages(made),
        "encodings": f"{made.model} at ratio {made.ratio} in {made.codec}",
        "metadata": f"{made.characters:,} characters a passage, {format_bytes(made.total)} in all",
        "encoding_in_memory": f"{format_bytes(memory.encoding)} a passage, {memory.encodings:,} in the default cache",
        "prefix_states": f"{format_bytes(memory.prefix)} a passage, {memory.prefixes:,} in the default cache",
        "prefix_dtype": memory.prefix_dtype,
    }


def _long_passages(made: Plan) -> dict[str, object]:
    """Return what is said of passages that are not read in one piece."""
    reading = made.reading
    unread = f"the last {reading.tokens_unread:,} are not read"
    if reading.windows > 1:
        said = f"about {reading.windows:,} windows each, of {reading.max_passage_tokens:,} tokens at most: "
        said += f"{reading.tokens_read:,} tokens with what they repeat"
        return {"long_passages": f"{said}; {unread}" if reading.tokens_unread else said}
    if reading.tokens_unread:
        return {"long_passages": f"cut to {reading.tokens_read:,} tokens: {unread}"}
    return {}


def _table(first: str, *others: str) -> Table:
    table = make_table()
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _lengths(made: Plan) -> Table:
    codecs = list(made.lengths[made.ratio])
    # A terminal of 80 columns has no room for more digits.
    is_long = max(made.lengths[min(made.lengths)].values()) >= _LONG
    table = _table("1,000 characters at ratio" if is_long else "characters at ratio", *codecs)
    for ratio, by_codec in made.lengths.items():
        lengths = (by_codec[codec] / 1000 if is_long else by_codec[codec] for codec in codecs)
        table.add_row(str(ratio), *(f"{length:,.0f}" for length in lengths))
    return table


def _stores(made: Plan) -> Table:
    table = _table("bytes in a store", "a passage", "in all")
    for name, total in made.stores.items():
        table.add_row(name, format_bytes(total / made.passages), format_bytes(total))
    return table


def _limits(made: Plan) -> Table:
    codecs = list(made.lengths[made.ratio])
    table = _table("finest ratio that fits into", "bytes", *codecs)
    for name, n_bytes in made.room.items():
        ratios = (made.finest[name][codec] for codec in codecs)
        table.add_row(name, f"{n_bytes:,}", *("none" if ratio is None else str(ratio) for ratio in ratios))
    return table


def _seconds(made: Plan) -> Table:
    seconds = made.seconds
    table = _table(f"time in {seconds.dtype}, {seconds.scale:.2f} × the benchmark's machine", "")
    table.add_row("encode the collection", format_seconds(seconds.encoding))
    table.add_row("passages encoded an hour and core", f"{seconds.passages_per_hour_and_core:,.0f}")
    for kept, value in seconds.query.items():
        table.add_row(f"query of 100 candidates, {kept} kept", format_seconds(value))
    return table


def _migration(migration: Migration, made: Plan) -> Table:
    table = _table(f"bytes, {migration.model} to {made.model}", "before", "both", "after")
    for name in migration.before:
        table.add_row(name, *(format_bytes(stage[name]) for stage in (migration.before, migration.both, migration.after)))
    table.add_row("time to encode again", "", format_seconds(migration.seconds))
    table.add_row("documents a second", "", f"{migration.documents_per_second:,.1f}")
    return table
