"""Documents that are longer than a passage may be: read in windows, unless a client or the service has them cut."""

from __future__ import annotations

import threading

import cohere
import httpx
import pytest
from haystack import Document
from haystack.utils import Secret
from haystack_integrations.components.rankers.cohere import CohereRanker
from haystack_integrations.components.rankers.vllm import VLLMRanker
from pydantic import BaseModel
from tools.holding import Held
from tools.services import kalm_serve, number
from tools.waiting import until

from kalm_integrations import KalmReranker
from kalm_integrations.remote.protocol import ScoreAnswer, ServiceFacts

LIMIT = 64
WINDOWS = {"max_passage_tokens": LIMIT, "max_windows": 8}
CUT = {"max_passage_tokens": LIMIT, "long_passages": "cut"}

QUERY = "What do otters eat?"
ANSWER = "Otters live on fish, crabs and frogs."
OTHER = "The Rhine rises in the Swiss Alps and flows north. " * 12
LATE = OTHER + ANSWER
TEXTS = [OTHER, "Denver won Super Bowl 50.", LATE]
PATHS = ["/v2/rerank", "/v1/rerank", "/rerank"]


@pytest.fixture(scope="module")
def model() -> KalmReranker:
    """Keeps the weights, which all rerankers of this module share."""
    model = KalmReranker.from_pretrained("pico", **WINDOWS)
    model.warm_up()
    return model


@pytest.fixture
def client(make_client, model):
    return make_client(KalmReranker.from_pretrained("pico", **WINDOWS))


def ask(client, path="/v2/rerank", documents=TEXTS, **body):
    response = client.post(path, json={"query": QUERY, "documents": documents, **body})
    assert response.status_code == 200, response.text
    return {result["index"]: result for result in response.json()["results"]}


def scores(results):
    return [results[index]["relevance_score"] for index in range(len(results))]


def metric(client, name):
    return sum(float(line.split()[1]) for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} "))


# --- what is read


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_behind_the_limit_is_found_in_windows(make_client, client, path):
    assert next(iter(ask(client, path))) == 2
    cutting = make_client(KalmReranker.from_pretrained("pico", **CUT))
    found = ask(cutting, path)
    assert next(iter(found)) != 2
    assert found[2]["relevance_score"] < 0.1 < ask(client, path)[2]["relevance_score"]


def test_numbers_of_long_documents(client):
    ask(client)
    ask(client)
    assert metric(client, "kalm_passages_windowed_total") == 2
    assert metric(client, "kalm_passages_truncated_total") == 0
    assert metric(client, "kalm_passages_encoded_total") == 3
    ask(client, documents=[OTHER * 8])
    assert metric(client, "kalm_passages_truncated_total") == 1


def test_tei_reads_them_and_says_how_much(make_client, client):
    answer = client.post("/rerank", json={"query": QUERY, "texts": TEXTS, "truncate": False}).json()
    assert answer[0]["index"] == 2
    assert client.get("/info").json()["max_input_length"] == 8 * LIMIT
    assert make_client(KalmReranker.from_pretrained("pico", **CUT)).get("/info").json()["max_input_length"] == LIMIT


def test_relevant_spans_lie_in_the_best_window(client, model):
    [place] = model.rank(QUERY, [LATE], spans=1)
    start, end = place.window
    assert 0 < start < LATE.index(ANSWER)
    assert end == len(LATE)
    results = ask(client, documents=[LATE], relevant_spans={"mode": "enabled", "threshold": 0})
    spans = results[0]["relevant_spans"]
    assert [(span["start"], span["end"]) for span in spans] == [(span.start, span.end) for span in place.spans]
    assert all(start <= span["start"] < span["end"] <= end for span in spans)
    assert LATE[spans[0]["start"] : spans[0]["end"]] == ANSWER
    assert set(results[0]) == {"index", "relevance_score", "relevant_spans"}, "the formats have no field for windows"


# --- max_tokens_per_doc


