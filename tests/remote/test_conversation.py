"""What a client does about a service that is busy, late, gone, or none: time, retries and errors."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
import time
from email.utils import formatdate

import httpx
import pytest
from tools.spans import recording
from tools.stub_service import as_json, refusal

from kalm_integrations import RemoteReranker
from kalm_integrations.errors import DeadlineExceededError, QueueFullError, ServiceError, SettingsError
from kalm_integrations.remote import conversation
from kalm_integrations.remote.address import check_address, check_key

QUERY, TEXTS = "who won?", ["Denver won.", "Lift and drag."]
HANG_UP = (0, {}, b"")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(conversation, "FIRST_PAUSE", 0.001)
    monkeypatch.delenv("KALM_API_KEY", raising=False)


@pytest.fixture(params=["threads", "coroutines"])
def rank(request):
    """Ranks, by either of the two ways."""

    def rank(reranker, **settings):
        if request.param == "threads":
            return reranker.rank(QUERY, TEXTS, **settings)
        return asyncio.run(reranker.arank(QUERY, TEXTS, **settings))

    return rank


# --- errors


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, SettingsError, "API key,.*401: no.*KALM_API_KEY"),
        (403, SettingsError, "API key"),
        (404, SettingsError, "404: no"),
        (413, SettingsError, "too large.*413: no.*proxy"),
        (422, SettingsError, "422: no"),
        (429, QueueFullError, "429: no"),
        (500, ServiceError, "kalm serve.*status 500"),
        (302, ServiceError, "status 302"),
        (503, ServiceError, "ready.*503: no"),
        (504, DeadlineExceededError, "504: no"),
    ],
)
def test_a_status_is_one_of_our_errors_with_what_the_service_says(fake, rank, status, kind, message):
    fake.instead.extend([refusal(status)] * 4)
    with pytest.raises(kind, match=message):
        rank(RemoteReranker(fake.url))
    assert len(fake.requests) == (4 if status in (429, 503) else 1)


def test_details_in_the_form_of_the_framework_are_made_a_line(fake):
    fake.instead.append(refusal(422, [{"loc": ["body", "query"], "msg": "too\n long"}, {"loc": ["x"], "msg": "y"}]))
    with pytest.raises(SettingsError, match=r"422: body\.query: too long; x: y"):
        RemoteReranker(fake.url).warm_up()
    fake.instead.append(refusal(422, "long " * 1000))
    with pytest.raises(SettingsError) as caught:
        RemoteReranker(fake.url).warm_up()
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>Welcome to nginx</html>", "text/html"),
        (b"", "sent 0 bytes"),
        (b"[1]", "text/html"),
        (b'{"fingerprint": "f"}', "model"),
        (b"{" * 100_000, "text/html"),
        (b'{"x": "' + b"y" * 2**20 + b'"}', "more than 1048576 bytes"),
    ],
    ids=["html", "empty", "list", "too little", "nested", "huge"],
)
def test_what_is_no_answer_is_an_error_that_says_what_came(fake, rank, body, message):
    fake.instead.append(lambda _: (200, {"content-type": "text/html; charset=x"}, body))
    with pytest.raises(ServiceError, match=message):
        rank(RemoteReranker(fake.url))


@pytest.mark.parametrize(
    "changed",
    [
        {"margins": [1.0]},
        {"margins": [1.0, math.nan]},
        {"margins": [1.0, math.inf]},
        {"margins": [1.0, None]},
        {"scores": [0.5, 1.5]},
        {"statuses": ["missing", "lost"]},
        {"wanted": [0]},
        {"wanted": [-1]},
    ],
    ids=repr,
)
def test_scores_that_are_none_are_refused(fake, changed):
    remote = RemoteReranker(fake.url)
    remote.warm_up()
    sound = {"margins": [1.0, 2.0], "scores": [0.7, 0.8], "statuses": ["missing", "missing"]}
    answer = {"fingerprint": remote.fingerprint, **sound}
    fake.instead.extend([lambda _: as_json(answer), lambda _: as_json({**answer, **changed})])
    assert [place.margin for place in remote.rank(QUERY, TEXTS)] == [2.0, 1.0]
    with pytest.raises(ServiceError, match="kalm serve"):
        remote.rank(QUERY, TEXTS)


def test_encodings_that_are_none_are_refused(fake):
    remote = RemoteReranker(fake.url)
    for encodings in ([], [{"kalm_encoding": "kalm1.x"}], [{"kalm_encoding": 1, "kalm_fp": "f"}], None):
        answer = {"model": "m", "fingerprint": "f", "encodings": encodings}
        fake.instead.append(lambda _, answer=answer: as_json(answer))
        with pytest.raises(ServiceError, match="kalm serve"):
            remote.encode_to_metadata(["one"])


def test_a_newer_service_may_say_more(fake):
    facts = {"model": "m", "fingerprint": "f", "compression_ratio": 4, "storage_codec": "rot4", "version": "9", "new": 1}
    fake.instead.append(lambda _: as_json(facts))
    assert RemoteReranker(fake.url).storage_codec == "rot4"


# --- retries


def test_what_may_pass_is_asked_again(fake, rank):
    fake.instead.extend([refusal(503), lambda _: HANG_UP, lambda _: None, refusal(429), lambda _: HANG_UP])
    remote = RemoteReranker(fake.url)
    assert [place.index for place in rank(remote)] == [0, 1]
    assert len(fake.requests) == 6
    assert remote.stats.passages_scored == 2


def test_a_server_that_died_behind_its_proxy_is_asked_again(fake, rank):
    """Ray's proxy and nginx say so in words of their own; an error of the service itself has a detail, and stays one."""
    fake.instead.extend([lambda _: (500, {}, b"Internal Server Error"), lambda _: (502, {}, b"<html>Bad Gateway</html>")])
    assert [place.index for place in rank(RemoteReranker(fake.url))] == [0, 1]
    fake.instead.extend([lambda _: (502, {}, b"")] * 2)
    with pytest.raises(ServiceError, match="sent status 502"):
        rank(RemoteReranker(fake.url, max_retries=1))


