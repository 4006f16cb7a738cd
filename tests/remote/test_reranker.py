"""A remote reranker ranks, reads and encodes as the reranker does that is behind the service."""

from __future__ import annotations

import asyncio
import copy
import math
import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
from tools.stub_service import Service, as_json, serve

from kalm_integrations import EncodedPassage, KalmReranker, Passage, RemoteReranker
from kalm_integrations.core.passages.stores import LmdbPayloadStore
from kalm_integrations.errors import ServiceError, SettingsError
from kalm_integrations.langchain import KalmCrossEncoder
from kalm_integrations.remote import reranker as reranker_module
from kalm_integrations.remote import scoring
from kalm_integrations.remote.protocol import name_encoding
from kalm_integrations.testing import FakeReranker

QUERY = "who won the super bowl?"
TEXTS = [
    "The Panthers defense gave up 308 points.",
    "Lift and drag of a wing.",
    "Denver won Super Bowl 50.",
    "naïve \ud83d",
]


def encodings(reranker: KalmReranker, texts=TEXTS) -> list[str]:
    return [metadata["kalm_encoding"] for metadata in reranker.encode_to_metadata(texts)]


def sent_encodings(service: Service) -> list[list[bool]]:
    """Return for each request for scores which passages came with an encoding."""
    return [["encoding" in passage for passage in body["passages"]] for body in service.sent("/v1/score")]


# --- ranking


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 2},
        {"score_threshold": 0.5},
        {"fusion": "reciprocal_rank", "fusion_weight": 0.3},
        {"fusion": "z_score", "first_stage_scores": [1.0, 9.0, 2.0, 3.0]},
        {"instruction": "Find the opposite.\ud83d"},
    ],
    ids=str,
)
async def test_rankings_are_those_of_the_reranker_behind_the_service(tiny, make_reranker, settings):
    local, remote = make_reranker(), RemoteReranker(tiny.url)
    expected = local.rank(QUERY, TEXTS, **settings)
    for ranking in (remote.rank(QUERY, TEXTS, **settings), await remote.arank(QUERY, TEXTS, **settings)):
        assert [(place.index, place.text) for place in ranking] == [(place.index, place.text) for place in expected]
        assert [place.score for place in ranking] == pytest.approx([place.score for place in expected], abs=1e-6)
        assert [place.margin for place in ranking] == pytest.approx([place.margin for place in expected], abs=1e-5)
    assert remote.rank(QUERY, TEXTS).made == {}
    assert remote.score(QUERY, TEXTS) == pytest.approx(local.score(QUERY, TEXTS), abs=1e-6)


def test_many_queries_and_pairs(tiny, make_reranker):
    local, remote = make_reranker(), RemoteReranker(tiny.url)
    queries, lists = [QUERY, "wings"], [TEXTS[:3], TEXTS[1:]]
    for ranking, expected in zip(remote.rank_many(queries, lists), local.rank_many(queries, lists), strict=True):
        assert [place.index for place in ranking] == [place.index for place in expected]
    pairs = [(QUERY, TEXTS[0]), ("wings", TEXTS[1]), (QUERY, TEXTS[2])]
    assert KalmCrossEncoder(model=tiny.url).score(pairs) == pytest.approx(KalmCrossEncoder(model=local).score(pairs), abs=1e-6)


def test_what_had_to_be_encoded_is_written_when_it_is_asked_for(tiny, make_reranker):
    remote, expected = RemoteReranker(tiny.url), make_reranker().encode_to_metadata(TEXTS)
    ranking = remote.rank(QUERY, [*TEXTS, TEXTS[0], Passage(TEXTS[1], expected[1]["kalm_encoding"])], top_k=1)
    assert not tiny.sent("/v1/encodings")
    assert list(ranking.reading) == ["missing"] * 5 + ["stored"]
    assert ranking.made == {0: expected[0], 2: expected[2], 3: expected[3], 4: expected[0]}
    assert len(tiny.sent("/v1/encodings")) == 1
    assert pickle.loads(pickle.dumps(ranking)).made == ranking.made


