"""Encodings into documents that a store has already, without embedding them again, and out of them.

What others write meanwhile is never undone: two keys are added to what the store holds now, and documents that are gone or
have another text are passed over and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

from kalm_integrations.core.types import Passage
from kalm_integrations.hosting.documents import fingerprint_key

logger = logging.getLogger(__name__)

PAGE_SIZE = 1000
"""Ids that are asked for at a time."""

DocumentId: TypeAlias = "str | int"
Doc = TypeVar("Doc")

Changes: TypeAlias = Mapping[DocumentId, Mapping[str, "str | None"]]
"""Metadata to add, by document; None takes a key away."""


@dataclass(frozen=True)
class Label:
    """What tells, without the encoding being read, whether a document has one of a reranker."""

    key: str
    """Of the metadata: `kalm_fp`, or `<encoding_key>_fp`."""
    fingerprint: str
    """The reranker's."""
    others: tuple[str, ...] = ()
    """What else its encodings carry: passages in windows have a fingerprint of their own. A store that asks for `fingerprint`
    alone finds documents of these too; they are read, and left as they are."""

    def is_on(self, metadata: Mapping[str, Any]) -> bool:
        """Return whether a document's metadata has it."""
        return metadata.get(self.key) in (self.fingerprint, *self.others)


class PagedIds(Iterable[DocumentId]):
    """Ids that are fetched page by page, once."""

    def __init__(self, pages: Iterable[Sequence[DocumentId]], count: int | None = None) -> None:
        """Take pages, and how many ids there are in all of them, if that is known."""
        self._pages = pages
        self._count = count

    def __iter__(self) -> Iterator[DocumentId]:
        """Return an iterator over the ids."""
        return chain.from_iterable(self._pages)

    def __length_hint__(self) -> int:
        """Return how many there are, for a progress bar; unknown, NotImplemented."""
        return NotImplemented if self._count is None else self._count


def merged(metadata: Mapping[Any, Any], added: Mapping[str, str | None]) -> dict[Any, Any]:
    """Return metadata with what is added, and without the keys that are taken away; see `Changes`."""
    kept = {key: value for key, value in metadata.items() if key not in added}
    return kept | split_change(added)[0]


def split_change(change: Mapping[str, str | None]) -> tuple[dict[str, str], list[str]]:
    """Return what a change adds, and the keys that it takes away; see `Changes`."""
    added = {key: value for key, value in change.items() if value is not None}
    return added, [key for key in change if key not in added]


class Readable(Protocol[Doc]):
    """What fetching encodings needs of a store."""

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Doc]:
        """Return documents by id as the store holds them now, leaving out those that are gone or have no text."""


@runtime_checkable
class DocumentAccess(Readable[Doc], Protocol[Doc]):
    """What write-back and backfill need of a store; implement it for a store that is not known here."""

    def find_ids(self, without: Label | None) -> Iterable[DocumentId]:
        """Return the ids of the documents that do not have a label; of all documents for None.

        Each comes once, also while metadata is added to documents whose ids have come already. `PagedIds` says how many there
        are, for a progress bar, and needs no memory for all of them.
        """

    def add_metadata(self, changes: Changes) -> None:
        """Add to the metadata of one or more documents as the store holds them now, leaving all else as it is.

        A value of None takes a key away, or becomes null where the store cannot do that. Ids that are gone are passed over.
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

    def label(self, fingerprint: str, *others: str) -> Label:
        """Return what tells whether a document has an encoding of a fingerprint, or of one of several."""
        return Label(fingerprint_key(self.encoding_key), fingerprint, others)


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
    metadata: Mapping[str, str | None]


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
    keys = (kind.encoding_key, fingerprint_key(kind.encoding_key))
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
