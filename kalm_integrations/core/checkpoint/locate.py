"""Where a checkpoint lies: an alias, a hub id or a folder becomes a local folder, fetched from the hub if need be.

The only module that knows hub ids. No code from a repository is executed and no pickle is fetched.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from kalm_integrations.errors import CheckpointNotFoundError, SettingsError
from kalm_integrations.logs import only_errors

logger = logging.getLogger(__name__)

BUILT_IN = Path(__file__).parents[2] / "checkpoints"


class Published(NamedTuple):
    """A published checkpoint: where it is, and what its authors say of it."""

    hub_id: str
    revision: str | None
    """Used by default; None, where none has been verified, is the newest."""
    max_compression_ratio: int
    """The coarsest ratio that it was trained for."""


ALIASES: dict[str, Published] = {
    "nano": Published("KaLM-Embedding/KaLM-Reranker-V1-Nano", "1d3dcd79115a77b91b2ece798f536880d2115e48", 32),
    "small": Published("KaLM-Embedding/KaLM-Reranker-V1-Small", "e8eaadc957a7ae383a4983a483c2c399f1056cd3", 32),
    "large": Published("KaLM-Embedding/KaLM-Reranker-V1-Large", "bc5cb8fe5a266b6d0b5ffdb9da4c06c950ae242f", 32),
    "nano-r2": Published("KaLM-Embedding/KaLM-Reranker-V1-Nano-R2", "3902d6453ea915007dcbf88fbc8a1d7dd5f8df10", 128),
    "small-r2": Published("KaLM-Embedding/KaLM-Reranker-V1-Small-R2", None, 128),
    "large-r2": Published("KaLM-Embedding/KaLM-Reranker-V1-Large-R2", None, 128),
}

BUILT_IN_ALIASES = ("pico",)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files that transformers builds a tokenizer from; each can change the token ids of a text."""

DEFAULTS_FILE = "kalm_reranker.json"
"""A checkpoint's own defaults; see `opened.CheckpointDefaults`."""

FILES = ("config.json", DEFAULTS_FILE, *TOKENIZER_FILES, "*.safetensors", "*.index.json")
"""What is fetched from the hub: configuration, tokenizer and safetensors; never code, pickles or other formats."""


def resolve(model: str | os.PathLike[str], revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a checkpoint, fetching it from the hub if need be.

    Args:
        model: an alias (`pico`, `nano`, ...), a hub id (`owner/name`) or a local folder.
        revision: branch, tag or commit of a hub repository; None takes the pinned one of an alias.
        token: for a private repository; None leaves it to huggingface_hub (`HF_TOKEN`, a saved login).

    An alias means the same wherever it is used: a folder of that name in the working directory is `./nano`.

    Raises:
        CheckpointNotFoundError: no such folder or repository, or the hub cannot be reached.
        SettingsError: neither an alias, nor a hub id, nor a folder; or a revision of something without revisions.
    """
    name = os.fspath(model)
    if not isinstance(name, str):
        msg = f"model must be a string or a path of text, but got {name!r}; decode it with os.fsdecode"
        raise SettingsError(msg)
    # os.path's functions say no of names that no file can have; pathlib's raise for some.
    is_local = name in BUILT_IN_ALIASES or (name not in ALIASES and os.path.isdir(name))  # noqa: PTH112
    if is_local and revision is not None:
        msg = f"revision applies to hub repositories only, but got revision={revision!r} with model={name!r}; leave it out"
        raise SettingsError(msg)
    if name in BUILT_IN_ALIASES:
        return BUILT_IN / name
    if is_local:
        return Path(name)
    if name in ALIASES:
        published = ALIASES[name]
        return _fetch(published.hub_id, revision or published.revision, token)
    if isinstance(model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _fetch(name, revision, token)
    known = ", ".join((*BUILT_IN_ALIASES, *ALIASES))
    if name == "" or os.sep in name or os.path.exists(name):  # noqa: PTH110
        msg = f"a local checkpoint must be an existing folder, but got {name!r}; check the path, or use one of: {known}"
        raise CheckpointNotFoundError(msg)
    msg = f"model must be one of {known}, a hub id (owner/name) or a local folder, but got {name!r}"
    raise SettingsError(msg)


def published_max_ratio(model: str | os.PathLike[str]) -> int | None:
    """Return the coarsest compression ratio that a published checkpoint was trained for, by alias or hub id."""
    name = os.fspath(model)
    ratios = {published.hub_id: published.max_compression_ratio for published in ALIASES.values()}
    return ALIASES[name].max_compression_ratio if name in ALIASES else ratios.get(name)


def _fetch(repository: str, revision: str | None, token: str | None) -> Path:
    """Return the snapshot folder of a hub repository, from the cache if it is there."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if not isinstance(try_to_load_from_cache(repository, "config.json", revision=revision), str):
            logger.info("fetching %s from the hub", repository)
        # Two lines for each retry, and what comes of them is in our own message.
        with only_errors("huggingface_hub"):
            return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=list(FILES)))
    except HFValidationError as error:
        msg = f"model must be a valid hub id (owner/name), an alias or an existing folder, but got {repository!r}: {error}"
        raise SettingsError(msg) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        msg = (
            f"checkpoint {repository!r}{at} must be in the local cache or on the hub, but could not be fetched "
            f"({type(error).__name__}); check the name and the network. Without a network: download it on another machine "
            f"(hf download {repository}) and pass the folder, set HF_HUB_OFFLINE=1 to read the cache without asking the hub, "
            "or use the built-in checkpoint 'pico'"
        )
        raise CheckpointNotFoundError(msg) from error