def test_nobody_there_is_said_with_the_address(rank):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServiceError, match=rf"{url} must be reached, but ConnectError"):
            rank(RemoteReranker(url, max_retries=1))


def test_retry_after_is_kept_to_as_seconds_or_as_a_date():
    def pause(header, seconds=None):
        reply = conversation.Reply(429, "", header, b"")
        return conversation._pause(reply, 0, conversation.Deadline.after(seconds))

    assert pause("7") == 7
    assert 8 < pause(formatdate(time.time() + 10, usegmt=True)) <= 10
    assert pause("100000") == conversation.LONGEST_WISH
    assert pause("100", 1000) == 100
    for odd in ("", "-5", "soon", "nan", "inf", "٣", formatdate(0), "Wed, 99 Nov 99999 99:99:99 GMT"):
        assert 0 < pause(odd) <= conversation.FIRST_PAUSE


def test_nothing_is_waited_for_past_the_deadline(fake, rank):
    """The wish to be left alone for an hour is an answer at once, and says why."""
    fake.instead.extend([lambda _: None, refusal(429, Retry_After="3600")])
    with pytest.raises(DeadlineExceededError, match=r"timeout=60") as caught:
        rank(RemoteReranker(fake.url), timeout=60)
    assert isinstance(caught.value.__cause__, QueueFullError)
    assert len(fake.requests) == 2


# --- time


@pytest.mark.parametrize("when", ["silent", "halfway"])
def test_a_service_that_hangs_is_late_and_is_hung_up_on(fake, rank, when):
    gone = threading.Event()

    def hang(handler):
        if when == "halfway":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
        assert handler.rfile.read(1) == b""  # comes back when the client closes the connection
        gone.set()
        return HANG_UP

    remote = RemoteReranker(fake.url)
    remote.warm_up()
    fake.instead.append(hang)
    with pytest.raises(DeadlineExceededError, match=r"timeout=0\.5"):
        rank(remote, timeout=0.5)
    assert gone.wait(10)
    assert len(fake.requests) == 2


