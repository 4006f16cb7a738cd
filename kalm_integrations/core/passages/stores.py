"""Byte stores outside the host's metadata: payloads of reference mode, and prefix states."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_integrations.core.passages.environments import STAMPS, SharedEnvironment, share_environment
from kalm_integrations.core.passages.redis_store import RedisPayloadStore, is_redis_url
from kalm_integrations.core.settings import STORE_SETTINGS
from kalm_integrations.errors import SettingsError

if TYPE_CHECKING:
    import lmdb

MAX_KEYS_AT_ONCE = 1024
"""Keys that are read in one transaction when a store is gone through."""

KEPT_SHARE = 0.9
"""What of a bounded store's size is left by an eviction, so that it is not needed with every write."""

_STAMP = struct.Struct(">d")
"""When a value was last used, in seconds since 1970."""


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

    def get_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Return those of the payloads that are there, read in one transaction."""
        with self._environment.begin() as transaction:
            found = ((key, transaction.get(key.encode())) for key in keys)
            return {key: bytes(value) for key, value in found if value is not None}

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
            return [key.decode() for key in islice((key for key in following if key not in (last, STAMPS)), n_keys)]

    def __len__(self) -> int:
        """Return the number of payloads."""
        with self._environment.begin() as transaction:
            return int(transaction.stat()["entries"]) - int(transaction.get(STAMPS) is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that hold payloads; the file has others that are free to be used again."""
        with self._environment.begin() as transaction:
            return _n_bytes(transaction)

    def update(self, *args: Any, **kwargs: bytes) -> None:
        """Write many payloads in one transaction; `keep_recent` of other writers does not delete them."""
        payloads = dict(*args, **kwargs)
        environment = self._environment
        with environment.begin(write=True) as transaction:
            stamps = environment.stamps(transaction) if transaction.get(STAMPS) is not None else None
            for key, value in payloads.items():
                transaction.put(key.encode(), value)
                if stamps is not None:
                    transaction.delete(key.encode(), db=stamps)

    def keep_recent(self, payloads: Mapping[str, bytes], used: Collection[str], max_bytes: int) -> int:
        """Write payloads that may be deleted again, and delete the least recently used ones if the store is too large.

        Args:
            payloads: what to write.
            used: keys of what is there and was used since the last call.
            max_bytes: the bound of `nbytes`. What `update` has written counts, but is not deleted.

        Returns:
            How many were deleted.
        """
        now = time.time()
        environment = self._environment
        with environment.begin(write=True) as transaction:
            stamps = environment.stamps(transaction)
            n_new = sum(map(len, payloads.values()))
            n_evicted = _evict(transaction, stamps, max_bytes, n_new) if _n_bytes(transaction) + n_new > max_bytes else 0
            for name in map(str.encode, used):
                if transaction.get(name, db=stamps) is not None:
                    transaction.put(name, _STAMP.pack(now), db=stamps)
            for key, value in payloads.items():
                name = key.encode()
                # What `update` has written stays without a stamp.
                may_go = transaction.get(name) is None or transaction.get(name, db=stamps) is not None
                transaction.put(name, value)
                if may_go:
                    transaction.put(name, _STAMP.pack(now), db=stamps)
        return n_evicted

    @property
    def _environment(self) -> SharedEnvironment:
        """The environment of this process: after a fork the child opens its own."""
        if self._process != os.getpid():
            self._shared = share_environment(*self._opened_as)
            self._process = os.getpid()
        return self._shared


def _n_bytes(transaction: lmdb.Transaction) -> int:
    stat = transaction.stat()
    return int(stat["psize"]) * int(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"])


def _evict(transaction: lmdb.Transaction, stamps: Any, max_bytes: int, n_new: int) -> int:
    """Delete the least recently used payloads until there is room for so many new bytes, and return how many."""
    with transaction.cursor(stamps) as cursor:
        oldest_first = sorted((_STAMP.unpack(stamp), bytes(name)) for name, stamp in cursor)
    n_evicted = 0
    for _, name in oldest_first:
        if _n_bytes(transaction) + n_new <= KEPT_SHARE * max_bytes:
            break
        transaction.delete(name)
        transaction.delete(name, db=stamps)
        n_evicted += 1
    return n_evicted


def check_stores(settings: Mapping[str, Any]) -> None:
    """Check what was given as stores, before folders are made of them.

    Raises:
        SettingsError: one is neither a mapping that can be written to, nor a path that can be a folder.
    """
    for name in STORE_SETTINGS:
        store = settings.get(name)
        if is_redis_url(store):
            continue
        if isinstance(store, (str, os.PathLike)):
            if Path(store).is_file():
                msg = f"{name} must be a mapping or a folder, but {os.fspath(store)!r} is a file"
                raise SettingsError(msg)
        elif store is not None and not isinstance(store, MutableMapping):
            msg = (
                f"{name} must be a mapping from str to bytes, the folder of an LMDB store or the URL of a Redis server, but "
                f"got {type(store).__name__}; wrap it in a collections.abc.MutableMapping"
            )
            raise SettingsError(msg)
    store = settings.get("payload_store")
    is_folder = isinstance(store, (str, os.PathLike)) and not is_redis_url(store)
    if settings.get("max_store_bytes") is not None and not (is_folder or isinstance(store, LmdbPayloadStore)):
        msg = (
            "max_store_bytes bounds the folder of an LMDB store, but payload_store is another; bound that where it runs "
            "(Redis: maxmemory, and maxmemory-policy allkeys-lru)"
        )
        raise SettingsError(msg)


def check_stores_travel(settings: Mapping[str, Any]) -> None:
    """Check that the stores among settings can be opened again by another process.

    Raises:
        SettingsError: one lives in this process only: what would be written to a copy would be lost.
    """
    for name in STORE_SETTINGS:
        store = settings.get(name)
        if store is not None and not isinstance(store, (str, os.PathLike, LmdbPayloadStore, RedisPayloadStore)):
            msg = (
                f"{name} must be the folder of an LMDB store or a Redis server to go to another process (pickling, "
                f"num_workers), but got {type(store).__name__}, which stays in its own; pass a folder"
            )
            raise SettingsError(msg)


def open_store(store: MutableMapping[str, bytes] | str | os.PathLike[str] | None) -> MutableMapping[str, bytes] | None:
    """Return a store: a mapping as it is, a URL as a Redis store, a folder as an LMDB store."""
    if isinstance(store, str) and is_redis_url(store):
        return RedisPayloadStore(store)
    return LmdbPayloadStore(store) if isinstance(store, (str, os.PathLike)) else store
