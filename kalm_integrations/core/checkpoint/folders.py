"""Writing checkpoint folders: beside their place, then renamed, and never over anything but a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from kalm_integrations.core.checkpoint.locate import LICENCE_FILES, TOKENIZER_FILES
from kalm_integrations.errors import SettingsError
from kalm_integrations.files import folder_written_beside

PARTS = ("*.json", "*.safetensors", "*.jinja", *TOKENIZER_FILES)
"""Files that a checkpoint consists of."""

PLAIN_FILES = (*PARTS, *LICENCE_FILES, "*.md", "*.toml", "README*", ".gitattributes")
"""What a plain checkpoint may hold; a folder with anything else in it is somebody's, and is not replaced."""


@contextmanager
def checkpoint_written_beside(folder: Path, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """Give a new folder to write a checkpoint into, which takes the place of `folder` at the end.

    An error leaves what was there, and nothing else.

    Args:
        folder: see `check_target`; the link's target if it is a link.
        sources: see `check_target`.

    Yields:
        An empty folder in the same parent folder, with a name of its own.

    Raises:
        SettingsError: see `check_target`.
    """
    sources = list(sources)
    target = check_target(folder, sources)
    replaced: Path | None = None
    try:
        with folder_written_beside(target) as part:
            yield part
            # Checked again: hours may have passed.
            if check_target(folder, sources).exists():
                replaced = target.replace(part.with_suffix(".old"))
    finally:
        if replaced is not None and target.exists():
            shutil.rmtree(replaced)
        elif replaced is not None:
            replaced.replace(target)


def check_target(folder: Path, sources: Iterable[Path] = ()) -> Path:
    """Return the real path of a folder that a checkpoint may be written to.

    Args:
        folder: must be new, empty or a plain checkpoint: files of a T5Gemma2 checkpoint, no links and no folders.
        sources: folders that the checkpoint is made from; `folder` must be none of them, lie in none and hold none.

    Raises:
        SettingsError: it breaks a rule; the message says what is in the way.
    """
    target = Path(os.path.realpath(folder))
    problem = _other_content(target) if target.exists() else None
    for source in sources:
        place, *files = (Path(os.path.realpath(path)) for path in (source, *source.glob("*")))
        if target == place or place in target.parents:
            problem = f"lies in {source}, which is read" if target != place else f"is {source}, which is read"
        # Its files too, for those of the hub's cache are links.
        elif any(target in path.parents for path in (place, *files)):
            problem = f"holds {source}, which is read"
    if problem is not None:
        msg = (
            "a checkpoint is written to a new folder, or in place of a checkpoint that nothing is read from, but "
            f"{folder} {problem}; choose another folder"
        )
        raise SettingsError(msg)
    return target


def copy_files(source: Path, folder: Path, *, weights: bool) -> None:
    """Copy configuration, tokenizer, defaults, chat template and licences of a checkpoint, and its weights if wanted.

    Its README stays behind: it tells of that checkpoint, not of one that is made from it.
    """
    for path in source.iterdir():
        is_weights = path.suffix == ".safetensors" or path.name.endswith(".index.json")
        if path.is_file() and _matches(path, (*PARTS, *LICENCE_FILES)) and (weights or not is_weights):
            shutil.copy(path, folder / path.name)


def _other_content(target: Path) -> str | None:
    """Return what makes a path something else than an empty folder or a plain checkpoint, or None if it is one."""
    if not target.is_dir():
        return "is a file"
    paths = sorted(target.iterdir())
    for path in paths:
        if path.is_symlink() or not path.is_file() or not _matches(path, PLAIN_FILES):
            return f"holds {path.name!r}, which is no part of one"
    if paths and not (_is_t5gemma2(target / "config.json") and any(path.suffix == ".safetensors" for path in paths)):
        return "holds no config.json of a T5Gemma2 checkpoint, or no weights beside it"
    return None


def _matches(path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)


def _is_t5gemma2(config: Path) -> bool:
    try:
        return bool(json.loads(config.read_bytes())["model_type"] == "t5gemma2")
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False
