"""What work on a whole store keeps to, whatever the store: pages, a pace, our errors, and encodings of the very text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from kalm_integrations import KalmReranker
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, Passage
from kalm_integrations.errors import SettingsError, StoreError
from kalm_integrations.hosting import filling
from kalm_integrations.hosting.filling import BackfillReport, LoadReport, Pace
from kalm_integrations.hosting.stores import PAGE_SIZE, Changes, DocumentId, DocumentKind, Label, PagedIds, Written, merged
from kalm_integrations.testing import FakeReranker

QUIET = Pace(batch_size=100, show_progress=False)


@dataclass(frozen=True)
class Doc:
    text: str
    metadata: dict[str, Any]


KIND: DocumentKind[Doc] = DocumentKind(
    to_passage=lambda doc: Passage(doc.text, doc.metadata.get(ENCODING_KEY)),
    metadata=lambda doc: doc.metadata,
    has_text_of=lambda held, encoded: held.text == encoded.text,
    encoding_key=ENCODING_KEY,
)


class Shelf:
    """Documents in a dict, and what was done with them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.held = {f"id-{i}": Doc(text, {"page": i}) for i, text in enumerate(texts)}
        self.n_ids = 0
        self.ids_at_first_read: int | None = None
        self.fails_at: int | None = None

    def find_ids(self, without: Label | None) -> PagedIds:
        return PagedIds(self._pages(without), len(self.held))

    def _pages(self, without: Label | None) -> Iterator[list[DocumentId]]:
        ids = list(self.held)
        for start in range(0, len(ids), PAGE_SIZE):
            self.n_ids += len(ids[start : start + PAGE_SIZE])
            if self.fails_at is not None and self.n_ids > self.fails_at:
                msg = "the connection was lost"
                raise OSError(msg)
            yield [i for i in ids[start : start + PAGE_SIZE] if without is None or not without.is_on(self.held[i].metadata)]

    def read(self, ids: Sequence[DocumentId]) -> dict[DocumentId, Doc]:
        self.ids_at_first_read = self.ids_at_first_read or self.n_ids
        return {i: self.held[i] for i in ids if i in self.held}

    def add_metadata(self, changes: Changes) -> None:
        for i, added in changes.items():
            self.held[i] = Doc(self.held[i].text, merged(self.held[i].metadata, added))


def test_a_large_store_is_gone_through_page_by_page() -> None:
    shelf = Shelf(f"text {i}" for i in range(3 * PAGE_SIZE))
    report = filling.backfill(shelf, KIND, FakeReranker(), check_texts=False, pace=QUIET)
    assert report == BackfillReport(3 * PAGE_SIZE, 3 * PAGE_SIZE, 0)
    assert shelf.ids_at_first_read == PAGE_SIZE
    assert filling.backfill(shelf, KIND, FakeReranker(), check_texts=False, pace=QUIET) == BackfillReport(0, 0, 0)


def test_a_label_says_which_of_its_reranker_s_fingerprints_an_encoding_has(
    make_reranker: Callable[..., KalmReranker],
) -> None:
    """A store that asks for the first one alone has its documents of the second read, and left as they are."""
    settings = {"max_passage_tokens": 64, "long_passages": "windows"}
    shelf, reranker = Shelf(["a wing", "a slender wing " * 30]), make_reranker(**settings)
    assert filling.backfill(shelf, KIND, reranker, check_texts=False, pace=QUIET) == BackfillReport(2, 2, 0)
    labels = [doc.metadata[FINGERPRINT_KEY] for doc in shelf.held.values()]
    assert tuple(labels) == reranker.fingerprints
    held = dict(shelf.held)
    assert filling.backfill(shelf, KIND, make_reranker(**settings), check_texts=False, pace=QUIET) == BackfillReport(0, 0, 0)

    class Plain(Shelf):
        def find_ids(self, without: Label | None) -> PagedIds:
            return super().find_ids(without and Label(without.key, without.fingerprint))

    plain = Plain([])
    plain.held = held
    assert filling.backfill(plain, KIND, make_reranker(**settings), check_texts=False, pace=QUIET) == BackfillReport(1, 0, 0)
    assert plain.held == shelf.held


