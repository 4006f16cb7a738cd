"""One metadata string per passage: `kalm1.<header>.<payload>`, both base64url without padding.

Where a store takes no long strings the value is `kalm1r.<header>`, and a byte store has the payload, behind eight bytes of
checksum, under `<fp>:<th>:<r>:<c>`. Such a value depends on the text and the settings only, so one that is written again (by
another device or batch, whose payload differs in the last bits) refers to the same entry and does not break the older ones.

The header is a JSON object with exactly these keys, in this order:

| key | meaning |
|---|---|
| fp | fingerprint of checkpoint and encoder settings, 32 hex digits |
| th | hash of the exact text that the encoder read, 32 hex digits |
| n | tokens of the passage |
| r | compression ratio |
| s | [number of states, width] |
| c | codec of the payload (see `codecs.py`) |
| x | checksum of all the above and, inline, of the payload's bytes, 16 hex digits |

A value comes from somebody's store and is not trusted: sizes are checked before anything is allocated, every character counts
(the text is canonical, so no other spelling decodes to the same encoding), and nothing is ever unpickled. The format is a
promise: a reader of this version reads every value that starts with `kalm1.` or `kalm1r.`. `docs/format.md` specifies it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import pybase64
import torch

from kalm_integrations.core.model.pooling import n_pooled_states, repool_states
from kalm_integrations.core.passages.codecs import CODECS, LARGEST, check_limits, read_states, write_states
from kalm_integrations.core.passages.guarded import store_errors
from kalm_integrations.core.settings import MAX_TOKENS
from kalm_integrations.core.text import without_surrogates
from kalm_integrations.core.types import plain, shown
from kalm_integrations.errors import CorruptEncodingError, EncodingTooLargeError, SettingsError, StaleEncodingError

PREFIX = "kalm1"
REFERENCE_PREFIX = "kalm1r"

MAX_VALUE_CHARS = 64 * 2**20
"""Longer values are refused unread: 1,024 tokens of the widest model in fp32 at ratio 1 take 14 MB."""
MAX_HEADER_CHARS = 1024

_HEADER_KEYS = ("fp", "th", "n", "r", "s", "c", "x")
_CHECKSUM_BYTES = 8


def hash_text(text: str) -> str:
    """Return the hash (BLAKE2b, 32 hex digits) of the exact text that the encoder reads.

    What the tokenizer does not tell apart has one hash: JSON joins the halves of a surrogate pair on its way to a store.
    """
    return hashlib.blake2b(without_surrogates(text).encode(), digest_size=16).hexdigest()


def fingerprint(facts: dict[str, Any]) -> str:
    """Return the hash (BLAKE2b, 32 hex digits) of JSON-able facts about what makes an encoding."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Expected:
    """What all encodings of one checkpoint and one setting of its encoder have in common."""

    fingerprint: str
    width: int
    max_tokens: int
    """`max_passage_tokens`."""
    limits: torch.Tensor
    """The largest magnitudes of a state. Shape: (width,)."""