def test_nothing_in_nothing_out_nobody_asked():
    remote = RemoteReranker("http://localhost:1")
    assert remote.rank(QUERY, []) == []
    assert remote.encode_to_metadata([]) == []
    assert len(remote.read([])) == 0
    assert asyncio.run(remote.arank(QUERY, [])) == []


@pytest.mark.parametrize("passages", [[5], [None], [Passage(5)], "text", Passage("text"), 5])
def test_what_is_no_passage_is_refused(fake, passages):
    with pytest.raises(SettingsError):
        RemoteReranker(fake.url).rank(QUERY, passages)


def test_encoded_passages_have_no_text_to_send(tiny, make_reranker):
    with pytest.raises(SettingsError, match=r"got EncodedPassage.*Passage\(text, encoding.to_metadata\(\)\)"):
        RemoteReranker(tiny.url).rank(QUERY, make_reranker().encode_passages(TEXTS))


# --- what metadata are worth


def test_metadata_are_worth_what_the_reranker_itself_says(tiny, make_reranker, other_checkpoint, tmp_path):
    """By their strings alone, and so without a word to the service but one."""
    local, store = make_reranker(), LmdbPayloadStore(tmp_path / "store")
    sound = encodings(local)
    [of_another] = encodings(make_reranker(other_checkpoint), TEXTS[:1])
    [finer] = encodings(make_reranker(compression_ratio=1), TEXTS[:1])
    [longer] = encodings(make_reranker(max_passage_tokens=7), TEXTS[:1])
    [coded] = encodings(make_reranker(storage_codec="rot2"), TEXTS[:1])
    [reference] = encodings(make_reranker(storage_mode="reference", payload_store=store), TEXTS[:1])
    text = TEXTS[0]
    damaged = [sound[0][:-9] + "AAAAAAAAA", sound[0][:-1], sound[0] + "A", sound[0].replace("kalm1", "kalm2"), sound[0][:60]]
    odd = ["", "kalm1..", "kalm1r.", 5, b"kalm1.", [1], {}, math.nan, "kalm1." + "A" * 2000]
    given = [
        *(Passage(text, value) for text, value in zip(TEXTS, sound, strict=True)),
        *(Passage(text, value) for value in (None, sound[1], of_another, finer, longer, coded, reference, *damaged, *odd)),
        Passage("another text", reference),
        "a bare text",
    ]
    remote = RemoteReranker(tiny.url)
    assert list(remote.read(given)) == list(make_reranker(payload_store=store).read(given))
    assert list(asyncio.run(remote.aread(given))) == list(remote.read(given))
    assert [path for path, _, _ in tiny.requests] == ["/v1/kalm"]
    assert remote.find_unencoded(given) == make_reranker(payload_store=store).find_unencoded(given)


def test_statuses_of_a_ranking_are_of_metadata_first_and_of_the_service_else(tiny, make_reranker):
    local = make_reranker()
    sound = encodings(local)
    tiny.reranker.rank(QUERY, [TEXTS[1]])  # is in its memory from here on
    given = [Passage(TEXTS[0], sound[0]), TEXTS[1], TEXTS[2], Passage(TEXTS[3], sound[0]), Passage(TEXTS[1], "kalm1.x")]
    remote = RemoteReranker(tiny.url)
    ranking = remote.rank(QUERY, given)
    assert list(ranking.reading) == ["stored", "cached", "missing", "stale", "corrupt"]
    assert sorted(ranking.made) == [2, 3]
    stats = remote.stats
    assert (stats.metadata_hits, stats.cache_hits, stats.cache_misses, stats.passages_encoded) == (1, 2, 2, 2)
    assert (stats.stale, stats.corrupt, stats.passages_scored) == (1, 1, 4)
    assert stats.score_seconds > 0


def test_what_only_the_states_show_the_service_says(tiny, make_reranker):
    [sound] = make_reranker().encode_passages(TEXTS[:1])
    forged = replace(sound, states=sound.states * 1e9).to_metadata()
    remote = RemoteReranker(tiny.url)
    assert list(remote.read([Passage(TEXTS[0], forged)])) == ["stored"]
    ranking = remote.rank(QUERY, [Passage(TEXTS[0], forged)])
    assert list(ranking.reading) == ["corrupt"]
    assert list(ranking.made) == [0]
    assert (remote.stats.corrupt, remote.stats.metadata_hits, remote.stats.passages_encoded) == (1, 0, 1)


