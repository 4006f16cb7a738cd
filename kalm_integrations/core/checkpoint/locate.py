"""Where a checkpoint lies: an alias, a hub id or a folder becomes a local folder, fetched from the hub if need be.

The only module that knows hub ids. No code from a repository is executed and no pickle is fetched.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from kalm_integrations.core.settings import did_you_mean
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


class Repository(NamedTuple):
    """A repository of the hub."""

    hub_id: str
    revision: str | None
    """None is the newest."""

    def __str__(self) -> str:
        """Return it for a message."""
        return f"{self.hub_id!r}{f' at revision {self.revision}' if self.revision else ''}"


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

LICENCE_FILES = ("LICENSE*", "NOTICE*")
"""Files that must go with the weights and with what is made from them."""

FILES = ("config.json", DEFAULTS_FILE, *TOKENIZER_FILES, *LICENCE_FILES, "*.safetensors", "*.index.json")
"""What is fetched from the hub: configuration, tokenizer, safetensors and licences; never code, pickles or other formats."""


def resolve(model: str | os.PathLike[str], revision: str | None = None, token: str | None = None) -> Path:
    """Return the local folder of a checkpoint, fetching it from the hub if need be.

    Args:
        model: an alias (`pico`, `nano`, ...), a hub id (`owner/name`) or a local folder.
        revision: branch, tag or commit of a hub repository; None takes the pinned one of an alias.
        token: for a private repository; None leaves it to huggingface_hub (`HF_TOKEN`, a saved login).

    Raises:
        CheckpointNotFoundError: no such folder or repository, or the hub cannot be reached.
        SettingsError: neither an alias, nor a hub id, nor a folder; or a revision of something without revisions.
    """
    place = place_of(model, revision)
    return place if isinstance(place, Path) else _fetch(place, token)


def place_of(model: str | os.PathLike[str], revision: str | None = None) -> Path | Repository:
    """Return where a checkpoint belongs: a local folder, which is there, or a repository of the hub, which is not looked up.

    An alias means the same wherever it is used: a folder of that name in the working directory is `./nano`.

    Raises:
        CheckpointNotFoundError: no such folder.
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
        return Repository(published.hub_id, revision or published.revision)
    if isinstance(model, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "~")):
        return Repository(name, revision)
    if name.lower().startswith(("http://", "https://")):
        # Not shown: there may be a password in it.
        msg = "model must be a checkpoint here, but got the address of a service, which RemoteReranker(address) asks"
        raise SettingsError(msg)
    known = ", ".join((*BUILT_IN_ALIASES, *ALIASES))
    if name == "" or os.sep in name or os.path.exists(name):  # noqa: PTH110
        home = "write the home directory out for ~, " if name.startswith("~") else ""
        msg = f"a local checkpoint must be an existing folder, but got {name!r}; {home}check the path, or use one of: {known}"
        raise CheckpointNotFoundError(msg)
    msg = f"model must be one of {known}, a hub id (owner/name) or a local folder, but got {name!r}{did_you_mean_model(name)}"
    raise SettingsError(msg)


def published_max_ratio(model: str | os.PathLike[str]) -> int | None:
    """Return the coarsest compression ratio that a published checkpoint was trained for, by alias or hub id."""
    name = os.fspath(model)
    ratios = {published.hub_id: published.max_compression_ratio for published in ALIASES.values()}
    return ALIASES[name].max_compression_ratio if name in ALIASES else ratios.get(name)


def did_you_mean_model(name: str) -> str:
    """Return a hint at the alias or hub id that a name is close to, or nothing."""
    hub_ids = [published.hub_id for published in ALIASES.values()]
    if name in hub_ids:
        return ""
    if "kalm" in name.lower():
        return did_you_mean(name if "/" in name else f"KaLM-Embedding/{name}", hub_ids)
    return did_you_mean(name, (*BUILT_IN_ALIASES, *ALIASES))


def is_offline() -> bool:
    """Return whether the hub must not be asked, because the environment says so."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cache_folder() -> Path:
    """Return the folder in which the hub's client keeps what it has fetched; it need not be there."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_folder(repository: Repository) -> Path | None:
    """Return the folder of a repository in the hub's cache, or None. Nothing is fetched; a fetch may have been cut short."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository.hub_id, revision=repository.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None


def _fetch(repository: Repository, token: str | None) -> Path:
    """Return the snapshot folder of a hub repository, from the cache if it is there."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hub_id, revision = repository
    try:
        if not is_offline() and not isinstance(try_to_load_from_cache(hub_id, "config.json", revision=revision), str):
            logger.info("fetching %s from the hub", hub_id)
        # Two lines for each retry, and what comes of them is in our own message.
        with only_errors("huggingface_hub"):
            return Path(snapshot_download(hub_id, revision=revision, token=token, allow_patterns=list(FILES)))
    except HFValidationError as error:
        msg = f"model must be a valid hub id (owner/name), an alias or an existing folder, but got {hub_id!r}: {error}"
        raise SettingsError(msg) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointNotFoundError(_not_fetched(repository, error)) from error


def _not_fetched(repository: Repository, error: Exception) -> str:
    hub_id, revision = repository
    at = f" --revision {revision}" if revision else ""
    ways = (
        f"download it where there is a network (hf download {hub_id}{at} --local-dir FOLDER) and pass the folder, or use the "
        "built-in checkpoint 'pico'"
    )
    if is_offline():
        return (
            f"checkpoint {repository} must be in the local cache, because HF_HUB_OFFLINE is set, but {cache_folder()} does "
            f"not have it; unset HF_HUB_OFFLINE to fetch it, {ways}"
        )
    return (
        f"checkpoint {repository} must be in the local cache or on the hub, but could not be fetched "
        f"({type(error).__name__}){did_you_mean_model(hub_id)}; check the name and the network: there is no folder of that "
        f"name either. Without a network: {ways}; HF_HUB_OFFLINE=1 reads the cache without asking the hub"
    )