def test_a_service_that_drips_is_late_too(fake):
    def drip(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        for _ in range(10_000):
            handler.wfile.write(b" ")
            time.sleep(0.01)

    fake.instead.append(drip)
    with pytest.raises(DeadlineExceededError):
        RemoteReranker(fake.url).rank(QUERY, TEXTS, timeout=0.3)


def test_calls_without_a_time_out_have_that_of_the_reranker(fake, rank):
    fake.instead.append(lambda handler: (handler.rfile.read(1) and None) or HANG_UP)
    with pytest.raises(DeadlineExceededError, match=r"timeout=0\.2"):
        rank(RemoteReranker(fake.url, timeout=0.2))


def test_a_mistake_of_the_service_is_borne_with_keep_order_and_one_of_ours_is_not(fake, rank):
    fake.instead.append(refusal(500))
    ranking = rank(RemoteReranker(fake.url), on_error="keep_order")
    assert not ranking.reranked
    assert [place.text for place in ranking] == TEXTS
    fake.instead.append(refusal(401))
    with pytest.raises(SettingsError):
        rank(RemoteReranker(fake.url), on_error="keep_order")


# --- addresses and keys


@pytest.mark.parametrize("url", ["http://localhost:8000", "HTTPS://rerank.example/kalm/", "http://[::1]:80"])
def test_addresses(url):
    assert check_address(url) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host",
        "http://",
        "http://:80",
        "http://host:port",
        "http://host:99999",
        "http://[::1",
        "http://a b",
        "http://höst",
        "http://host\n",
        None,
        5,
        b"http://host",
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(SettingsError, match="http://host:port"):
        RemoteReranker(url)


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@host", "http://hunter2@host:x", "https://host/?key=hunter2", "http://h#hunter2"]
)
def test_secrets_do_not_belong_into_an_address_and_are_not_shown(url):
    with pytest.raises(SettingsError) as caught:
        RemoteReranker(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["", "hunter2\n", "hünter2", 5, b"hunter2"])
def test_a_key_must_fit_into_a_header_and_is_not_shown(key, monkeypatch):
    with pytest.raises(SettingsError, match="API key") as caught:
        RemoteReranker("http://host", api_key=key)
    assert "nter2" not in str(caught.value)


def test_the_key_is_sent_and_comes_from_the_environment_where_none_is_given(fake, monkeypatch):
    fake.key = "hunter2"
    with pytest.raises(SettingsError, match="401: a key is needed"):
        RemoteReranker(fake.url).warm_up()
    RemoteReranker(fake.url, api_key="hunter2").warm_up()
    monkeypatch.setenv("KALM_API_KEY", "hunter2")
    RemoteReranker(fake.url).warm_up()
    monkeypatch.setenv("KALM_API_KEY", "")
    assert check_key(None) is None


def test_keys_are_shown_nowhere(fake, caplog):
    caplog.set_level(0)
    fake.key = "another"
    remote = RemoteReranker(fake.url, api_key="hunter2")
    with pytest.raises(SettingsError) as caught:
        remote.rank(QUERY, TEXTS)
    shown = [repr(remote), repr(vars(remote)), str(caught.value), repr(caught.value), caplog.text, repr(remote.__reduce__())]
    assert not any("hunter2" in text for text in shown)


def test_the_service_may_lie_under_a_path(fake):
    fake.prefix = "/kalm"
    assert RemoteReranker(f"{fake.url}/kalm/").rank(QUERY, TEXTS)[0].index == 0
    with pytest.raises(SettingsError, match="404: Not Found"):
        RemoteReranker(fake.url).warm_up()


@pytest.mark.parametrize(
    ("name", "value"), [("max_retries", -1), ("max_retries", 1.5), ("max_retries", True), ("timeout", 0), ("timeout", "5")]
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingsError, match=name):
        RemoteReranker("http://host", **{name: value})


async def test_a_transport_of_ones_own_takes_the_place_of_sockets(fake):
    def handle(request: httpx.Request) -> httpx.Response:
        status, headers, content = fake.answer(request.url.path, json.loads(request.content or b"null"))
        return httpx.Response(status, headers=headers, content=content)

    remote = RemoteReranker("http://nowhere", transport=httpx.MockTransport(handle))
    assert remote.rank(QUERY, TEXTS) == await remote.arank(QUERY, TEXTS)


def test_the_service_is_told_the_trace(fake, rank):
    rank(RemoteReranker(fake.url))
    assert not any("traceparent" in headers for _, headers, _ in fake.requests)
    with recording() as spans:
        rank(RemoteReranker(fake.url))
    # The service lies in this process, and makes a span of its own.
    *_, span = spans.take()
    told = [headers["traceparent"].split("-")[2] for _, headers, _ in fake.requests[2:]]
    assert told == [f"{span.context.span_id:016x}"] * 2
