"""A plan for passages that are longer than the limit takes what real encodings in windows take."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from kalm_integrations import KalmReranker
from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.core.passages.header import CHECKSUM_BYTES
from kalm_integrations.core.settings import EncoderSettings
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.errors import SettingsError
from kalm_integrations.planning.migration import plan_migration
from kalm_integrations.planning.plans import Plan, make_plan
from kalm_integrations.planning.reading import PassageRead, read_of
from kalm_integrations.planning.shapes import shape_of
from kalm_integrations.planning.sizes import payload_bytes
from kalm_integrations.samples import XQUAD_EN

TOLERANCE = 0.08
"""Of sizes; where a window ends depends on the sentences."""


def plan_for(tokens: int, **settings: Any) -> Plan:
    """Plan for 100 passages under pico, on the benchmark's machine."""
    return make_plan("pico", 100, tokens, **{"speed": 1.0, **settings})


@pytest.fixture(scope="module")
def articles() -> list[str]:
    """Of one to twelve paragraphs each."""
    paragraphs = iter(Collection.read(XQUAD_EN).passages.values())
    return [" ".join(itertools.islice(paragraphs, n)) for n in range(1, 13)]


@pytest.mark.parametrize("limit", [64, 128, 256])
def test_sizes_are_those_of_real_windows(articles: list[str], limit: int) -> None:
    """Summed over English articles, within 8 %, at limits of which a sentence takes half to a tenth."""
    reranker = KalmReranker.from_pretrained("pico", max_passage_tokens=limit, prefix_dtype="float32", device="cpu")
    encodings = reranker.encode_passages(articles)
    reranker.prepare(encodings)
    tokenizer = reranker.runtime.tokenizer(allow_special_tokens=False)
    lengths = [len(ids) for ids in tokenizer.passages([passage_text(article) for article in articles])]
    plans = [plan_for(length, max_passage_tokens=limit) for length in lengths]
    windows = [1 if encoding.windows is None else len(encoding.windows) for encoding in encodings]
    assert max(windows) > 8
    assert sum(plan.reading.windows for plan in plans) == pytest.approx(sum(windows), rel=TOLERANCE)
    for real, planned in (
        ([len(encoding.to_metadata()) for encoding in encodings], [plan.characters for plan in plans]),
        ([encoding.n_tokens for encoding in encodings], [plan.reading.tokens_read for plan in plans]),
        ([len(encoding.states) for encoding in encodings], [plan.states for plan in plans]),
        ([encoding.as_stored().nbytes for encoding in encodings], [plan.memory.encoding for plan in plans]),
        ([reranker._ranker.scorer.prefixes.nbytes], [plan.memory.prefix for plan in plans]),
    ):
        assert sum(planned) == pytest.approx(sum(real), rel=TOLERANCE)


def test_a_payload_holds_its_windows(articles: list[str]) -> None:
    """What a payload store takes, to the byte, of windows that are known; its checksum comes on top."""
    reranker = KalmReranker.from_pretrained("pico", max_passage_tokens=64, storage_codec="fp16")
    [encoding] = reranker.encode_passages(articles[-1:])
    payloads: dict[str, bytes] = {}
    encoding.to_metadata(payloads)
    [payload] = payloads.values()
    assert encoding.windows is not None
    read = PassageRead(Counter(window.n_tokens for window in encoding.windows), encoding.windows, 0)
    assert len(payload) == CHECKSUM_BYTES + payload_bytes(shape_of("pico"), read, 4, "fp16")


def test_a_passage_that_fits_is_planned_as_ever() -> None:
    short = plan_for(1023)
    assert (short.reading.windows, short.reading.tokens_read, short.reading.tokens_unread) == (1, 1023, 0)
    assert short.states == 256
    assert replace(plan_for(1023, long_passages="cut"), reading=short.reading) == short


def test_what_is_cut_takes_no_more_than_the_limit() -> None:
    full, cut = (plan_for(tokens, long_passages="cut") for tokens in (1024, 5000))
    assert (cut.reading.windows, cut.reading.tokens_read, cut.reading.tokens_unread) == (1, 1024, 3976)
    assert (cut.characters, cut.memory, cut.stores, cut.seconds) == (full.characters, full.memory, full.stores, full.seconds)


def test_windows_are_encoded_and_scored_one_by_one() -> None:
    """Time is that of so many passages of a window's length, the last one shorter."""
    read = read_of(4000, EncoderSettings())
    [full, last] = read.sizes
    assert read.sizes == {full: 4, last: 1}
    long = plan_for(4000)
    parts = {size: plan_for(size, long_passages="cut") for size in read.sizes}
    assert long.seconds.encoding == pytest.approx(4 * parts[full].seconds.encoding + parts[last].seconds.encoding)
    for kept, seconds in long.seconds.query.items():
        # What all candidates of a query share is counted again for each length.
        assert seconds == pytest.approx(4 * parts[full].seconds.query[kept] + parts[last].seconds.query[kept], rel=1e-3)
    assert long.memory.prefix == 4 * parts[full].memory.prefix + parts[last].memory.prefix


def test_no_more_windows_are_planned_than_are_made() -> None:
    few = plan_for(4000, max_windows=2)
    assert few.reading.windows == 2
    assert few.reading.tokens_unread > 2000
    assert few.characters < plan_for(2000).characters
    assert plan_for(131_072, max_passage_tokens=4096, max_windows=10**6).reading.windows == 32


def test_the_old_checkpoint_of_a_migration_reads_as_the_new_one() -> None:
    new = plan_for(4000, max_windows=2)
    migration = plan_migration("pico", new)
    assert migration.before == migration.after == new.stores


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"long_passages": "fold"}, "long_passages: .*, but got 'fold'"),
        ({"max_windows": 0}, "max_windows: .*, but got 0"),
        ({"max_passage_tokens": 0}, "max_passage_tokens: .*, but got 0"),
    ],
)
def test_what_no_reranker_does_is_not_planned_for(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        plan_for(4000, **settings)
