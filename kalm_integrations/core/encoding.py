"""One metadata string per passage: `kalm1.<header>.<payload>`, both base64url without padding.

The header is a JSON object with exactly these keys, in this order:

| key | meaning |
|---|---|
| fp | fingerprint of checkpoint and encoder settings, 32 hex digits |
| th | hash of the exact text that the encoder read, 32 hex digits |
| n | tokens of the passage |
| r | compression ratio |
| s | [number of states, width] |
| c | codec of the payload (see `codecs.py`) |
| x | checksum of all the above and the payload string, 16 hex digits |

A value comes from somebody's store and is not trusted: sizes are checked before anything is allocated, every character counts
(the text is canonical, so no other spelling decodes to the same encoding), and nothing is ever unpickled. The format is a
promise: a reader of this version reads every value that starts with `kalm1.`.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

import pybase64
import torch

from kalm_integrations.core.codecs import CODECS, read_states, write_states
from kalm_integrations.core.pooling import n_pooled_states, repool_states
from kalm_integrations.errors import CorruptEncodingError, SettingsError

PREFIX = "kalm1"
ENCODING_KEY = "kalm_encoding"
"""Metadata key of the encoding."""
FINGERPRINT_KEY = "kalm_fp"
"""Metadata key of the fingerprint alone, short, for stores to filter on. Readers trust the one in the header only."""

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

    def to_metadata(self) -> str:
        """Return the encoding as one ASCII string, to be stored under `kalm_encoding`.

        Lossy for every codec but fp32. States that overflow fp16 are written as bf16.
        """
        codec, payload = write_states(self.states, self.codec)
        body = _to_base64(payload)
        return ".".join((PREFIX, _write_header(self._fields(codec), body), body))

    @classmethod
    def from_metadata(cls, value: str) -> EncodedPassage:
        """Read a string made by `to_metadata`.

        Raises:
            CorruptEncodingError: it is anything else, or was changed in any character.
        """
        if not isinstance(value, str):
            raise _corrupt(f"be a string, but got {type(value).__name__}")
        if len(value) > MAX_VALUE_CHARS:
            raise _corrupt(f"have at most {MAX_VALUE_CHARS} characters, but got {len(value)}")
        prefix, *rest = value.split(".", 3)
        if prefix != PREFIX or len(rest) != 2:
            raise _corrupt(f"look like {PREFIX}.<header>.<payload>, but got {value[:24]!r}")
        header_text, body = rest
        fields = _read_header(header_text)
        n_states, width = fields["s"]
        n_bytes = CODECS[fields["c"]].n_bytes(n_states, width)
        if len(body) != (n_bytes * 4 + 2) // 3:
            raise _corrupt(f"hold {n_bytes} bytes of payload by its header, but has {len(body)} base64 characters")
        if _write_header({key: fields[key] for key in _HEADER_KEYS[:-1]}, body) != header_text:
            raise _corrupt("match its checksum, but it does not: a character was changed")
        states = read_states(_from_base64(body), fields["c"], n_states, width)
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
        n_bytes = CODECS[self.codec].n_bytes(*self.states.shape)
        header = _write_header(self._fields(self.codec), "")
        return len(PREFIX) + len(header) + (n_bytes * 4 + 2) // 3 + 2

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


def _write_header(fields: dict[str, Any], body: str) -> str:
    """Return the header for fields without checksum, adding the checksum over them and the payload text."""
    digest = hashlib.blake2b(_json(fields), digest_size=8)
    digest.update(body.encode("ascii", "replace"))
    return _to_base64(_json({**fields, "x": digest.hexdigest()}))


def _read_header(text: str) -> dict[str, Any]:
    """Parse a header and check every field; nothing is allocated from them here."""
    if len(text) > MAX_HEADER_CHARS:
        raise _corrupt(f"have a header of at most {MAX_HEADER_CHARS} characters, but got {len(text)}")
    try:
        fields = json.loads(_from_base64(text))
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"have a JSON header, but it cannot be read ({error})") from error
    if not isinstance(fields, dict) or tuple(fields) != _HEADER_KEYS:
        raise _corrupt(f"have a header with the keys {', '.join(_HEADER_KEYS)}")
    for key, digits in (("fp", 32), ("th", 32), ("x", 16)):
        if not isinstance(fields[key], str) or not re.fullmatch(rf"[0-9a-f]{{{digits}}}", fields[key]):
            raise _corrupt(f"have {digits} hex digits as {key!r}")
    shape = fields["s"]
    # bool is an int to isinstance, so types are compared.
    is_shape = isinstance(shape, list) and len(shape) == 2
    if not is_shape or any(type(size) is not int for size in (*shape, fields["n"], fields["r"])):
        raise _corrupt("have whole numbers as 'n', 'r' and the two entries of 's'")
    n_tokens, ratio, (n_states, width) = fields["n"], fields["r"], shape
    if not (1 <= n_tokens <= MAX_TOKENS and 1 <= ratio <= MAX_TOKENS and 1 <= width <= MAX_TOKENS):
        raise _corrupt(f"have 'n', 'r' and width between 1 and {MAX_TOKENS}")
    if n_states != n_pooled_states(n_tokens, ratio):
        raise _corrupt(f"have ceil(n / r) states, but {n_states} are not that for n={n_tokens}, r={ratio}")
    if not isinstance(fields["c"], str) or fields["c"] not in CODECS:
        raise _corrupt(f"have a codec out of {', '.join(CODECS)}, but got {str(fields['c'])[:16]!r}")
    return fields


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()


def _to_base64(data: bytes) -> str:
    return pybase64.b64encode(data, altchars=b"-_").rstrip(b"=").decode("ascii")


def _from_base64(text: str) -> bytes:
    """Decode base64url without padding; raises ValueError on any other character."""
    return pybase64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


def _corrupt(rule: str) -> CorruptEncodingError:
    return CorruptEncodingError(f"a passage encoding must {rule}; encode the passage again")
