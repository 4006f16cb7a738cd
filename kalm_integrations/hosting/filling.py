"""Work on all documents of a store, page by page beside queries and updates: encode, load what was encoded, take away."""

from __future__ import annotations

import operator
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from tqdm.auto import tqdm

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.core.passages.header import check_fields
from kalm_integrations.core.passages.strings import hash_text, read_string
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, shown
from kalm_integrations.errors import CorruptEncodingError, KalmError, SettingsError, StoreError
from kalm_integrations.hosting.documents import fingerprint_key, under_key
from kalm_integrations.hosting.models import fingerprints_of
from kalm_integrations.hosting.ranking import encode_missing, kept_metadata
from kalm_integrations.hosting.stores import (
    PAGE_SIZE,
    Addition,
    DocumentAccess,
    DocumentId,
    DocumentKind,
    Label,
    PagedIds,
    Written,
    add_encodings,
)

DEFAULT_BATCH_SIZE = 64
"""Documents that are read, encoded and written at a time."""

Doc = TypeVar("Doc")
Item = TypeVar("Item")


@dataclass(frozen=True)
class BackfillReport:
    """What a `backfill` found in a store, and did, in documents."""

    n_checked: int
    """Read from the store."""
    n_missing: int
    """Had no encoding."""
    n_stale: int
    """Had one of another checkpoint, setting or text, or a damaged one."""
    n_failed: int = 0
    """Of the missing and the stale, those that the store did not take; why is in the log."""
    n_gone: int = 0
    """Deleted by others before their encoding could be written."""
    n_changed: int = 0
    """Given another text by others before their encoding could be written; the next run finds them."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_encodings` did with rows."""

    n_written: int
    """Encodings that are in the store now."""
    n_present: int
    """Were there before."""
    n_gone: int
    """The store has no document of this id."""
    n_changed: int
    """The store's document has another text than the one that was encoded."""
    n_bad: int
    """Rows without an id or a sound encoding."""
    n_failed: int
    """The store did not take them; why is in the log."""


@dataclass(frozen=True)
class Pace:
    """How fast to go through a store."""

    batch_size: int = DEFAULT_BATCH_SIZE
    """Documents at a time."""
    documents_per_second: float | None = None
    """At most, so that queries have the store and the model; None goes as fast as it can."""
    show_progress: bool = True
    """Draw a progress bar."""

    def __post_init__(self) -> None:
        """Check.

        Raises:
            SettingsError: `batch_size` or `documents_per_second` is not positive.
        """
        if type(self.batch_size) is not int or self.batch_size < 1:
            msg = f"batch_size must be a positive whole number, but got {self.batch_size!r}"
            raise SettingsError(msg)
        rate = self.documents_per_second
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf")):
            msg = f"documents_per_second must be a positive number or None, but got {shown(rate)}"
            raise SettingsError(msg)

    def batches(self, items: Iterable[Item], what: str) -> Iterator[list[Item]]:
        """Yield items in batches, no faster than is allowed."""
        iterator = iter(items)
        with tqdm(
            total=operator.length_hint(items) or None, desc=what, unit="document", disable=not self.show_progress
        ) as bar:
            while batch := list(islice(iterator, self.batch_size)):
                started = time.monotonic()
                yield batch
                bar.update(len(batch))
                if self.documents_per_second is not None:
                    # By the batch: a pause of the store is not made up for by a rush.
                    time.sleep(max(0.0, len(batch) / self.documents_per_second - (time.monotonic() - started)))


def backfill(
    access: DocumentAccess[Doc], kind: DocumentKind[Doc], reranker: Reranker, *, check_texts: bool, pace: Pace
) -> BackfillReport:
    """Encode the documents of a store that a query would have to encode: read, encode, write, batch by batch.

    Each batch is written when it is done, so a run that was stopped is continued by the next one.

    Args:
        access: to the store.
        kind: how its documents are read.
        reranker: encodes them.
        check_texts: read every document; otherwise those whose label says that they are of this reranker are believed. The
            label does not say whether a passage was cut, so a change of `long_passages` asks for a run that reads all.
        pace: how fast to go.

    Raises:
        EncodingTooLargeError: an encoding does not fit `max_inline_bytes`.
        StoreError: the store could not be read.
    """
    label = kind.label(*fingerprints_of(reranker))
    counts: Counter[str] = Counter()
    written = Written()
    for ids in pace.batches(_ids(access, None if check_texts else label), "Encoding"):
        held = list(_read(access, ids).items())
        passages = [kind.to_passage(document) for _, document in held]
        reading, made = encode_missing(reranker, passages)
        additions = {
            held[index][0]: Addition(held[index][1], under_key(metadata, kind.encoding_key))
            for index, metadata in made.items()
        }
        kept = {index: kept_metadata(reranker, passages[index]) for index, status in enumerate(reading) if status == "stored"}
        # The encoding too: a host may have to hide both keys.
        labels = {
            held[index][0]: Addition(held[index][1], under_key(metadata, kind.encoding_key))
            for index, metadata in kept.items()
            if kind.metadata(held[index][1]).get(label.key) != metadata[FINGERPRINT_KEY]
        }
        written += add_encodings(access, kind, additions)
        add_encodings(access, kind, labels)
        counts.update(reading.counts)
    n_missing = counts["missing"] + counts["cached"] + counts["found"]
    n_stale = counts["stale"] + counts["corrupt"]
    return BackfillReport(counts.total(), n_missing, n_stale, written.n_failed, written.n_gone, written.n_changed)


