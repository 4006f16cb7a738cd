"""Byte stores outside the host's metadata: payloads of reference mode, and prefix states."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from itertools import islice
from pathlib import Path
from typing import Any

from kalm_integrations.core.passages.environments import SharedEnvironment, share_environment
from kalm_integrations.core.settings import STORE_SETTINGS
from kalm_integrations.errors import SettingsError

MAX_KEYS_AT_ONCE = 1024
"""Keys that are read in one transaction when a store is gone through."""


class LmdbPayloadStore(MutableMapping[str, bytes]):
    """Payloads of reference-mode encodings in an LMDB environment: one folder, many readers, any number of processes.

    Stores of the same folder share its environment, which is closed with the last of them. Keys are 1 to 511 bytes of UTF-8.
    A folder that this process may not write is opened for reading. A store that came over by fork opens its folder again.

    Whatever goes wrong is a `StoreError`. Files that were cut are refused before they are read, garbage when they are opened.
    What LMDB itself cannot bear is damage inside the pages that lead to the values: it does not check them, and a flipped byte
    there may end the process. Values are checked by who reads them. Who can write the folder is trusted that far.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int = 2**40) -> None:
        """Open or create the store.

        Args:
            path: its folder.
            max_bytes: the size it may grow to; a limit, not an allocation. Where the process has the folder open already,
                that limit holds; where the system grants no map of this size, the largest half, quarter, … that it grants.

        Raises:
            SettingsError: `max_bytes` is not positive.
            StoreError: the folder cannot be made or opened, or what lies there is damaged or no LMDB environment.
        """
        self._shared = share_environment(path, max_bytes)
        self._process = os.getpid()
        self._opened_as = (self._shared.folder, max_bytes)

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
        """Go through the keys, in order; those that come or go meanwhile may be among them or not."""
        # Some at a time: a transaction that waits for its caller keeps pages from being used again, and forks waiting.
        n_keys, last = 1, b""
        while keys := self._keys_after(last, n_keys):
            yield from keys
            n_keys, last = min(2 * n_keys, MAX_KEYS_AT_ONCE), keys[-1].encode()

    def _keys_after(self, last: bytes, n_keys: int) -> list[str]:
        with self._environment.begin() as transaction:
            cursor = transaction.cursor()
            if not (cursor.set_range(last) if last else cursor.first()):
                return []
            following = (bytes(key) for key in cursor.iternext(keys=True, values=False))
            return [key.decode() for key in islice((key for key in following if key != last), n_keys)]

    def __len__(self) -> int:
        """Return the number of payloads."""
        with self._environment.begin() as transaction:
            return int(transaction.stat()["entries"])

    def update(self, *args: Any, **kwargs: bytes) -> None:
        """Write many payloads in one transaction."""
        payloads = dict(*args, **kwargs)
        with self._environment.begin(write=True) as transaction:
            for key, value in payloads.items():
                transaction.put(key.encode(), value)

    @property
    def _environment(self) -> SharedEnvironment:
        """The environment of this process: after a fork the child opens its own."""
        if self._process != os.getpid():
            self._shared = share_environment(*self._opened_as)
            self._process = os.getpid()
        return self._shared


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
