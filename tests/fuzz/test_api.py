"""Every public call of the core with values of all kinds: it ends well or in an error of ours, and changes nothing for others.

What `EncodedPassage` objects with broken fields, damaged strings, stores and checkpoints do, the other files here say.
"""

from __future__ import annotations

import io
import random
import sys
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
from tools.fuzzing import rounds
from tools.oddities import MAKERS, Five, Member, Method, OwnError, Refusing, Text, foreign, random_value

from kalm_integrations import EncodedPassage, KalmReranker, Passage
from kalm_integrations.core.settings import SETTING_NAMES, STORE_SETTINGS

QUERY = "which"
PASSAGES = ["otters eat crabs", "the league of 2015"]
fresh = count()


def new() -> list[str]:
    """Return a passage that has not been encoded yet."""
    return [f"passage {next(fresh)}"]


CALLS: dict[str, Callable[[KalmReranker, Any], object]] = {
    "score(query)": lambda r, v: r.score(v, PASSAGES),
    "score(passages)": lambda r, v: r.score(QUERY, v),
    "score([passage])": lambda r, v: r.score(QUERY, [v]),
    "score(instruction)": lambda r, v: r.score(QUERY, PASSAGES, v),
    "score([Passage(text)])": lambda r, v: r.score(QUERY, [Passage(v)]),
    "score([Passage(encoding)])": lambda r, v: r.score(QUERY, [Passage("a", v)]),
    "rank(top_k)": lambda r, v: r.rank(QUERY, PASSAGES, v),
    "rank(score_threshold)": lambda r, v: r.rank(QUERY, PASSAGES, None, v),
    "rank(first_stage_scores)": lambda r, v: r.rank(QUERY, PASSAGES, first_stage_scores=v, fusion="z_score"),
    "rank([first_stage_score])": lambda r, v: r.rank(QUERY, ["a"], first_stage_scores=[v], fusion="reciprocal_rank"),
    "rank(fusion)": lambda r, v: r.rank(QUERY, PASSAGES, first_stage_scores=[1, 2], fusion=v),
    "rank(fusion_weight)": lambda r, v: r.rank(QUERY, PASSAGES, fusion="reciprocal_rank", fusion_weight=v),
    "rank(timeout)": lambda r, v: r.rank(QUERY, PASSAGES, timeout=v),
    "rank(on_error)": lambda r, v: r.rank(QUERY, PASSAGES, on_error=v),
    "rank(fusion_weight alone)": lambda r, v: r.rank(QUERY, PASSAGES, fusion_weight=v),
    "rank_many(queries)": lambda r, v: r.rank_many(v, [PASSAGES]),
    "rank_many([query])": lambda r, v: r.rank_many([v], [PASSAGES]),
    "rank_many(lists)": lambda r, v: r.rank_many([QUERY], v),
    "rank_many([passages])": lambda r, v: r.rank_many([QUERY], [v]),
    "rank_many(scores)": lambda r, v: r.rank_many([QUERY], [PASSAGES], first_stage_scores=v, fusion="z_score"),
    "rank_many([scores])": lambda r, v: r.rank_many([QUERY], [PASSAGES], first_stage_scores=[v], fusion="z_score"),
    "encode_passages(texts)": lambda r, v: r.encode_passages(v),
    "encode_passages([text])": lambda r, v: r.encode_passages([v]),
    "encode_passages(show_progress)": lambda r, v: r.encode_passages(new(), v),
    "encode_to_metadata(texts)": lambda r, v: r.encode_to_metadata(v),
    "encode_to_metadata([text])": lambda r, v: r.encode_to_metadata([v]),
    "encode_to_metadata(show_progress)": lambda r, v: r.encode_to_metadata(new(), v),
    "read(passages)": lambda r, v: r.read(v),
    "read([passage])": lambda r, v: r.read([v]),
    "find_unencoded(passages)": lambda r, v: r.find_unencoded(v),
    "find_unencoded([Passage])": lambda r, v: r.find_unencoded([Passage(v, v)]),
    "prepare(passages)": lambda r, v: r.prepare(v),
    "prepare([passage])": lambda r, v: r.prepare([v]),
    "prepare(instruction)": lambda r, v: r.prepare(PASSAGES, v),
    "prepare(show_progress)": lambda r, v: r.prepare(new(), None, v),
    "warm_up": lambda r, v: r.warm_up(encoder=v, decoder=v),
    "pool": lambda r, v: r.encode_passages(PASSAGES)[0].pool(v),
    "from_metadata(value)": lambda r, v: EncodedPassage.from_metadata(v),
    "KalmReranker": lambda r, v: KalmReranker(v),
    "from_pretrained": lambda r, v: KalmReranker.from_pretrained(v),
}