def load_encodings(
    access: DocumentAccess[Doc], kind: DocumentKind[Doc], rows: Iterable[Mapping[str, Any]], *, id_field: str, pace: Pace
) -> LoadReport:
    """Write encodings that were made elsewhere into the documents of a store, by id; no model is needed.

    Only an encoding of the very text that the store holds is written. Rows may come again: a run that was stopped is
    continued by the next one.

    Args:
        access: to the store.
        kind: how its documents are read.
        rows: with an id, `kalm_encoding` and `kalm_fp`, such as `kalm encode` writes and `bulk.read_encoded` reads.
        id_field: field of the rows that has the store's id.
        pace: how fast to go.

    Raises:
        StoreError: the store could not be read.
    """
    counts: Counter[str] = Counter()
    written = Written()
    for batch in pace.batches(rows, "Loading"):
        # What an encoding's string costs to check, it costs once.
        checked = [(row, _text_hash(row)) for row in batch if isinstance(row.get(id_field), (str, int))]
        good = [(row, text_hash) for row, text_hash in checked if text_hash]
        counts["bad"] += len(batch) - len(good)
        sound = {row[id_field]: (row, text_hash) for row, text_hash in good}
        held = _read(access, list(sound))
        counts["gone"] += len(sound) - len(held)
        additions = {}
        for document_id, document in held.items():
            row, text_hash = sound[document_id]
            passage = kind.to_passage(document)
            if passage.encoding == row[ENCODING_KEY] and kind.label(row[FINGERPRINT_KEY]).is_on(kind.metadata(document)):
                counts["present"] += 1
            elif text_hash != hash_text(passage_text(passage.text)):
                counts["changed"] += 1
            else:
                additions[document_id] = Addition(document, under_key(dict(row), kind.encoding_key))
        written += add_encodings(access, kind, additions)
    return LoadReport(
        written.n_written,
        counts["present"],
        counts["gone"] + written.n_gone,
        counts["changed"] + written.n_changed,
        counts["bad"],
        written.n_failed,
    )


def drop_encodings(access: DocumentAccess[Doc], kind: DocumentKind[Doc], *, pace: Pace) -> Written:
    """Take the encodings under one key, and their fingerprints, out of all documents of a store.

    Raises:
        StoreError: the store could not be read.
    """
    keys = (kind.encoding_key, fingerprint_key(kind.encoding_key))
    written = Written()
    for ids in pace.batches(_ids(access, None), "Dropping"):
        held = _read(access, ids)
        carriers = {i: document for i, document in held.items() if any(kind.metadata(document).get(key) for key in keys)}
        written += add_encodings(access, kind, {i: Addition(d, dict.fromkeys(keys)) for i, d in carriers.items()})
    return written


def _text_hash(row: Mapping[str, Any]) -> str | None:
    """Return the hash of the text that a row's encoding was made of; None if it is not sound."""
    try:
        fields, _ = read_string(row.get(ENCODING_KEY), check_fields)
    except CorruptEncodingError:
        return None
    found: str = fields["th"]
    return found if fields["fp"] == row.get(FINGERPRINT_KEY) else None


def _ids(access: DocumentAccess[Any], without: Label | None) -> Iterable[DocumentId]:
    with _readable():
        ids = access.find_ids(without)

    def pages() -> Iterator[list[DocumentId]]:
        iterator = iter(ids)
        while True:
            with _readable():
                page = list(islice(iterator, PAGE_SIZE))
            if not page:
                return
            yield page

    return PagedIds(pages(), operator.length_hint(ids) or None)


def _read(access: DocumentAccess[Doc], ids: list[DocumentId]) -> dict[DocumentId, Doc]:
    # A batch of bad rows leaves none to ask for, which some stores refuse.
    with _readable():
        return access.read(ids) if ids else {}


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except KalmError:
        raise
    except Exception as error:
        msg = f"a store must be readable to be worked on, but {type(error).__name__}: {error}; run it again: it goes on there"
        raise StoreError(msg) from error
