"""What a service is told when it starts. It travels to worker processes and replicas in one environment variable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from kalm_integrations.core.settings import SETTING_NAMES, STORE_SETTINGS, build_settings, check_names, describe_problems
from kalm_integrations.errors import SettingsError

ENVIRONMENT_VARIABLE = "KALM_SERVICE"
"""Holds a service's settings as JSON."""

LogLevel = Literal["debug", "info", "warning", "error"]

ELSEWHERE = {
    **dict.fromkeys(STORE_SETTINGS[:1], "store"),
    "write_through": "store",
    "max_store_bytes": "max_store_bytes",
    "max_queued_pairs": "max_queue",
}
"""Settings of a reranker that have a field of their own here, and its name."""


class ServiceSettings(BaseModel):
    """Settings of a service; `make` builds them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model: str = "pico"
    """An alias, a hub id or a folder."""
    model_names: tuple[str, ...] = ()
    """Further names that requests may call the model by, such as rerank-v3.5 for clients that must name one of Cohere's."""
    model_settings: dict[str, Any] = Field(default_factory=dict)
    """What `KalmReranker.from_pretrained` takes beside the model: device, dtype, compression_ratio, storage_codec, …"""
    store: str | None = Field(default=None, repr=False)
    """A folder or a redis:// URL, where encodings are kept by their text."""
    max_store_bytes: PositiveInt | None = None
    api_key_env: str | None = None
    """The name of the environment variable that holds the key; the key itself is never among the settings."""
    max_queue: PositiveInt | None = None
    """Pairs that may wait for the model; beyond that requests are refused with 429."""
    timeout: PositiveFloat | None = 120.0
    """Seconds in which the model must have answered; beyond that 504."""
    max_documents: PositiveInt = 1000
    """Of one request, and of one line of a stream."""
    max_body_bytes: PositiveInt = 32 * 2**20
    """Of one request, and of one line of a stream."""
    body_seconds: PositiveFloat = 60.0
    """In which a body must have arrived; of a stream, its next piece."""
    shutdown_seconds: PositiveInt = 30
    """In which requests that run are finished after a signal to stop."""
    workers: PositiveInt = 1
    log_level: LogLevel = "info"
    traces: bool = False
    """Whether spans are sent by OTLP, as the OTEL_ variables of the environment say."""

    @classmethod
    def make(cls, **given: Any) -> ServiceSettings:
        """Build settings; None means unset.

        Raises:
            SettingsError: a name is unknown, or a value breaks a rule.
        """
        check_names(given, cls.model_fields, "settings of a service")
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            msg = f"invalid settings: {describe_problems(error)}"
            raise SettingsError(msg) from error

    @model_validator(mode="after")
    def _check(self) -> ServiceSettings:
        """Check what is given to the reranker, as far as nothing is loaded for it.

        Raises:
            SettingsError: a name is unknown or has another place, a value breaks a rule, or a name of the model is empty.
        """
        if not all(name.strip() for name in (self.model, *self.model_names)):
            msg = f"the model and its names must not be empty, but got {[self.model, *self.model_names]}"
            raise SettingsError(msg)
        check_names(self.model_settings, SETTING_NAMES, "model_settings")
        for name in self.model_settings:
            if name in ELSEWHERE:
                msg = f"model_settings must not hold {name}, but do; set {ELSEWHERE[name]} of the service"
                raise SettingsError(msg)
            if name == "token":
                msg = "model_settings must not hold a token, which others could read, but do; set HF_TOKEN instead"
                raise SettingsError(msg)
        if self.max_store_bytes is not None and self.store is None:
            msg = f"max_store_bytes={self.max_store_bytes} bounds a store, but store is None; name its folder or URL"
            raise SettingsError(msg)
        build_settings(self.reranker_settings())
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """What the model may be called in requests; the first is what it is called in answers that name it unasked."""
        own = Path(self.model).resolve().name if Path(self.model).is_dir() else self.model
        return tuple(dict.fromkeys((own, *self.model_names)))

    def reranker_settings(self) -> dict[str, Any]:
        """Return what `KalmReranker.from_pretrained` is to be given beside the model."""
        settings = {**self.model_settings, "max_queued_pairs": self.max_queue}
        if self.store is not None:
            settings |= {"payload_store": self.store, "write_through": True, "max_store_bytes": self.max_store_bytes}
        return settings

    def read_key(self) -> str | None:
        """Return the key that requests must carry, if there is to be one.

        Raises:
            SettingsError: the variable that is to hold it is unset or empty.
        """
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            msg = f"api_key_env must name an environment variable that holds a key, but {self.api_key_env!r} is unset or empty"
            raise SettingsError(msg)
        return key

    def to_env(self) -> dict[str, str]:
        """Return the environment variable that carries the settings."""
        try:
            return {ENVIRONMENT_VARIABLE: self.model_dump_json()}
        except ValueError as error:
            msg = f"model_settings of a service must be what JSON can hold, but {error}"
            raise SettingsError(msg) from error

    @classmethod
    def from_env(cls) -> ServiceSettings:
        """Return the settings that the environment carries; the defaults if it carries none.

        Raises:
            SettingsError: they are damaged, or a value breaks a rule.
        """
        try:
            return cls.model_validate_json(os.environ.get(ENVIRONMENT_VARIABLE, "{}"))
        except ValidationError as error:
            msg = f"{ENVIRONMENT_VARIABLE} must hold settings of a service as JSON: {describe_problems(error)}"
            raise SettingsError(msg) from error
