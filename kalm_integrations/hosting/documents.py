"""Where an encoding lies in a document's metadata, and what may be passed as documents."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from kalm_integrations.core.types import (
    ENCODING_KEY,
    FINGERPRINT_KEY,
    FUSED_SCORE_KEY,
    Metadata,
    RankedPassage,
    iterator_of,
    shown,
)
from kalm_integrations.errors import SettingsError

RELEVANCE_SCORE_KEY = "relevance_score"
"""Metadata key of P(yes) where a host has no field for it."""
RETRIEVAL_SCORE_KEY = "retrieval_score"
"""Metadata key of the score that a document came with."""

RERANKED_KEY = "reranked"
"""Metadata key that is False on documents that were to be reranked and were not; see `on_error`."""

RELEVANT_SPANS_KEY = "relevant_spans"
"""Metadata key of a text's sentences with their scores, best first; see `highlight`."""
RELEVANT_WINDOW_KEY = "relevant_window"
"""Metadata key of where the window lies in a text that its sentences are of, if it was read in windows; see `highlight`."""
KEPT_SPANS_KEY = "kept_spans"
"""Metadata key of the parts of the original that a pruned text has; see `prune`."""

RESERVED_KEYS = (
    FINGERPRINT_KEY,
    FUSED_SCORE_KEY,
    KEPT_SPANS_KEY,
    RELEVANCE_SCORE_KEY,
    RELEVANT_SPANS_KEY,
    RELEVANT_WINDOW_KEY,
    RERANKED_KEY,
    RETRIEVAL_SCORE_KEY,
)
"""Metadata keys of ours that hold something else than an encoding."""

_PREFIXES = ("kalm1.", "kalm1r.")
"""What every encoding begins with; see docs/format.md."""

Doc = TypeVar("Doc")


def check_encoding_key(encoding_key: object) -> str:
    """Return a metadata key if encodings may lie under it.

    Raises:
        SettingsError: it is no string, empty, or a key that this package uses for something else.
    """
    if not isinstance(encoding_key, str) or not encoding_key or encoding_key in RESERVED_KEYS:
        rule = f"a non-empty metadata key other than {', '.join(RESERVED_KEYS)}"
        msg = f"encoding_key must be {rule}, but got {shown(encoding_key)}"
        raise SettingsError(msg)
    return encoding_key


def fingerprint_key(encoding_key: str) -> str:
    """Return the metadata key of an encoding's fingerprint: `kalm_fp` beside `kalm_encoding`, otherwise `<encoding_key>_fp`.

    So a document may carry encodings of two checkpoints, and a store can be asked for those that lack either.
    """
    return FINGERPRINT_KEY if encoding_key == ENCODING_KEY else f"{encoding_key}_fp"


def encoding_keys(encoding_key: str, metadata: Mapping[Any, Any]) -> frozenset[Any]:
    """Return the keys of metadata that are stripped: those of this component, the default ones, and of other encodings.

    Other components may use keys of their own, as while a store changes its checkpoint; an encoding is known by its value.
    """
    named = {encoding_key, ENCODING_KEY}
    named |= {key for key, value in metadata.items() if isinstance(value, str) and value.startswith(_PREFIXES)}
    return frozenset(named | {fingerprint_key(key) for key in named})


def without_encodings(metadata: Mapping[Any, Any], encoding_key: str) -> dict[Any, Any]:
    """Return a document's metadata without encodings; it shares no nested value with the original."""
    kept = copied(metadata)
    ours = encoding_keys(encoding_key, kept)
    return {key: value for key, value in kept.items() if key not in ours}


def only_encodings(metadata: Mapping[Any, Any], encoding_key: str) -> dict[Any, Any]:
    """Return of a document's metadata what `without_encodings` leaves out."""
    ours = encoding_keys(encoding_key, metadata)
    return {key: value for key, value in metadata.items() if key in ours}


def with_encoding(metadata: Mapping[Any, Any], encoding: Metadata, encoding_key: str) -> dict[Any, Any]:
    """Return a document's metadata with what `Reranker.encode_to_metadata` made of it, in place of what it has there."""
    added = under_key(encoding, encoding_key)
    return {key: value for key, value in copied(metadata).items() if key not in added} | added


def under_key(encoding: Metadata, encoding_key: str) -> Metadata:
    """Return an encoding's metadata with encoding and fingerprint under other keys."""
    return {encoding_key: encoding[ENCODING_KEY], fingerprint_key(encoding_key): encoding[FINGERPRINT_KEY]}


def ranked_metadata(metadata: Mapping[Any, Any], place: RankedPassage, encoding_key: str, *, strip: bool) -> dict[Any, Any]:
    """Return the metadata that a document comes back with: without encodings for `strip`, and with what ranking adds."""
    kept = without_encodings(metadata, encoding_key) if strip else copied(metadata)
    return without_marks(kept) | added_metadata(place)


def without_marks(metadata: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return metadata without what an earlier reranker says: that it failed, or which spans its query has.

    What others keep under these keys stays.
    """
    marks = {key for key in (KEPT_SPANS_KEY, RELEVANT_SPANS_KEY) if _is_of_spans(metadata.get(key))}
    if _is_place(metadata.get(RELEVANT_WINDOW_KEY)):
        marks.add(RELEVANT_WINDOW_KEY)
    if metadata.get(RERANKED_KEY) is False:
        marks.add(RERANKED_KEY)
    return {key: value for key, value in metadata.items() if key not in marks}


def _is_of_spans(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_place, value))


def _is_place(value: object) -> bool:
    return isinstance(value, dict) and {"start", "end"} <= value.keys()


def added_metadata(place: RankedPassage) -> dict[str, float | bool]:
    """Return the metadata that ranking adds, beside the score: what a fused ranking is ordered by, or that it failed."""
    if not place.is_scored:
        return {RERANKED_KEY: False}
    return {} if place.fused is None else {FUSED_SCORE_KEY: place.fused}


def copied(metadata: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return metadata that share no nested value with the original."""
    # Copied first: a store may change the mapping from another thread.
    return {key: _copied(value) for key, value in dict(metadata).items()}


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:
        # A lock, a connection: nothing that can be copied, and so nothing that a copy of a document could have of its own.
        return value


def checked_documents(documents: Iterable[Doc], kind: type[Doc], component: str) -> list[Doc]:
    """Return documents as a list; any iterable is taken, and gone through once.

    Args:
        documents: what a component was given.
        kind: what each must be.
        component: name of the component, for the message.

    Raises:
        SettingsError: it is one document, a string or no iterable, or holds something else than documents.
    """
    name = kind.__name__
    # A pydantic model is iterable: over its fields.
    iterator = None if isinstance(documents, (kind, str, bytes, Mapping, BaseModel)) else iterator_of(documents)
    if iterator is None:
        msg = f"{component} takes a list of {name}s, but got one {type(documents).__name__}; put {name}s into a list"
        raise SettingsError(msg)
    checked = list(iterator)
    for index, document in enumerate(checked):
        if not isinstance(document, kind):
            got = f"a {type(document).__name__} at place {index}"
            msg = f"{component} takes a list of {name}s, but got {got}; make a {name} of it"
            raise SettingsError(msg)
    return checked