@pytest.mark.parametrize("path", PATHS)
def test_documents_are_cut_before_they_are_read_in_windows(client, model, path):
    for n_tokens in (5, LIMIT, LIMIT + 40):
        cut = model.truncate(TEXTS, n_tokens)
        assert len(cut[2]) < len(LATE)
        assert scores(ask(client, path, max_tokens_per_doc=n_tokens)) == pytest.approx(model.score(QUERY, cut), abs=1e-6)
    assert len(model.encode_passages(model.truncate([LATE], LIMIT + 40))[0].windows) == 2
    # As much as the model reads, or more, cuts nothing.
    for n_tokens in (8 * LIMIT - 1, 8 * LIMIT, 4096):
        assert next(iter(ask(client, path, max_tokens_per_doc=n_tokens))) == 2
    long = OTHER * 8 + ANSWER
    for n_tokens, wanted in ((8 * LIMIT, long), (8 * LIMIT - 1, model.truncate([long], 8 * LIMIT - 1)[0])):
        found = scores(ask(client, path, [long], max_tokens_per_doc=n_tokens))
        assert found == pytest.approx(model.score(QUERY, [wanted]), abs=1e-6)


def test_clients_that_limit_documents(serve, model):
    url = serve(KalmReranker.from_pretrained("pico", **WINDOWS), model_names=("rerank-v3.5",))
    in_windows, cut = model.score(QUERY, TEXTS), model.score(QUERY, model.truncate(TEXTS, LIMIT + 40))
    assert in_windows.index(max(in_windows)) == 2 != cut.index(max(cut))
    sdk = cohere.ClientV2("none", base_url=url)
    for limit, wanted in ((4096, in_windows), (LIMIT + 40, cut)):
        results = sdk.rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS, max_tokens_per_doc=limit).results
        assert {result.index: result.relevance_score for result in results} == pytest.approx(dict(enumerate(wanted)), abs=1e-6)
    key, documents = Secret.from_token("none"), [Document(content=text) for text in TEXTS]
    rankers = [
        # Cohere's component says 4,096 unless it is told something else.
        (CohereRanker(api_base_url=url, api_key=key, model="rerank-v3.5"), in_windows),
        (CohereRanker(api_base_url=url, api_key=key, model="rerank-v3.5", max_tokens_per_doc=LIMIT + 40), cut),
        (VLLMRanker(model="rerank-v3.5", api_base_url=f"{url}/v1", api_key=key), in_windows),
        (
            VLLMRanker(
                model="rerank-v3.5",
                api_base_url=f"{url}/v1",
                api_key=key,
                extra_parameters={"max_tokens_per_doc": LIMIT + 40},
            ),
            cut,
        ),
    ]
    for ranker, wanted in rankers:
        found = {document.content: document.score for document in ranker.run(query=QUERY, documents=documents)["documents"]}
        assert found == pytest.approx(dict(zip(TEXTS, wanted, strict=True)), abs=1e-6)


# --- limits


def test_windows_that_are_more_than_may_wait_are_refused(serve, model):
    reranker = KalmReranker.from_pretrained("pico", **WINDOWS, max_queued_pairs=4)
    url = serve(reranker, timeout=60)
    answers: list[httpx.Response] = []

    def encode(text):
        return httpx.post(f"{url}/v1/encodings", json={"texts": [text]}, timeout=60)

    first = threading.Thread(target=lambda: answers.append(encode(LATE)))
    with Held(reranker):
        first.start()
        until(lambda: number(url, "kalm_queue_items") == 1 + 3)  # what holds the model, and the windows of a text
        refused = encode(f"{OTHER}{ANSWER} Really.")
        assert refused.status_code == 429
        assert "max_queued_pairs=4 may wait for a model, but 3 wait and 3 more were asked for" in refused.json()["detail"]
        assert refused.headers["retry-after"] == "1"
    first.join()
    assert answers[0].json()["encodings"] == model.encode_to_metadata([LATE])
    # Alone a document has the room, however many windows it has.
    huge = OTHER * 8
    answer = httpx.post(f"{url}/v2/rerank", json={"query": QUERY, "documents": [huge]}, timeout=60)
    assert answer.json()["results"][0]["relevance_score"] == pytest.approx(model.score(QUERY, [huge])[0], abs=1e-6)


