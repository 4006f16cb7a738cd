"""Codecs: pooled states to bytes and back. Pure functions.

| codec | bytes of n states of width H | how |
|---|---|---|
| fp32 | 4 n H | IEEE single precision |
| fp16, bf16 | 2 n H | half precision; bfloat16 has the range of fp32 and 8 bits of mantissa |
| int8 | n (H + 2) | symmetric, one fp16 scale per state |
| rot4, rot3, rot2 | about n (b H / 8 + 2), and H for the mean | see `rotated.py` |
| int4 | n (ceil(H / 2) + 2 ceil(H / 64)) | symmetric, one fp16 scale per 64 values; read only, see `SUCCESSORS` |

Numbers are little-endian; scales stand before the values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kalm_integrations.core.passages import rotated
from kalm_integrations.core.sizes import INT4_GROUP, PAYLOAD_BYTES
from kalm_integrations.errors import CorruptEncodingError, NonFiniteScoreError

LARGEST = torch.finfo(torch.float32).max
"""What no finite number exceeds."""


@dataclass(frozen=True)
class Codec:
    """How states are kept. `n_bytes` takes (n_states, width)."""

    n_bytes: Callable[[int, int], int]
    read: Callable[[torch.Tensor, int, int], torch.Tensor]


def write_states(states: torch.Tensor, codec: str) -> tuple[str, bytes]:
    """Write float32 states (n_states, width) and return the codec used and the bytes.

    Half precision overflows above 65,504; states that do not fit (or whose scales do not) are written as bf16 instead.

    Raises:
        NonFiniteScoreError: a state is NaN, infinite, or beyond bf16 too.
    """
    codec = SUCCESSORS.get(codec, codec)
    for name in (codec, "bf16") if _is_finite([states]) else ():
        tensors = WRITERS[name](states.detach())
        if _is_finite(tensors):
            return name, b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)
    msg = "states must be finite to be stored, but some are NaN or infinite; check the checkpoint, use dtype='float32'"
    raise NonFiniteScoreError(msg)


def read_states(payload: bytes, codec: str, n_states: int, width: int, limit: float = LARGEST) -> torch.Tensor:
    """Read what `write_states` wrote as float32 (n_states, width).

    The caller has checked that `payload` has `n_bytes(n_states, width)` bytes.

    Args:
        payload: the bytes.
        codec: how they were written.
        n_states: how many states they hold.
        width: of a state.
        limit: what no magnitude may exceed.

    Raises:
        CorruptEncodingError: a state or a scale is not finite, or a state exceeds the limit.
    """
    states = CODECS[codec].read(torch.frombuffer(bytearray(payload), dtype=torch.uint8), n_states, width)
    check_limit(states, limit)
    return states


def check_limit(states: torch.Tensor, limit: float) -> None:
    """Check that states are finite and within a limit.

    Raises:
        CorruptEncodingError: they are not.
    """
    least, largest = states.aminmax()
    # NaN is not below anything, so that these comparisons find it too.
    if not (largest.item() <= limit and least.item() >= -limit):
        msg = (
            "a passage encoding must hold finite numbers that its checkpoint's encoder can give, but a state or a scale is "
            "NaN, infinite or too large; encode it again"
        )
        raise CorruptEncodingError(msg)


def _is_finite(tensors: list[torch.Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


def _read_float(dtype: torch.dtype, data: torch.Tensor, n_states: int, width: int) -> torch.Tensor:
    return data.view(dtype).view(n_states, width).float()


def _write_float(dtype: torch.dtype, states: torch.Tensor) -> list[torch.Tensor]:
    return [states.to(dtype)]


def _quantize(groups: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp16 scales (..., 1) and whole numbers within +-limit, per last dimension."""
    scales = (groups.abs().amax(-1, keepdim=True) / limit).half()
    # The scale as stored, so that rounding it costs nothing; a zero scale belongs to zeros, or to values below fp16.
    divisor = torch.where(scales > 0, scales.float(), torch.ones(()))
    return scales, (groups / divisor).round().clamp(-limit, limit).to(torch.int8)


def _write_int8(states: torch.Tensor) -> list[torch.Tensor]:
    return list(_quantize(states, 127))


def _read_int8(data: torch.Tensor, n_states: int, width: int) -> torch.Tensor:
    scales, values = data[: 2 * n_states].view(torch.float16), data[2 * n_states :].view(torch.int8)
    return values.view(n_states, width).float() * scales.float()[:, None]


def _read_int4(data: torch.Tensor, n_states: int, width: int) -> torch.Tensor:
    n_groups = -(-width // INT4_GROUP)
    split = 2 * n_states * n_groups
    scales = data[:split].view(torch.float16).view(n_states, n_groups).float()
    packed = data[split:].view(n_states, -1)
    nibbles = torch.stack((packed & 0x0F, packed >> 4), dim=-1).view(n_states, -1)[:, :width]
    # Sign extension of four bits.
    values = (nibbles.to(torch.int8) ^ 8) - 8
    return values.float() * scales.repeat_interleave(INT4_GROUP, dim=1)[:, :width]


def _read_rotated(bits: int, data: torch.Tensor, n_states: int, width: int) -> torch.Tensor:
    return torch.from_numpy(rotated.read(bits, data.numpy(), n_states, width))


def _write_rotated(bits: int, states: torch.Tensor) -> list[torch.Tensor]:
    return [torch.from_numpy(part) for part in rotated.write(bits, states.numpy())]


_FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXACT_CODECS = tuple(_FLOATS)
"""What is read of these is written as the same bytes."""

_READERS: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    **{name: functools.partial(_read_float, dtype) for name, dtype in _FLOATS.items()},
    "int8": _read_int8,
    **{f"rot{bits}": functools.partial(_read_rotated, bits) for bits in rotated.LEVELS},
    "int4": _read_int4,
}

CODECS = {name: Codec(n_bytes, _READERS[name]) for name, n_bytes in PAYLOAD_BYTES.items()}
"""All that can be read."""

WRITERS: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    **{name: functools.partial(_write_float, dtype) for name, dtype in _FLOATS.items()},
    "int8": _write_int8,
    **{f"rot{bits}": functools.partial(_write_rotated, bits) for bits in rotated.LEVELS},
}
"""States to the tensors whose bytes are the payload."""

SUCCESSORS = {"int4": "rot4"}
"""What is written of what can only be read: rot4 takes about as many bytes, and loses a third to a fiftieth as much."""
