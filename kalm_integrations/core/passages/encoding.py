"""One metadata string per passage: `kalm1.<header>.<payload>`, both base64url without padding.

Where a store takes no long strings the value is `kalm1r.<header>`, and a byte store has the payload, behind eight bytes of
checksum, under `<fp>:<th>:<r>:<c>`. Such a value depends on the text and the settings only, so one that is written again (by
another device or batch, whose payload differs in the last bits) refers to the same entry and does not break the older ones.

The header is a JSON object with these keys, in this order:

| key | meaning |
|---|---|
| fp | fingerprint of checkpoint and encoder settings, 32 hex digits |
| th | hash of the exact text that the encoder read, 32 hex digits |
| n | tokens of the passage |
| r | compression ratio |
| s | [number of states, width] |
| c | codec of the payload (see `codecs.py`) |
| w | windows of a long passage, whose table begins the payload (see `windows.py`); only of one that was encoded in windows |
| x | checksum of all the above and, inline, of the payload's bytes, 16 hex digits |

A value comes from somebody's store and is not trusted: sizes are checked before anything is allocated, every character counts
(the text is canonical, so no other spelling decodes to the same encoding), and nothing is ever unpickled. The format is a
promise: a reader of this version reads every value that starts with `kalm1.` or `kalm1r.`. `docs/format.md` specifies it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kalm_integrations.core.model.pooling import repool_states
from kalm_integrations.core.passages.codecs import EXACT_CODECS, LARGEST, check_limit, read_states, write_states
from kalm_integrations.core.passages.expected import Expected
from kalm_integrations.core.passages.guarded import store_errors
from kalm_integrations.core.passages.header import (
    CHECKSUM_BYTES,
    HEADER_KEYS,
    base64_length,
    check_fields,
    checksum,
    refuse,
    to_base64,
    to_json,
    without_checksum,
    write_header,
)
from kalm_integrations.core.passages.strings import MAX_VALUE_CHARS, PREFIX, REFERENCE_PREFIX, payload_bytes, read_string
from kalm_integrations.core.passages.windows import (
    Windows,
    check_windows,
    n_states_of,
    read_table,
    split_body,
    write_table,
)
from kalm_integrations.core.settings import MAX_TOKENS
from kalm_integrations.core.sizes import PAYLOAD_BYTES, n_pooled_states
from kalm_integrations.core.types import plain, shown
from kalm_integrations.errors import EncodingTooLargeError, SettingsError


@dataclass(frozen=True, eq=False)
class EncodedPassage:
    """What the encoder left of a passage: pooled states, and where they come from.

    Raises:
        CorruptEncodingError: no string could be read as this: a field has the wrong type or is out of range, or the shape of
            the states is not that of the number of tokens and the ratio.
    """

    states: torch.Tensor = field(repr=False)
    """float32, on the CPU; they must not be changed in place. Shape: (n_states, hidden)."""
    n_tokens: int
    """Tokens that were read; the last state, of each window, may stand for fewer than the others."""
    compression_ratio: int
    """Tokens per state."""
    fingerprint: str
    """What made the states: checkpoint and encoder settings. 32 hex digits."""
    text_hash: str
    """Hash of the text the encoder read. 32 hex digits."""
    codec: str
    """How `to_metadata` writes the states."""
    windows: Windows | None = None
    """Of a long passage that was encoded in windows; their states follow one another."""
    # Not for `replace`: what has other states has another digest and other bytes.
    _digest: str | None = field(default=None, init=False, repr=False)
    _payload: bytes | None = field(default=None, init=False, repr=False)
    """What the states were read from, where writing them again might give other bytes."""
    _is_shared: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check everything but the states' values, which are checked when they are used."""
        states = self.states
        is_plain = isinstance(states, torch.Tensor) and states.layout == torch.strided and states.device.type == "cpu"
        if not is_plain or states.dtype != torch.float32 or states.ndim != 2:
            refuse("have as states a float32 tensor on the CPU of shape (n_states, hidden)")
        fields = self._fields(self.codec)
        check_fields(fields)
        if self.windows is not None:
            check_windows(self.windows, fields)

    @property
    def window_tokens(self) -> tuple[int, ...]:
        """The tokens of each window; all of them where the passage was read in one piece."""
        return (self.n_tokens,) if self.windows is None else tuple(window.n_tokens for window in self.windows)

    @property
    def window_states(self) -> list[torch.Tensor]:
        """The states of each window, which are scored on their own; all of them where the passage was read in one piece."""
        sizes = [n_pooled_states(n_tokens, self.compression_ratio) for n_tokens in self.window_tokens]
        return list(torch.split(self.states, sizes))

    @property
    def digest(self) -> str:
        """Hash (BLAKE2b, in hex) that names the states, together with text and ratio.

        What was or will be stored has the checksum of its string, so that nothing is hashed a second time, and what is kept of
        an encoding that was just made serves the one that is read back.
        """
        if self._digest is not None:
            return self._digest
        hashed = hashlib.blake2b(
            to_json([self.n_tokens, self.compression_ratio, *self.states.shape, self.windows]), digest_size=16
        )
        hashed.update(self.states.detach().contiguous().view(torch.uint8).numpy().data)
        return _noted(self, hashed.hexdigest()).digest

    @property
    def is_shared(self) -> bool:
        """Whether a payload store was seen to have it, where every reranker finds it by its text."""
        return self._is_shared

    def note_shared(self) -> None:
        """Note that a payload store has it."""
        object.__setattr__(self, "_is_shared", True)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, of the states and of what they were read from."""
        return self.states.nbytes + len(self._payload or b"")

    def as_stored(self) -> EncodedPassage:
        """Return the encoding as it is found after it was stored: its states have made the way through the codec.

        Its string is the same however often it is read and written. States that overflow fp16 are found as bf16.

        Raises:
            NonFiniteScoreError: a state is NaN or infinite.
        """
        if self._payload is not None:
            return self
        codec, payload = write_states(self.states, self.codec)
        stored = replace(self, states=read_states(payload, codec, *self.states.shape), codec=codec)
        return _noted(stored, checksum(stored._fields(codec), self._body(payload)).hex(), payload)

    def to_metadata(self, payload_store: MutableMapping[str, bytes] | None = None) -> str:
        """Return the encoding as one ASCII string, to be stored under `kalm_encoding`.

        Lossy for every codec but fp32, except for what was read or is `as_stored`. States that overflow fp16 are written as
        bf16, and what is only read by now, int4, as its successor.

        Args:
            payload_store: if given, the payload goes there and the string only refers to it.

        Raises:
            EncodingTooLargeError: the string would be longer than readers accept, 64 Mi characters.
            NonFiniteScoreError: a state is NaN or infinite.
            StoreError: the payload could not be written.
        """
        codec, payload = self._written()
        fields, body = self._fields(codec), self._body(payload)
        if payload_store is not None:
            with store_errors("payload_store", payload_store):
                payload_store[_payload_key(fields)] = checksum(fields, body) + body
            return f"{REFERENCE_PREFIX}.{write_header(fields)}"
        value = f"{PREFIX}.{write_header(fields, body)}.{to_base64(body)}"
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
        fields, body = read_string(value, expected.check_fields if expected else check_fields)
        digest = fields["x"]
        if body is None:
            digest, body = _fetch_body(fields, payload_store)
        return cls._of(fields, body, digest, expected)

    @property
    def payload_key(self) -> str:
        """What the payload lies under in a payload store; `as_stored` may change it."""
        return _payload_key(self._fields(self.codec))

    def to_payload(self) -> bytes:
        """Return what lies in a payload store: checksum and payload of an encoding that is `as_stored`.

        Raises:
            NonFiniteScoreError: a state is NaN or infinite.
        """
        codec, payload = self._written()
        body = self._body(payload)
        return checksum(self._fields(codec), body) + body

    @classmethod
    def from_payload(
        cls, entry: bytes, fingerprint: str, text_hash: str, ratio: int, codec: str, expected: Expected
    ) -> EncodedPassage:
        """Read what a payload store has for a text. The number of tokens, which no key tells, is in the checksum.

        Raises:
            CorruptEncodingError: no encoder of what is expected can have put it there for this text.
            StaleEncodingError: the passage fills `max_passage_tokens`, and may have been cut where windows are wanted.
        """
        body, digest = entry[CHECKSUM_BYTES:], entry[:CHECKSUM_BYTES]

        def fields_of(n_tokens: int, payload: bytes, windows: Windows | None = None) -> dict[str, Any]:
            shape = [_n_states(len(payload), codec, expected.width), expected.width]
            return _make_fields(fingerprint, text_hash, n_tokens, ratio, shape, codec, windows)

        if fingerprint == expected.windows_fingerprint:
            windows, payload = read_table(body)
            possible = [fields_of(sum(window.n_tokens for window in windows), payload, windows)]
        else:
            n_states = _n_states(len(body), codec, expected.width)
            most = min(n_states * ratio, expected.max_tokens)
            possible = [fields_of(n_tokens, body) for n_tokens in range((n_states - 1) * ratio + 1, most + 1) if n_states]
        fields = next((fields for fields in possible if checksum(fields, body) == digest), None)
        if fields is None:
            refuse("match its checksum in the payload_store, but it does not")
        check_fields(fields)
        expected.check_fields(fields)
        return cls._of(fields, body, digest.hex(), expected)

    @classmethod
    def _of(cls, fields: dict[str, Any], body: bytes, digest: str, expected: Expected | None) -> EncodedPassage:
        """Read the body of a checked header.

        Raises:
            CorruptEncodingError: they do not agree, or what is expected cannot have made it.
        """
        windows, payload = split_body(fields, body)
        if expected is not None and windows is not None:
            expected.check_windows(windows)
        limit = LARGEST if expected is None else expected.limit
        n_states, width = fields["s"]
        states = read_states(payload, fields["c"], n_states, width, limit)
        made = cls(states, fields["n"], fields["r"], fields["fp"], fields["th"], fields["c"], windows)
        return _noted(made, digest, payload)

    def check(self, expected: Expected) -> None:
        """Check an object that somebody may have put together.

        Raises:
            StaleEncodingError: another checkpoint or encoder setting made it.
            CorruptEncodingError: what is expected cannot have made it.
        """
        expected.check_fields(self._fields(self.codec))
        if self.windows is not None:
            expected.check_windows(self.windows)
        check_limit(self.states, expected.limit)

    def pool(self, ratio: int) -> EncodedPassage:
        """Return the encoding at a coarser compression ratio, of the same codec.

        In fp32 these are the states that encoding at this ratio gives, up to rounding (1e-6). Of another codec they are means
        of what it kept, which it has not rounded yet: as a rule nearer to the encoder's than what is stored at this ratio.

        Raises:
            SettingsError: `ratio` is not a multiple of the present one, or larger than the format allows.
        """
        ratio = plain(ratio)
        if type(ratio) is not int or abs(ratio) > MAX_TOKENS:
            msg = f"a compression ratio must be a whole number up to {MAX_TOKENS}, but got {shown(ratio)}"
            raise SettingsError(msg)
        if ratio == self.compression_ratio:
            # A copy would have to be rounded once more before it is written.
            return self
        parts = zip(self.window_states, self.window_tokens, strict=True)
        states = torch.cat([repool_states(part, n_tokens, self.compression_ratio, ratio) for part, n_tokens in parts])
        # The digest of what was pooled will do, beside the ratio: it is known already where a string was read.
        return _noted(replace(self, states=states, compression_ratio=ratio), self.digest)

    def metadata_length(self) -> int:
        """Return the length of `to_metadata()` in characters."""
        codec, _ = self._written()
        return inline_length(self.n_tokens, self.compression_ratio, self.states.shape[1], codec, self.windows)

    def _written(self) -> tuple[str, bytes]:
        """Return a codec and a payload."""
        return write_states(self.states, self.codec) if self._payload is None else (self.codec, self._payload)

    def _body(self, payload: bytes) -> bytes:
        """Return what a string or a store holds of the states' bytes."""
        return write_table(self.windows) + payload

    def _fields(self, codec: str) -> dict[str, Any]:
        shape = [int(size) for size in self.states.shape]
        facts = (self.fingerprint, self.text_hash, self.n_tokens, self.compression_ratio)
        return _make_fields(*facts, shape, codec, self.windows)


