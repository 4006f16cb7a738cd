"""One contract for what adapters say about a document's sentences, and for copies that are cut to the best of them."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from tools.holding import Held
from tools.hosts import HOSTS, Host

from kalm_integrations import KalmReranker
from kalm_integrations.core.base import Reranker
from kalm_integrations.core.types import Passage
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting import wait_for_write_back
from kalm_integrations.testing import FakeReranker

TEXTS = [
    "The Panthers defense gave up just 308 points. Who won the super bowl?\nNobody knows. Super Bowl 50 was played in 2015.",
    "  Lift and drag of a slender wing.\n",
    "naïve café 東京",
    "",
]
QUERY = "who won the super bowl?"
SURE = 0.005
"""Threshold at which the first text loses two of its sentences with a fake, and the others nothing."""
LEFT = "Who won the super bowl?\nSuper Bowl 50 was played in 2015."
PARTS = [{"start": TEXTS[0].index(part), "end": TEXTS[0].index(part) + len(part)} for part in LEFT.splitlines()]
KEYS = ("relevant_spans", "kept_spans")


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request) -> Host:
    return request.param


@pytest.fixture(params=["thread", "coroutine"])
def use(request, host):
    """Reranks in one of two ways, and returns the documents by their ids."""

    async def call(component, documents):
        if request.param == "coroutine":
            returned = await host.ause(component, QUERY, documents)
        else:
            returned = host.use(component, QUERY, documents)
        return {host.key(document): document for document in returned}

    return call


def documents(host: Host, **metadata):
    return [host.document(f"id-{i}", text, {"page": i, **copy.deepcopy(metadata)}) for i, text in enumerate(TEXTS)]


def make(host: Host, model=None, **settings):
    return host.reranker(model=FakeReranker() if model is None else model, **{host.top: None}, **settings)


def spans(document, host: Host):
    return [(span["start"], span["end"], span["score"]) for span in host.metadata(document)["relevant_spans"]]


async def test_spans_are_those_of_the_reranker(host, use, make_reranker):
    """Best first, of the document's own text, with the numbers that `highlight` gives; for stored encodings too."""
    reranker = make_reranker()
    stored = host.encode(host.encoder(model=reranker), documents(host)[:2])
    returned = await use(make(host, reranker, highlight=True), [*stored, *documents(host)[2:]])
    for index, text in enumerate(TEXTS):
        expected = reranker.highlight(QUERY, text)
        found = spans(returned[f"id-{index}"], host)
        assert [span[:2] for span in found] == [(span.start, span.end) for span in expected]
        assert [span[2] for span in found] == pytest.approx([span.score for span in expected], abs=1e-6)
        assert host.text(returned[f"id-{index}"]) == text
        assert "kept_spans" not in host.metadata(returned[f"id-{index}"])
    assert len(spans(returned["id-0"], host)) == 4


async def test_what_is_pruned_is_cut_from_a_copy(host, use):
    given = documents(host, tags=["a"])
    before = copy.deepcopy(given)
    returned = await use(make(host, prune=True, prune_threshold=SURE), given)
    assert given == before
    assert [host.text(returned[f"id-{i}"]) for i in range(4)] == [LEFT, *TEXTS[1:]]
    whole = [[{"start": 0, "end": len(text)}] if text else [] for text in TEXTS[1:]]
    kept = [host.metadata(returned[f"id-{i}"])["kept_spans"] for i in range(4)]
    assert kept == [PARTS, *whole]
    assert "relevant_spans" not in host.metadata(returned["id-0"])
    # All else is as it would have been.
    plain = await use(make(host), given)
    for key, document in returned.items():
        metadata = {name: value for name, value in host.metadata(document).items() if name != "kept_spans"}
        assert (host.score(document), metadata) == (host.score(plain[key]), host.metadata(plain[key]))


async def test_spans_beside_a_pruned_text_are_the_originals(host, use):
    returned = await use(make(host, highlight=True, prune=True, prune_threshold=SURE), documents(host))
    best, *others = spans(returned["id-0"], host)
    assert TEXTS[0][slice(*best[:2])] == "Who won the super bowl?"
    assert len(others) == 3
    assert host.metadata(returned["id-0"])["kept_spans"] == PARTS


async def test_without_being_asked_for_nothing_is_added(host, use):
    returned = await use(make(host), documents(host))
    assert all(host.metadata(document).keys() == {"page"} for document in returned.values())


def test_the_default_threshold_takes_what_says_nothing(host):
    text = "Otters live on fish, crabs and frogs. They hunt at night."
    component = make(host, KalmReranker.from_pretrained("pico"), prune=True)
    [document] = host.use(component, "What do otters eat?", [host.document("id", text, {})])
    assert host.text(document) == "Otters live on fish, crabs and frogs."


async def test_what_is_written_back_is_the_whole_text_with_its_encoding(host, use):
    reranker, written = FakeReranker(), []
    component = make(host, reranker, highlight=True, prune=True, prune_threshold=SURE, write_back=written.extend)
    returned = await use(component, documents(host))
    assert host.text(returned["id-0"]) == LEFT
    assert wait_for_write_back(20)
    assert {host.key(document): host.text(document) for document in written} == {f"id-{i}": t for i, t in enumerate(TEXTS)}
    passages = [Passage(host.text(document), host.metadata(document)["kalm_encoding"]) for document in written]
    assert reranker.find_unencoded(passages) == []
    assert not any(key in host.metadata(document) for document in written for key in KEYS)


