"""Files and standard output: bytes out, gzipped or not."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import typer

from kalm_integrations.corpora.text import STREAM
from kalm_integrations.errors import SettingsError
from kalm_integrations.files import written_beside


@contextmanager
def open_output(path: Path) -> Iterator[BinaryIO]:
    """Open a file or standard output; a file appears, or is replaced, when all of it has been written.

    What is written to a file whose name ends in .gz is gzipped.

    Raises:
        SettingsError: it is a folder, or its folder does not exist.
    """
    if path == STREAM:
        yield typer.get_binary_stream("stdout")
        return
    if path.is_dir() or not path.resolve().parent.is_dir():
        reason = "it is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
        msg = f"the output must be a file in an existing folder, but got {str(path)!r}: {reason}"
        raise SettingsError(msg)
    with ExitStack() as stack:
        # A pipe or a device must not be replaced.
        is_special = path.exists() and not path.is_file()
        written = path if is_special else stack.enter_context(written_beside(path))
        file: BinaryIO = stack.enter_context(written.open("wb"))
        if path.suffix == ".gz":
            file = cast("BinaryIO", stack.enter_context(gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0)))
        yield file