# --- what is sent


def test_encodings_are_sent_if_the_service_has_none_of_its_own(tiny, make_reranker):
    sound = encodings(make_reranker())
    given = [Passage(text, value) for text, value in zip(TEXTS, sound, strict=True)]
    tiny.reranker.encode_to_metadata(TEXTS[:2])
    remote = RemoteReranker(tiny.url)
    expected = make_reranker().rank(QUERY, given)
    assert [place.index for place in remote.rank(QUERY, given)] == [place.index for place in expected]
    assert sent_encodings(tiny) == [[False] * 4, [False, False, True, True]]
    for body in tiny.sent("/v1/score"):
        assert [passage["held"] for passage in body["passages"]] == list(map(name_encoding, sound))
    assert tiny.reranker.stats.passages_encoded == 2
    assert len({body["client"] for body in tiny.sent("/v1/score")}) == 1


def test_texts_are_sent_once_and_as_the_tokenizer_reads_them(tiny):
    remote = RemoteReranker(tiny.url)
    ranking = remote.rank("\ud83d", ["a", "\ud83c\udf00 \ud83d", "a", Passage("a"), "\U0001f300 �"])
    [body] = tiny.sent("/v1/score")
    assert (body["query"], [passage["text"] for passage in body["passages"]]) == ("�", ["a", "\U0001f300 �"])
    assert {place.index for place in ranking} == set(range(5))
    assert remote.stats.passages_scored == 2


def test_long_lists_are_cut_into_requests_that_the_service_takes(tiny, make_reranker, monkeypatch):
    monkeypatch.setattr(scoring, "MAX_PASSAGES", 3)
    texts = [f"passage {index}" for index in range(8)]
    texts[7] += " longer" * 400
    sound = encodings(make_reranker(), texts)
    given = [Passage(text, value) for text, value in zip(texts, sound, strict=True)]
    remote = RemoteReranker(tiny.url)
    first = remote.rank(QUERY, texts)
    assert [len(body["passages"]) for body in tiny.sent("/v1/score")] == [3, 3, 2]
    assert [place.index for place in first] == [place.index for place in make_reranker().rank(QUERY, texts)]
    # With their encodings fewer fit; one that fills a request alone is not offered.
    tiny.requests.clear()
    tiny.reranker = make_reranker()
    monkeypatch.setattr(scoring, "MAX_CHARACTERS", 2 * (len(sound[0]) + 200))
    again = remote.rank(QUERY, given)
    assert [place.index for place in again] == [place.index for place in first]
    assert list(again.reading) == ["stored"] * 8
    requests = [[False] * 3, [True, True], [True], [False] * 3, [True, True], [True], [False], [True], [False]]
    assert sent_encodings(tiny) == requests
    assert tiny.reranker.stats.passages_encoded == 1


def test_machines_that_answer_in_turn_are_told_all_in_the_end(make_reranker):
    """Each of them has another encoding; nobody is asked a fourth time."""
    sound = encodings(make_reranker())
    given = [Passage(text, value) for text, value in zip(TEXTS, sound, strict=True)]
    first, second = make_reranker(), make_reranker()
    first.encode_to_metadata(TEXTS[:2])
    second.encode_to_metadata(TEXTS[2:])
    with serve(first) as service:
        remote = RemoteReranker(service.url)
        remote.warm_up()

        def swap(_):
            service.reranker = second if service.reranker is first else first

        service.instead.extend([lambda _: None, swap, swap])
        assert list(remote.rank(QUERY, given).reading) == ["stored"] * 4
    assert sent_encodings(service) == [[False] * 4, [False, False, True, True], [True] * 4]


def test_fetched_encodings_are_remembered_for_their_origin(tiny, make_reranker):
    sound, origin = encodings(make_reranker()), object()
    remote = RemoteReranker(tiny.url)
    assert remote.read([Passage(TEXTS[0], None, origin)])[0] == "missing"
    remote.rank(QUERY, [Passage(TEXTS[0], sound[0], origin)])
    statuses = {"cached": origin, "missing": object()}
    assert [remote.read([Passage(TEXTS[0], None, other)])[0] for other in statuses.values()] == list(statuses)
    assert remote.read(TEXTS[:1])[0] == "missing"
    tiny.requests.clear()
    remote.rank(QUERY, [Passage(TEXTS[0], None, origin)])
    assert sent_encodings(tiny) == [[False], [True]]
    assert tiny.reranker.stats.passages_encoded == 0
    remote.rank(QUERY, [TEXTS[1]])
    assert remote.read([TEXTS[1]])[0] == "cached"


