"""What updates the weights: Muon for the layers' matrices or AdamW for everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BETAS = (0.9, 0.98)


class MatrixOptimizer(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for embeddings and norms, as one optimizer for the Trainer."""

    def __init__(self, model: nn.Module, matrix_learning_rate: float, learning_rate: float, weight_decay: float) -> None:
        """Split a model's parameters between the two."""
        matrices, others = split_parameters(model)
        parts: list[torch.optim.Optimizer] = []
        # With LoRA there are only matrices.
        if matrices:
            parts.append(torch.optim.Muon(matrices, lr=matrix_learning_rate, weight_decay=weight_decay))
        if others:
            parts.append(torch.optim.AdamW(others, lr=learning_rate, betas=BETAS, weight_decay=0.0))
        self._parts = tuple(parts)
        super().__init__([*matrices, *others], {})
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        for part in self._parts:
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of both."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def make_adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW; only the matrices of the layers decay."""
    matrices, others = split_parameters(model)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=BETAS)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trained matrices of the layers, and all other trained parameters."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    is_matrix = [parameter.ndim == 2 and ".layers." in name for name, parameter in trained]
    return (
        [parameter for (_, parameter), is_one in zip(trained, is_matrix, strict=True) if is_one],
        [parameter for (_, parameter), is_one in zip(trained, is_matrix, strict=True) if not is_one],
    )
