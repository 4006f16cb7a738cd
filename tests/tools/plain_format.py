"""The encoding format in plain Python, written from docs/format.md: what another implementation would be.

It trusts its input. Tests use it to check the package's reader and writer from outside, and to forge values.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any


def checksum(fields: Mapping[str, Any], payload: bytes) -> bytes:
    text = json.dumps({key: value for key, value in fields.items() if key != "x"}, separators=(",", ":"))
    return hashlib.blake2b(text.encode() + payload, digest_size=8).digest()


def write_base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def read_base64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def write_header(fields: Mapping[str, Any], payload: bytes = b"") -> str:
    return write_base64(json.dumps({**fields, "x": checksum(fields, payload).hex()}, separators=(",", ":")).encode())


def write_inline(fields: Mapping[str, Any], payload: bytes) -> str:
    """Return a `kalm1` value with a right checksum, whatever the fields are."""
    return f"kalm1.{write_header(fields, payload)}.{write_base64(payload)}"


def write_reference(fields: Mapping[str, Any], payload: bytes) -> tuple[str, dict[str, bytes]]:
    """Return a `kalm1r` value with a right checksum, and the entry of the byte store."""
    key = "{fp}:{th}:{r}:{c}".format(**fields)
    return f"kalm1r.{write_header(fields)}", {key: checksum(fields, payload) + payload}


def write_table(windows: Sequence[Sequence[int]]) -> bytes:
    """Return the table of windows: start, end and number of tokens of each."""
    return struct.pack("<I", len(windows)) + b"".join(struct.pack("<III", *window) for window in windows)


def read(value: str, store: Mapping[str, bytes] | None = None) -> tuple[dict[str, Any], list[list[float]]]:
    """Return the header's fields and the states of a valid value; of one with windows the fields have them as `windows`."""
    prefix, header, *body = value.split(".")
    fields = json.loads(read_base64(header))
    if prefix == "kalm1":
        payload = read_base64(body[0])
        assert fields["x"] == checksum(fields, payload).hex()
    else:
        assert fields["x"] == checksum(fields, b"").hex()
        entry = (store or {})["{fp}:{th}:{r}:{c}".format(**fields)]
        payload = entry[8:]
        assert entry[:8] == checksum(fields, payload)
    if "w" in fields:
        end = 4 + 12 * fields["w"]
        assert struct.unpack_from("<I", payload) == (fields["w"],)
        fields["windows"] = [list(window) for window in struct.iter_unpack("<III", payload[4:end])]
        payload = payload[end:]
    return fields, READERS[fields["c"]](payload, *fields["s"])


def _rows(values: tuple[float, ...], width: int) -> list[list[float]]:
    return [list(values[start : start + width]) for start in range(0, len(values), width)]


def _read_fp32(payload: bytes, n_states: int, width: int) -> list[list[float]]:
    return _rows(struct.unpack(f"<{n_states * width}f", payload), width)


def _read_fp16(payload: bytes, n_states: int, width: int) -> list[list[float]]:
    return _rows(struct.unpack(f"<{n_states * width}e", payload), width)


def _read_bf16(payload: bytes, n_states: int, width: int) -> list[list[float]]:
    halves = struct.unpack(f"<{n_states * width}H", payload)
    # A bfloat16 is the upper half of a float32.
    return _read_fp32(struct.pack(f"<{n_states * width}I", *(half << 16 for half in halves)), n_states, width)


def _read_int8(payload: bytes, n_states: int, width: int) -> list[list[float]]:
    scales = struct.unpack(f"<{n_states}e", payload[: 2 * n_states])
    rows = _rows(struct.unpack(f"<{n_states * width}b", payload[2 * n_states :]), width)
    return [[value * scale for value in row] for row, scale in zip(rows, scales, strict=True)]


def _read_int4(payload: bytes, n_states: int, width: int) -> list[list[float]]:
    n_groups, row_bytes = math.ceil(width / 64), math.ceil(width / 2)
    split = 2 * n_states * n_groups
    scales = _rows(struct.unpack(f"<{n_states * n_groups}e", payload[:split]), n_groups)
    states = []
    for index in range(n_states):
        row = payload[split + index * row_bytes : split + (index + 1) * row_bytes]
        nibbles = [nibble for byte in row for nibble in (byte & 15, byte >> 4)][:width]
        values = [nibble - 16 if nibble > 7 else nibble for nibble in nibbles]
        states.append([value * scales[index][column // 64] for column, value in enumerate(values)])
    return states


LEVELS = {
    4: (-700, -530, -414, -322, -241, -168, -99, -33, 33, 99, 168, 241, 322, 414, 530, 700),
    3: (-551, -344, -194, -63, 63, 194, 344, 551),
    2: (-387, -116, 116, 387),
}


def _read_rotated(bits: int, payload: bytes, n_states: int, width: int) -> list[list[float]]:
    block = 8
    while block < width and block < 128:
        block *= 2
    padded = math.ceil(width / block) * block
    n_means = 1 if n_states >= 3 else 0
    n_scales = n_means + n_states
    scales = struct.unpack(f"<{n_scales}e", payload[: 2 * n_scales])
    rows, start = [], 2 * n_scales
    for place, scale in enumerate(scales):
        is_mean = place < n_means
        size = padded if is_mean else padded * bits // 8
        row = payload[start : start + size]
        numbers = _unrotated(list(struct.unpack(f"{size}b", row)) if is_mean else _levels(bits, row), block)
        unit = 1 if is_mean else 256
        rows.append([_float32(number * (scale / (unit * block))) for number in numbers[:width]])
        start += size
    if not n_means:
        return rows
    mean, *differences = rows
    return [[_float32(at + value) for at, value in zip(mean, row, strict=True)] for row in differences]


def _levels(bits: int, row: bytes) -> list[int]:
    # As one whole number: the first byte and the lowest bit come first.
    packed = int.from_bytes(row, "little")
    return [LEVELS[bits][packed >> bits * place & (1 << bits) - 1] for place in range(len(row) * 8 // bits)]


def _unrotated(row: list[int], block: int) -> list[int]:
    n_blocks = len(row) // block
    row = [number * sign for number, sign in zip(_transformed(row, block), _signs(2, len(row)), strict=True)]
    # From place i * n_blocks + k to place k * block + i.
    row = [row[i * n_blocks + k] for k in range(n_blocks) for i in range(block)]
    return [number * sign for number, sign in zip(_transformed(row, block), _signs(1, len(row)), strict=True)]


def _transformed(row: list[int], block: int) -> list[int]:
    """Multiply each block by the Hadamard matrix: sums and differences of what is 1, 2, 4, ... places apart."""
    row, apart = list(row), 1
    while apart < block:
        for place in range(len(row)):
            if not place & apart:
                first, second = row[place], row[place + apart]
                row[place], row[place + apart] = first + second, first - second
        apart *= 2
    return row


def _signs(which: int, n: int) -> list[int]:
    digests = b"".join(hashlib.blake2b(f"{which}:{count}".encode()).digest() for count in range(math.ceil(n / 512)))
    return [-1 if digests[place // 8] >> place % 8 & 1 else 1 for place in range(n)]


def _float32(number: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", number))[0])


READERS = {
    "fp32": _read_fp32,
    "fp16": _read_fp16,
    "bf16": _read_bf16,
    "int8": _read_int8,
    "int4": _read_int4,
    **{f"rot{bits}": functools.partial(_read_rotated, bits) for bits in LEVELS},
}
