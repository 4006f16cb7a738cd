"""A component's model: from its settings to an open reranker, and what of it can be copied or sent to another process."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kalm_integrations.core.base import Reranker, is_reranker
from kalm_integrations.core.forks import ForkSafeLock
from kalm_integrations.core.passages.redis_store import is_redis_url, is_without_password
from kalm_integrations.core.passages.stores import check_stores, check_stores_travel
from kalm_integrations.core.passages.strings import fingerprint_of
from kalm_integrations.core.settings import SETTING_NAMES, STORE_SETTINGS, build_settings, check_names
from kalm_integrations.errors import SettingsError
from kalm_integrations.remote.address import check_address, is_address

logger = logging.getLogger(__name__)

FUNCTIONS = ("write_back", "fetch")
"""Settings of components that are functions of the user's."""

# One lock a model, so that nobody waits for another model's download; kept here, because a lock in a component would forbid
# copying it.
_locks: defaultdict[str, ForkSafeLock] = defaultdict(ForkSafeLock)
_locks_lock = ForkSafeLock()


def as_reranker(model: Reranker | str | os.PathLike[str], **settings: Any) -> Reranker:
    """Return what was given as `model` as a reranker.

    A reranker is itself, the address of a service gives a `RemoteReranker`, all else goes to `KalmReranker.from_pretrained`.

    Says once per process that the built-in checkpoint is not the one for production.

    Raises:
        SettingsError: settings were given for a reranker that has its own, or one is unknown or breaks a rule.
        CheckpointError: the checkpoint is not there or cannot be used.
    """
    if not isinstance(model, (str, os.PathLike)):
        check_model(model, settings)
        return model
    check_names(settings, SETTING_NAMES, "settings")
    if is_address(model):
        check_model(model, settings)
        # httpx is loaded here, and torch is not.
        from kalm_integrations.remote.reranker import RemoteReranker

        return RemoteReranker(str(model))
    # torch is loaded here, not when a component is made.
    from kalm_integrations.core.reranker import KalmReranker

    if model == "pico":
        _notice_pico()
    return KalmReranker.from_pretrained(model, **settings)


@functools.cache
def _notice_pico() -> None:
    logger.warning("using the small built-in checkpoint 'pico'; for production pass model='nano' or larger")


def fingerprints_of(reranker: Reranker) -> tuple[str, ...]:
    """Return all that a reranker's encodings may carry; somebody else's, of whatever class, may know of one only."""
    return reranker.fingerprints if hasattr(type(reranker), "fingerprints") else (reranker.fingerprint,)


def kept_fingerprint(reranker: Reranker, encoding: str) -> str:
    """Return which of its fingerprints an encoding carries that a reranker has found valid."""
    fingerprint, *others = fingerprints_of(reranker)
    return fingerprint_of(encoding) if others else fingerprint


def check_model(model: object, settings: Mapping[str, Any]) -> None:
    """Check a model and the settings beside it as far as that is possible with nothing loaded.

    Raises:
        SettingsError: it is neither a name, nor a folder, nor an address, nor a reranker; a setting is unknown or breaks a
            rule; or there are settings for a reranker or a service that has its own.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if is_reranker(model):
        if given:
            msg = (
                f"a reranker given as model brings its own settings, but got {', '.join(sorted(given))} too; set them on the "
                "reranker"
            )
            raise SettingsError(msg)
        return
    if not isinstance(model, (str, os.PathLike)):
        msg = (
            "model must be an alias, a hub id, a folder, the address of a service or a reranker, but got "
            f"{type(model).__name__}"
        )
        raise SettingsError(msg)
    if is_address(model):
        check_address(model)
        if given:
            msg = (
                f"a service given as model brings its own settings, but got {', '.join(sorted(given))} too; give them to "
                "`kalm serve`, or pass a RemoteReranker, which takes what a client may decide"
            )
            raise SettingsError(msg)
        return
    build_settings(given)
    check_stores(given)


def check_model_kwargs(model_kwargs: Mapping[str, Any], fields: Iterable[str]) -> None:
    """Check the names of what a component passes on to `KalmReranker.from_pretrained` beside its fields.

    Raises:
        SettingsError: one is a field of the component, unknown, or something that must not be shown.
    """
    fields = set(fields)
    repeated = sorted(model_kwargs.keys() & fields)
    if repeated:
        msg = f"model_kwargs must not repeat fields, but got {', '.join(repeated)}; give them directly"
        raise SettingsError(msg)
    check_no_token(model_kwargs, "model_kwargs")
    check_names(model_kwargs, {*SETTING_NAMES} - fields - {"token"}, "model_kwargs")
    for name in STORE_SETTINGS:
        store = model_kwargs.get(name)
        if isinstance(store, str) and "://" in store and not (is_redis_url(store) and is_without_password(store)):
            # Not shown: there may be a password in it.
            scheme = store.partition("://")[0]
            msg = (
                f"{name} must be a mapping, a folder, or the URL of a Redis server without a password, because settings are "
                f"shown and saved, but got another URL of {scheme}; open that store and wrap it in a mapping (LangChain: "
                "ByteStorePayloads, LlamaIndex: KVPayloadStore), or pass KalmReranker.from_pretrained(..., payload_store=...) "
                "as model"
            )
            raise SettingsError(msg)


def check_no_token(settings: Iterable[str], what: str) -> None:
    """Check that no hub token is among a component's settings, which are shown, saved and sent to other processes.

    Raises:
        SettingsError: there is one; the message says where it belongs.
    """
    if "token" in settings:
        msg = (
            f"{what} must hold no token, because settings are shown, saved and sent to other processes, but got one; set "
            "HF_TOKEN or log in by `hf auth login`, or pass KalmReranker.from_pretrained(..., token=...) as model"
        )
        raise SettingsError(msg)


@dataclass(frozen=True)
class Opened:
    """A reranker that a component has opened, and the settings it was opened with. A copy is itself."""

    settings: dict[str, Any] = field(repr=False)
    reranker: Reranker

    def fits(self, settings: Mapping[str, Any]) -> bool:
        """Return whether the settings are still the same; stores are compared by identity, for == would read them whole."""
        if self.settings.keys() != settings.keys():
            return False
        pairs = ((name, value, settings[name]) for name, value in self.settings.items())
        return all(old is new or (name not in ("model", *STORE_SETTINGS) and old == new) for name, old, new in pairs)

    def __copy__(self) -> Opened:
        """Return itself: copies of a component share the model."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Opened:
        """Return itself; see `__copy__`."""
        return self


