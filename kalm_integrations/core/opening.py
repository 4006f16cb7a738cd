"""From a name and settings to the parts of a reranker. Settings are checked first, then the checkpoint is opened."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from kalm_integrations.core.checkpoint.locate import published_max_ratio
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.passages.stores import check_stores, check_stores_travel, open_store
from kalm_integrations.core.runtime import Runtime, get_runtime
from kalm_integrations.core.settings import (
    Calibration,
    EncoderSettings,
    QuerySettings,
    StorageSettings,
    build_settings,
    with_defaults,
)
from kalm_integrations.core.types import plain
from kalm_integrations.errors import SettingsError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a reranker is put together from."""

    model: str
    """As it was given: an alias, a hub id or a folder."""
    runtime: Runtime
    encoder: EncoderSettings
    storage: StorageSettings
    query: QuerySettings
    calibration: Calibration | None
    payload_store: MutableMapping[str, bytes] | None
    prefix_store: MutableMapping[str, bytes] | None
    given: Mapping[str, Any] = field(repr=False)
    """The settings that were given, to open the same again."""


def travelling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings by which another process can open the same reranker; a hub token stays here.

    Raises:
        SettingsError: a store lives in this process only.
    """
    check_stores_travel(given)
    return {name: value for name, value in given.items() if name != "token"}


def open_parts(model: str | os.PathLike[str], settings: Mapping[str, Any]) -> Parts:
    """Open a checkpoint with settings.

    Args:
        model: an alias, a hub id or a folder.
        settings: what `KalmReranker.from_pretrained` takes beside it; None means unset.

    Raises:
        SettingsError: a setting is unknown or breaks a rule.
        CheckpointError: the checkpoint is not there or cannot be used.
        StoreError: the folder of a store cannot be opened.
    """
    given = {name: plain(value) for name, value in settings.items() if value is not None}
    model = plain(model)
    if not isinstance(model, (str, os.PathLike)):
        msg = f"model must be an alias, a hub id or a folder, but got {type(model).__name__}"
        raise SettingsError(msg)
    encoder, storage, query = build_settings(given)
    check_stores(given)
    runtime = get_runtime(model, *(given.get(name) for name in ("revision", "device", "dtype", "token")))
    checkpoint = runtime.checkpoint
    _check_ratio(os.fspath(model), checkpoint, storage.compression_ratio)
    query = with_defaults(query, checkpoint.defaults)
    return Parts(
        model=os.fspath(model),
        runtime=runtime,
        encoder=with_defaults(encoder, checkpoint.defaults),
        storage=storage,
        query=query,
        calibration=_choose_calibration(query.calibration, checkpoint),
        payload_store=open_store(given.get("payload_store")),
        prefix_store=open_store(given.get("prefix_store")),
        given=given,
    )


def _choose_calibration(wanted: bool | Calibration, checkpoint: Checkpoint) -> Calibration | None:
    """Return the calibration that was asked for.

    Raises:
        SettingsError: it is the checkpoint's, which has none.
    """
    if isinstance(wanted, Calibration):
        return wanted
    if wanted and checkpoint.defaults.calibration is None:
        msg = (
            f"calibration=True needs one in the checkpoint's kalm_reranker.json, but {checkpoint.folder} has none; make one "
            'with kalm calibrate, or pass {"temperature": …, "bias": …}'
        )
        raise SettingsError(msg)
    return checkpoint.defaults.calibration if wanted else None


def _check_ratio(model: str, checkpoint: Checkpoint, ratio: int) -> None:
    """Warn of a ratio that a checkpoint was not trained for: scores by it are poor."""
    limit = checkpoint.defaults.max_compression_ratio or published_max_ratio(model)
    if limit is not None and ratio > limit:
        _warn_of_ratio(model, ratio, limit)


@functools.cache
def _warn_of_ratio(model: str, ratio: int, limit: int) -> None:
    logger.warning(
        "compression_ratio=%d is beyond what %s was trained for (1 to %d): rankings by it are poor; use a smaller one",
        ratio,
        model,
        limit,
    )
