"""One contract for the components of all hosts: their settings, copies, pickles, and what they may be given."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import threading

import pytest
from tools.hosts import HOSTS, Host

from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.core import passes
from kalm_integrations.core.passages.stores import LmdbPayloadStore
from kalm_integrations.core.settings import DEFAULT_CODEC
from kalm_integrations.errors import CheckpointNotFoundError, SettingsError
from kalm_integrations.hosting import models, wait_for_write_back
from kalm_integrations.hosting import ranking as hosting_ranking
from kalm_integrations.testing import FakeReranker

TEXTS = ["The Panthers defense gave up just 308 points.", "Lift and drag of a slender wing.", "naïve café 東京"]
QUERY = "who won the super bowl?"


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request) -> Host:
    return request.param


@pytest.fixture(params=["reranker", "encoder"])
def make(request, host):
    """Makes a component, of each kind."""
    return getattr(host, request.param)


def documents(host: Host, texts=TEXTS, **metadata):
    return [host.document(f"id-{i}", text, {"page": i, **copy.deepcopy(metadata)}) for i, text in enumerate(texts)]


def work(host: Host, component, given):
    """Let a component do what it is for."""
    if hasattr(component, "on_missing"):
        return host.use(component, QUERY, given)
    return host.encode(component, given)


# --- settings at construction


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": 5}, "model must be .* but got int"),
        ({"compression_ratio": "8"}, "compression_ratio"),
        ({"compression_ratio": 0}, "compression_ratio"),
        ({"storage_codec": "zip"}, "storage_codec must be one of"),
        ({"dtype": "float16"}, "dtype must be one of .* overflows"),
        ({"device": 5}, "device"),
        ({"max_passage_tokens": -1}, "max_passage_tokens"),
        ({"long_passages": "split"}, "long_passages: .*'cut' or 'windows'"),
        ({"max_windows": 0}, "max_windows: .* greater than 0"),
        ({"max_windows": "8"}, "max_windows"),
        ({"model_kwargs": {"max_windows": 8}}, "model_kwargs must not repeat"),
        ({"max_inline_bytes": 2.5}, "max_inline_bytes"),
        ({"revision": 7}, "revision"),
        ({"encoding_key": ""}, "encoding_key must be a non-empty metadata key"),
        ({"encoding_key": "kalm_fp"}, "encoding_key .* other than kalm_fp.* but got 'kalm_fp'"),
        ({"encoding_key": "fused_score"}, "encoding_key"),
        ({"encoding_key": 5}, "encoding_key"),
        ({"model_kwargs": {"cache_byte": 1}}, "model_kwargs .*'cache_byte'; did you mean 'cache_bytes'"),
        ({"model_kwargs": {"compression_ratio": 8}}, "model_kwargs must not repeat"),
        ({"model_kwargs": {"cache_bytes": -1}}, "cache_bytes"),
        ({"model_kwargs": {"payload_store": 5}}, "payload_store must be a mapping"),
        ({"model_kwargs": 5}, "model_kwargs"),
        ({"model_kwargs": {"storage_mode": "reference"}}, "storage_mode='reference' needs a payload_store"),
        ({"model": FakeReranker(), "storage_codec": "int8"}, "brings its own settings, but got storage_codec"),
    ],
)
def test_wrong_settings_are_refused_at_construction_with_their_name(host, make, settings, message):
    with pytest.raises(SettingsError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TOP": 0}, "TOP must be a positive whole number"),
        ({"TOP": -1}, "TOP must be"),
        ({"TOP": 2.5}, "TOP must be"),
        ({"TOP": "3"}, "TOP must be"),
        ({"TOP": True}, "TOP must be"),
        ({"score_threshold": "x"}, "score_threshold must be a number"),
        ({"score_threshold": float("nan")}, "score_threshold must be a number"),
        ({"fusion": "sum"}, "fusion"),
        ({"fusion_weight": 0.5}, "fusion_weight=0.5 needs a fusion"),
        ({"fusion": "reciprocal_rank", "fusion_weight": 2}, "fusion_weight must be"),
        ({"on_missing": "ignore"}, "on_missing"),
        ({"write_back": 5}, "write_back"),
        ({"instruction": 5}, "instruction"),
        ({"system_instruction": 5}, "system_instruction"),
        ({"max_query_tokens": 0}, "max_query_tokens"),
        ({"calibration": "yes please"}, "calibration"),
        ({"calibration": {"temperature": 0.0, "bias": 0.0}}, "temperature"),
        ({"strip_encodings": "perhaps"}, "strip_encodings"),
    ],
)
def test_wrong_settings_of_a_reranker_are_refused_at_construction(host, settings, message):
    named = {host.top if name == "TOP" else name: value for name, value in settings.items()}
    with pytest.raises(SettingsError, match=message.replace("TOP", host.top)):
        host.reranker(**named)


def test_unknown_settings_are_refused(host, make):
    with pytest.raises((SettingsError, TypeError), match="topn"):
        make(topn=3)


def test_settings_may_come_in_the_types_that_people_have(host, make, tiny_checkpoint):
    import torch

    for device in ("cpu", torch.device("cpu")):
        component = make(model=tiny_checkpoint, device=device, dtype=torch.float32)
        assert len(work(host, component, documents(host))) == len(TEXTS)


def test_none_means_all(host):
    import numpy as np

    assert len(host.use(host.reranker(model=FakeReranker(), **{host.top: None}), QUERY, documents(host, TEXTS * 7))) == 21
    assert len(host.use(host.reranker(model=FakeReranker(), **{host.top: np.int64(2)}), QUERY, documents(host))) == 2


# --- assignment


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("TOP", 1, 0),
        ("score_threshold", 0.5, "x"),
        ("fusion", "reciprocal_rank", "nope"),
        ("on_missing", "error", "ignore"),
        ("compression_ratio", 8, "x"),
        ("encoding_key", "vec", "kalm_fp"),
        ("model_kwargs", {"cache_bytes": 5}, {"device": "cpu"}),
        ("fusion_weight", 0.3, 3),
        ("write_back", print, 5),
        ("strip_encodings", False, "perhaps"),
        ("model", "nano", 5),
    ],
)
def test_an_assignment_that_is_refused_changes_nothing(host, name, good, bad):
    name = name.replace("TOP", host.top)
    component = host.reranker()
    before = getattr(component, name)
    with pytest.raises(SettingsError, match=name):
        setattr(component, name, bad)
    assert getattr(component, name) == before
    setattr(component, name, good)
    assert getattr(component, name) == good
    with pytest.raises(SettingsError, match=name):
        setattr(component, name, bad)
    assert getattr(component, name) == good


def test_unknown_names_cannot_be_assigned(host, make):
    component = make()
    with pytest.raises(SettingsError, match="topn"):
        component.topn = 3
    assert not hasattr(component, "topn")


def test_every_valid_state_is_reached_by_single_assignments(host):
    """In some order; and what is without effect for a while does no harm, in a pickle neither."""
    component = host.reranker(model=FakeReranker())
    given = [host.retrieved(d, score) for d, score in zip(documents(host), [1.0, 2.0, 3.0], strict=True)]
    for name, value in {"fusion_weight": 0.3, **host.z_score, "fusion": "z_score"}.items():
        setattr(component, name, value)
    assert all("fused_score" in host.metadata(d) for d in host.use(component, QUERY, given))
    component.fusion = None
    assert not any("fused_score" in host.metadata(d) for d in host.use(component, QUERY, given))
    assert component.fusion_weight == 0.3
    component.model = "pico"
    assert pickle.loads(pickle.dumps(component)).fusion_weight == 0.3
    component.fusion = "reciprocal_rank"
    assert component.fusion == "reciprocal_rank"


def test_settings_that_are_assigned_after_the_first_use_count(host, tiny_checkpoint, make_reranker):
    component = host.reranker(model=str(tiny_checkpoint))
    host.use(component, QUERY, documents(host))
    opened = component.reranker
    component.calibration = {"temperature": 3.0, "bias": -1.0}
    ranked = host.use(component, QUERY, documents(host))
    expected = make_reranker(storage_codec=DEFAULT_CODEC, calibration=component.calibration).rank(QUERY, TEXTS)
    assert [host.score(d) for d in ranked] == pytest.approx([p.score for p in expected], abs=1e-6)
    assert component.reranker is not opened
    assert component.reranker.runtime is opened.runtime, "the weights are those that were loaded"
    component.instruction = "Find wings."
    reopened = component.reranker
    host.use(component, QUERY, documents(host))
    assert component.reranker is reopened, "an instruction goes with each query"


def test_settings_cannot_be_assigned_beside_a_given_reranker(host, make):
    component = make(model=FakeReranker())
    with pytest.raises(SettingsError, match="brings its own settings, but got compression_ratio"):
        component.compression_ratio = 8
    assert component.compression_ratio is None
    work(host, component, documents(host))


# --- opening


def test_an_opened_component_never_waits_for_another_s_download(host, make, tiny_checkpoint, monkeypatch):
    opened, downloading, release = make(model=tiny_checkpoint), threading.Event(), threading.Event()
    work(host, opened, documents(host))
    original = models.as_reranker

    def slow(model, **settings):
        if model == "owner/far":
            downloading.set()
            release.wait(30)
        return original(model, **settings)

    monkeypatch.setattr(models, "as_reranker", slow)

    def open_the_other() -> None:
        with pytest.raises(CheckpointNotFoundError):
            make(model="owner/far").reranker  # noqa: B018

    thread = threading.Thread(target=open_the_other)
    thread.start()
    try:
        assert downloading.wait(30)
        assert len(work(host, opened, documents(host))) == len(TEXTS)
        assert make(model=tiny_checkpoint).reranker is not None, "nor does one that opens another model"
    finally:
        release.set()
        thread.join()


# --- copies, pickles, JSON


@pytest.mark.parametrize("is_used", [False, True])
def test_copies_share_the_model_and_work(host, make, tiny_checkpoint, is_used):
    component = make(model=str(tiny_checkpoint), compression_ratio=8)
    if is_used:
        work(host, component, documents(host))
    for made in (copy.copy(component), copy.deepcopy(component)):
        assert len(work(host, made, documents(host))) == len(TEXTS)
        assert made.reranker.runtime is component.reranker.runtime
        if is_used:
            assert made.reranker is component.reranker
        made.compression_ratio = 16
        assert component.compression_ratio == 8
        assert made.reranker.compression_ratio == 16


def test_copies_of_what_was_given_share_it(host, tmp_path):
    payloads, fake, written = {}, FakeReranker(), []
    component = host.reranker(model=fake, write_back=written.extend)
    made = copy.deepcopy(component)
    assert made.model is fake
    host.use(made, QUERY, documents(host))
    assert wait_for_write_back(10)
    assert len(written) == len(TEXTS)
    encoder = host.encoder(model_kwargs={"storage_mode": "reference", "payload_store": payloads})
    assert copy.deepcopy(encoder).model_kwargs["payload_store"] is payloads


@pytest.mark.parametrize("is_used", [False, True])
def test_pickles_open_the_model_anew_with_the_same_settings(host, make, tiny_checkpoint, tmp_path, is_used):
    settings = {"compression_ratio": 8, "model_kwargs": {"payload_store": str(tmp_path / "payloads"), "cache_bytes": 0}}
    component = make(model=str(tiny_checkpoint), **settings)
    if is_used:
        work(host, component, documents(host))
    made = pickle.loads(pickle.dumps(component))
    assert len(work(host, made, documents(host))) == len(TEXTS)
    assert made.reranker is not component.reranker
    assert made.reranker.compression_ratio == 8
    assert made.model_kwargs == component.model_kwargs


def module_level_write_back(documents) -> None:
    """A function that another process can import."""


def test_what_cannot_travel_is_refused_with_what_to_give_instead(host, make, tmp_path):
    with pytest.raises(SettingsError, match=r"alias, a hub id or a folder as model .* but got a FakeReranker"):
        pickle.dumps(make(model=FakeReranker()))
    with pytest.raises(
        SettingsError, match=r"payload_store must be the folder of an LMDB store .* but got dict.*pass a folder"
    ):
        pickle.dumps(make(model_kwargs={"payload_store": {}}))
    store = LmdbPayloadStore(tmp_path / "payloads")
    assert pickle.loads(pickle.dumps(make(model_kwargs={"payload_store": store}))).model_kwargs["payload_store"] is not store
    with pytest.raises(SettingsError, match="write_back must be a function that can be imported by its name"):
        pickle.dumps(host.reranker(write_back=lambda documents: None))
    made = pickle.loads(pickle.dumps(host.reranker(write_back=module_level_write_back)))
    assert made.write_back is module_level_write_back


@pytest.mark.parametrize("is_used", [False, True])
def test_components_turn_into_json(host, make, tiny_checkpoint, is_used):
    component = make(model=tiny_checkpoint, device="cpu", model_kwargs={"cache_bytes": 5})
    if is_used:
        work(host, component, documents(host))
    text = json.dumps(host.dump(component))
    assert str(tiny_checkpoint) in text
    assert "cache_bytes" in text


def test_representations_are_short_and_hold_no_payload(host, make):
    component = make(model_kwargs={"payload_store": {"key": b"payload" * 1000}})
    assert "payloadpayload" not in repr(component)


# --- documents


@pytest.mark.parametrize(
    "kind", [list, tuple, iter, lambda given: (d for d in given)], ids=["list", "tuple", "iter", "generator"]
)
def test_any_iterable_of_documents_is_taken(host, make, kind):
    component = make(model=FakeReranker())
    assert len(work(host, component, kind(documents(host)))) == len(TEXTS)


@pytest.mark.parametrize("given", ["a string", ["strings", "in a list"], {"a": "dict"}, 5, None], ids=repr)
def test_what_is_no_list_of_documents_is_refused_with_a_sentence(host, make, given):
    with pytest.raises(SettingsError, match="takes a list of"):
        work(host, make(model=FakeReranker()), given)


def test_one_document_is_no_list(host, make):
    [document] = documents(host, TEXTS[:1])
    with pytest.raises(SettingsError, match=r"takes a list of .* but got one"):
        work(host, make(model=FakeReranker()), document)


@pytest.mark.parametrize("encoding_key", ["kalm_encoding", "vec"])
def test_only_our_exact_keys_are_stripped(host, encoding_key):
    theirs = {"kalm_fpath": "/a.pdf", "kalm_encoding_date": "2026", "kalm": 1, "vector_id": 7, "vec_norm": 2.0}
    encoded = host.encode(host.encoder(model=FakeReranker(), encoding_key=encoding_key), documents(host, **theirs))
    assert all({**theirs, encoding_key: host.metadata(d)[encoding_key]}.items() <= host.metadata(d).items() for d in encoded)
    for document in host.use(host.reranker(model=FakeReranker(), encoding_key=encoding_key), QUERY, encoded):
        assert host.metadata(document).keys() == {"page", *theirs}


def test_encodings_under_two_keys_are_both_left_out(host):
    twice = host.encode(host.encoder(model=FakeReranker()), documents(host))
    metadata = {**host.metadata(twice[0]), "vec": host.metadata(twice[0])["kalm_encoding"]}
    [document] = host.use(
        host.reranker(model=FakeReranker(), encoding_key="vec"), QUERY, [host.document("id-0", TEXTS[0], metadata)]
    )
    assert host.metadata(document).keys() == {"page"}
    [encoded] = host.encode(
        host.encoder(model=FakeReranker(), encoding_key="vec"), [host.document("id-0", TEXTS[0], metadata)]
    )
    # The other one stays in the store, for the component that reads it.
    assert host.metadata(encoded).keys() == {"page", "vec", "vec_fp", "kalm_encoding", "kalm_fp"}


def test_encodings_of_two_checkpoints_lie_side_by_side_and_neither_comes_out(host):
    first, second = FakeReranker(), FakeReranker()
    once = host.encode(host.encoder(model=first), documents(host))
    twice = host.encode(host.encoder(model=second, encoding_key="kalm_encoding_2"), once)
    for key in ("kalm_encoding", "kalm_encoding_2"):
        reranker = host.reranker(model=FakeReranker(), encoding_key=key, on_missing="error")
        assert all(host.metadata(d).keys() == {"page"} for d in host.use(reranker, QUERY, twice))


@pytest.mark.parametrize("strip_encodings", [True, False])
def test_returned_and_written_documents_share_no_nested_metadata(host, strip_encodings):
    written = []
    component = host.reranker(model=FakeReranker(), write_back=written.extend, strip_encodings=strip_encodings)
    given = documents(host, tags={"a": ["b"]})
    lock = threading.Lock()
    given[0] = host.document("id-0", TEXTS[0], {"page": 0, "tags": {"a": ["b"]}, "lock": lock})
    ranked = host.use(component, QUERY, given)
    assert wait_for_write_back(10)
    encoded = host.encode(host.encoder(model=FakeReranker()), given)
    assert len(ranked) == len(written) == len(encoded) == len(TEXTS)
    for document in (*ranked, *written, *encoded):
        host.metadata(document)["tags"]["a"].append("changed")
    assert all(host.metadata(document)["tags"] == {"a": ["b"]} for document in given)


# --- work done once


def test_a_query_decodes_each_string_once_and_encodes_each_missing_passage_once(host, make_reranker, monkeypatch):
    """With write-back, without a cache, and whoever listens."""
    encoding, decoded, written = [], [], []
    reranker = make_reranker(cache_bytes=0)
    stored = host.encode(host.encoder(model=reranker), documents(host))[:2]
    original, original_encode = EncodedPassage.from_metadata.__func__, passes.encode

    def from_metadata(cls, value, *arguments):
        decoded.append(value)
        return original(cls, value, *arguments)

    def encode(token_ids, n_tokens, *arguments):
        encoding.extend(n_tokens)
        return original_encode(token_ids, n_tokens, *arguments)

    monkeypatch.setattr(EncodedPassage, "from_metadata", classmethod(from_metadata))
    monkeypatch.setattr(passes, "encode", encode)
    plain = documents(host, [*TEXTS, "another text"])[2:]
    host.use(host.reranker(model=reranker, write_back=written.extend), QUERY, [*stored, *plain])
    assert wait_for_write_back(10)
    assert (len(decoded), len(encoding), len(written)) == (2, 2, 2)
    assert all(host.metadata(document)["kalm_encoding"].startswith("kalm1.") for document in written)


def test_an_error_for_missing_encodings_comes_before_anything_is_encoded(host, make_reranker):
    reranker = make_reranker()
    with pytest.raises(ValueError, match=r"3 of 3 do not, the first being .*\(missing\); encode"):
        host.use(host.reranker(model=reranker, on_missing="error"), QUERY, documents(host))
    assert (reranker.stats.passages_encoded, reranker.stats.passages_scored) == (0, 0)


def test_a_query_that_has_to_encode_much_says_so_once_per_process(host, caplog):
    hosting_ranking._noted.clear()
    component = host.reranker(model=FakeReranker())
    host.use(component, QUERY, documents(host))
    assert "carried no usable encoding" not in caplog.text
    many = documents(host, [f"text {i}" for i in range(20)])
    for _ in range(2):
        host.use(component, QUERY, many)
    message = "20 of 20 candidates carried no usable encoding: 0 stale, 20 missing"
    assert caplog.text.count(message) == 1
    assert "see backfill" in caplog.text
    assert [record.levelno for record in caplog.records if message in record.getMessage()] == [logging.WARNING]
    hosting_ranking._noted.clear()
    caplog.clear()
    host.use(component, QUERY, host.encode(host.encoder(model=FakeReranker()), many))
    assert caplog.text == ""


def test_write_back_gets_what_memory_has_too(host):
    """A document that came without an encoding gets one, also if an earlier query has made it."""
    reranker = KalmReranker.from_pretrained("pico")
    written = []
    host.use(host.reranker(model=reranker), QUERY, documents(host))
    host.use(host.reranker(model=reranker, write_back=written.extend), QUERY, documents(host))
    assert wait_for_write_back(10)
    assert reranker.stats.passages_encoded == len(TEXTS)
    assert len(written) == len(TEXTS)
