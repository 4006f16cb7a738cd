"""What the reranker and the passage encoder have in common: the settings of a reranker, and the reranker itself."""

from __future__ import annotations

import functools
import inspect
import json
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.schema import BaseComponent, MetadataMode
from pydantic import ConfigDict, Field, PositiveInt, PrivateAttr, ValidationError, field_serializer

from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, Reranker, is_reranker
from kalm_integrations.errors import SettingsError

# One for the process: a lock in each component would forbid copying it.
_OPENING = threading.Lock()

# Without `instruction`: it goes with each query, so that components with different ones can share a reranker.
_SETTINGS = (
    "revision",
    "device",
    "dtype",
    "compression_ratio",
    "storage_codec",
    "max_inline_bytes",
    "max_passage_tokens",
    "max_query_tokens",
    "system_instruction",
    "calibration",
)


class RerankerComponent(BaseComponent):
    """A component that opens a reranker from its fields when it first needs it, or was given one."""

    model_config = ConfigDict(extra="forbid")

    model: str = "pico"
    """Alias, hub id or folder of a checkpoint; of a reranker that was given, the name of its type."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    device: str | None = None
    """A torch device; None takes CUDA if there is one."""
    dtype: str | None = None
    """"float32" or "bfloat16"; None chooses by device."""
    compression_ratio: PositiveInt | None = None
    """Encoder tokens per stored state."""
    storage_codec: str | None = None
    """How states are written: fp32, fp16, bf16, int8 or int4."""
    max_inline_bytes: PositiveInt | None = None
    """Longest metadata string that the store takes."""
    max_passage_tokens: PositiveInt | None = None
    """Longer passages are cut."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What else `KalmReranker.from_pretrained` takes: storage_mode, payload_store, cache_bytes, ...; made of JSON types,
    except that a `payload_store` may be a mapping, which is not serialised."""
    metadata_mode: MetadataMode = MetadataMode.EMBED
    """Which metadata belongs to a passage's text."""
    encoding_key: str = Field(ENCODING_KEY, min_length=1)
    """Metadata key of a node's encoding."""

    _given: bool = PrivateAttr(default=False)
    _reranker: Reranker | None = PrivateAttr(default=None)

    def __init__(self, model: str | os.PathLike[str] | Reranker = "pico", **settings: Any) -> None:
        """Check and keep settings; nothing is loaded.

        Args:
            model: an alias, a hub id, a folder, or a reranker to share, which brings the settings of its own.
            **settings: the fields of the class.

        Raises:
            SettingsError: a setting is unknown, out of range, or given beside a reranker that has its own.
        """
        given: Reranker | None = None
        if isinstance(model, (str, os.PathLike)):
            name = os.fspath(model)
        elif is_reranker(model):
            given, name = model, type(model).__name__
        else:
            msg = f"model must be an alias, a folder or a reranker, but got {type(model).__name__}"
            raise SettingsError(msg)
        try:
            super().__init__(model=name, **settings)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, but got {e['input']!r}" for e in error.errors())
            msg = f"invalid settings of {self.class_name()}: {problems}"
            raise SettingsError(msg) from error
        self._check_model_kwargs()
        if given is not None:
            self._given = True
            self._reranker = given
            if any(value is not None for value in self._settings().values()):
                self._open(given)

    def __reduce__(self) -> tuple[Callable[[], RerankerComponent], tuple[()]]:
        """Pickle the settings: a worker process opens the checkpoint anew.

        Raises:
            SettingsError: there are none, because a reranker was given.
        """
        if self._given:
            msg = (
                f"{self.class_name()} must have an alias or a folder as model to go to other processes (num_workers), but "
                "got a reranker, which stays in its own; pass model and settings instead"
            )
            raise SettingsError(msg)
        fields = {k: v for k, v in self.__dict__.items() if not type(self).model_fields[k].exclude}
        return functools.partial(type(self), **fields), ()

    @property
    def reranker(self) -> Reranker:
        """The reranker, opened on first use; its weights are loaded when they are needed."""
        with _OPENING:
            if self._reranker is None:
                self._reranker = self._open(self.model)
            return self._reranker

    def _open(self, model: str | Reranker) -> Reranker:
        # torch is loaded here, not when a component is made.
        from kalm_integrations.hosting import as_reranker

        return as_reranker(model, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {**{name: getattr(self, name, None) for name in _SETTINGS}, **self.model_kwargs}

    def _encode(self, texts: Sequence[str], *, show_progress: bool = False) -> list[dict[str, str]]:
        """Return for each text the metadata of a node that has it."""
        encoded = self.reranker.encode_to_metadata(texts, show_progress)
        return [{self.encoding_key: e[ENCODING_KEY], FINGERPRINT_KEY: e[FINGERPRINT_KEY]} for e in encoded]

    def _check_model_kwargs(self) -> None:
        if not self.model_kwargs:
            return
        from kalm_integrations.core.reranker import KalmReranker

        allowed = set(inspect.signature(KalmReranker.from_pretrained).parameters).difference(type(self).model_fields)
        unknown = sorted(set(self.model_kwargs) - allowed)
        if unknown:
            msg = f"model_kwargs must be out of {', '.join(sorted(allowed))}, but got {', '.join(unknown)}"
            raise SettingsError(msg)
        try:
            json.dumps(self._serialize_model_kwargs(self.model_kwargs))
        except TypeError as error:
            msg = f"model_kwargs must be made of JSON types, payload_store aside, but {error}; use their names instead"
            raise SettingsError(msg) from error

    @field_serializer("model")
    def _serialize_model(self, model: str) -> str:
        # Ingestion caches are keyed by this: one reranker must not be served what another has encoded.
        return f"{model}:{self.reranker.fingerprint}" if self._given else model

    @field_serializer("model_kwargs")
    def _serialize_model_kwargs(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in model_kwargs.items() if k != "payload_store" or isinstance(v, str)}
