"""What the page is sent: its files, and rankings with all that is known of them."""

from __future__ import annotations

import re

import pytest

from kalm_integrations import KalmReranker
from kalm_integrations.core.settings import CODEC_NAMES
from kalm_integrations.serving.ui.routes import FILES, OPEN_PATHS
from kalm_integrations.serving.ui.variants import MAX_VARIANTS
from kalm_integrations.testing import FakeReranker

QUERY = "what do otters eat?"
TEXTS = ["The Rhine rises in the Alps.", "Otters live on fish and crabs.", "Otters swim.", "Crabs are boiled."]


def rank(client, *, texts=TEXTS, encodings=None, **body):
    passages = [{"text": text} for text in texts]
    for passage, encoding in zip(passages, encodings or [], strict=False):
        passage["encoding"] = encoding
    response = client.post("/ui/rank", json={"query": QUERY, "passages": passages, **body})
    assert response.status_code == 200, response.text
    return response.json()


# --- files


def test_a_service_has_no_page_unless_it_is_told_to(make_client):
    client = make_client()
    for path in ("/", "/ui", "/ui/", "/ui/page.js", "/ui/facts"):
        assert client.get(path).status_code == 404


def test_the_page_and_all_that_it_names_are_there(make_page):
    client = make_page()
    assert client.get("/").url == client.get("/ui").url == "http://localhost/ui/"
    page = client.get("/ui/").text
    named = re.findall(r'(?:src|href)="([\w.]+)"', page)
    assert {f"/ui/{name}" for name in named} <= FILES.keys()
    scripts = [client.get(path) for path in FILES if path.endswith(".js")]
    imported = {name for script in scripts for name in re.findall(r'from "\./([\w.]+)"', script.text)}
    assert {f"/ui/{name}" for name in imported} | {"/ui/page.js"} == {path for path in FILES if path.endswith(".js")}
    assert all(script.headers["content-type"] == "text/javascript; charset=utf-8" for script in scripts)


