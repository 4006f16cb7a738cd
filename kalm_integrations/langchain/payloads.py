"""A LangChain byte store as the place of reference-mode payloads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

from langchain_core.stores import BaseStore

from kalm_integrations.errors import SettingsError


class ByteStorePayloads(MutableMapping[str, bytes]):
    """Makes a `ByteStore` (LocalFileStore, RedisStore, …) a `payload_store`.

    ```python
    payloads = ByteStorePayloads(LocalFileStore("payloads"))
    KalmPassageEncoder(model_kwargs={"storage_mode": "reference", "payload_store": payloads})
    ```
    """

    def __init__(self, store: BaseStore[str, bytes]) -> None:
        """Wrap a byte store; it must hold nothing else, or have a prefix of its own."""
        self._store = store

    def __getitem__(self, key: str) -> bytes:
        """Return a payload."""
        [value] = self._store.mget([_to_store(key)])
        if value is None:
            raise KeyError(key)
        return value

    def get_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Return those of the payloads that are there, asked for in one call of the store."""
        keys = list(keys)
        values = self._store.mget([_to_store(key) for key in keys])
        return {key: value for key, value in zip(keys, values, strict=True) if value is not None}

    def __setitem__(self, key: str, value: bytes) -> None:
        """Write a payload; `update` writes many at the price of one."""
        self.update({key: value})

    def __delitem__(self, key: str) -> None:
        """Delete a payload."""
        if key not in self:
            raise KeyError(key)
        self._store.mdelete([_to_store(key)])

    def __iter__(self) -> Iterator[str]:
        """Go through the keys."""
        return (key.replace("-", ":") for key in self._store.yield_keys())

    def __len__(self) -> int:
        """Count the keys, one by one: byte stores cannot tell."""
        return sum(1 for _ in self._store.yield_keys())

    def update(self, *args: Any, **kwargs: bytes) -> None:
        """Write many payloads in one call of the store."""
        self._store.mset([(_to_store(key), value) for key, value in dict(*args, **kwargs).items()])


def _to_store(key: str) -> str:
    """Return the store's key: LocalFileStore takes no colons."""
    if "-" in key:
        msg = f"a payload's key must not contain '-', but got {key!r}"
        raise SettingsError(msg)
    return key.replace(":", "-")
