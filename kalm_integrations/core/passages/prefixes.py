"""Where the states of a prompt's prefix are kept per passage: in memory, and on disk if a store is given."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from kalm_integrations.core.model.kv_cache import PrefixStates
from kalm_integrations.core.passages.caches import BoundedCache

logger = logging.getLogger(__name__)

PREFIX_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PrefixKey = tuple[Hashable, ...]


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
    cache: BoundedCache[PrefixKey, PrefixStates]
    store: MutableMapping[str, bytes] | None
    dtype: torch.dtype
    """Of the kept states."""
    computed_in: torch.dtype
    """Precision of the run: a store may serve runs that differ in it."""
    count: Callable[[int, int, int], None]
    """Told how many states were found in memory, how many in the store, and how many were computed."""

    @property
    def group(self) -> Hashable:
        """What rows must have in common to be computed together."""
        return self.token_ids, self.dtype

    def key(self, candidate: Candidate) -> PrefixKey:
        """Return what a passage's states are kept under."""
        return (*candidate.key, self.token_ids, str(self.dtype), str(self.computed_in))

    def find(
        self, candidates: Iterable[Candidate], layout: Sequence[int], device: torch.device
    ) -> dict[PrefixKey, PrefixStates]:
        """Return the states that are kept of some passages.

        Args:
            candidates: the passages.
            layout: n_layers, n_kv_heads and head_width of the decoder, which stored states must have.
            device: where the states are wanted.
        """
        wanted = {self.key(candidate): candidate for candidate in candidates}
        found = self.cache.get_many(wanted)
        n_in_memory = len(found)
        if self.store is not None:
            n_layers, n_heads, width = layout
            stored = {}
            for key, candidate in wanted.items():
                if key not in found:
                    n_states = len(candidate.states)
                    shape = (n_layers, 2, n_heads, n_states + len(self.token_ids), width)
                    pairs = _load(self.store.get(_name(key)), shape, self.dtype)
                    if pairs is not None:
                        stored[key] = PrefixStates(pairs.to(device), n_states)
            self.cache.put_many(stored)
            found |= stored
        self.count(n_in_memory, len(found) - n_in_memory, len(wanted) - len(found))
        return found

    def keep(self, states: Mapping[PrefixKey, PrefixStates]) -> None:
        """Keep states that were computed."""
        self.cache.put_many(states)
        if self.store is not None:
            self.store.update({_name(key): _dump(entry.pairs) for key, entry in states.items()})


def _name(key: PrefixKey) -> str:
    """Return a key as a short string, the same in every process."""
    return "prefix:" + hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


def _dump(pairs: torch.Tensor) -> bytes:
    """Return safetensors with the keys and values and a checksum of them; see `_load`."""
    pairs = pairs.cpu().contiguous()
    return save({"pairs": pairs, "checksum": _checksum(pairs)})


def _load(value: bytes | None, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """Return the keys and values of a stored value, or None if there is none or it is not the one that is needed."""
    if value is None:
        return None
    try:
        found = load(value)
        pairs, checksum = found["pairs"], found["checksum"]
        is_valid = pairs.shape == shape and pairs.dtype == dtype and torch.equal(checksum, _checksum(pairs))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
        is_valid = False
    if not is_valid:
        logger.warning("stored prefix states are damaged, or not of this passage; they are computed anew")
        return None
    return pairs


def _checksum(pairs: torch.Tensor) -> torch.Tensor:
    return torch.tensor([zlib.crc32(pairs.view(torch.uint8).numpy().data)], dtype=torch.int64)
