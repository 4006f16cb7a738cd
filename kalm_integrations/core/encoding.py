"""One metadata string per passage: `kalm1.<header>.<payload>`, both base64url without padding.

Where a store takes no long strings the value is `kalm1r.<header>`, and the payload's bytes lie in a byte store under
`<fp>:<th>:<r>:<c>`.

The header is a JSON object with exactly these keys, in this order:

| key | meaning |
|---|---|
| fp | fingerprint of checkpoint and encoder settings, 32 hex digits |
| th | hash of the exact text that the encoder read, 32 hex digits |
| n | tokens of the passage |
| r | compression ratio |
| s | [number of states, width] |
| c | codec of the payload (see `codecs.py`) |
| x | checksum of all the above and the payload (its base64 text, or its bytes in a byte store), 16 hex digits |

A value comes from somebody's store and is not trusted: sizes are checked before anything is allocated, every character counts
(the text is canonical, so no other spelling decodes to the same encoding), and nothing is ever unpickled. The format is a
promise: a reader of this version reads every value that starts with `kalm1.`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import pybase64
import torch

from kalm_integrations.core.codecs import CODECS, read_states, write_states
from kalm_integrations.core.pooling import n_pooled_states, repool_states
from kalm_integrations.errors import CorruptEncodingError, SettingsError

PREFIX = "kalm1"
REFERENCE_PREFIX = "kalm1r"

MAX_VALUE_CHARS = 64 * 2**20
"""Longer values are refused unread: 1,024 tokens of the widest model in fp32 at ratio 1 take 14 MB."""
MAX_HEADER_CHARS = 1024
MAX_TOKENS = 2**17
"""The position limit that the model cards claim."""

_HEADER_KEYS = ("fp", "th", "n", "r", "s", "c", "x")


def hash_text(text: str) -> str:
    """Return the hash (BLAKE2b, 32 hex digits) of the exact text that the encoder reads."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def fingerprint(facts: dict[str, Any]) -> str:
    """Return the hash (BLAKE2b, 32 hex digits) of JSON-able facts about what makes an encoding."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, eq=False)
class EncodedPassage:
    """What the encoder left of a passage: pooled states, and where they come from."""

    states: torch.Tensor
    """float32, on the CPU. Shape: (n_states, hidden)."""
    n_tokens: int
    """Tokens of the passage after truncation; the last state may stand for fewer than the others."""
    compression_ratio: int
    """Tokens per state."""
    fingerprint: str
    """What made the states: checkpoint and encoder settings."""
    text_hash: str
    """Hash of the text the encoder read."""
    codec: str
    """How `to_metadata` writes the states."""

    @property
    def nbytes(self) -> int:
        """Bytes of the states in memory."""
        return self.states.nbytes

    def to_metadata(self, payload_store: MutableMapping[str, bytes] | None = None) -> str:
        """Return the encoding as one ASCII string, to be stored under `kalm_encoding`.

        Lossy for every codec but fp32. States that overflow fp16 are written as bf16.

        Args:
            payload_store: if given, the payload goes there and the string only refers to it.
        """
        codec, payload = write_states(self.states, self.codec)
        fields = self._fields(codec)
        if payload_store is not None:
            payload_store[_payload_key(fields)] = payload
            return f"{REFERENCE_PREFIX}.{_write_header(fields, payload)}"
        body = _to_base64(payload)
        return f"{PREFIX}.{_write_header(fields, body.encode())}.{body}"

    @classmethod
    def from_metadata(cls, value: str, payload_store: Mapping[str, bytes] | None = None) -> EncodedPassage:
        """Read a string made by `to_metadata`.

        Args:
            value: the string.
            payload_store: where the payload lies if the string refers to one.

        Raises:
            CorruptEncodingError: it is anything else, was changed in any character, or its payload is not there.
        """
        if not isinstance(value, str):
            _refuse(f"be a string, but got {type(value).__name__}")
        if len(value) > MAX_VALUE_CHARS:
            _refuse(f"have at most {MAX_VALUE_CHARS} characters, but got {len(value)}")
        match value.split(".", 3):
            case [prefix, header, body] if prefix == PREFIX:
                fields = _read_header(header)
                # Sizes first: nothing is allocated for a payload that does not have the length its header claims.
                if len(body) != _base64_length(_n_bytes(fields)):
                    _refuse(f"hold {_n_bytes(fields)} bytes of payload, but has {len(body)} base64 characters")
                _check_header(fields, header, body.encode("ascii", "replace"))
                payload = _from_base64(body)
            case [prefix, header] if prefix == REFERENCE_PREFIX:
                fields = _read_header(header)
                payload = _fetch_payload(fields, payload_store)
                _check_header(fields, header, payload)
            case _:
                _refuse(f"look like {PREFIX}.<header>.<payload>, but got {value[:24]!r}")
        states = read_states(payload, fields["c"], *fields["s"])
        return cls(states, fields["n"], fields["r"], fields["fp"], fields["th"], fields["c"])

    def pool(self, ratio: int) -> EncodedPassage:
        """Return the encoding at a coarser compression ratio, exactly as if it had been encoded at it.

        Raises:
            SettingsError: `ratio` is not a multiple of the present one.
        """
        states = repool_states(self.states, self.n_tokens, self.compression_ratio, ratio)
        return replace(self, states=states, compression_ratio=ratio)

    def metadata_length(self) -> int:
        """Return the length of `to_metadata()` in characters, without making it (fp16 overflow aside)."""
        fields = self._fields(self.codec)
        return len(PREFIX) + len(_write_header(fields, b"")) + _base64_length(_n_bytes(fields)) + 2

    def _fields(self, codec: str) -> dict[str, Any]:
        shape = [int(size) for size in self.states.shape]
        values = (self.fingerprint, self.text_hash, self.n_tokens, self.compression_ratio, shape, codec)
        return dict(zip(_HEADER_KEYS, values, strict=False))


def check_codec(codec: str) -> str:
    """Return `codec` if it is known.

    Raises:
        SettingsError: it is not.
    """
    if codec not in CODECS:
        msg = f"storage_codec must be one of {', '.join(CODECS)}, but got {codec!r}"
        raise SettingsError(msg)
    return codec


def _write_header(fields: dict[str, Any], payload: bytes) -> str:
    """Return the header for fields without checksum, adding the checksum over them and the payload."""
    digest = hashlib.blake2b(_json(fields), digest_size=8)
    digest.update(payload)
    return _to_base64(_json({**fields, "x": digest.hexdigest()}))


def _check_header(fields: dict[str, Any], header: str, payload: bytes) -> None:
    """Compare a header with the one that its fields and the payload give, character by character."""
    if _write_header({key: fields[key] for key in _HEADER_KEYS[:-1]}, payload) != header:
        _refuse("match its checksum, but it does not: a character was changed")


def _fetch_payload(fields: dict[str, Any], store: Mapping[str, bytes] | None) -> bytes:
    key = _payload_key(fields)
    payload = None if store is None else store.get(key)
    if not isinstance(payload, bytes):
        where = "no payload_store was given" if store is None else "the payload_store does not have it"
        _refuse(f"have its payload under {key!r}, but {where}")
    if len(payload) != _n_bytes(fields):
        _refuse(f"have a payload of {_n_bytes(fields)} bytes, but the payload_store has {len(payload)}")
    return payload


def _payload_key(fields: dict[str, Any]) -> str:
    """Return the byte store's key; ratio and codec are in it, so that two settings can share a store."""
    return "{fp}:{th}:{r}:{c}".format(**fields)


