"""The fields by which every component here names its model, and the reranker made from them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SkipValidation, field_validator, model_validator

from kalm_integrations.core.types import Reranker, is_reranker

# One for the process: a lock in each component would forbid copying it.
_OPENING = threading.Lock()


class WithReranker(BaseModel):
    """Holds a reranker, or the settings to make one when it is first needed."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", validate_assignment=True)

    model: SkipValidation[str | Path | Reranker] = "pico"
    """An alias (`pico` is built in; `nano`, `small`, `large`, …), a hub id, a local folder, or a reranker to share."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    device: Any = None
    """A torch device; None takes CUDA if there is one."""
    dtype: Any = None
    """"float32" or "bfloat16"; None chooses by device."""
    compression_ratio: int | None = None
    """Encoder tokens per stored state; 4 if not set."""
    storage_codec: str | None = None
    """How states are written: fp32, fp16, bf16, int8 or int4."""
    max_inline_bytes: int | None = None
    """If set, each encoding is pooled until its metadata string is not longer."""
    max_passage_tokens: int | None = None
    """Longer documents are cut; 1,024 if not set."""
    max_query_tokens: int | None = None
    """Longer queries are cut; 512 if not set."""
    system_instruction: str | None = None
    """The sentence that tells the model to judge."""
    calibration: bool | dict[str, float] | None = None
    """Make scores probabilities: True takes what `kalm calibrate` saved in the checkpoint, or give temperature and bias."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict, repr=False)
    """What else `KalmReranker.from_pretrained` takes: storage_mode, payload_store, cache_bytes, batch sizes, …"""

    _opened: tuple[dict[str, Any], Reranker] | None = PrivateAttr(None)

    @field_validator("model")
    @classmethod
    def _check_model(cls, model: Any) -> Any:
        if isinstance(model, (str, Path)) or is_reranker(model):
            return model
        msg = f"model must be an alias, a hub id, a folder or a reranker, but got {type(model).__name__}"
        raise ValueError(msg)

    @model_validator(mode="after")
    def _check_model_kwargs(self) -> WithReranker:
        fields = sorted(self.model_kwargs.keys() & type(self).model_fields.keys())
        if fields:
            msg = f"model_kwargs must not repeat fields, but got {', '.join(fields)}; give them directly"
            raise ValueError(msg)
        return self

    @property
    def reranker(self) -> Reranker:
        """The reranker: made at the first use, once, and again only after a setting has changed.

        Raises:
            SettingsError: a setting is out of range or unknown, or came with a reranker that has its own.
            CheckpointError: the checkpoint is not there or cannot be used.
        """
        # torch is loaded here, not when a component is made.
        from kalm_integrations.hosting import as_reranker

        names = WithReranker.model_fields.keys() - {"model_kwargs"}
        settings = {name: getattr(self, name) for name in names} | self.model_kwargs
        with _OPENING:
            opened = self._opened
            if opened is None or not _are_same(opened[0], settings):
                opened = self._opened = (settings, as_reranker(**settings))
            return opened[1]


def _are_same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Compare by identity: a payload store may be a mapping that == would read whole."""
    return old.keys() == new.keys() and all(old[name] is new[name] for name in old)
