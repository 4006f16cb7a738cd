"""Encodings into documents that a store has already, without embedding them again: write-back and backfill. And out of them.

What others write meanwhile is never undone: two keys are added to what the store holds now, and documents that are gone or
have another text are passed over and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

from tqdm.auto import tqdm

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.types import FINGERPRINT_KEY, Passage
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.documents import under_key
from kalm_integrations.hosting.ranking import encode_missing

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 64
"""Documents that a backfill reads, encodes and writes at a time."""

DocumentId: TypeAlias = "str | int"
Doc = TypeVar("Doc")

Changes: TypeAlias = Mapping[DocumentId, Mapping[str, str]]
"""Metadata to add, by document."""


class Readable(Protocol[Doc]):
    """What fetching encodings needs of a store."""

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Doc]:
        """Return documents by id as the store holds them now, leaving out those that are gone or have no text."""


@runtime_checkable
class DocumentAccess(Readable[Doc], Protocol[Doc]):
    """What write-back and backfill need of a store; implement it for a store that is not known here."""

    def find_ids(self, fingerprint: str | None) -> Sequence[DocumentId]:
        """Return the ids of the documents whose `kalm_fp` is missing or another; of all documents for None."""

    def add_metadata(self, changes: Changes) -> None:
        """Add to the metadata of one or more documents as the store holds them now, leaving all else as it is.

        Ids that are gone are passed over.
        """


@dataclass(frozen=True)
class DocumentKind(Generic[Doc]):
    """How a host's documents are read."""

    to_passage: Callable[[Doc], Passage]
    """Text and stored encoding."""
    metadata: Callable[[Doc], Mapping[str, Any]]
    has_text_of: Callable[[Doc, Doc], bool]
    """Whether what a store holds (first) still has the text of the document that was encoded (second)."""
    encoding_key: str


