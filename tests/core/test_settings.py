"""Settings are checked before any work, and an error names the rule, the value and what to do."""

from __future__ import annotations

import json
import shutil

import pytest
from pydantic import ValidationError

from kalm_integrations import KalmReranker
from kalm_integrations.core.checkpoint.opened import CheckpointDefaults
from kalm_integrations.core.passages.codecs import CODECS
from kalm_integrations.core.settings import (
    COMPRESSION_RATIOS,
    DEFAULT_CODEC,
    EncoderSettings,
    QuerySettings,
    StorageSettings,
    make_settings,
    with_defaults,
)
from kalm_integrations.errors import SettingsError

POSITIVE = [
    "max_passage_tokens",
    "max_query_tokens",
    "compression_ratio",
    "encode_batch_size",
    "score_batch_size",
    "max_inline_bytes",
]


def test_the_published_defaults_hold_without_any_setting():
    encoder, storage, query = (make_settings(kind, {}) for kind in (EncoderSettings, StorageSettings, QuerySettings))
    assert (encoder.max_passage_tokens, encoder.allow_special_tokens) == (1024, False)
    assert (storage.compression_ratio, storage.storage_codec, storage.max_inline_bytes) == (4, DEFAULT_CODEC, None)
    assert (query.max_query_tokens, query.cache_bytes) == (512, 256 * 2**20)
    assert query.instruction == "Given a query, retrieve documents that answer the query."
    assert DEFAULT_CODEC in CODECS
    assert storage.compression_ratio in COMPRESSION_RATIOS


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -1, 1.5, 4.0, "4", True, [4]])
def test_a_size_that_is_no_positive_whole_number_is_refused(name, value):
    with pytest.raises(SettingsError, match=f"invalid settings: {name}: .*, but got ") as caught:
        KalmReranker.from_pretrained("no/such-checkpoint", **{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_bytes": -1}, "cache_bytes: .* greater than or equal to 0"),
        ({"max_passage_tokens": 2**17 + 1}, "max_passage_tokens: .* less than or equal to 131072"),
        ({"compression_ratio": 2**17 + 1}, "compression_ratio: .* less than or equal to 131072"),
        ({"storage_codec": "zip"}, "storage_codec must be one of fp32, fp16, bf16, int8, rot4, rot3, rot2, but got 'zip'"),
        ({"storage_codec": 16}, "storage_codec: .* valid string"),
        ({"storage_mode": "disk"}, "storage_mode: .*'auto', 'inline' or 'reference'"),
        ({"instruction": 5}, "instruction: .* valid string"),
        ({"system_instruction": b"bytes"}, "system_instruction: .* valid string"),
        ({"allow_special_tokens": "yes"}, "allow_special_tokens: .* valid boolean"),
    ],
)
def test_a_bad_setting_is_refused_before_a_checkpoint_is_looked_for(settings, message):
    with pytest.raises(SettingsError, match=message):
        KalmReranker.from_pretrained("no/such-checkpoint", **settings)


def test_all_bad_settings_of_a_kind_are_named_at_once():
    with pytest.raises(SettingsError, match=r"compression_ratio: .*; max_inline_bytes: "):
        KalmReranker.from_pretrained("no/such-checkpoint", compression_ratio=0, max_inline_bytes=0)


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="chunk_size"):
        KalmReranker.from_pretrained("no/such-checkpoint", chunk_size=4)


def test_none_leaves_a_setting_unset():
    nothing = dict.fromkeys(("max_passage_tokens", "compression_ratio", "storage_codec", "instruction", "cache_bytes"))
    for kind in (EncoderSettings, StorageSettings, QuerySettings):
        assert make_settings(kind, nothing) == make_settings(kind, {})


def test_what_is_given_beats_the_checkpoint_which_beats_the_default():
    defaults = CheckpointDefaults(instruction="checkpoint", max_query_tokens=9)
    settings = with_defaults(make_settings(QuerySettings, {"instruction": "given"}), defaults)
    assert (settings.instruction, settings.max_query_tokens, settings.cache_bytes) == ("given", 9, 256 * 2**20)


def test_settings_cannot_be_changed_afterwards():
    settings = make_settings(StorageSettings, {})
    with pytest.raises(ValidationError, match="frozen"):
        settings.compression_ratio = 8


def test_a_checkpoint_may_bring_defaults_and_those_of_the_encoder_change_the_fingerprint(
    make_reranker, tiny_checkpoint, tmp_path
):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "with defaults")
    defaults = {"instruction": "Find it.", "system_instruction": "Judge.", "max_query_tokens": 7, "note": "not ours"}
    (folder / "kalm_reranker.json").write_text(json.dumps(defaults))
    brought, plain = make_reranker(folder), make_reranker()
    assert brought.fingerprint == plain.fingerprint
    same = make_reranker(instruction="Find it.", system_instruction="Judge.", max_query_tokens=7)
    query = "who won the Super Bowl of the year?"
    assert brought.score(query, ["a"]) == same.score(query, ["a"]) != plain.score(query, ["a"])

    (folder / "kalm_reranker.json").write_text(json.dumps({"max_passage_tokens": 20}))
    limited = make_reranker(folder)
    assert limited.fingerprint == make_reranker(max_passage_tokens=20).fingerprint != plain.fingerprint
    assert [encoding.n_tokens for encoding in limited.encode_passages(["word " * 50])] == [20]
    assert make_reranker(folder, max_passage_tokens=1024).fingerprint == plain.fingerprint


def test_wrong_kinds_of_model_and_payload_store_are_refused(tiny_checkpoint, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SettingsError, match="model must be an alias, a hub id or a folder, but got int"):
        KalmReranker.from_pretrained(5)
    with pytest.raises(SettingsError, match=r"payload_store must be a mapping or a folder, but .* is a file"):
        KalmReranker.from_pretrained(tiny_checkpoint, payload_store=file)


@pytest.mark.parametrize("device", ["meta", "xpu"])
def test_a_device_that_cannot_compute_is_refused(tiny_checkpoint, device):
    with pytest.raises(SettingsError, match="does not work here"):
        KalmReranker.from_pretrained(tiny_checkpoint, device=device)


def test_a_message_says_a_rule_once():
    with pytest.raises(SettingsError) as caught:
        KalmReranker.from_pretrained("pico", storage_codec="zip")
    assert str(caught.value).count("zip") == 1