async def test_no_encoding_is_left_on_a_text_that_it_does_not_fit(host, use):
    reranker = FakeReranker()
    stored = host.encode(host.encoder(model=reranker), documents(host))
    returned = await use(make(host, reranker, prune=True, prune_threshold=SURE, strip_encodings=False), stored)
    assert [key for key, document in returned.items() if "kalm_fp" not in host.metadata(document)] == ["id-0"]
    assert "kalm_encoding" not in host.metadata(returned["id-0"])
    passages = [Passage(TEXTS[i], host.metadata(returned[f"id-{i}"])["kalm_encoding"]) for i in (1, 2, 3)]
    assert reranker.find_unencoded(passages) == []


async def test_spans_of_an_earlier_reranker_go(host, use):
    """They are of another query or text; what somebody else keeps under these keys stays."""
    place = {"start": 0, "end": 3}
    theirs = {"relevant_spans": [{**place, "score": 0.5}], "kept_spans": [place], "relevant_window": place}
    returned = await use(make(host), documents(host, **theirs))
    assert all(host.metadata(document).keys() == {"page"} for document in returned.values())
    returned = await use(make(host), documents(host, relevant_spans="by hand", kept_spans=[1], relevant_window=[0, 3]))
    assert all(host.metadata(document)["relevant_spans"] == "by hand" for document in returned.values())
    assert all(host.metadata(document)["kept_spans"] == [1] for document in returned.values())
    assert all(host.metadata(document)["relevant_window"] == [0, 3] for document in returned.values())
    twice = await use(make(host, highlight=True), list((await use(make(host, prune=True), documents(host))).values()))
    assert all(host.metadata(document).keys() == {"page", "relevant_spans"} for document in twice.values())


async def test_spans_do_not_change_what_a_later_reranker_judges(host, use):
    reranker = FakeReranker()
    stored = host.encode(host.encoder(model=reranker), documents(host))
    told = await use(make(host, reranker, highlight=True, strip_encodings=False), stored)
    await use(make(host, reranker, on_missing="error"), list(told.values()))
    assert reranker.stats.passages_encoded == len(TEXTS)


async def test_what_is_not_reranked_stays_whole(host, use, make_reranker):
    reranker = make_reranker()
    component = make(host, reranker, highlight=True, prune=True, timeout=0.05, on_error="keep_order")
    with Held(reranker):
        returned = await use(component, documents(host, kept_spans=[]))
    assert [host.text(document) for document in returned.values()] == TEXTS
    assert all(host.metadata(document).keys() == {"page", "reranked"} for document in returned.values())


class WithoutSpans:
    """A reranker of somebody else's, from before there were spans."""

    def read(self, passages):
        return FakeReranker().read(passages)

    def encode_to_metadata(self, texts):
        return FakeReranker().encode_to_metadata(texts)

    def rank(
        self, query, passages, *, top_k, score_threshold, instruction, first_stage_scores, fusion, fusion_weight, timeout
    ):
        assert (score_threshold, instruction, first_stage_scores, fusion, fusion_weight, timeout) == (None,) * 6
        return FakeReranker().rank(query, passages, top_k)


class IgnoresSpans(FakeReranker):
    """A reranker that takes the argument, and does nothing about it."""

    def answer(self, request):
        return [FakeReranker().rank(query, given) for query, given in zip(request.queries, request.lists, strict=True)]


def test_a_reranker_without_spans_works_as_long_as_none_are_needed(host):
    assert len(host.use(make(host, WithoutSpans()), QUERY, documents(host))) == len(TEXTS)
    assert len(host.use(make(host, IgnoresSpans()), QUERY, documents(host))) == len(TEXTS)


@pytest.mark.parametrize("asked", [{"highlight": True}, {"prune": True}], ids=str)
async def test_a_reranker_that_ignores_spans_is_a_mistake_that_is_raised(host, use, asked):
    assert isinstance(IgnoresSpans(), Reranker)
    with pytest.raises(SettingsError, match=r"highlight and prune need a reranker .* 4 of 4 passages without"):
        await use(make(host, IgnoresSpans(), on_error="keep_order", **asked), documents(host))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"highlight": "perhaps"}, "highlight"),
        ({"prune": None}, "prune"),
        ({"prune": True, "prune_threshold": 1.5}, r"prune_threshold must be a number from 0 .* but got 1\.5"),
        ({"prune": True, "prune_threshold": "x"}, "prune_threshold must be"),
        ({"prune_threshold": 0.5}, r"prune_threshold=0\.5 is for prune, but prune is False; set prune=True too"),
        ({"highlight": True, "prune_threshold": 0.5}, "is for prune"),
        ({"encoding_key": "relevant_spans"}, "encoding_key must be"),
        ({"encoding_key": "kept_spans"}, "encoding_key must be"),
        ({"encoding_key": "relevant_window"}, "encoding_key must be"),
    ],
)
def test_bad_settings_are_refused_when_a_component_is_made(host, settings, message):
    with pytest.raises(SettingsError, match=message):
        host.reranker(**settings)


def test_settings_are_assigned_and_travel(host):
    component = host.reranker(highlight=True, prune=True, prune_threshold=0.25)
    with pytest.raises(SettingsError, match="prune_threshold"):
        component.prune_threshold = -1
    component.prune = False
    # Without effect as long as it is off.
    made = pickle.loads(pickle.dumps(component))
    assert (made.highlight, made.prune, made.prune_threshold) == (True, False, 0.25)
    made.prune = True
    dumped = json.loads(json.dumps(host.dump(made)))
    settings = dumped.get("init_parameters", dumped)
    assert (settings["highlight"], settings["prune"], settings["prune_threshold"]) == (True, True, 0.25)
