"""The header of an encoding's string: its fields, their checks, its checksum, and base64. `docs/format.md` specifies it."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, NoReturn

import pybase64

from kalm_integrations.core.settings import MAX_TOKENS
from kalm_integrations.core.sizes import PAYLOAD_BYTES, n_pooled_states
from kalm_integrations.core.types import shown
from kalm_integrations.errors import CorruptEncodingError

MAX_HEADER_CHARS = 1024
HEADER_KEYS = ("fp", "th", "n", "r", "s", "c", "x")
WINDOWED_KEYS = ("fp", "th", "n", "r", "s", "c", "w", "x")
"""Those of a passage that was encoded in windows: `w` is how many they are."""
CHECKSUM_BYTES = 8


def checksum(fields: dict[str, Any], payload: bytes) -> bytes:
    """Return the BLAKE2b of the fields without checksum and of the payload."""
    digest = hashlib.blake2b(to_json(fields), digest_size=CHECKSUM_BYTES)
    digest.update(payload)
    return digest.digest()


def write_header(fields: dict[str, Any], payload: bytes = b"") -> str:
    """Return the header for fields without checksum, adding it; a reference's does not cover the payload."""
    return to_base64(to_json({**fields, "x": checksum(fields, payload).hex()}))


def check_header(fields: dict[str, Any], header: str, payload: bytes = b"") -> None:
    """Compare a header with the one that its fields and the payload give, character by character."""
    if write_header(without_checksum(fields), payload) != header:
        refuse("match its checksum, but it does not: a character was changed")


def without_checksum(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the checksum covers."""
    return {key: value for key, value in fields.items() if key != "x"}


def base64_length(n_bytes: int) -> int:
    """Return how many characters bytes take."""
    return (n_bytes * 4 + 2) // 3


def read_header(text: str) -> dict[str, Any]:
    """Parse a header and check every field; nothing is allocated from them here."""
    if len(text) > MAX_HEADER_CHARS:
        refuse(f"have a header of at most {MAX_HEADER_CHARS} characters, but got {len(text)}")
    data = from_base64(text)
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        refuse(f"have a JSON header, but it cannot be read ({error})", error)
    if not isinstance(fields, dict) or tuple(fields) not in (HEADER_KEYS, WINDOWED_KEYS):
        refuse(f"have a header with the keys {', '.join(HEADER_KEYS)}, and w before x if it has windows")
    _check_hex(fields, "x", 16, "checksum")
    check_fields(fields)
    return fields


def check_fields(fields: dict[str, Any]) -> None:
    """Check all fields but the checksum."""
    _check_hex(fields, "fp", 32, "fingerprint")
    _check_hex(fields, "th", 32, "text_hash")
    n_tokens, ratio, shape = fields["n"], fields["r"], fields["s"]
    # bool is an int to isinstance, so types are compared.
    is_shape = isinstance(shape, list) and len(shape) == 2
    if not is_shape or any(type(size) is not int for size in (*shape, n_tokens, ratio)):
        got = f"{shown(n_tokens)}, {shown(ratio)} and {shown(shape)}"
        refuse(
            f"have whole numbers as 'n' (tokens), 'r' (compression ratio) and the two entries of 's' (shape), but has {got}"
        )
    n_states, width = shape
    if not all(1 <= number <= MAX_TOKENS for number in (n_tokens, ratio, width)):
        got = f"{shown(n_tokens)}, {shown(ratio)} and {shown(width)}"
        refuse(f"have whole numbers between 1 and {MAX_TOKENS} as tokens, compression ratio and width, but has {got}")
    fewest = n_pooled_states(n_tokens, ratio)
    if "w" in fields:
        _check_count(fields["w"], n_tokens, ratio, n_states)
    elif n_states != fewest:
        refuse(f"have ceil(n / r) states, for n={n_tokens} and r={ratio} that is {fewest}, but has {n_states}")
    if not isinstance(fields["c"], str) or fields["c"] not in PAYLOAD_BYTES:
        refuse(f"have a codec out of {', '.join(PAYLOAD_BYTES)}, but got {str(fields['c'])[:16]!r}")


def _check_count(n_windows: object, n_tokens: int, ratio: int, n_states: int) -> None:
    """Check how many windows there are, as far as that needs none of them; see `windows.check_windows`."""
    if type(n_windows) is not int or not 1 <= n_windows <= n_tokens:
        refuse(f"have 1 to n={n_tokens} windows, but has {shown(n_windows)}")
    if not n_tokens <= n_states * ratio < n_tokens + n_windows * ratio:
        wanted = f"n={n_tokens} tokens in w={n_windows} windows at r={ratio}"
        refuse(f"have the states of {wanted}, of which each window rounds its own up, but has {n_states}")


def _check_hex(fields: dict[str, Any], key: str, digits: int, name: str) -> None:
    if not isinstance(fields[key], str) or not re.fullmatch(rf"[0-9a-f]{{{digits}}}", fields[key]):
        refuse(f"have {digits} hex digits as {key!r} ({name}), but has {shown(fields[key])[:48]}")


def to_json(facts: object) -> bytes:
    """Return facts as JSON without white space."""
    return json.dumps(facts, separators=(",", ":")).encode()


def to_base64(data: bytes) -> str:
    """Return bytes as base64url without padding."""
    return pybase64.b64encode(data, altchars=b"-_").rstrip(b"=").decode("ascii")


def from_base64(text: str) -> bytes:
    """Decode base64url without padding.

    Raises:
        CorruptEncodingError: `to_base64` does not write this.
    """
    # The decoder would take the other alphabet, too, and any value of the unused bits of the last character.
    if "+" in text or "/" in text:
        refuse("be base64url, but it has a '+' or a '/'")
    try:
        data = pybase64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError as error:
        refuse(f"be base64url, but it cannot be read ({error})", error)
    if to_base64(data) != text:
        refuse("be canonical base64url, but it is spelled in another way")
    return data


def refuse(rule: str, cause: Exception | None = None) -> NoReturn:
    """Refuse an encoding that breaks a rule.

    Raises:
        CorruptEncodingError: always.
    """
    msg = f"a passage encoding must {rule}; encode the passage again"
    raise CorruptEncodingError(msg) from cause