def test_many_long_documents_at_once_are_answered_or_refused(serve, model):
    url = serve(KalmReranker.from_pretrained("pico", **WINDOWS, max_queued_pairs=20))
    found: list[int] = []

    def post(n):
        documents = [f"{n}. {LATE}", f"{n}. {OTHER}"]
        found.append(httpx.post(f"{url}/v2/rerank", json={"query": QUERY, "documents": documents}, timeout=60).status_code)

    threads = [threading.Thread(target=post, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) <= {200, 429}
    assert 200 in found
    until(lambda: number(url, "kalm_queue_items") == 0)


def test_a_huge_document_is_read_up_to_the_last_window(make_client, model):
    client = make_client(KalmReranker.from_pretrained("pico", max_passage_tokens=LIMIT, max_windows=3))
    huge = "x" * 1_000_000
    assert len(ask(client, documents=[huge, f"{ANSWER} {OTHER * 2000}"], max_tokens_per_doc=100_000)) == 2
    assert metric(client, "kalm_passages_truncated_total") == 2


# --- our own clients


def test_a_service_says_how_it_reads_long_passages(make_client, client, model):
    facts = ServiceFacts.model_validate_json(client.get("/v1/kalm").content)
    assert (facts.fingerprints, facts.max_passage_tokens) == (model.fingerprints, LIMIT)
    body = {"query": QUERY, "passages": [{"text": text} for text in TEXTS]}
    answer = ScoreAnswer.model_validate_json(client.post("/v1/score", json=body).content)
    by_index = {place.index: place.window for place in model.rank(QUERY, TEXTS)}
    assert answer.fingerprints == model.fingerprints
    assert answer.windows == [by_index[0], None, by_index[2]]
    short = {"query": QUERY, "passages": [{"text": ANSWER}]}
    assert client.post("/v1/score", json=short).json()["windows"] == []
    for other in (make_client(KalmReranker.from_pretrained("pico", **CUT)), make_client()):
        facts = ServiceFacts.model_validate_json(other.get("/v1/kalm").content)
        assert facts.windows_fingerprint is None
        answer = ScoreAnswer.model_validate_json(other.post("/v1/score", json=body).content)
        assert (answer.fingerprints, answer.windows) == (facts.fingerprints, [])


def test_encodings_carry_the_fingerprint_of_how_they_were_read(client, model):
    made = client.post("/v1/encodings", json={"texts": TEXTS}).json()["encodings"]
    assert made == model.encode_to_metadata(TEXTS)
    own, windows = model.fingerprints
    assert [metadata["kalm_fp"] for metadata in made] == [windows, own, windows]


class OldAnswer(BaseModel):
    """What clients from before windows read of an answer."""

    fingerprint: str
    margins: list[float]
    scores: list[float]
    statuses: list[str]
    wanted: list[int]


def test_a_client_from_before_windows_is_answered(client, model):
    """It sends what it takes for valid, and is told that this was cut."""
    cut = KalmReranker.from_pretrained("pico", **CUT).encode_to_metadata(TEXTS)
    held = [{"text": text, "held": str(index)} for index, text in enumerate(TEXTS)]
    first = OldAnswer.model_validate_json(client.post("/v1/score", json={"query": QUERY, "passages": held}).content)
    assert (first.fingerprint, first.wanted) == (model.fingerprint, [0, 1, 2])
    sent = [{**passage, "encoding": metadata["kalm_encoding"]} for passage, metadata in zip(held, cut, strict=True)]
    answer = OldAnswer.model_validate_json(client.post("/v1/score", json={"query": QUERY, "passages": sent}).content)
    assert answer.statuses == ["stale", "stored", "stale"]
    assert answer.scores == pytest.approx(model.score(QUERY, TEXTS), abs=1e-6)


def test_options_of_the_command(tmp_path):
    arguments = ("--max-passage-tokens", LIMIT, "--max-windows", 8)
    for mode, expected in ((("--long-passages", "cut"), CUT), ((), WINDOWS)):
        local = KalmReranker.from_pretrained("pico", **expected)
        with kalm_serve(tmp_path, *arguments, *mode) as running:
            facts = ServiceFacts.model_validate_json(httpx.get(f"{running.url}/v1/kalm").content)
            assert facts.fingerprints == local.fingerprints
            assert httpx.get(f"{running.url}/info").json()["max_input_length"] == local.max_tokens_read
            running.process.terminate()
            running.process.wait(60)
