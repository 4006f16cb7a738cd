"""An encoding's string, checked as far as that needs no states and so no torch: its form, its sizes, its checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from kalm_integrations.core.passages.header import base64_length, check_header, from_base64, read_header, refuse
from kalm_integrations.core.passages.windows import table_bytes
from kalm_integrations.core.sizes import PAYLOAD_BYTES
from kalm_integrations.core.text import without_surrogates
from kalm_integrations.core.types import ENCODING_KEY

PREFIX = "kalm1"
REFERENCE_PREFIX = "kalm1r"

MAX_VALUE_CHARS = 64 * 2**20
"""Longer values are refused unread: 1,024 tokens of the widest model in fp32 at ratio 1 take 14 MB."""

Fields = dict[str, Any]
"""Of a header."""


def hash_text(text: str) -> str:
    """Return the hash (BLAKE2b, 32 hex digits) of the exact text that the encoder reads.

    What the tokenizer does not tell apart has one hash: JSON joins the halves of a surrogate pair on its way to a store.
    """
    return hashlib.blake2b(without_surrogates(text).encode(), digest_size=16).hexdigest()


def payload_bytes(fields: Fields) -> int:
    """Return the bytes of a payload, by its checked header: of its states, and of the table of its windows if it has any."""
    states = PAYLOAD_BYTES[fields["c"]](*fields["s"])
    return states + table_bytes(fields["w"]) if "w" in fields else states


def header_of(value: str) -> Fields:
    """Return the header of a string that was read before; nothing else of it is checked.

    Raises:
        CorruptEncodingError: it has no header.
    """
    return read_header(value.partition(".")[2].partition(".")[0])


def fingerprint_of(value: str) -> str:
    """Return the fingerprint in the header of a string; see `header_of`."""
    found: str = header_of(value)["fp"]
    return found


def read_string(value: object, check: Callable[[Fields], None]) -> tuple[Fields, bytes | None]:
    """Return a string's header and its payload; None where it refers to one.

    Args:
        value: the string.
        check: refuses a header, as early as it is read.

    Raises:
        CorruptEncodingError: it is anything else, or was changed in any character.
    """
    if not isinstance(value, str):
        whole = f" ({ENCODING_KEY!r} of the metadata is wanted, not all of them)" if isinstance(value, Mapping) else ""
        refuse(f"be a string, but got {type(value).__name__}{whole}")
    if len(value) > MAX_VALUE_CHARS:
        refuse(f"have at most {MAX_VALUE_CHARS} characters, but got {len(value)}")
    prefix, *parts = value.split(".", 3)
    if (prefix, len(parts)) not in ((PREFIX, 2), (REFERENCE_PREFIX, 1)):
        refuse(f"look like {PREFIX}.<header>.<payload>, but got {value[:24]!r}")
    fields = read_header(parts[0])
    if prefix == REFERENCE_PREFIX:
        check_header(fields, parts[0])
        check(fields)
        return fields, None
    # Sizes first: nothing is allocated for a payload that does not have the length its header claims.
    n_bytes = payload_bytes(fields)
    if len(parts[1]) != base64_length(n_bytes):
        refuse(f"hold {n_bytes} bytes of payload, but has {len(parts[1])} base64 characters")
    check(fields)
    payload = from_base64(parts[1])
    check_header(fields, parts[0], payload)
    return fields, payload