def _make_fields(
    fingerprint: str, text_hash: str, n_tokens: int, ratio: int, shape: list[int], codec: str, windows: Windows | None
) -> dict[str, Any]:
    """Return a header without its checksum."""
    fields = dict(zip(HEADER_KEYS, (fingerprint, text_hash, n_tokens, ratio, shape, codec), strict=False))
    return fields if windows is None else {**fields, "w": len(windows)}


def inline_length(n_tokens: int, ratio: int, width: int, codec: str, windows: Windows | None = None) -> int:
    """Return the characters of the metadata string of a passage whose states the codec can hold."""
    n_states = n_pooled_states(n_tokens, ratio) if windows is None else n_states_of(windows, ratio)
    fields = _make_fields("0" * 32, "0" * 32, n_tokens, ratio, [n_states, width], codec, windows)
    return len(PREFIX) + len(write_header(fields)) + base64_length(payload_bytes(fields)) + 2


def _noted(encoding: EncodedPassage, digest: str, payload: bytes | None = None) -> EncodedPassage:
    """Note on an encoding its digest, and what it was read from if its codec needs it to write the same again."""
    object.__setattr__(encoding, "_digest", digest)
    if encoding.codec not in EXACT_CODECS:
        object.__setattr__(encoding, "_payload", payload)
    return encoding