def encodings_of(access: Readable[Doc], kind: DocumentKind[Doc], ids: Sequence[DocumentId | None]) -> list[Any]:
    """Return what a store has under the encoding's key of documents, in order, by one call for all; None where it has none.

    Args:
        access: to the store.
        kind: how its documents are read.
        ids: of the documents; None for one that has none.
    """
    wanted = [document_id for document_id in dict.fromkeys(ids) if document_id is not None]
    held = access.read(wanted) if wanted else {}
    found = {document_id: kind.metadata(document).get(kind.encoding_key) for document_id, document in held.items()}
    return [None if document_id is None else found.get(document_id) for document_id in ids]


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
class Written:
    """What came of encodings that were to be written."""

    n_written: int = 0
    n_failed: int = 0
    n_gone: int = 0
    n_changed: int = 0

    def __add__(self, other: Written) -> Written:
        """Return the sums."""
        return Written(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def n_passed_over(self) -> int:
        """All that were not written."""
        return self.n_failed + self.n_gone + self.n_changed


@dataclass(frozen=True)
class Addition(Generic[Doc]):
    """What is to be added to a document's metadata."""

    document: Doc
    """As it was when its text was encoded."""
    metadata: Mapping[str, str]


def add_encodings(
    access: DocumentAccess[Doc], kind: DocumentKind[Doc], additions: Mapping[DocumentId, Addition[Doc]]
) -> Written:
    """Add encodings to documents of a store, those that are gone or have another text now excepted.

    A failure is logged and counted, and the others go on.
    """
    if not additions:
        return Written()
    try:
        held = access.read(list(additions))
    except Exception:
        logger.exception("a store could not be read: %d encodings are not written", len(additions))
        return Written(n_failed=len(additions))
    n_gone = len(additions.keys() - held.keys())
    current = {i: a for i, a in additions.items() if i in held and kind.has_text_of(held[i], a.document)}
    n_changed = len(additions) - n_gone - len(current)
    n_failed = _add(access, {i: addition.metadata for i, addition in current.items()})
    return Written(len(current) - n_failed, n_failed, n_gone, n_changed)


def _add(access: DocumentAccess[Doc], changes: Changes) -> int:
    """Add metadata and return how many documents the store did not take."""
    if not changes:
        return 0
    try:
        access.add_metadata(changes)
    except Exception:
        logger.debug("a batch was refused; its documents are written one by one", exc_info=True)
    else:
        return 0
    # One that the store refuses shall not keep the others out.
    refused: dict[DocumentId, Exception] = {}
    for document_id, added in changes.items():
        try:
            access.add_metadata({document_id: added})
        except Exception as error:
            refused[document_id] = error
    if refused:
        first = next(iter(refused))
        rule = "a store did not take %d of %d encodings, the first being that of %s"
        logger.warning(rule, len(refused), len(changes), first, exc_info=refused[first])
    return len(refused)


def write_encodings(
    access: DocumentAccess[Doc], kind: DocumentKind[Doc], documents: Mapping[DocumentId, Doc], n_without_id: int = 0
) -> Written:
    """Write the encodings that documents carry into a store, and log what came of those that were not written.

    Args:
        access: to the store.
        kind: how the documents are read.
        documents: with encodings, by the store's ids.
        n_without_id: documents that have none, for the log.
    """
    keys = (kind.encoding_key, FINGERPRINT_KEY)
    additions = {
        document_id: Addition(document, {key: kind.metadata(document)[key] for key in keys})
        for document_id, document in documents.items()
    }
    written = add_encodings(access, kind, additions)
    if written.n_passed_over or n_without_id:
        reasons = {
            "gone": written.n_gone,
            "have another text now": written.n_changed,
            "failed": written.n_failed,
            "have no id": n_without_id,
        }
        shown = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        n_lost, n_all = written.n_passed_over + n_without_id, len(documents) + n_without_id
        logger.warning("%d of %d encodings were not written back: %s", n_lost, n_all, shown)
    return written


def backfill(
    access: DocumentAccess[Doc],
    kind: DocumentKind[Doc],
    reranker: Reranker,
    *,
    check_texts: bool,
    batch_size: int,
    show_progress: bool,
) -> BackfillReport:
    """Encode the documents of a store that a query would have to encode: read, encode, write, batch by batch.

    Each batch is written when it is done, so a run that was stopped is continued by the next one.

    Args:
        access: to the store.
        kind: how its documents are read.
        reranker: encodes them.
        check_texts: read every document; otherwise those whose `kalm_fp` says that they are of this reranker are believed.
        batch_size: documents read, encoded and written at a time.
        show_progress: draw a progress bar.

    Raises:
        SettingsError: `batch_size` is not positive.
        EncodingTooLargeError: an encoding does not fit `max_inline_bytes`.
    """
    if type(batch_size) is not int or batch_size < 1:
        msg = f"batch_size must be a positive whole number, but got {batch_size!r}"
        raise SettingsError(msg)
    fingerprint = reranker.fingerprint
    ids = access.find_ids(None if check_texts else fingerprint)
    n_checked = n_missing = n_stale = 0
    written = Written()
    with tqdm(total=len(ids), desc="Encoding", unit="document", disable=not show_progress) as progress:
        for start in range(0, len(ids), batch_size):
            held = list(access.read(ids[start : start + batch_size]).items())
            passages = [kind.to_passage(document) for _, document in held]
            reading, made = encode_missing(reranker, passages)
            additions = {
                held[index][0]: Addition(held[index][1], under_key(metadata, kind.encoding_key))
                for index, metadata in made.items()
            }
            # The encoding too: a host may have to hide both keys.
            labels = {
                document_id: Addition(document, {kind.encoding_key: passage.encoding or "", FINGERPRINT_KEY: fingerprint})
                for (document_id, document), passage, status in zip(held, passages, reading, strict=True)
                if status == "stored" and kind.metadata(document).get(FINGERPRINT_KEY) != fingerprint
            }
            written += add_encodings(access, kind, additions)
            add_encodings(access, kind, labels)
            counts = reading.counts
            n_checked += len(held)
            n_missing += counts["missing"] + counts["cached"] + counts["found"]
            n_stale += counts["stale"] + counts["corrupt"]
            progress.update(min(batch_size, len(ids) - start))
    return BackfillReport(n_checked, n_missing, n_stale, written.n_failed, written.n_gone, written.n_changed)