# --- another model


def test_a_service_that_gets_another_model_is_read_for_anew(make_reranker, other_checkpoint):
    with serve(make_reranker()) as service:
        remote = RemoteReranker(service.url)
        given = [Passage(text, value) for text, value in zip(TEXTS, encodings(service.reranker), strict=True)]
        assert remote.rank(QUERY, given).counts["stored"] == 4
        reading = remote.read(given)
        service.reranker = make_reranker(other_checkpoint)
        assert remote.rank(QUERY, given).counts["stale"] == 4
        assert remote.fingerprint == service.reranker.fingerprint
        with pytest.raises(ServiceError, match="read the passages again"):
            remote.rank(QUERY, reading)
        reading = remote.read(given)
        service.reranker = make_reranker()
        with pytest.raises(ServiceError, match="another one now"):
            remote.rank(QUERY, reading)
        assert remote.rank(QUERY, given).counts["stored"] == 4


def test_a_model_that_changes_while_passages_are_read_is_read_for_anew(fake, monkeypatch):
    """Another thread has heard of it first."""
    remote = RemoteReranker(fake.url)
    read = remote._reader.read

    def read_and_change(passages, facts):
        reading = read(passages, facts)
        monkeypatch.undo()
        fake.reranker = FakeReranker("another")
        remote.warm_up()
        return reading

    monkeypatch.setattr(remote._reader, "read", read_and_change)
    assert remote.rank(QUERY, TEXTS) == FakeReranker().rank(QUERY, TEXTS)
    assert len(fake.sent("/v1/score")) == 1


def test_a_service_that_gets_another_model_all_the_time_is_given_up(fake):
    remote = RemoteReranker(fake.url)

    def change(_):
        fake.reranker = FakeReranker(str(len(fake.requests)))

    fake.instead.extend([change] * 5)
    with pytest.raises(ServiceError, match="another one now"):
        remote.rank(QUERY, TEXTS)


# --- encoding


async def test_encodings_are_those_of_the_reranker_behind_the_service(tiny, make_reranker, monkeypatch, capsys):
    expected = make_reranker().encode_to_metadata(TEXTS)
    remote = RemoteReranker(tiny.url)
    given = [*TEXTS, TEXTS[0], TEXTS[1]]
    assert remote.encode_to_metadata(iter(given), show_progress=True) == [*expected, expected[0], expected[1]]
    assert "Encoding: 100%" in capsys.readouterr().err
    assert [len(body["texts"]) for body in tiny.sent("/v1/encodings")] == [4]
    monkeypatch.setattr(reranker_module, "TEXTS_PER_REQUEST", 3)
    assert await remote.aencode_to_metadata(given) == [*expected, expected[0], expected[1]]
    assert [len(body["texts"]) for body in tiny.sent("/v1/encodings")] == [4, 3, 1]
    assert remote.stats.passages_encoded == 8
    monkeypatch.setattr(reranker_module, "CHARACTERS_PER_REQUEST", 10)
    tiny.requests.clear()
    assert remote.encode_to_metadata(TEXTS) == expected
    assert len(tiny.sent("/v1/encodings")) == 4
    for texts in ("text", [5], 5):
        with pytest.raises(SettingsError):
            remote.encode_to_metadata(texts)


def test_facts(tiny):
    remote = RemoteReranker(tiny.url)
    assert remote.model_name == remote.url == tiny.url
    assert remote.flush()
    assert (remote.fingerprint, remote.compression_ratio, remote.storage_codec) == (tiny.reranker.fingerprint, 4, "fp32")
    assert remote.model_name == "tiny"
    assert len(tiny.requests) == 1
    remote.warm_up(encoder=False)
    remote.get_ready(5)
    assert len(tiny.requests) == 2


