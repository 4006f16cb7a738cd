"""The folder that the hub's client keeps checkpoints in."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from kalm_integrations.cli.checks.findings import Finding, note, ok
from kalm_integrations.cli.terminal import format_bytes
from kalm_integrations.files import nearest_existing

LOW_BYTES = 2 * 10**9
"""Free room below which a fetch may fail."""

SECONDS = 2.0
"""How long files are counted."""

ELSEWHERE = "set HF_HOME to a folder with room that can be written"


def check_folders() -> Iterator[Finding]:
    """Look at the hub's cache: how large it is, how much room is left, and whether it can be written."""
    from kalm_integrations.core.checkpoint.locate import cache_folder

    folder = cache_folder()
    place = nearest_existing(folder)
    free = shutil.disk_usage(place).free
    if place == folder:
        n_bytes, is_all = folder_bytes(folder)
        size = f"holds {'' if is_all else 'more than '}{format_bytes(n_bytes)}"
    else:
        size = "is not there yet"
    found = f"{folder} {size}, {format_bytes(free)} free"
    if not is_writable(place):
        because = "" if place == folder else f", because of {place}"
        yield note("hub's cache", f"{found}, and cannot be written{because}: nothing can be fetched", ELSEWHERE)
    elif free < LOW_BYTES:
        yield note("hub's cache", found, f"make room, or {ELSEWHERE}")
    else:
        yield ok("hub's cache", found)


def is_writable(place: Path) -> bool:
    """Return whether files can be made in a folder."""
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def folder_bytes(folder: Path, seconds: float = SECONDS) -> tuple[int, bool]:
    """Return the bytes of a folder's files, links not followed, and whether there was time for all."""
    total, until = 0, time.monotonic() + seconds
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size  # noqa: PTH118 - many files
            except OSError:
                continue
        if time.monotonic() > until:
            return total, False
    return total, True
