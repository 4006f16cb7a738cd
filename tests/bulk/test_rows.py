"""The rows that are in hand, encoded: what is kept, made once, replaced, and counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kalm_integrations import KalmReranker
from kalm_integrations.bulk import RowCounts, RowEncoder
from kalm_integrations.corpora.jsonl import PassageFields
from kalm_integrations.errors import EncodingTooLargeError, SettingsError
from kalm_integrations.testing import FakeReranker


def test_rows_keep_what_they_have_and_get_what_they_lack(make_reranker: Callable[..., KalmReranker]) -> None:
    """Valid encodings are kept even without their companion; stale and corrupt ones are replaced; a text is encoded once."""
    reranker = make_reranker()
    one, two = (metadata["kalm_encoding"] for metadata in reranker.encode_to_metadata(["one", "two"]))
    fresh = make_reranker()
    encoder = RowEncoder(fresh)
    rows = [
        {"_id": 1, "text": "one"},
        {"_id": 2, "text": "one", "kalm_encoding": one},
        {"_id": 3, "text": "two", "kalm_encoding": one},
        {"_id": 4, "text": "two", "kalm_encoding": {"no": "string"}, "kalm_fp": "old"},
    ]
    before = [dict(row) for row in rows]
    encoded = encoder.encode(rows)
    assert rows == before
    assert [row["_id"] for row in encoded] == [1, 2, 3, 4]
    assert [row["kalm_encoding"] for row in encoded] == [one, one, two, two]
    assert {row["kalm_fp"] for row in encoded} == {reranker.fingerprint}
    assert fresh.stats.passages_encoded == 1
    sizes = 2 * len(one) + 2 * len(two)
    assert encoder.counts == RowCounts(rows=4, passed_through=1, encoded=1, repeated=2, stale=1, corrupt=1, characters=sizes)


def test_fields_and_known_texts() -> None:
    """A title goes before the text; what another call knows is not made again, and it learns what is made here."""
    encoder = RowEncoder(FakeReranker(), PassageFields("body", "head"))
    [row] = encoder.encode([{"head": "A", "body": "b"}])
    assert row["kalm_encoding"] == FakeReranker().encode_to_metadata(["A b"])[0]["kalm_encoding"]
    known = {"b": "kalm1.of-elsewhere"}
    values = [metadata["kalm_encoding"] for metadata in encoder.encode_texts(["b", "c"], [{}, {}], known)]
    assert values[0] == "kalm1.of-elsewhere"
    assert known["c"] == values[1]
    with pytest.raises(SettingsError, match="a row must have its passage under 'body'"):
        encoder.encode([{"text": "a"}])


def test_an_encoding_that_does_not_fit_names_its_row(make_reranker: Callable[..., KalmReranker]) -> None:
    encoder = RowEncoder(make_reranker(max_inline_bytes=1200))
    with pytest.raises(EncodingTooLargeError, match="max_inline_bytes=1200") as caught:
        encoder.encode([{"text": "a"}, {"text": "a"}, {"text": "long " * 4000}])
    assert caught.value.index == 2