def _fetch_body(fields: dict[str, Any], store: Mapping[str, bytes] | None) -> tuple[str, bytes]:
    """Return the checksum, in hex, and the body that a reference refers to."""
    key = _payload_key(fields)
    entry = None
    if store is not None:
        with store_errors("payload_store", store):
            entry = store.get(key)
    if not isinstance(entry, bytes):
        where = "no payload_store was given" if store is None else "the payload_store does not have it"
        refuse(f"have its payload under {key!r}, but {where}")
    if len(entry) != CHECKSUM_BYTES + payload_bytes(fields):
        refuse(f"have an entry of {CHECKSUM_BYTES + payload_bytes(fields)} bytes in the payload_store, but has {len(entry)}")
    stored, body = entry[:CHECKSUM_BYTES], entry[CHECKSUM_BYTES:]
    if stored != checksum(without_checksum(fields), body):
        refuse("have a payload that matches its checksum, but the one in the payload_store does not")
    return stored.hex(), body


def _payload_key(fields: dict[str, Any]) -> str:
    """Return the byte store's key; ratio and codec are in it, so that two settings can share a store."""
    return "{fp}:{th}:{r}:{c}".format(**fields)


def payload_key(fingerprint: str, text_hash: str, ratio: int, codec: str) -> str:
    """Return what an encoding lies under in a payload store."""
    return _payload_key({"fp": fingerprint, "th": text_hash, "r": ratio, "c": codec})


def _n_states(n_bytes: int, codec: str, width: int) -> int:
    """Return of how many states a payload of so many bytes is; 0 if of none."""
    count = PAYLOAD_BYTES[codec]
    low, high = 1, MAX_TOKENS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle, width) >= n_bytes else (middle + 1, high)
    return low if count(low, width) == n_bytes else 0