# --- threads, loops, processes


def test_threads_share_a_reranker(fake):
    remote = RemoteReranker(fake.url)
    expected = FakeReranker().rank(QUERY, TEXTS)
    with ThreadPoolExecutor(8) as pool:
        assert all(ranking == expected for ranking in pool.map(lambda _: remote.rank(QUERY, TEXTS), range(40)))
    assert remote.stats.passages_scored == 160


def test_each_event_loop_has_connections_that_end_with_it(fake):
    remote = RemoteReranker(fake.url)
    expected = FakeReranker().rank(QUERY, TEXTS)

    async def use():
        both = await asyncio.gather(remote.arank(QUERY, TEXTS), remote.arank(QUERY, TEXTS))
        assert both == [expected, expected]
        return await remote._connections._async()

    clients = [asyncio.run(use()) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        clients += pool.map(lambda _: asyncio.run(use()), range(3))
    assert len(set(clients)) == 6
    assert all(client.is_closed for client in clients)
    assert all(loop.is_closed() for loop in remote._connections._of_loops)
    assert len(remote._connections._of_loops) <= 3
    loop = asyncio.new_event_loop()
    client = loop.run_until_complete(use())
    loop.run_until_complete(loop.shutdown_asyncgens())
    assert client.is_closed
    assert loop.run_until_complete(remote.arank(QUERY, TEXTS)) == expected
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def test_a_connection_is_used_again(fake):
    ports = set()

    def note(handler):
        ports.add(handler.client_address)

    remote = RemoteReranker(fake.url)
    fake.instead.extend([note] * 8)
    for _ in range(4):
        remote.rank(QUERY, TEXTS)
    assert len(ports) == 1

    async def use():
        for _ in range(3):
            await remote.arank(QUERY, TEXTS)

    asyncio.run(use())
    assert len(ports) == 2


def test_a_cancelled_coroutine_hangs_up(fake):
    asked, gone = threading.Event(), threading.Event()

    def hang(handler):
        asked.set()
        assert handler.rfile.read(1) == b""
        gone.set()
        return (0, {}, b"")

    remote = RemoteReranker(fake.url)
    remote.warm_up()
    fake.instead.append(hang)

    async def use():
        task = asyncio.ensure_future(remote.arank(QUERY, TEXTS))
        await asyncio.to_thread(asked.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(gone.wait, 10)

    asyncio.run(use())
    assert gone.is_set()
    assert remote.rank(QUERY, TEXTS) == FakeReranker().rank(QUERY, TEXTS)


def _in_child(remote, queue):
    queue.put((remote.score(QUERY, TEXTS), asyncio.run(remote.ascore(QUERY, TEXTS))))


def test_a_child_process_connects_for_itself(fake):
    remote = RemoteReranker(fake.url)
    expected = remote.score(QUERY, TEXTS)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(remote, queue))
    child.start()
    assert queue.get(timeout=30) == (expected, expected)
    child.join(30)
    assert child.exitcode == 0
    assert remote.score(QUERY, TEXTS) == expected


def test_copies_and_pickles(fake, monkeypatch):
    remote = RemoteReranker(fake.url, api_key="hunter2", timeout=7, max_retries=2)
    assert copy.copy(remote) is copy.deepcopy(remote) is remote
    pickled = pickle.dumps(remote)
    assert b"hunter2" not in pickled
    again = pickle.loads(pickled)
    assert (again.url, again._to.timeout, again._to.max_retries) == (fake.url, 7, 2)
    assert again._to.client != remote._to.client
    fake.key = "hunter3"
    monkeypatch.setenv("KALM_API_KEY", "hunter3")
    assert pickle.loads(pickled).rank(QUERY, TEXTS)[0].index == 2
    with pytest.raises(SettingsError, match="no transport"):
        pickle.dumps(RemoteReranker(fake.url, transport=httpx.MockTransport(as_json)))


def test_encodings_of_the_service_are_read_by_everybody(tiny, make_reranker):
    [metadata] = RemoteReranker(tiny.url).encode_to_metadata(TEXTS[:1])
    assert EncodedPassage.from_metadata(metadata["kalm_encoding"]).fingerprint == make_reranker().fingerprint
