"""Settings of a service: what they refuse, and how they travel."""

from __future__ import annotations

import pytest

from kalm_integrations.errors import SettingsError
from kalm_integrations.serving.settings import ENVIRONMENT_VARIABLE, ServiceSettings


def test_they_travel_in_one_environment_variable(monkeypatch):
    settings = ServiceSettings.make(
        model="nano",
        model_names=("rerank-v3.5",),
        model_settings={"dtype": "bfloat16", "compression_ratio": 8},
        store="/var/lib/kalm",
        api_key_env="KALM_API_KEY",
        timeout=None,
        workers=4,
    )
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "{}")
    assert ServiceSettings.from_env() == ServiceSettings()
    for name, value in settings.to_env().items():
        monkeypatch.setenv(name, value)
    assert ServiceSettings.from_env() == settings


@pytest.mark.parametrize("text", ["", "{", "[]", '{"modle": "a"}', '{"workers": 0}'])
def test_damaged_ones_are_refused(monkeypatch, text):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, text)
    with pytest.raises(SettingsError, match=f"{ENVIRONMENT_VARIABLE} must hold settings of a service as JSON"):
        ServiceSettings.from_env()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"modle": "pico"}, "did you mean 'model'"),
        ({"workers": 0}, "workers: Input should be greater than 0, but got 0"),
        ({"timeout": float("nan")}, "timeout"),
        ({"model_settings": {"codec": "rot4"}}, "model_settings must be out of"),
        ({"model_settings": {"storage_codec": "zip"}}, "storage_codec must be one of"),
        ({"model_settings": {"payload_store": "a"}}, "must not hold payload_store, but do; set store of the service"),
        ({"model_settings": {"max_queued_pairs": 1}}, "set max_queue of the service"),
        ({"model_settings": {"token": "s3cret"}}, "must not hold a token"),
        ({"model": " "}, "must not be empty"),
        ({"max_store_bytes": 2**30}, "bounds a store, but store is None"),
    ],
)
def test_wrong_ones_are_refused_with_a_reason(given, message):
    with pytest.raises(SettingsError, match=message) as caught:
        ServiceSettings.make(**given)
    assert "s3cret" not in str(caught.value)


def test_what_json_cannot_hold_is_refused_when_it_is_to_travel():
    settings = ServiceSettings.make(model_settings={"device": object()})
    with pytest.raises(SettingsError, match="must be what JSON can hold"):
        settings.to_env()


def test_a_store_is_written_to():
    given = ServiceSettings.make(store="redis://localhost/0", max_store_bytes=2**30, max_queue=7).reranker_settings()
    assert given == {
        "payload_store": "redis://localhost/0",
        "write_through": True,
        "max_store_bytes": 2**30,
        "max_queued_pairs": 7,
    }
    assert ServiceSettings.make().reranker_settings() == {"max_queued_pairs": None}


def test_a_password_in_a_stores_url_is_not_shown():
    assert "s3cret" not in repr(ServiceSettings.make(store="redis://:s3cret@localhost/0"))