class WithModel:
    """A component that was given a reranker, or the settings to open one when it is first needed.

    Settings that change after the first use count: the reranker is opened again, which costs its caches, not its weights.
    """

    model: Any
    _opened: Opened | None
    """Set by the class: pydantic and others keep it in different places."""

    def model_settings(self) -> dict[str, Any]:
        """Return what `as_reranker` takes beside the model."""
        raise NotImplementedError

    def credentials(self) -> dict[str, Any]:
        """Return settings that are needed to open the reranker only, and are not kept: a token."""
        return {}

    @property
    def reranker(self) -> Reranker:
        """The reranker, opened on first use; its weights are loaded when they are needed, `stats` says what it has done.

        Raises:
            SettingsError: a setting is out of range or unknown, or came with a reranker that has its own.
            CheckpointError: the checkpoint is not there or cannot be used.
        """
        settings = {"model": self.model, **self.model_settings()}
        found = self._opened_with(settings)
        return self._open(settings) if found is None else found

    async def areranker(self) -> Reranker:
        """Return the reranker; it is opened on another thread, so that the event loop goes on."""
        settings = {"model": self.model, **self.model_settings()}
        found = self._opened_with(settings)
        return await asyncio.to_thread(self._open, settings) if found is None else found

    def _open(self, settings: dict[str, Any]) -> Reranker:
        with _locks_lock:
            lock = _locks[str(self.model)]
        with lock:
            found = self._opened_with(settings)
            if found is not None:
                return found
            reranker = as_reranker(**settings, **self.credentials())
            self._opened = Opened(settings, reranker)
            return reranker

    def _opened_with(self, settings: Mapping[str, Any]) -> Reranker | None:
        """Return the reranker if it is open, with these settings."""
        opened = self._opened
        return opened.reranker if opened is not None and opened.fits(settings) else None

    def shared_parts(self) -> Iterator[object]:
        """Yield what copies of the component share instead of copying it: a reranker, its stores, callables."""
        if is_reranker(self.model):
            yield self.model
        yield from (value for name, value in self.model_settings().items() if name in STORE_SETTINGS)
        yield from (getattr(self, name, None) for name in FUNCTIONS)

    def share(self, memo: dict[int, Any]) -> dict[int, Any]:
        """Return the memo of a deep copy in which the shared parts stand for themselves."""
        return {**memo, **{id(part): part for part in self.shared_parts() if part is not None}}

    def check_travels(self) -> None:
        """Check that the component can go to another process, where it opens its model anew.

        Raises:
            SettingsError: a part lives in this process only; the message says what to give instead.
        """
        name = type(self).__name__
        if is_reranker(self.model):
            msg = (
                f"{name} must have an alias, a hub id or a folder as model to go to another process (pickling, num_workers), "
                f"but got a {type(self.model).__name__}, which stays in its own; pass model and settings instead"
            )
            raise SettingsError(msg)
        check_stores_travel(self.model_settings())
        for name in FUNCTIONS:
            check_callable_travels(getattr(self, name, None), name)


def check_callable_travels(function: Callable[..., object] | None, name: str) -> None:
    """Check that a function can be found by another process.

    Raises:
        SettingsError: it cannot be pickled, as a lambda, a closure, or a method of something that lives in this process.
    """
    try:
        pickle.dumps(function)
    except Exception as error:
        msg = (
            f"{name} must be a function that can be imported by its name to go to another process (pickling, num_workers), "
            f"but got {_name_of(function)} ({error}); define it at the top of a module, or set it in the process that queries"
        )
        raise SettingsError(msg) from error


def _name_of(function: object) -> str:
    """Return a function's name: the arguments of a partial one are nobody else's affair."""
    return getattr(function, "__qualname__", type(function).__name__)
