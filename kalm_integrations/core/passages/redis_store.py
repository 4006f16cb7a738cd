"""Payloads in a Redis or Valkey server: one store for the rerankers of several machines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kalm_integrations.errors import MissingExtraError, StoreError

if TYPE_CHECKING:
    from redis import Redis

PREFIX = b"kalm:"
"""What keys begin with on the server, so that they are told from others."""

SCHEMES = ("redis", "rediss", "unix")
TIMEOUT_SECONDS = 2.0
"""For a connection, and for an answer."""


def is_redis_url(store: object) -> bool:
    """Return whether what was given as a store is the URL of a Redis server."""
    return isinstance(store, str) and "://" in store and urlsplit(store).scheme in SCHEMES


def is_without_password(url: str) -> bool:
    """Return whether a URL has no place that could hold a secret: neither a user, nor parameters."""
    parts = urlsplit(url)
    return "@" not in parts.netloc and not parts.query


class RedisPayloadStore(MutableMapping[str, bytes]):
    """Payloads under `kalm:<key>` in a Redis or Valkey server. Bound it there: `maxmemory`, `maxmemory-policy allkeys-lru`.

    Safe to share between threads, and usable after a fork. The URL may hold a password, which is never shown.
    """

    def __init__(self, url: str) -> None:
        """Keep where the server is; it is asked when the store is used.

        Args:
            url: `redis://`, `rediss://` or `unix://`, as redis-py takes it.

        Raises:
            MissingExtraError: redis-py is not installed.
            StoreError: redis-py cannot read the URL.
        """
        try:
            from redis import Redis
        except ImportError as error:
            msg = "a Redis server as payload_store needs redis-py; install it: pip install 'kalm-integrations[redis]'"
            raise MissingExtraError(msg) from error
        self._url = url
        try:
            self._client: Redis = Redis.from_url(
                url, socket_timeout=TIMEOUT_SECONDS, socket_connect_timeout=TIMEOUT_SECONDS, decode_responses=False
            )
        except ValueError as error:
            msg = f"the payload_store must be a URL that redis-py can read, but {error}; see Redis.from_url"
            raise StoreError(msg) from error

    def __reduce__(self) -> tuple[type[RedisPayloadStore], tuple[str]]:
        """Travel as the URL; the other process opens its own connections."""
        return type(self), (self._url,)

    def __repr__(self) -> str:
        """Return the server without what may be a password."""
        parts = urlsplit(self._url)
        return f"RedisPayloadStore({parts.scheme}://{parts.hostname or parts.path})"

    def __getitem__(self, key: str) -> bytes:
        """Return a payload."""
        value: Any = self._client.get(_name(key))
        if value is None:
            raise KeyError(key)
        return bytes(value)

    def get_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Return those of the payloads that are there, asked for in one call."""
        keys = list(keys)
        values: Any = self._client.mget(map(_name, keys)) if keys else []
        return {key: value for key, value in zip(keys, values, strict=True) if value is not None}

    def __setitem__(self, key: str, value: bytes) -> None:
        """Write a payload; `update` writes many at the price of one."""
        self.update({key: value})

    def update(self, *args: Any, **kwargs: bytes) -> None:
        """Write many payloads in one call."""
        payloads = dict(*args, **kwargs)
        if payloads:
            self._client.mset({_name(key): value for key, value in payloads.items()})

    def __delitem__(self, key: str) -> None:
        """Delete a payload."""
        if not self._client.delete(_name(key)):
            raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        """Go through the keys; those that come or go meanwhile may be among them or not."""
        names: Iterable[bytes] = self._client.scan_iter(match=PREFIX + b"*", count=1000)
        return (name[len(PREFIX) :].decode() for name in names)

    def __len__(self) -> int:
        """Count the keys, by going through them."""
        return sum(1 for _ in self)


def _name(key: str) -> bytes:
    return PREFIX + key.encode()
