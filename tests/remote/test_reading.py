"""What a client makes of strings that somebody changed is what the reranker behind the service makes of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tools.checkpoints import make_checkpoint

from kalm_integrations import KalmReranker, Passage
from kalm_integrations.core.passages.header import from_base64, to_base64
from kalm_integrations.remote.protocol import ServiceFacts
from kalm_integrations.remote.reading import Reader

TEXTS = ["Denver won.", "Lift and drag.", "A wing stalls. " * 30]
CHARACTERS = st.sampled_from("ABCxyz019-_.{}+/= kñ\n\0")


@pytest.fixture(scope="module")
def reranker(tmp_path_factory) -> KalmReranker:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("tiny"))
    return KalmReranker.from_pretrained(checkpoint, storage_codec="fp32", cache_bytes=0, max_passage_tokens=64)


@pytest.fixture(scope="module")
def facts(reranker) -> ServiceFacts:
    own, windows = reranker.fingerprints
    told = {"model": "tiny", "compression_ratio": 4, "storage_codec": "fp32", "version": "0", "max_passage_tokens": 64}
    return ServiceFacts(fingerprint=own, windows_fingerprint=windows, **told)


@pytest.fixture(scope="module")
def sound(reranker) -> list[str]:
    return [metadata["kalm_encoding"] for metadata in reranker.encode_to_metadata(TEXTS)]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_changed_strings(reranker, facts, sound, data):
    """Characters changed, put in and taken out; parts of two strings put together; headers rewritten."""
    value = data.draw(st.sampled_from(sound))
    kind = data.draw(st.sampled_from(["replace", "insert", "cut", "mix", "header"]))
    place = data.draw(st.integers(0, len(value) - 1))
    if kind == "replace":
        value = value[:place] + data.draw(CHARACTERS) + value[place + 1 :]
    elif kind == "insert":
        value = value[:place] + data.draw(st.text(CHARACTERS, max_size=4)) + value[place:]
    elif kind == "cut":
        value = value[:place] + value[place + data.draw(st.integers(1, 200)) :]
    elif kind == "mix":
        value = value[:place] + sound[1][place:]
    else:
        prefix, header, body = value.split(".")
        text = from_base64(header).decode()
        spot = data.draw(st.integers(0, len(text) - 1))
        header = to_base64((text[:spot] + data.draw(CHARACTERS) + text[spot + 1 :]).encode())
        value = f"{data.draw(st.sampled_from([prefix, 'kalm1r']))}.{header}" + (f".{body}" if data.draw(st.booleans()) else "")
    passages = [Passage(text, value) for text in TEXTS]
    there, here = reranker.read(passages), Reader().read(passages, facts)
    assert list(here) == list(there)
    assert here.keys == there.keys
    assert here.encodings.keys() == there.encodings.keys()
    for name in ("stale", "corrupt", "metadata_hits"):
        assert here.tally.get(name, 0) == there.tally.get(name, 0)
