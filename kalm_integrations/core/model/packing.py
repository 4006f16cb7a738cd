"""Matrices in oneDNN's own layout, for products on x86 CPUs.

PyTorch multiplies float32 by its BLAS (MKL), which on AMD CPUs runs at less than half of oneDNN's speed, and it lays bfloat16
matrices out anew for every product. The operators below are those that torch.compile puts into frozen graphs; PyTorch gives
them no public names, so whether they are there is asked before anything is packed.
"""

from __future__ import annotations

import platform
from typing import Any

import torch

_OPERATORS: Any = torch.ops.mkldnn
_NEEDED = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")

ACTIVATIONS = {"gelu_pytorch_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none"), "silu": ("swish", "")}
"""oneDNN's operation and algorithm for each activation of `layers.ACTIVATIONS`."""


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether matrices of this kind can be packed here."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(_OPERATORS, name) for name in _NEEDED):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(_OPERATORS._is_mkldnn_bf16_supported()))  # noqa: SLF001


def pack(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix (n_out, n_in) in oneDNN's layout; the functions below take it, and not under autograd."""
    packed: torch.Tensor = _OPERATORS._reorder_linear_weight(matrix)  # noqa: SLF001
    return packed


def multiply(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Return `x` (..., n_in) times the transpose of a packed matrix."""
    return _multiply(x, packed, "none", "")


def product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return `x` (rows, n_in) times the transpose of a matrix (n_out, n_in) that is not packed, and used once."""
    # Parts of a larger matrix would be multiplied by oneDNN's reference code, a thousand times slower.
    return _multiply(x.contiguous(), matrix.contiguous(), "none", "")


def multiply_gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return activation(x times gate) * (x times up), both packed, each computed while its product is written."""
    multiply_by = _OPERATORS._linear_pointwise.binary  # noqa: SLF001
    product: torch.Tensor = multiply_by(x, _multiply(x, gate, *ACTIVATIONS[activation]), up, None, "mul")
    return product


def _multiply(x: torch.Tensor, packed: torch.Tensor, operation: str, algorithm: str) -> torch.Tensor:
    product: torch.Tensor = _OPERATORS._linear_pointwise(x, packed, None, operation, [], algorithm)  # noqa: SLF001
    return product
