"""Codecs: pooled states to bytes and back. Pure functions.

| codec | bytes of n states of width H | how |
|---|---|---|
| fp32 | 4 n H | IEEE single precision |
| fp16, bf16 | 2 n H | half precision; bfloat16 has the range of fp32 and 8 bits of mantissa |
| int8 | n (H + 2) | symmetric, one fp16 scale per state |
| int4 | n (ceil(H / 2) + 2 ceil(H / 64)) | symmetric, one fp16 scale per 64 values, two values a byte, low nibble first |

Numbers are little-endian; scales stand before the values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kalm_integrations.core.passages import rotated
from kalm_integrations.errors import CorruptEncodingError, NonFiniteScoreError

INT4_GROUP = 64
"""Values that share a scale in int4."""

LARGEST = torch.finfo(torch.float32).max
"""What no finite number exceeds."""


@dataclass(frozen=True)
class Codec:
    """How states are written. `n_bytes` takes (n_states, width)."""

    n_bytes: Callable[[int, int], int]
    write: Callable[[torch.Tensor], list[torch.Tensor]]
    read: Callable[[torch.Tensor, int, int], torch.Tensor]


def write_states(states: torch.Tensor, codec: str) -> tuple[str, bytes]:
    """Write float32 states (n_states, width) and return the codec used and the bytes.

    Half precision overflows above 65,504; states that do not fit (or whose scales do not) are written as bf16 instead.

    Raises:
        NonFiniteScoreError: a state is NaN, infinite, or beyond bf16 too.
    """
    tensors = CODECS[codec].write(states)
    if not _is_finite(tensors):
        codec = "bf16"
        tensors = CODECS[codec].write(states)
        if not _is_finite(tensors):
            msg = "states must be finite to be stored, but some are NaN or infinite; check the checkpoint, use dtype='float32'"
            raise NonFiniteScoreError(msg)
    return codec, b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)


def read_states(payload: bytes, codec: str, n_states: int, width: int, limits: torch.Tensor | float = LARGEST) -> torch.Tensor:
    """Read what `write_states` wrote as float32 (n_states, width).

    The caller has checked that `payload` has `n_bytes(n_states, width)` bytes.

    Args:
        payload: the bytes.
        codec: how they were written.
        n_states: how many states they hold.
        width: of a state.
        limits: what no magnitude may exceed, see `state_limits`; without, the largest float.

    Raises:
        CorruptEncodingError: a state or a scale is not finite, or a state exceeds its limit.
    """
    states = CODECS[codec].read(torch.frombuffer(bytearray(payload), dtype=torch.uint8), n_states, width)
    check_limits(states, limits)
    return states


def check_limits(states: torch.Tensor, limits: torch.Tensor | float) -> None:
    """Check that states are finite and within their limits.

    Raises:
        CorruptEncodingError: they are not.
    """
    # NaN is not below anything, so that these comparisons find it too.
    if not bool((states.amax(0) <= limits).all() and (states.amin(0) >= -limits).all()):
        msg = (
            "a passage encoding must hold finite numbers that its checkpoint's encoder can give, but a state or a scale is "
            "NaN, infinite or too large; encode it again"
        )
        raise CorruptEncodingError(msg)


def state_limits(bound: torch.Tensor) -> torch.Tensor:
    """Return how large states within a bound can be after their way through any codec. Shapes: (width,).

    The room that is left is two roundings to bfloat16 and a whole step of int8 and of int4, whichever is larger: an encoding
    may have been written with one codec, read, and written with another.
    """
    width = len(bound)
    groups = F.pad(bound, (0, -width % INT4_GROUP)).view(-1, INT4_GROUP).amax(1) / 7
    steps = torch.maximum(groups.repeat_interleave(INT4_GROUP)[:width], bound.amax() / 127)
    return bound * (1 + 2.0**-6) + steps + torch.finfo(torch.float16).smallest_normal


def _is_finite(tensors: list[torch.Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


def _float_codec(dtype: torch.dtype) -> Codec:
    return Codec(
        n_bytes=lambda n_states, width: n_states * width * dtype.itemsize,
        write=lambda states: [states.to(dtype)],
        read=lambda data, n_states, width: data.view(dtype).view(n_states, width).float(),
    )


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


def _n_groups(width: int) -> int:
    return math.ceil(width / INT4_GROUP)


def _write_int4(states: torch.Tensor) -> list[torch.Tensor]:
    n_states, width = states.shape
    n_groups = _n_groups(width)
    groups = F.pad(states, (0, n_groups * INT4_GROUP - width)).view(n_states, n_groups, INT4_GROUP)
    scales, values = _quantize(groups, 7)
    nibbles = F.pad(values.view(n_states, -1)[:, :width], (0, width % 2)).view(torch.uint8) & 0x0F
    return [scales, nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)]


def _read_int4(data: torch.Tensor, n_states: int, width: int) -> torch.Tensor:
    n_groups = _n_groups(width)
    split = 2 * n_states * n_groups
    scales = data[:split].view(torch.float16).view(n_states, n_groups).float()
    packed = data[split:].view(n_states, -1)
    nibbles = torch.stack((packed & 0x0F, packed >> 4), dim=-1).view(n_states, -1)[:, :width]
    # Sign extension of four bits.
    values = (nibbles.to(torch.int8) ^ 8) - 8
    return values.float() * scales.repeat_interleave(INT4_GROUP, dim=1)[:, :width]


def _rotated_codec(bits: int) -> Codec:
    def write(states: torch.Tensor) -> list[torch.Tensor]:
        return [torch.from_numpy(part) for part in rotated.write(bits, states.numpy())]

    def read(data: torch.Tensor, n_states: int, width: int) -> torch.Tensor:
        return torch.from_numpy(rotated.read(bits, data.numpy(), n_states, width))

    return Codec(functools.partial(rotated.n_bytes, bits), write, read)


CODECS: dict[str, Codec] = {
    "fp32": _float_codec(torch.float32),
    "fp16": _float_codec(torch.float16),
    "bf16": _float_codec(torch.bfloat16),
    "int8": Codec(lambda n, width: n * (width + 2), _write_int8, _read_int8),
    **{f"rot{bits}": _rotated_codec(bits) for bits in rotated.LEVELS},
    "int4": Codec(lambda n, width: n * (-(-width // 2) + 2 * _n_groups(width)), _write_int4, _read_int4),
}
