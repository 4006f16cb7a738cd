"""Bytes of a checkpoint: tensors of its safetensors files, read one by one and by name.

Only what is asked for enters memory, so a vision tower never does. What the names mean is `t5gemma2`'s affair.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from kalm_integrations.core.checkpoint.stamps import OpenFiles, hash_file, stamp_of
from kalm_integrations.errors import InvalidCheckpointError

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of tensors that hold weights as they are; others are quantised and come with scales."""


class TensorReader:
    """Reads tensors of a single-file or sharded safetensors checkpoint by name."""

    def __init__(self, files: dict[str, Path], opened: OpenFiles) -> None:
        """Take the file of each tensor name, and what the files were before they were read; use `open` to find them."""
        self._files = files
        self._opened = opened

    @classmethod
    def open(cls, folder: Path) -> TensorReader:
        """List the tensors of a folder.

        Raises:
            InvalidCheckpointError: no safetensors, a shard that is missing, or a file that cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        # In the order of transformers, should a folder hold both.
        if single.is_file():
            paths = [single]
        elif index.is_file():
            paths = _shards(index)
        else:
            msg = (
                f"{folder} must hold model.safetensors or model.safetensors.index.json, but holds neither; other formats "
                "are not read: convert the weights with save_pretrained(..., safe_serialization=True)"
            )
            raise InvalidCheckpointError(msg)
        opened = OpenFiles(paths)
        files: dict[str, Path] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    files.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                msg = f"{path} cannot be read as safetensors ({error}); fetch the checkpoint again"
                raise InvalidCheckpointError(msg) from error
        return cls(files, opened)

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    @property
    def nbytes(self) -> int:
        """The size of all files when they were opened: no tensor has more elements, whatever config.json says."""
        return self._opened.nbytes

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted by name."""
        return sorted(set(self._files.values()))

    def hashes(self) -> list[str]:
        """Return the SHA-256 of each of the files.

        Raises:
            InvalidCheckpointError: one was deleted or written anew, or the hub's cache has it under another hash.
        """
        made = [hash_file(path) for path in self.files]
        self._opened.check()
        return made

    def first_of(self, candidates: Sequence[str]) -> str:
        """Return the first name that the files have.

        Raises:
            InvalidCheckpointError: they have none of them.
        """
        found = next((candidate for candidate in candidates if candidate in self._files), None)
        if found is None:
            msg = (
                f"tensor {' or '.join(candidates)} is missing from the checkpoint; it is incomplete or not a "
                "T5Gemma2 encoder-decoder"
            )
            raise InvalidCheckpointError(msg)
        return found

    def read(self, full_name: str) -> torch.Tensor:
        """Read a tensor by its name in the file.

        Raises:
            InvalidCheckpointError: the file cannot be read, or holds something else than weights under that name.
        """
        from safetensors import SafetensorError, safe_open

        path = self._files[full_name]
        # Weights are loaded late: tensors of two checkpoints must not meet in one model, nor under one identity.
        self._opened.check([path])
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(full_name)
        except (SafetensorError, OSError) as error:
            msg = f"tensor {full_name} cannot be read from {path} ({error}); fetch it again"
            raise InvalidCheckpointError(msg) from error
        if tensor.dtype not in WEIGHT_DTYPES:
            msg = (
                f"tensor {full_name} must hold floating-point numbers of 16 bits or more, but is {tensor.dtype}; "
                "quantised checkpoints are not supported, use the original one"
            )
            raise InvalidCheckpointError(msg)
        return tensor


def _shards(index: Path) -> list[Path]:
    """Return the files that the index of a sharded checkpoint names."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = sorted({index.parent / Path(str(shard)).name for shard in weight_map.values()})
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        msg = f"{index} must be a JSON object with a 'weight_map', but it is not ({error}); fetch it again"
        raise InvalidCheckpointError(msg) from error
    missing = [path.name for path in paths if stamp_of(path) is None]
    if missing:
        msg = f"{index.name} names shards that are not in {index.parent}: {', '.join(missing)}; fetch the checkpoint again"
        raise InvalidCheckpointError(msg)
    return paths
