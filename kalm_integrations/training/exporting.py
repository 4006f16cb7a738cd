"""Trained weights as a checkpoint folder, and the mean of several checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kalm_integrations.core.checkpoint.folders import check_target, checkpoint_written_beside, copy_files
from kalm_integrations.core.checkpoint.locate import DEFAULTS_FILE, resolve
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.errors import SettingsError, TrainingError
from kalm_integrations.training.card import CardFacts, base_of, stated_licence, write_card
from kalm_integrations.training.config import ExportDtype

logger = logging.getLogger(__name__)

MAX_NAMED = 3
"""Tensors that an error names."""


def export_checkpoint(
    start: Path,
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    dtype: ExportDtype = "float32",
    card: CardFacts | None = None,
) -> Path:
    """Write a checkpoint in one file: the weights given, and everything else as `start` has it.

    Copies of the token embeddings that some files hold beside them are left out: they would no longer be copies. A
    calibration of `start` is left out, too: it was fitted to the margins of other weights.

    Args:
        start: checkpoint that gives configuration, tokenizer and the tensors that are not text.
        weights: tensors by their names in `start`.
        folder: where to write; a checkpoint that is there is replaced.
        dtype: what the weights are written in.
        card: what the model card tells; None: there is no card.

    Returns:
        `folder`.

    Raises:
        SettingsError: `folder` holds anything else, or is, holds or lies in `start`.
        TrainingError: a tensor holds NaN or infinity; nothing is written.
    """
    opened = Checkpoint.open(start)
    embedding_name = opened.text_names()[0]
    embedding = dict(opened.tensors([embedding_name]))[embedding_name]
    tensors = {}
    for name, tensor in opened.tensors():
        if name in weights:
            tensors[name] = weights[name].detach().to("cpu", getattr(torch, dtype)).contiguous()
        elif tensor.shape != embedding.shape or not torch.equal(tensor, embedding):
            tensors[name] = tensor
    remedy = "the weights to export; train again with a lower learning rate or a longer warm-up"
    _check_finite(tensors.items(), "an exported checkpoint", remedy)
    with checkpoint_written_beside(folder, [start]) as part:
        copy_files(start, part, weights=False)
        _say_dtype(part / "config.json", dtype)
        _drop_calibration(part / DEFAULTS_FILE, folder)
        if card is not None:
            write_card(part, card)
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    return folder


def average_checkpoints(models: Sequence[str], folder: Path, dtype: ExportDtype = "float32") -> Path:
    """Write the mean of the weights of several checkpoints: runs from the same start, with other data or seeds.

    Args:
        models: two or more aliases, hub ids or folders; the first one gives configuration and tokenizer.
        folder: where to write; a checkpoint that is there is replaced.
        dtype: what the weights are written in.

    Returns:
        `folder`.

    Raises:
        SettingsError: there are not two, they are not of one shape, their tokenizers differ, or `folder` holds anything
            but a checkpoint, or is, holds or lies in one of them.
        CheckpointError: one cannot be used.
        TrainingError: one holds NaN or infinity.
    """
    if len(models) < 2:
        msg = f"a mean is of two checkpoints or more, but got {len(models)}"
        raise SettingsError(msg)
    folders = [resolve(model) for model in models]
    check_target(folder, folders)
    opened = [Checkpoint.open(each) for each in folders]
    first, names = opened[0], opened[0].text_names()
    for model, other in zip(models[1:], opened[1:], strict=True):
        if other.text_names() != names or _tokenizer(other) != _tokenizer(first):
            msg = (
                f"checkpoints to average must be trained from the same start, but {model!r} has other tensors or another "
                f"tokenizer than {models[0]!r}"
            )
            raise SettingsError(msg)
    sums: dict[str, torch.Tensor] = {}
    for model, each in zip(models, opened, strict=True):
        _check_finite(each.tensors(names), "a mean", f"{model!r}, so leave it out")
        for name, tensor in each.tensors(names):
            if name in sums and tensor.shape != sums[name].shape:
                shapes = f"{tuple(tensor.shape)} and {tuple(sums[name].shape)}"
                msg = f"checkpoints to average must be of one shape, but {name} of {model!r} and {models[0]!r} has {shapes}"
                raise SettingsError(msg)
            sums[name] = sums[name].add_(tensor) if name in sums else tensor.float()
    means = {name: total / len(models) for name, total in sums.items()}
    return export_checkpoint(folders[0], means, folder, dtype, _facts_of_mean(models, folders, folder.absolute().name))


def _facts_of_mean(models: Sequence[str], folders: Sequence[Path], name: str) -> CardFacts:
    """Return what the card of a mean tells; it has a licence where all that are averaged state the same."""
    bases = [base_of(model) for model in models]
    licences = {stated_licence(each) for each in folders}
    return CardFacts(
        name=name,
        made_from=f"the mean of the weights of {', '.join(words for words, _ in bases)}",
        base_models=tuple(dict.fromkeys(hub_id for _, hub_ids in bases for hub_id in hub_ids)),
        relation="merge",
        license=licences.pop() if len(licences) == 1 else None,
    )


def _check_finite(tensors: Iterable[tuple[str, torch.Tensor]], what: str, where: str) -> None:
    """Check that no tensor holds NaN or infinity.

    Args:
        tensors: with their names.
        what: is made of them.
        where: they are from, and what to do about it.

    Raises:
        TrainingError: some do; it names them.
    """
    bad = [name for name, tensor in tensors if not tensor.isfinite().all()]
    if bad:
        others = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
        named = ", ".join(bad[:MAX_NAMED])
        msg = f"{what} must consist of finite numbers, but NaN or infinity is in {named}{others} of {where}"
        raise TrainingError(msg)


def _say_dtype(path: Path, dtype: ExportDtype) -> None:
    """Write the dtype of the weights into config.json: transformers loads them in the one that it finds there."""
    config: dict[str, Any] = json.loads(path.read_bytes())

    def replace(section: dict[str, Any]) -> None:
        for key, value in section.items():
            if key in ("dtype", "torch_dtype"):
                section[key] = dtype
            elif isinstance(value, dict):
                replace(value)

    replace(config)
    path.write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _drop_calibration(path: Path, folder: Path) -> None:
    """Take the calibration out of a checkpoint's defaults; all other fields stay."""
    fields = json.loads(path.read_bytes()) if path.is_file() else {}
    if fields.pop("calibration", None) is not None:
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        logger.warning(
            "the calibration of the start is left out, because it was fitted to other weights; to fit a new one: kalm "
            "calibrate DATA --model %s --save",
            folder,
        )


def _tokenizer(checkpoint: Checkpoint) -> str:
    return str(checkpoint.load_tokenizer().to_str())
