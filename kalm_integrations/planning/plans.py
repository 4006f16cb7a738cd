"""A plan: what a collection takes, put together."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalm_integrations.core.settings import (
    CODEC_NAMES,
    MAX_TOKENS,
    EncoderSettings,
    QuerySettings,
    StorageSettings,
    check_dtype,
    make_settings,
)
from kalm_integrations.errors import SettingsError
from kalm_integrations.planning import sizes
from kalm_integrations.planning.reading import read_of
from kalm_integrations.planning.shapes import shape_of
from kalm_integrations.planning.speed import speed_at

MEASURED = Path(__file__).with_name("measured.json")
"""What the benchmarks found; `python -m benchmarks.stores render` writes it."""

CANDIDATES = 100
"""Of the query whose seconds are given."""

MAX_PASSAGES = 10**12


@dataclass(frozen=True)
class Memory:
    """What a process keeps of passages."""

    encoding: int
    """Bytes of a passage's encoding."""
    encodings: int
    """Passages whose encodings the cache's default holds."""
    prefix: int
    """Bytes of a passage's prefix states, those of all its windows."""
    prefixes: int
    """Passages whose prefix states the cache's default holds."""
    prefix_dtype: str


@dataclass(frozen=True)
class Seconds:
    """How long it takes on a CPU."""

    scale: float
    """Speed of the machine, in that of the benchmark's."""
    dtype: str
    encoding: float
    """The whole collection."""
    passages_per_hour_and_core: float
    query: dict[str, float]
    """A query over `CANDIDATES`, by what is kept of them."""


@dataclass(frozen=True)
class LongPassages:
    """What becomes of a passage that is longer than the limit."""

    max_passage_tokens: int
    long_passages: str
    max_windows: int
    windows: int
    """Of a passage of this collection, as expected; 1 if it is read in one piece."""
    tokens_read: int
    """Of a passage; what windows repeat is counted each time."""
    tokens_unread: int
    """Of a passage: they are cut off."""


@dataclass(frozen=True)
class Plan:
    """What a collection takes. Bytes are of encodings; text and vectors are not counted."""

    model: str
    passages: int
    tokens: int
    ratio: int
    codec: str
    reading: LongPassages
    states: int
    """Of a passage."""
    characters: int
    """Of a passage's metadata string."""
    total: int
    """Characters of all of them."""
    lengths: dict[int, dict[str, int]]
    """Characters of a passage by ratio and codec."""
    stores: dict[str, int]
    """Bytes of all passages in each store."""
    room: dict[str, int]
    """Bytes that a store with a limit leaves for an encoding."""
    finest: dict[str, dict[str, int | None]]
    """The finest ratio that fits into it, by codec."""
    memory: Memory
    seconds: Seconds


def make_plan(
    model: str,
    passages: int,
    tokens: int,
    ratio: int | None = None,
    codec: str | None = None,
    prefix_dtype: str | None = None,
    dtype: str | None = None,
    speed: float | None = None,
    max_passage_tokens: int | None = None,
    long_passages: str | None = None,
    max_windows: int | None = None,
) -> Plan:
    """Plan for a collection.

    Args:
        model: an alias or a local folder.
        passages: how many.
        tokens: of a passage, on average.
        ratio: tokens per stored state; None is the default.
        codec: how states are written; None is the default.
        prefix_dtype: in which prefix states are kept; None is the precision of the run.
        dtype: precision of the run; None is float32, a CPU's default.
        speed: of the machine, in that of the benchmark's; None measures this one for a second.
        max_passage_tokens: what a window holds, or where passages are cut; None is the checkpoint's default.
        long_passages: "windows" or "cut"; None is the default.
        max_windows: windows of a passage at most; None is the default.

    Raises:
        InvalidCheckpointError: the folder holds no checkpoint.
        SettingsError: a value breaks a rule.
    """
    for name, value, most in (("passages", passages, MAX_PASSAGES), ("tokens", tokens, MAX_TOKENS)):
        if not 1 <= value <= most:
            msg = f"{name} must be a whole number from 1 to {most:,}, but got {value}"
            raise SettingsError(msg)
    if speed is not None and not 0 < speed < math.inf:
        msg = f"speed must be positive, 1 for the machine of the benchmarks, but got {speed}; leave it out to measure this one"
        raise SettingsError(msg)
    stored = make_settings(StorageSettings, {"compression_ratio": ratio, "storage_codec": codec})
    ratio, codec = stored.compression_ratio, stored.storage_codec
    dtype = check_dtype(dtype or "float32")
    query = make_settings(QuerySettings, {"prefix_dtype": prefix_dtype})
    kept_in = query.prefix_dtype or dtype
    shape = shape_of(model)
    limits = {
        "max_passage_tokens": shape.max_passage_tokens if max_passage_tokens is None else max_passage_tokens,
        "long_passages": long_passages,
        "max_windows": max_windows,
    }
    encoder = make_settings(EncoderSettings, limits)
    read = read_of(tokens, encoder)
    lengths = sizes.lengths(shape, read, ratio)
    characters, payload = lengths[ratio][codec], sizes.payload_bytes(shape, read, ratio, codec)
    encoding, prefix = sizes.encoding_bytes(shape, read, ratio, codec), sizes.prefix_bytes(shape, read, ratio, kept_in)
    measured = read_measured()
    machine = speed_at(measured["speed"], dtype, speed)
    room = sizes.room_in(tokens)
    return Plan(
        model=model,
        passages=passages,
        tokens=tokens,
        ratio=ratio,
        codec=codec,
        reading=LongPassages(
            max_passage_tokens=encoder.max_passage_tokens,
            long_passages=encoder.long_passages,
            max_windows=encoder.max_windows,
            windows=read.n_parts,
            tokens_read=read.n_tokens,
            tokens_unread=read.n_unread,
        ),
        states=read.n_states(ratio),
        characters=characters,
        total=passages * characters,
        lengths=lengths,
        stores={name: store.n_bytes(passages, characters, payload) for name, store in store_models(measured).items()},
        room=room,
        finest={name: sizes.finest(lengths, CODEC_NAMES, n_bytes) for name, n_bytes in room.items()},
        memory=Memory(encoding, query.cache_bytes // encoding, prefix, query.prefix_cache_bytes // prefix, kept_in),
        seconds=Seconds(
            scale=machine.scale,
            dtype=dtype,
            encoding=machine.encode_seconds(shape, passages, read),
            passages_per_hour_and_core=machine.passages_per_hour_and_core(shape, read),
            query=machine.query_seconds(shape, CANDIDATES, read, ratio),
        ),
    )


def read_measured() -> dict[str, Any]:
    """Return what the benchmarks found."""
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found


def store_models(measured: dict[str, Any]) -> dict[str, sizes.StoreModel]:
    """Return what was measured of each store, by name."""
    return {name: sizes.StoreModel(**fields) for name, fields in measured["stores"].items()}