def _n_bytes(fields: dict[str, Any]) -> int:
    return CODECS[fields["c"]].n_bytes(*fields["s"])


def _base64_length(n_bytes: int) -> int:
    return (n_bytes * 4 + 2) // 3


def _read_header(text: str) -> dict[str, Any]:
    """Parse a header and check every field; nothing is allocated from them here."""
    if len(text) > MAX_HEADER_CHARS:
        _refuse(f"have a header of at most {MAX_HEADER_CHARS} characters, but got {len(text)}")
    try:
        fields = json.loads(_from_base64(text))
    except (ValueError, RecursionError) as error:
        _refuse(f"have a JSON header, but it cannot be read ({error})", error)
    if not isinstance(fields, dict) or tuple(fields) != _HEADER_KEYS:
        _refuse(f"have a header with the keys {', '.join(_HEADER_KEYS)}")
    for key, digits in (("fp", 32), ("th", 32), ("x", 16)):
        if not isinstance(fields[key], str) or not re.fullmatch(rf"[0-9a-f]{{{digits}}}", fields[key]):
            _refuse(f"have {digits} hex digits as {key!r}")
    shape = fields["s"]
    # bool is an int to isinstance, so types are compared.
    is_shape = isinstance(shape, list) and len(shape) == 2
    if not is_shape or any(type(size) is not int for size in (*shape, fields["n"], fields["r"])):
        _refuse("have whole numbers as 'n', 'r' and the two entries of 's'")
    n_tokens, ratio, (n_states, width) = fields["n"], fields["r"], shape
    if not (1 <= n_tokens <= MAX_TOKENS and 1 <= ratio <= MAX_TOKENS and 1 <= width <= MAX_TOKENS):
        _refuse(f"have 'n', 'r' and width between 1 and {MAX_TOKENS}")
    if n_states != n_pooled_states(n_tokens, ratio):
        _refuse(f"have ceil(n / r) states, but {n_states} are not that for n={n_tokens}, r={ratio}")
    if not isinstance(fields["c"], str) or fields["c"] not in CODECS:
        _refuse(f"have a codec out of {', '.join(CODECS)}, but got {str(fields['c'])[:16]!r}")
    return fields


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def _to_base64(data: bytes) -> str:
    return pybase64.b64encode(data, altchars=b"-_").rstrip(b"=").decode("ascii")


def _from_base64(text: str) -> bytes:
    """Decode base64url without padding; raises ValueError on any other character."""
    return pybase64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _refuse(rule: str, cause: Exception | None = None) -> NoReturn:
    msg = f"a passage encoding must {rule}; encode the passage again"
    raise CorruptEncodingError(msg) from cause