@dataclass(frozen=True, eq=False)
class EncodedPassage:
    """What the encoder left of a passage: pooled states, and where they come from."""

    states: torch.Tensor = field(repr=False)
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
    # Not for `replace`: what has other states has another digest.
    _digest: str | None = field(default=None, init=False, repr=False)

    @property
    def digest(self) -> str:
        """Hash (BLAKE2b, in hex) that names the states, together with text and ratio; they must not be changed in place.

        What was read from a string has the checksum that came with its payload, so that nothing is hashed a second time.
        """
        if self._digest is not None:
            return self._digest
        states = self.states.detach().cpu().contiguous()
        hashed = hashlib.blake2b(_json([self.n_tokens, self.compression_ratio, *states.shape]), digest_size=16)
        hashed.update(states.view(torch.uint8).numpy().data)
        return _with_digest(self, hashed.hexdigest()).digest

    @property
    def nbytes(self) -> int:
        """Bytes of the states in memory."""
        return self.states.nbytes

    def to_metadata(self, payload_store: MutableMapping[str, bytes] | None = None) -> str:
        """Return the encoding as one ASCII string, to be stored under `kalm_encoding`.

        Lossy for every codec but fp32. States that overflow fp16 are written as bf16.

        Args:
            payload_store: if given, the payload goes there and the string only refers to it.

        Raises:
            EncodingTooLargeError: the string would be longer than readers accept, 64 Mi characters.
            NonFiniteScoreError: a state is NaN or infinite.
            StoreError: the payload could not be written.
        """
        codec, payload = write_states(self.states, self.codec)
        fields = self._fields(codec)
        if payload_store is not None:
            with store_errors("payload_store", payload_store):
                payload_store[_payload_key(fields)] = _checksum(fields, payload) + payload
            return f"{REFERENCE_PREFIX}.{_write_header(fields)}"
        value = f"{PREFIX}.{_write_header(fields, payload)}.{_to_base64(payload)}"
        if len(value) > MAX_VALUE_CHARS:
            msg = (
                f"an encoding must have at most {MAX_VALUE_CHARS} characters, but this one has {len(value)}; pool it, use a "
                "smaller codec, or give a payload_store"
            )
            raise EncodingTooLargeError(msg)
        return value

    @classmethod
    def from_metadata(
        cls, value: str, payload_store: Mapping[str, bytes] | None = None, expected: Expected | None = None
    ) -> EncodedPassage:
        """Read a string made by `to_metadata`.

        Args:
            value: the string.
            payload_store: where the payload lies if the string refers to one.
            expected: refuse what does not keep to it, as early as the header shows it; rerankers do.

        Raises:
            CorruptEncodingError: it is anything else, was changed in any character, or its payload is not there; or what
                was expected cannot have made it.
            StaleEncodingError: its header says that something else was expected; whether the rest is sound stays open.
            StoreError: the payload store failed.
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
                _check_expected(fields, expected)
                payload = _from_base64(body)
                _check_header(fields, header, payload)
                digest = fields["x"]
            case [prefix, header] if prefix == REFERENCE_PREFIX:
                fields = _read_header(header)
                _check_header(fields, header)
                _check_expected(fields, expected)
                digest, payload = _fetch_payload(fields, payload_store)
            case _:
                _refuse(f"look like {PREFIX}.<header>.<payload>, but got {value[:24]!r}")
        n_states, width = fields["s"]
        limits = LARGEST if expected is None else expected.limits
        states = read_states(payload, fields["c"], n_states, width, limits)
        return _with_digest(cls(states, fields["n"], fields["r"], fields["fp"], fields["th"], fields["c"]), digest)

    def check(self, expected: Expected) -> None:
        """Check an object that somebody may have put together.

        Raises:
            StaleEncodingError: another checkpoint or encoder setting made it.
            CorruptEncodingError: a field breaks a rule, or what is expected cannot have made the states.
        """
        states, n_tokens, ratio = self.states, self.n_tokens, self.compression_ratio
        if not isinstance(self.text_hash, str) or not isinstance(self.codec, str) or self.codec not in CODECS:
            _refuse(f"have a string as text_hash and a codec out of {', '.join(CODECS)}")
        if not all(type(number) is int and 1 <= number <= MAX_TOKENS for number in (n_tokens, ratio)):
            _refuse(f"have whole numbers between 1 and {MAX_TOKENS} as n_tokens and compression_ratio")
        is_plain = isinstance(states, torch.Tensor) and states.layout == torch.strided and states.device.type == "cpu"
        if not is_plain or states.dtype != torch.float32 or states.ndim != 2:
            _refuse("have as states a float32 tensor on the CPU of shape (n_states, hidden)")
        _check_expected(self._fields(self.codec), expected)
        n_states = n_pooled_states(n_tokens, ratio)
        if len(states) != n_states:
            _refuse(f"have ceil(n_tokens / compression_ratio) states, {n_states}, but has {len(states)}")
        check_limits(states, expected.limits)

    def pool(self, ratio: int) -> EncodedPassage:
        """Return the encoding at a coarser compression ratio, exactly as if it had been encoded at it.

        Raises:
            SettingsError: `ratio` is not a multiple of the present one, or larger than the format allows.
        """
        ratio = plain(ratio)
        if type(ratio) is not int or abs(ratio) > MAX_TOKENS:
            msg = f"a compression ratio must be a whole number up to {MAX_TOKENS}, but got {shown(ratio)}"
            raise SettingsError(msg)
        states = repool_states(self.states, self.n_tokens, self.compression_ratio, ratio)
        # The digest of what was pooled will do, beside the ratio: it is known already where a string was read.
        return _with_digest(replace(self, states=states, compression_ratio=ratio), self.digest)

    def metadata_length(self) -> int:
        """Return the length of `to_metadata()` in characters."""
        codec, _ = write_states(self.states, self.codec)
        return inline_length(self.n_tokens, self.compression_ratio, self.states.shape[1], codec)

    def _fields(self, codec: str) -> dict[str, Any]:
        shape = [int(size) for size in self.states.shape]
        values = (self.fingerprint, self.text_hash, self.n_tokens, self.compression_ratio, shape, codec)
        return dict(zip(_HEADER_KEYS, values, strict=False))


def inline_length(n_tokens: int, ratio: int, width: int, codec: str) -> int:
    """Return the characters of the metadata string of a passage whose states the codec can hold."""
    n_states = n_pooled_states(n_tokens, ratio)
    fields = dict(zip(_HEADER_KEYS, ("0" * 32, "0" * 32, n_tokens, ratio, [n_states, width], codec), strict=False))
    return len(PREFIX) + len(_write_header(fields)) + _base64_length(_n_bytes(fields)) + 2


def _with_digest(encoding: EncodedPassage, digest: str) -> EncodedPassage:
    """Note an encoding's digest on it."""
    object.__setattr__(encoding, "_digest", digest)
    return encoding