@pytest.fixture
def reranker(make_reranker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Progress bars, drawn where a value counts as true.
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    return make_reranker()


@pytest.mark.parametrize("name", CALLS)
def test_any_value_is_taken_or_refused_with_a_message(reranker, make_reranker, name):
    call = CALLS[name]
    assert foreign((kind, lambda make=make: call(reranker, make())) for kind, make in MAKERS.items()) == []
    assert reranker.score(QUERY, PASSAGES) == make_reranker().score(QUERY, PASSAGES)


@pytest.mark.parametrize("name", SETTING_NAMES)
def test_any_setting_is_taken_or_refused_with_a_message(make_reranker, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def use(value):
        # A store's text is a folder, which tests of stores make.
        if name not in STORE_SETTINGS or not isinstance(value, str):
            make_reranker(**{name: value}).score(QUERY, PASSAGES)

    assert foreign((kind, lambda make=make: use(make())) for kind, make in MAKERS.items()) == []


def test_arguments_of_any_kind_together(reranker, make_reranker, tiny_checkpoint):
    """Seeded, so that round n is the same in every run; KALM_FUZZ_ROUNDS says how many."""
    names = [name for name in SETTING_NAMES if name not in STORE_SETTINGS]

    def rank(source):
        keywords = {
            name: random_value(source)
            for name in ("top_k", "score_threshold", "instruction", "first_stage_scores", "fusion", "fusion_weight")
            if source.random() < 0.3
        }
        passages = (
            random_value(source) if source.random() < 0.3 else [random_value(source, 0) for _ in range(source.randrange(4))]
        )
        many = source.random() < 0.3
        query = random_value(source) if source.random() < 0.3 else QUERY
        if many:
            reranker.rank_many([query, QUERY], [passages, PASSAGES], **keywords)
        else:
            reranker.rank(query, passages, **keywords)

    def open_reranker(source):
        settings = {name: random_value(source) for name in source.sample(names, source.randrange(3))}
        KalmReranker.from_pretrained(tiny_checkpoint, **settings).score(QUERY, PASSAGES)

    def one(source):
        call = source.choice(list(CALLS.values()))
        call(reranker, random_value(source))

    kinds = [rank, rank, open_reranker, one]
    calls = ((f"round {n}", lambda n=n: kinds[n % 4](random.Random(n))) for n in range(rounds(400)))
    assert foreign(calls) == []
    assert reranker.score(QUERY, PASSAGES) == make_reranker().score(QUERY, PASSAGES)


@pytest.mark.parametrize("text", [Text("otters eat crabs"), Member.OTTER, np.str_("otters eat crabs")], ids=type)
def test_a_string_of_another_class_is_the_text_that_it_holds(make_reranker, text):
    plain = make_reranker()
    assert make_reranker().score(text, [text, Passage(text)], text) == plain.score(PASSAGES[0], PASSAGES[:1] * 2, PASSAGES[0])
    assert make_reranker().encode_to_metadata([text]) == plain.encode_to_metadata(PASSAGES[:1])
    [stored] = plain.encode_to_metadata(PASSAGES[:1])
    value = type(text)(stored["kalm_encoding"]) if type(text) is not Member else stored["kalm_encoding"]
    assert list(make_reranker().read([Passage(text, value)])) == ["stored"]
    assert make_reranker(instruction=text).score(QUERY, PASSAGES) == plain.score(QUERY, PASSAGES, PASSAGES[0])


@pytest.mark.parametrize("number", [np.int64(5), np.uint8(5), Five.FIVE])
def test_a_whole_number_of_another_class_is_the_number_that_it_is(make_reranker, number):
    many = [f"passage {n}" for n in range(8)]
    assert make_reranker().rank(QUERY, many, number) == make_reranker().rank(QUERY, many, 5)
    limited, same = make_reranker(max_passage_tokens=number), make_reranker(max_passage_tokens=5)
    assert limited.fingerprint == same.fingerprint
    assert limited.score(QUERY, many) == same.score(QUERY, many)
    assert make_reranker(compression_ratio=1).encode_passages(many)[0].pool(number).compression_ratio == 5


def test_a_method_and_numbers_of_other_classes_fuse_as_plain_ones(make_reranker):
    reranker = make_reranker()
    plain = reranker.rank(QUERY, PASSAGES, None, 0.25, first_stage_scores=[1, 2], fusion="z_score", fusion_weight=0.5)
    scores, weight, threshold = np.array([1, 2]), np.float32(0.5), np.float32(0.25)
    assert plain == reranker.rank(
        QUERY, PASSAGES, None, threshold, first_stage_scores=scores, fusion=Method.Z_SCORE, fusion_weight=weight
    )


def test_iterators_are_gone_through_once(make_reranker):
    reranker = make_reranker()
    # Of two passages all z-scores are 1 and -1: with equal weights the last bits of a margin would decide.
    fusion = {"fusion": "z_score", "fusion_weight": 0.25}
    queries, lists, scores = iter([QUERY, "42"]), (iter(PASSAGES) for _ in range(2)), (iter([1, 2]) for _ in range(2))
    rankings = reranker.rank_many(queries, lists, first_stage_scores=scores, **fusion)
    for query, ranking in zip((QUERY, "42"), rankings, strict=True):
        expected = reranker.rank(query, PASSAGES, first_stage_scores=[1, 2], **fusion)
        assert [passage.text for passage in ranking] == [passage.text for passage in expected]
        assert [passage.margin for passage in ranking] == pytest.approx([passage.margin for passage in expected], abs=1e-5)
    assert reranker.score(QUERY, iter(PASSAGES)) == reranker.score(QUERY, PASSAGES)
    assert len(reranker.encode_passages(map(str, range(3)))) == 3


def test_what_an_iterator_raises_goes_to_its_owner(make_reranker):
    with pytest.raises(OwnError):
        make_reranker().score(QUERY, Refusing())


def test_long_values_are_cut_in_messages(make_reranker):
    for settings in ({"storage_codec": "x" * 10**6}, {"dtype": "x" * 10**6}, {"storage_mode": "x" * 10**6}):
        with pytest.raises(ValueError, match="but got 'xxx") as caught:
            make_reranker(**settings)
        assert len(str(caught.value)) < 600
