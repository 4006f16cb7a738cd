"""One contract for payload stores that are asked by text, under all hosts: encodings persist, documents stay as they are."""

from __future__ import annotations

import asyncio
import copy

import pytest
from tools.hosts import HOSTS, Host

from kalm_integrations.errors import EncodingError, SettingsError
from kalm_integrations.hosting import wait_for_write_back

TEXTS = ["The Panthers defense gave up just 308 points.", "Lift and drag of a slender wing.", "naïve café 東京", "a"]
QUERY = "who won the super bowl?"
SECONDS = 20


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request) -> Host:
    return request.param


def documents(host: Host, texts=TEXTS):
    return [host.document(f"id-{i}", text, {"page": i}) for i, text in enumerate(texts)]


@pytest.fixture
def component(host, tiny_checkpoint, tmp_path):
    """Makes components of the same settings, as several processes have them."""

    def make(**settings):
        kwargs = {"payload_store": str(tmp_path / "store"), "write_through": True}
        return host.reranker(
            model=str(tiny_checkpoint), storage_codec="fp32", model_kwargs=kwargs, **{host.top: None}, **settings
        )

    return make


def outcome(host: Host, given) -> list[tuple[str, float]]:
    return [(host.key(document), host.score(document)) for document in given]


def test_what_one_component_encoded_the_next_one_finds(host, component, make_reranker):
    given = documents(host)
    expected = outcome(host, host.use(host.reranker(model=make_reranker(), **{host.top: None}), QUERY, given))
    before = copy.deepcopy(given)
    first = component()
    returned = host.use(first, QUERY, given)
    assert outcome(host, returned) == expected
    assert first.reranker.flush(SECONDS)
    second = component()
    assert outcome(host, host.use(second, QUERY, given)) == expected
    stats = second.reranker.stats
    assert (stats.passages_encoded, stats.store_hits, stats.metadata_hits) == (0, len(TEXTS), 0)
    # Neither what came nor what is returned carries an encoding.
    assert [host.metadata(document) for document in given] == [host.metadata(document) for document in before]
    assert not any("kalm" in key for document in returned for key in host.metadata(document))


def test_coroutines_find_them_too(host, component):
    given = documents(host)
    first = component()
    expected = outcome(host, host.use(first, QUERY, given))
    assert first.reranker.flush(SECONDS)
    second = component()
    assert outcome(host, asyncio.run(host.ause(second, QUERY, given))) == expected
    assert second.reranker.stats.passages_encoded == 0


def test_what_is_found_is_stored_for_on_missing(host, component):
    given = documents(host)
    strict = component(on_missing="error")
    with pytest.raises(EncodingError, match=r"4 of 4 do not, the first being .* \(missing\)"):
        host.use(strict, QUERY, given)
    first = component()
    host.use(first, QUERY, given[1:])
    assert first.reranker.flush(SECONDS)
    with pytest.raises(EncodingError, match=r"1 of 4 do not"):
        host.use(component(on_missing="error"), QUERY, given)
    strict = component(on_missing="error")
    for _ in range(2):  # from the store, then from memory
        assert len(host.use(strict, QUERY, given[1:])) == len(TEXTS) - 1
    assert len(host.use(first, QUERY, given[1:])) == len(TEXTS) - 1


def test_an_encoder_takes_what_is_found_and_write_back_writes_it(host, component, tiny_checkpoint, tmp_path):
    given = documents(host)
    first = component()
    host.use(first, QUERY, given)
    assert first.reranker.flush(SECONDS)
    kwargs = {"payload_store": str(tmp_path / "store")}
    encoder = host.encoder(model=str(tiny_checkpoint), storage_codec="fp32", model_kwargs=kwargs)
    encoded = host.encode(encoder, given)
    assert encoder.reranker.stats.passages_encoded == 0
    written = []
    component_that_writes = component(write_back=written.extend)
    host.use(component_that_writes, QUERY, given)
    assert wait_for_write_back(SECONDS)
    assert component_that_writes.reranker.stats.passages_encoded == 0
    values = {host.key(document): host.metadata(document)["kalm_encoding"] for document in encoded}
    assert {host.key(document): host.metadata(document)["kalm_encoding"] for document in written} == values


def test_components_take_the_url_of_a_redis_without_a_password(host, tiny_checkpoint, redis_url):
    given = documents(host)
    scores = []
    for _ in range(2):
        kwargs = {"payload_store": redis_url, "write_through": True}
        component = host.reranker(model=str(tiny_checkpoint), model_kwargs=kwargs, compression_ratio=8, **{host.top: None})
        scores.append(outcome(host, host.use(component, QUERY, given)))
        assert component.reranker.flush(SECONDS)
    assert scores[0] == scores[1]
    assert component.reranker.stats.passages_encoded == 0
    for url in ("redis://:secret@host/0", "redis://host/0?password=secret", "https://host/secret"):
        with pytest.raises(
            SettingsError, match="payload_store must be a mapping, a folder, or the URL of a Redis server"
        ) as caught:
            host.reranker(model=str(tiny_checkpoint), model_kwargs={"payload_store": url})
        assert "secret" not in str(caught.value)
