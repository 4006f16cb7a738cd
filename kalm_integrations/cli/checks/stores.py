"""Stores that refuse long metadata: whether an encoding fits."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

from kalm_integrations.cli.checks.findings import Finding, note, ok
from kalm_integrations.remote.address import is_address


def check_stores(model: str, revision: str | None, tokens: int, ratio: int | None, codec: str | None) -> Iterator[Finding]:
    """Compare the encoding of a passage with what stores take, by their own documentation.

    Args:
        model: an alias, a hub id, a folder, or the address of a service.
        revision: of a hub repository.
        tokens: of the passage.
        ratio: tokens per stored state; None is the default.
        codec: how states are written; None is the default.
    """
    from kalm_integrations.core.checkpoint.locate import ALIASES, cached_folder, place_of
    from kalm_integrations.core.settings import EncoderSettings, StorageSettings, make_settings
    from kalm_integrations.planning import sizes
    from kalm_integrations.planning.reading import read_of
    from kalm_integrations.planning.shapes import shape_of

    stored = make_settings(StorageSettings, {"compression_ratio": ratio, "storage_codec": codec})
    ratio, codec = stored.compression_ratio, stored.storage_codec
    if is_address(model):
        yield note("encodings", "a service makes them: its ratio and codec decide how long they are")
        return
    if model not in ALIASES:
        place = place_of(model, revision)
        folder = place if isinstance(place, Path) else cached_folder(place)
        if folder is None:
            yield note("encodings", f"{place} is not in the cache, so its width is not known")
            return
        model = str(folder)
    shape = shape_of(model)
    encoder = make_settings(EncoderSettings, {"max_passage_tokens": shape.max_passage_tokens})
    lengths = sizes.lengths(shape, read_of(tokens, encoder), ratio)
    length = lengths[ratio][codec]
    limit, n_windows = encoder.max_passage_tokens, encoder.n_windows or 1
    longest = limit * n_windows
    yield ok("encodings", f"{length:,} characters for a passage of {tokens:,} tokens, at ratio {ratio} in {codec}")
    for store, room in sizes.room_in(tokens).items():

        def is_too_long(n_tokens: int, store: str = store) -> bool:
            made = sizes.length(shape, read_of(n_tokens, encoder), ratio, codec)
            return made > sizes.room_in(n_tokens)[store]

        most = bisect_left(range(1, longest + 1), True, key=is_too_long)
        if most == longest:
            passages = f"of any length, of which {n_windows:,} windows of {limit:,} tokens are read at most"
        else:
            passages = f"of up to {most:,} tokens" if most <= limit else f"of up to about {most:,} tokens, in windows"
        found = f"takes {room:,} characters: passages {passages}"
        if length <= room:
            yield ok(store, found)
        else:
            finest = sizes.finest(lengths, [codec], room)[codec]
            fitting = f"compression_ratio={finest} fits, or " if finest is not None else ""
            yield note(store, found, f"if you use it: {fitting}max_inline_bytes={room}, or a payload_store")