def test_files_name_nothing_elsewhere_and_nothing_inline(make_page):
    client = make_page()
    for path in FILES:
        answer = client.get(path)
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", answer.text)
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(| style=| on[a-z]+=", answer.text)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_not_in_the_description(make_page):
    paths = make_page().get("/openapi.json").json()["paths"]
    assert "/v2/rerank" in paths
    assert not [path for path in paths if path.startswith("/ui")]


# --- facts


def test_facts(make_page, make_collection):
    client = make_page(make_collection(TEXTS, 2), model="pico", model_settings={"compression_ratio": 5}, max_documents=50)
    facts = client.get("/ui/facts").json()
    assert (facts["model"], facts["max_documents"]) == ("pico", 50)
    assert (facts["ratio"], facts["codec"]) == (5, "rot4")
    assert facts["ratios"] == [1, 2, 4, 5, 8, 16, 32]
    assert facts["codecs"] == list(CODEC_NAMES)
    assert facts["collection"] == {"name": "p.jsonl", "n_passages": 4, "limit": 2, "first_stage": "BM25"}


def test_a_reranker_without_settings_of_encodings_offers_none(make_page):
    client = make_page()
    facts = client.get("/ui/facts").json()
    assert (facts["ratio"], facts["codec"], facts["ratios"], facts["codecs"]) == (None, None, [], [])
    assert facts["collection"] is None
    answer = rank(client)
    assert (answer["ratio"], answer["codec"]) == (None, None)
    right = {passage.index: passage.margin for passage in FakeReranker().rank(QUERY, TEXTS)}
    assert [passage["margin"] for passage in answer["passages"]] == [right[index] for index in range(4)]


# --- rankings


def test_ranks_and_scores_are_those_of_rank(make_page, pico):
    answer = rank(make_page(model="pico"))
    for place, right in enumerate(pico.rank(QUERY, TEXTS), 1):
        found = answer["passages"][right.index]
        assert (found["rank"], found["text"], found["name"]) == (place, right.text, None)
        assert found["score"] == pytest.approx(right.score, abs=1e-6)
        assert found["margin"] == pytest.approx(right.margin, abs=1e-4)
    assert answer["first_stage"] is None
    assert answer["seconds"].keys() == {"encode", "score", "total"}
    assert answer["seconds"]["encode"] > 0
    assert answer["seconds"]["score"] > 0


def test_an_instruction_is_heeded(make_page, pico):
    answer = rank(make_page(model="pico"), instruction="Find rivers.")
    scores = [passage["score"] for passage in answer["passages"]]
    assert scores == pytest.approx(pico.score(QUERY, TEXTS, instruction="Find rivers."), abs=1e-6)
    assert scores != pytest.approx(pico.score(QUERY, TEXTS), abs=1e-3)


def test_bytes_are_those_of_the_strings_to_store(make_page, pico):
    answer = rank(make_page(model="pico"))
    lengths = [encoding.metadata_length() for encoding in pico.encode_passages(TEXTS)]
    assert [passage["n_bytes"] for passage in answer["passages"]] == lengths
    assert [passage["n_text_bytes"] for passage in answer["passages"]] == [len(text) for text in TEXTS]


def test_statuses_say_what_was_found(make_page, pico):
    client = make_page(model="pico")
    stored = [row["kalm_encoding"] for row in pico.encode_to_metadata(TEXTS)]
    answer = rank(client, encodings=[stored[0], "kalm1.damaged", stored[1]])
    assert [passage["status"] for passage in answer["passages"]] == ["stored", "corrupt", "stale", "missing"]
    assert answer["passages"][0]["n_bytes"] == len(stored[0])
    assert [passage["status"] for passage in rank(client)["passages"]][1:] == ["cached"] * 3


def test_other_settings_make_other_encodings(make_page, pico):
    client = make_page(model="pico")
    stored = [row["kalm_encoding"] for row in pico.encode_to_metadata(TEXTS)]
    for ratio, codec in ((16, "rot4"), (4, "fp32"), (1, "int8")):
        other = KalmReranker.from_pretrained("pico", compression_ratio=ratio, storage_codec=codec)
        # What came with the passages has the service's own setting, and would be scored as it is.
        answer = rank(client, ratio=ratio, codec=codec, encodings=stored)
        assert (answer["ratio"], answer["codec"]) == (ratio, codec)
        assert [passage["score"] for passage in answer["passages"]] == pytest.approx(other.score(QUERY, TEXTS), abs=1e-6)
        lengths = [encoding.metadata_length() for encoding in other.encode_passages(TEXTS)]
        assert [passage["n_bytes"] for passage in answer["passages"]] == lengths
        assert {passage["status"] for passage in answer["passages"]} == {"missing"}
        assert {passage["status"] for passage in rank(client, ratio=ratio, codec=codec)["passages"]} == {"cached"}


def test_settings_that_were_not_asked_for_for_long_are_forgotten(make_page):
    client = make_page(model="pico")
    ratios = [1, 2, 8, 16, 32]
    for codec in ("fp32", "fp16"):
        for ratio in ratios:
            rank(client, ratio=ratio, codec=codec)
    settings = [(ratio, codec) for codec in ("fp16", "fp32") for ratio in reversed(ratios)]
    kept = [rank(client, ratio=ratio, codec=codec)["passages"][0]["status"] for ratio, codec in settings[:MAX_VARIANTS]]
    assert kept == ["cached"] * MAX_VARIANTS
    assert rank(client, ratio=1, codec="fp32")["passages"][0]["status"] == "missing"


def test_what_is_tried_out_is_not_put_into_the_store(make_page, tmp_path):
    client = make_page(model="pico", store=str(tmp_path / "store"))
    rank(client)
    rank(client, ratio=16)
    with client:
        pass  # what is to be stored has been written
    stored = KalmReranker.from_pretrained("pico", payload_store=tmp_path / "store")
    assert list(stored.read(TEXTS)) == ["found"] * len(TEXTS)
    coarse = KalmReranker.from_pretrained("pico", payload_store=tmp_path / "store", compression_ratio=16, storage_codec="int8")
    assert list(coarse.read(TEXTS)) == ["missing"] * len(TEXTS)


def test_the_collection_is_asked_where_no_passages_are_sent(make_page, make_collection):
    client = make_page(make_collection([{"_id": f"p{n}", "text": text} for n, text in enumerate(TEXTS)], 2))
    answer = rank(client, passages=None)
    assert answer["first_stage"] == "BM25"
    assert [passage["name"] for passage in answer["passages"]] == ["p2", "p1"]
    assert [passage["text"] for passage in rank(client, texts=["otters"])["passages"]] == ["otters"]


def test_the_best_window_of_a_long_passage(make_page):
    """Places count code points of what is shown, and sentences lie in it."""
    settings = {"long_passages": "windows", "max_passage_tokens": 64}
    texts = [*TEXTS, "\U0001f9a6 The Rhine rises in the Alps and flows north. " * 12 + TEXTS[1]]
    answer = rank(make_page(model="pico", model_settings=settings), texts=texts, spans=len(texts))
    places = {ranked.index: ranked.window for ranked in KalmReranker.from_pretrained("pico", **settings).rank(QUERY, texts)}
    *short, long = answer["passages"]
    assert [passage["window"] for passage in short] == [None] * len(TEXTS)
    assert tuple(long["window"]) == places[len(TEXTS)]
    start, end = long["window"]
    assert texts[-1][start:end].endswith(TEXTS[1])
    assert all(start <= span["start"] < span["end"] <= end for span in long["spans"])


def test_sentences_of_the_best_come_with_their_scores(make_page, pico):
    answer = rank(make_page(model="pico"), spans=2)
    for right in pico.rank(QUERY, TEXTS, spans=2):
        found = answer["passages"][right.index]["spans"]
        if right.spans is None:
            assert found is None
            continue
        spans = sorted(right.spans, key=lambda span: span.start)
        assert [(span["start"], span["end"]) for span in found] == [(span.start, span.end) for span in spans]
        assert [span["score"] for span in found] == pytest.approx([span.score for span in spans], abs=1e-6)


def test_half_surrogates_are_answered(make_page):
    answer = make_page().post(
        "/ui/rank",
        content=b'{"query": "otters", "passages": [{"text": "otters \\ud800"}]}',
        headers={"content-type": "application/json"},
    )
    assert answer.json()["passages"][0]["text"] == "otters ?"


# --- refusals


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"query": " "}, 422, "query: must hold a word at least"),
        ({"passages": None}, 422, "passages must be given"),
        ({"passages": [{"text": "a"}] * 6}, 413, "at most 5 texts, but holds 6"),
        ({"passages": [{"text": 1}]}, 422, "passages.0.text"),
        ({"spans": 0}, 422, "spans: Input should be greater than or equal to 1"),
        ({"ratio": 3}, 422, "ratio must be one of [1, 2, 4, 8, 16, 32]"),
        ({"codec": "int4"}, 422, "codec one of ['fp32'"),
    ],
)
def test_what_is_wrong_is_said(make_page, body, status, message):
    client = make_page(model="pico", max_documents=5)
    given = {"query": QUERY, "passages": [{"text": "a"}], **body}
    answer = client.post("/ui/rank", json=given)
    assert (answer.status_code, list(answer.json())) == (status, ["detail"])
    assert message in answer.json()["detail"]


