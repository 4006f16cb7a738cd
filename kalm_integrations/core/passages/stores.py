"""Byte stores outside the host's metadata: payloads of reference mode, and prefix states."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb

from kalm_integrations.core.settings import STORE_SETTINGS
from kalm_integrations.errors import SettingsError

MAX_READERS = 1024
"""Reads that may be under way at once, in all processes together."""

_environments: WeakValueDictionary[str, lmdb.Environment] = WeakValueDictionary()
_environments_lock = threading.Lock()


class LmdbPayloadStore(MutableMapping[str, bytes]):
    """Payloads of reference-mode encodings in an LMDB environment: one folder, many readers, any number of processes.

    Stores of the same folder share its environment, which is closed with the last of them. Keys are 1 to 511 bytes of UTF-8.
    Open the store after a fork, not before.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int = 2**40) -> None:
        """Open or create the store.

        Args:
            path: its folder.
            max_bytes: the size it may grow to; a limit, not an allocation. Where the process has the folder open already,
                that limit holds.
        """
        Path(path).mkdir(parents=True, exist_ok=True)
        folder = os.path.realpath(path)
        # LMDB allows one environment per folder and process, but every reranker opens a store of its own.
        with _environments_lock:
            environment = _environments.get(folder)
            if environment is None:
                environment = lmdb.open(folder, map_size=max_bytes, max_readers=MAX_READERS)
                _environments[folder] = environment
        self._environment = environment
        self._opened_as = (folder, max_bytes)

    def __reduce__(self) -> tuple[type[LmdbPayloadStore], tuple[str, int]]:
        """Travel as the folder, which the other process opens for itself; a copy shares the environment."""
        return type(self), self._opened_as

    def __getitem__(self, key: str) -> bytes:
        """Return a payload."""
        with self._environment.begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise KeyError(key)
        return bytes(value)

    def __setitem__(self, key: str, value: bytes) -> None:
        """Write a payload durably; `update` writes many at the price of one."""
        self.update({key: value})

    def __delitem__(self, key: str) -> None:
        """Delete a payload."""
        with self._environment.begin(write=True) as transaction:
            if not transaction.delete(key.encode()):
                raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        """Go through the keys, in order."""
        with self._environment.begin() as transaction:
            for key in transaction.cursor().iternext(keys=True, values=False):
                yield bytes(key).decode()

    def __len__(self) -> int:
        """Return the number of payloads."""
        return int(self._environment.stat()["entries"])

    def update(self, *args: Any, **kwargs: bytes) -> None:
        """Write many payloads in one transaction."""
        with self._environment.begin(write=True) as transaction:
            for key, value in dict(*args, **kwargs).items():
                transaction.put(key.encode(), value)


def check_stores(settings: Mapping[str, Any]) -> None:
    """Check what was given as stores, before folders are made of them.

    Raises:
        SettingsError: one is neither a mapping that can be written to, nor a path that can be a folder.
    """
    for name in STORE_SETTINGS:
        store = settings.get(name)
        if isinstance(store, (str, os.PathLike)):
            if Path(store).is_file():
                msg = f"{name} must be a mapping or a folder, but {os.fspath(store)!r} is a file"
                raise SettingsError(msg)
        elif store is not None and not isinstance(store, MutableMapping):
            msg = (
                f"{name} must be a mapping from str to bytes or the folder of an LMDB store, but got "
                f"{type(store).__name__}; wrap it in a collections.abc.MutableMapping"
            )
            raise SettingsError(msg)


def check_stores_travel(settings: Mapping[str, Any]) -> None:
    """Check that the stores among settings can be opened again by another process.

    Raises:
        SettingsError: one lives in this process only: what would be written to a copy would be lost.
    """
    for name in STORE_SETTINGS:
        store = settings.get(name)
        if store is not None and not isinstance(store, (str, os.PathLike, LmdbPayloadStore)):
            msg = (
                f"{name} must be the folder of an LMDB store to go to another process (pickling, num_workers), but got "
                f"{type(store).__name__}, which stays in its own; pass a folder"
            )
            raise SettingsError(msg)


def open_store(store: MutableMapping[str, bytes] | str | os.PathLike[str] | None) -> MutableMapping[str, bytes] | None:
    """Return a store: a mapping as it is, a folder as an LMDB store."""
    return LmdbPayloadStore(store) if isinstance(store, (str, os.PathLike)) else store
