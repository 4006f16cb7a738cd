"""KVPayloadStore: keeps payloads of reference-mode encodings in any key-value store of LlamaIndex."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import pybase64
from llama_index.core.storage.kvstore.types import BaseKVStore


class KVPayloadStore(MutableMapping[str, bytes]):
    """A `payload_store` over a `BaseKVStore` (simple, Redis, Postgres, ...).

    ```python
    payloads = KVPayloadStore(RedisKVStore(redis_uri="redis://localhost:6379"))
    reranker = KalmReranker.from_pretrained("pico", storage_mode="reference", payload_store=payloads)
    ```
    """

    def __init__(self, kvstore: BaseKVStore, collection: str = "kalm_payloads") -> None:
        """Keep payloads in a collection of `kvstore`."""
        self._kvstore = kvstore
        self._collection = collection

    def __getitem__(self, key: str) -> bytes:
        """Return a payload; a value that this class cannot have written counts as absent."""
        value = self._kvstore.get(key, collection=self._collection)
        try:
            return pybase64.b64decode(value["payload"], validate=True)  # type: ignore[index]
        except (TypeError, KeyError, ValueError):
            raise KeyError(key) from None

    def __setitem__(self, key: str, value: bytes) -> None:
        """Write a payload."""
        self.update({key: value})

    def __delitem__(self, key: str) -> None:
        """Delete a payload."""
        if not self._kvstore.delete(key, collection=self._collection):
            raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        """Go through the keys; the framework's interface can do that only by loading the values too."""
        return iter(self._kvstore.get_all(collection=self._collection))

    def __len__(self) -> int:
        """Return the number of payloads; loads them all, as `__iter__` does."""
        return len(self._kvstore.get_all(collection=self._collection))

    def update(self, *args: Any, **kwargs: bytes) -> None:
        """Write many payloads with one call to the store."""
        payloads = dict(*args, **kwargs)
        # Key-value stores hold JSON.
        pairs = [(key, {"payload": pybase64.b64encode(value).decode("ascii")}) for key, value in payloads.items()]
        self._kvstore.put_all(pairs, collection=self._collection)