def test_a_key_guards_all_but_the_files(make_page, make_collection, key):
    client = make_page(make_collection(TEXTS), api_key_env="KALM_TEST_KEY", address="http://gpu-box")
    for path in OPEN_PATHS:
        assert client.get(path).status_code == 200
    body = {"query": QUERY}
    assert client.get("/ui/facts").status_code == client.post("/ui/rank", json=body).status_code == 401
    headers = {"authorization": f"Bearer {key}"}
    assert client.get("/ui/facts", headers=headers).status_code == 200
    assert client.post("/ui/rank", json=body, headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:80", "LOCALHOST", "127.0.0.1:8080", "[::1]:8080", "192.168.1.7"])
def test_own_addresses_pass(make_page, host):
    assert make_page().get("/ui/facts", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", ""])
def test_a_name_that_may_be_a_site_s_is_refused_without_a_key(make_page, host):
    """The page of a site whose name leads to this machine may not read what is asked here."""
    client = make_page()
    for answer in (client.get("/ui/facts", headers={"host": host}), client.post("/ui/rank", json={}, headers={"host": host})):
        assert answer.status_code == 403
        assert "Host must be localhost or an address in numbers" in answer.json()["detail"]


@pytest.mark.parametrize("origin", ["http://evil.example", "http://localhost:81", "null", "http://localhost.evil.example"])
def test_another_origin_is_refused(make_page, origin):
    body = {"query": QUERY, "passages": [{"text": "a"}]}
    answer = make_page().post("/ui/rank", json=body, headers={"origin": origin})
    assert answer.status_code == 403
    assert "Origin must be" in answer.json()["detail"]
    assert make_page().post("/ui/rank", json=body, headers={"origin": "http://localhost"}).status_code == 200


def test_requests_of_the_page_are_counted_by_their_path(make_page):
    client = make_page()
    rank(client)
    assert 'kalm_requests_total{endpoint="/ui/rank",status="200"} 1.0' in client.get("/metrics").text