def test_a_run_that_a_store_stopped_is_continued_by_the_next() -> None:
    shelf, fake = Shelf(f"text {i}" for i in range(2 * PAGE_SIZE)), FakeReranker()
    shelf.fails_at = PAGE_SIZE
    with pytest.raises(StoreError, match=r"must be readable .* but OSError: the connection was lost; run it again"):
        filling.backfill(shelf, KIND, fake, check_texts=False, pace=QUIET)
    shelf.fails_at = None
    assert filling.backfill(shelf, KIND, fake, check_texts=False, pace=QUIET).n_missing == PAGE_SIZE
    assert fake.stats.passages_encoded == 2 * PAGE_SIZE


def test_the_pace_is_kept_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(round(seconds, 6))
        now += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)
    pace = Pace(batch_size=4, documents_per_second=2, show_progress=False)
    for batch in pace.batches(iter(range(10)), "Counting"):
        # The first batch takes longer than it may: what follows does not hurry.
        now += 3.0 if 0 in batch else 0.5
    assert slept == [0.0, 1.5, 0.5]


@pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan"), True, "fast"])
def test_a_pace_must_be_positive(rate: Any) -> None:
    with pytest.raises(SettingsError, match="documents_per_second must be a positive number or None, but got"):
        Pace(documents_per_second=rate)
    with pytest.raises(SettingsError, match="batch_size must be a positive whole number"):
        Pace(batch_size=0)


@pytest.fixture
def encoded(make_reranker: Callable[..., KalmReranker]) -> list[dict[str, Any]]:
    """Rows as `kalm encode` writes them."""
    texts = [f"text {i}" for i in range(6)]
    made = make_reranker().encode_to_metadata(texts)
    return [{"id": f"id-{i}", "text": text, **metadata} for i, (text, metadata) in enumerate(zip(texts, made, strict=True))]


def test_rows_go_into_the_store_by_id_if_they_are_of_its_texts(encoded: list[dict[str, Any]]) -> None:
    shelf = Shelf(f"text {i}" for i in range(4))
    shelf.held["id-1"] = Doc("another text", {})
    bad = [
        {"id": "id-0"},
        {**encoded[0], "id": None},
        {**encoded[0], ENCODING_KEY: "kalm1.x.y"},
        {**encoded[0], FINGERPRINT_KEY: "0" * 32},
    ]
    report = filling.load_encodings(shelf, KIND, [*bad, *encoded], id_field="id", pace=QUIET)
    assert report == LoadReport(n_written=3, n_present=0, n_gone=2, n_changed=1, n_bad=4, n_failed=0)
    for i in (0, 2, 3):
        assert shelf.held[f"id-{i}"].metadata == {"page": i} | {
            key: encoded[i][key] for key in (ENCODING_KEY, FINGERPRINT_KEY)
        }
    assert shelf.held["id-1"].metadata == {}
    again = filling.load_encodings(shelf, KIND, iter(encoded), id_field="id", pace=QUIET)
    assert (again.n_written, again.n_present) == (0, 3)


def test_what_a_query_would_encode_after_loading_is_what_was_not_loaded(
    encoded: list[dict[str, Any]], make_reranker: Callable[..., KalmReranker]
) -> None:
    shelf = Shelf(f"text {i}" for i in range(7))
    filling.load_encodings(shelf, KIND, encoded, id_field="id", pace=QUIET)
    assert make_reranker().read([KIND.to_passage(doc) for doc in shelf.held.values()]).counts["stored"] == 6
    report = filling.backfill(shelf, KIND, make_reranker(), check_texts=True, pace=QUIET)
    assert (report.n_checked, report.n_missing, report.n_stale) == (7, 1, 0)
    assert filling.drop_encodings(shelf, KIND, pace=QUIET) == Written(7)
    assert [doc.metadata for doc in shelf.held.values()] == [{"page": i} for i in range(7)]
