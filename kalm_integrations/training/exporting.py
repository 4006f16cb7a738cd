"""Trained weights as a checkpoint folder, and the mean of several checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from kalm_integrations.core.checkpoint.folders import check_target, checkpoint_written_beside, copy_files
from kalm_integrations.core.checkpoint.locate import resolve
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.errors import SettingsError

DTYPE = torch.bfloat16
"""What checkpoints are written in."""


def export_checkpoint(start: Path, weights: Mapping[str, torch.Tensor], folder: Path) -> Path:
    """Write a checkpoint in one file: the weights given, and everything else as `start` has it.

    Copies of the token embeddings that some files hold beside them are left out: they would no longer be copies.

    Args:
        start: checkpoint that gives configuration, tokenizer and the tensors that are not text.
        weights: tensors by their names in `start`.
        folder: where to write; a checkpoint that is there is replaced.

    Returns:
        `folder`.

    Raises:
        SettingsError: `folder` holds anything else, or is, holds or lies in `start`.
    """
    opened = Checkpoint.open(start)
    embedding_name = opened.text_names()[0]
    embedding = dict(opened.tensors([embedding_name]))[embedding_name]
    tensors = {}
    for name, tensor in opened.tensors():
        if name in weights:
            tensors[name] = weights[name].detach().to("cpu", DTYPE).contiguous()
        elif tensor.shape != embedding.shape or not torch.equal(tensor, embedding):
            tensors[name] = tensor.to(DTYPE)
    with checkpoint_written_beside(folder, [start]) as part:
        copy_files(start, part, weights=False)
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    return folder


def average_checkpoints(models: Sequence[str], folder: Path) -> Path:
    """Write the mean of the weights of several checkpoints: runs from the same start, with other data or seeds.

    Args:
        models: two or more aliases, hub ids or folders; the first one gives configuration and tokenizer.
        folder: where to write; a checkpoint that is there is replaced.

    Returns:
        `folder`.

    Raises:
        SettingsError: there are not two, they are not of one shape, their tokenizers differ, or `folder` holds anything
            but a checkpoint, or is, holds or lies in one of them.
        CheckpointError: one cannot be used.
    """
    if len(models) < 2:
        msg = f"a mean is of two checkpoints or more, but got {len(models)}"
        raise SettingsError(msg)
    folders = [resolve(model) for model in models]
    check_target(folder, folders)
    first, *others = [Checkpoint.open(each) for each in folders]
    names = first.text_names()
    for model, other in zip(models[1:], others, strict=True):
        if other.text_names() != names or _tokenizer(other) != _tokenizer(first):
            msg = (
                f"checkpoints to average must be trained from the same start, but {model!r} has other tensors or another "
                f"tokenizer than {models[0]!r}"
            )
            raise SettingsError(msg)
    sums = {name: tensor.float() for name, tensor in first.tensors(names)}
    for model, other in zip(models[1:], others, strict=True):
        for name, tensor in other.tensors(names):
            if tensor.shape != sums[name].shape:
                shapes = f"{tuple(tensor.shape)} and {tuple(sums[name].shape)}"
                msg = f"checkpoints to average must be of one shape, but {name} of {model!r} and {models[0]!r} has {shapes}"
                raise SettingsError(msg)
            sums[name] += tensor.float()
    return export_checkpoint(folders[0], {name: total / len(models) for name, total in sums.items()}, folder)


def _tokenizer(checkpoint: Checkpoint) -> str:
    return str(checkpoint.load_tokenizer().to_str())
