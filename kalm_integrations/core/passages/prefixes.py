"""Where the states of a prompt's prefix are kept per passage: in memory, and on disk if a store is given."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from kalm_integrations.core.model.layers import StackConfig
from kalm_integrations.core.model.prefix_states import PrefixStates, kept_bytes, kept_parts
from kalm_integrations.core.passages.caches import BoundedCache

PREFIX_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}

PrefixKey = tuple[Hashable, ...]

_MAX_MAGNITUDE = 2.0**40
"""Of stored keys and values: no layer gives more, and less overflows nowhere, so that a forged value fails no query."""


@dataclass(frozen=True)
class Candidate:
    """A passage to score."""

    states: torch.Tensor
    """Pooled states. Shape: (n_states, hidden)."""
    key: PrefixKey
    """Names the states: what has the same key has the same states."""


@dataclass(frozen=True)
class Prefix:
    """What prompts begin with, and where its states are kept."""

    token_ids: tuple[int, ...]
    decoder: str
    """What `hash_config` gives for the decoder's configuration."""
    cache: BoundedCache[PrefixKey, PrefixStates]
    store: MutableMapping[str, bytes] | None
    dtype: torch.dtype
    """Of the kept states."""
    computed_in: torch.dtype
    """Precision of the run: a store may serve runs that differ in it."""
    count: Callable[..., None]
    """Told, by the names of `RuntimeStats`, how many states were found in memory and in the store, how many have to be
    computed, and for how many of these the store had something else."""
    held: dict[PrefixKey, PrefixStates] = field(default_factory=dict)
    """States that were fetched from the store for a request, which memory may have no room for."""
    unkept: dict[PrefixKey, PrefixStates] = field(default_factory=dict)
    """States that were computed for a request, and that the store does not have yet."""

    def key(self, candidate: Candidate) -> PrefixKey:
        """Return what a passage's states are kept under."""
        return (*candidate.key, self.context)

    @property
    def context(self) -> str:
        """Hash of all that states depend on beside the passage; rows that have it in common can be computed together."""
        return _hash_context(self.token_ids, self.decoder, self.dtype, self.computed_in)

    def fetch(self, candidates: Iterable[Candidate], layout: Sequence[int], device: torch.device) -> None:
        """Get from the store what memory does not have, and hold it until `flush`.

        This and `flush` are for the caller's thread: the model's waits for no store.

        Args:
            candidates: the passages.
            layout: n_layers, n_kv_heads and head_width of the decoder, which stored states must have.
            device: where the states are wanted.
        """
        if self.store is None:
            return
        n_layers, n_heads, width = layout
        wanted = {self.key(candidate): candidate for candidate in candidates}
        n_refused, in_memory = 0, self.cache.get_many(wanted)
        for key, candidate in wanted.items():
            if key in in_memory:
                continue
            name, n_states = _name(key), len(candidate.states)
            value = self.store.get(name)
            shape = (n_layers, 2, n_heads, n_states + len(self.token_ids), width)
            states = _load(value, name, n_states, shape, self.dtype)
            if states is not None:
                self.held[key] = states.to(device)
            elif value is not None:
                n_refused += 1
        self.cache.put_many(self.held)
        self.count(prefix_store_hits=len(self.held), prefix_corrupt=n_refused)

    def find(self, candidates: Iterable[Candidate]) -> dict[PrefixKey, PrefixStates]:
        """Return the states of some passages that are in memory or were fetched."""
        wanted = dict.fromkeys(map(self.key, candidates))
        fetched = {key: self.held[key] for key in wanted if key in self.held}
        found = self.cache.get_many(key for key in wanted if key not in fetched)
        self.count(prefix_hits=len(found), prefix_misses=len(wanted) - len(found) - len(fetched))
        return fetched | found

    def keep(self, states: Mapping[PrefixKey, PrefixStates]) -> None:
        """Keep states that were computed: in memory now, in the store with the next `flush`."""
        self.cache.put_many(states)
        if self.store is not None:
            self.unkept.update(states)

    def flush(self) -> None:
        """Write to the store what was computed, and hold no states any more."""
        if self.store is not None and self.unkept:
            named = {_name(key): entry for key, entry in self.unkept.items()}
            self.store.update({name: _dump(entry, name) for name, entry in named.items()})
        self.held.clear()
        self.unkept.clear()


@functools.lru_cache(64)
def _hash_context(token_ids: tuple[int, ...], decoder: str, dtype: torch.dtype, computed_in: torch.dtype) -> str:
    facts = json.dumps([token_ids, decoder, str(dtype), str(computed_in)])
    return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()


def hash_config(config: StackConfig) -> str:
    """Return a hash of all that a decoder's configuration says: prefix states depend on it as on the weights."""
    facts = json.dumps(asdict(config), sort_keys=True, default=torch.Tensor.tolist)
    return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()


def _name(key: PrefixKey) -> str:
    """Return a key as a short string, the same in every process."""
    return "prefix:" + hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


def _dump(states: PrefixStates, name: str) -> bytes:
    """Return the states as bytes, behind their name and a checksum; see `_load`."""
    data = b"".join(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() for tensor in states.tensors)
    return _head(data, name) + data


def _load(value: object, name: str, n_states: int, shape: tuple[int, ...], dtype: torch.dtype) -> PrefixStates | None:
    """Return the states that were stored under a name, or None if the value is not what was kept under it.

    Args:
        value: of the store.
        name: its key.
        n_states: how many of the tokens are passage states.
        shape: of the pairs.
        dtype: of the pairs.
    """
    start = len(_head(b"", name))
    if not isinstance(value, bytes) or len(value) != start + kept_bytes(shape, dtype):
        return None
    data = memoryview(value)[start:]
    if value[:start] != _head(data, name):
        return None
    tensors = []
    for part, kept_in in kept_parts(shape, dtype):
        size = math.prod(part) * kept_in.itemsize
        tensors.append(torch.frombuffer(bytearray(data[:size]), dtype=kept_in).view(part))
        data = data[size:]
    states = PrefixStates(n_states, *tensors)
    # NaN, which is not smaller either, is refused too.
    return states if states.bound <= _MAX_MAGNITUDE else None


def _head(data: bytes | memoryview, name: str) -> bytes:
    """Return what stands before the states: their name, and a checksum that finds damage.

    It need not be hard to forge: who writes to the store can compute any. BLAKE2b would make a query from disk a third slower.
    """
    encoded = name.encode()
    return encoded + zlib.crc32(data, zlib.crc32(encoded)).to_bytes(4, "little")
