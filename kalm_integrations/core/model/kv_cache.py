"""The decoder's KV cache: keys and values of passage states and of prompt tokens, in every layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kalm_integrations.core.model.prefix_states import PrefixStates, keep


class KVCache(ABC):
    """Keys and values that the next prompt tokens of a batch attend to: of passage states, then of prompt tokens."""

    width: int
    """Passage states per row, padding included."""
    n_prompt: int
    """Prompt tokens read so far."""

    @property
    @abstractmethod
    def visible_states(self) -> torch.Tensor | None:
        """Which passage states are real, (batch, width), or None if all are."""

    @abstractmethod
    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's cached keys and values with new ones behind them.

        Args:
            layer: its index.
            keys: of the new tokens. Shape: (batch or 1, n_kv_heads, n_new, head_width).
            values: same shape.

        Returns:
            Keys and values. Shape of each: (batch, n_kv_heads, width + n_prompt + n_new, head_width).
        """


@dataclass(frozen=True)
class PaddedKVCache(KVCache):
    """A KV cache that was just computed: one tensor per layer, passage states padded on the right."""

    width: int
    n_prompt: int
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    """Of each layer: (batch, n_kv_heads, width + n_prompt, head_width)."""
    n_states: torch.Tensor
    """Real passage states of each row. Shape: (batch,)."""

    @property
    def visible_states(self) -> torch.Tensor | None:
        """See `KVCache`."""
        visible = torch.arange(self.width, device=self.n_states.device) < self.n_states[:, None]
        return None if bool(visible.all()) else visible

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KVCache`."""
        return _concatenate(self.keys[layer], keys), _concatenate(self.values[layer], values)

    def select(self, rows: torch.Tensor) -> PaddedKVCache:
        """Return the cache of some rows, in any order and number."""
        return PaddedKVCache(
            self.width,
            self.n_prompt,
            tuple(keys[rows] for keys in self.keys),
            tuple(values[rows] for values in self.values),
            self.n_states[rows],
        )

    def split(self, dtype: torch.dtype) -> list[PrefixStates]:
        """Return what is kept of each row, in a storage dtype."""
        kept = [keep(states, dtype) for pair in zip(self.keys, self.values, strict=True) for states in pair]
        rows = []
        for row, n_states in enumerate(self.n_states.tolist()):
            tensors = []
            for sources in zip(*kept, strict=True):
                _, n_heads, _, width = sources[0].shape
                tensor = sources[0].new_empty((len(sources), n_heads, n_states + self.n_prompt, width))
                for target, source in zip(tensor, sources, strict=True):
                    target[:, :n_states] = source[row, :, :n_states]
                    target[:, n_states:] = source[row, :, self.width :]
                tensors.append(tensor.unflatten(0, (len(self.keys), 2)))
            rows.append(PrefixStates(n_states, *tensors))
        return rows


class GatheredKVCache(KVCache):
    """Prefix states of several passages gathered into one batch, padded on the left.

    On a CPU all layers are gathered into the same buffer, which stays in the processor's cache until attention has read it.
    On a GPU, where every copy is a launch, they are gathered at once.
    """

    def __init__(self, rows: Sequence[PrefixStates], n_prompt: int, dtype: torch.dtype, n_new: int) -> None:
        """Gather the passage states and the first `n_prompt` prompt tokens of each row, with room for `n_new` tokens."""
        self.width = max(row.n_states for row in rows)
        self.n_prompt = n_prompt
        self._rows = rows
        n_layers, _, n_heads, _, head_width = rows[0].pairs.shape
        device = rows[0].pairs.device
        self._at_once = gathers_at_once(device)
        shape = (n_layers if self._at_once else 1, 2, len(rows), n_heads, self.width + n_prompt + n_new, head_width)
        self._buffer = torch.empty(shape, dtype=dtype, device=device)
        for index, row in enumerate(rows):
            # Attention gives padding the weight 0, and 0 times an uninitialised NaN is NaN.
            self._buffer[:, :, index, :, : self.width - row.n_states] = 0
        if self._at_once:
            self._gather(slice(None))

    @property
    def visible_states(self) -> torch.Tensor | None:
        """See `KVCache`."""
        n_states = torch.tensor([row.n_states for row in self._rows])
        if bool((n_states == self.width).all()):
            return None
        return (torch.arange(self.width) >= self.width - n_states[:, None]).to(self._buffer.device)

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KVCache`. On a CPU what an earlier layer got is overwritten."""
        if not self._at_once:
            self._gather(slice(layer, layer + 1))
        buffer = self._buffer[layer if self._at_once else 0]
        start = self.width + self.n_prompt
        buffer[0, :, :, start:] = keys
        buffer[1, :, :, start:] = values
        return buffer[0], buffer[1]

    def _gather(self, layers: slice) -> None:
        """Put some layers' pairs of all rows into place."""
        end = self.width + self.n_prompt
        for index, row in enumerate(self._rows):
            n_used = row.n_states + self.n_prompt
            row.write_to(self._buffer[:, :, index, :, end - n_used : end], layers)


def gathers_at_once(device: torch.device) -> bool:
    """Return whether prefix states of all layers are gathered together; see `GatheredKVCache`."""
    return device.type != "cpu"


def _concatenate(cached: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Put new keys or values behind the cached ones; a prompt shared by all rows is repeated here."""
    return torch.cat((cached, new.expand(cached.shape[0], -1, -1, -1)), dim=2)