def _check_expected(fields: dict[str, Any], expected: Expected | None) -> None:
    """Compare what a header says with what is expected."""
    if expected is None:
        return
    if fields["fp"] != expected.fingerprint or fields["s"][1] != expected.width:
        msg = (
            f"an encoding must carry this reranker's fingerprint {expected.fingerprint} and states of width {expected.width}, "
            f"but has {fields['fp']} and {fields['s'][1]}; encode the text again, or pass Passage(text, encoding), which does "
            "so by itself"
        )
        raise StaleEncodingError(msg)
    if fields["n"] > expected.max_tokens:
        _refuse(f"be of at most max_passage_tokens={expected.max_tokens} tokens, but has {fields['n']}")


def _checksum(fields: dict[str, Any], payload: bytes) -> bytes:
    """Return the BLAKE2b of the fields without checksum and of the payload."""
    digest = hashlib.blake2b(_json(fields), digest_size=_CHECKSUM_BYTES)
    digest.update(payload)
    return digest.digest()


def _write_header(fields: dict[str, Any], payload: bytes = b"") -> str:
    """Return the header for fields without checksum, adding it; a reference's does not cover the payload."""
    return _to_base64(_json({**fields, "x": _checksum(fields, payload).hex()}))


def _check_header(fields: dict[str, Any], header: str, payload: bytes = b"") -> None:
    """Compare a header with the one that its fields and the payload give, character by character."""
    if _write_header(_without_checksum(fields), payload) != header:
        _refuse("match its checksum, but it does not: a character was changed")


def _without_checksum(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: fields[key] for key in _HEADER_KEYS[:-1]}


def _fetch_payload(fields: dict[str, Any], store: Mapping[str, bytes] | None) -> tuple[str, bytes]:
    """Return the checksum, in hex, and the payload that a reference refers to."""
    key = _payload_key(fields)
    entry = None
    if store is not None:
        with store_errors("payload_store", store):
            entry = store.get(key)
    if not isinstance(entry, bytes):
        where = "no payload_store was given" if store is None else "the payload_store does not have it"
        _refuse(f"have its payload under {key!r}, but {where}")
    if len(entry) != _CHECKSUM_BYTES + _n_bytes(fields):
        _refuse(f"have an entry of {_CHECKSUM_BYTES + _n_bytes(fields)} bytes in the payload_store, but has {len(entry)}")
    checksum, payload = entry[:_CHECKSUM_BYTES], entry[_CHECKSUM_BYTES:]
    if checksum != _checksum(_without_checksum(fields), payload):
        _refuse("have a payload that matches its checksum, but the one in the payload_store does not")
    return checksum.hex(), payload


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
    data = _from_base64(text)
    try:
        fields = json.loads(data)
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


def _json(facts: object) -> bytes:
    return json.dumps(facts, separators=(",", ":")).encode()


def _to_base64(data: bytes) -> str:
    return pybase64.b64encode(data, altchars=b"-_").rstrip(b"=").decode("ascii")


def _from_base64(text: str) -> bytes:
    """Decode base64url without padding.

    Raises:
        CorruptEncodingError: `_to_base64` does not write this.
    """
    # The decoder would take the other alphabet, too, and any value of the unused bits of the last character.
    if "+" in text or "/" in text:
        _refuse("be base64url, but it has a '+' or a '/'")
    try:
        data = pybase64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError as error:
        _refuse(f"be base64url, but it cannot be read ({error})", error)
    if _to_base64(data) != text:
        _refuse("be canonical base64url, but it is spelled in another way")
    return data


def _refuse(rule: str, cause: Exception | None = None) -> NoReturn:
    msg = f"a passage encoding must {rule}; encode the passage again"
    raise CorruptEncodingError(msg) from cause
