"""The T5Gemma2 transformer layer as pure functions over weights, shared by the encoder and the decoder.

Nothing here knows how a checkpoint names its tensors (`checkpoint.t5gemma2` does) and nothing keeps state, so that the very
same code serves inference and, under autograd, training. Written for this workload: bidirectional or causal attention over
short sequences, grouped key/value heads without copies, matrices that can be packed for oneDNN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from kalm_integrations.core.model import packing

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer type: inverse frequencies (head_dim / 2,) and the factor on cos and sin."""

    inverse_frequencies: torch.Tensor
    attention_scaling: float

    def table(self, start: int, stop: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of positions `start` to `stop`, the first half of sin negative, as `rotate` takes them.

        Shapes: (stop - start, 1, head_width), float32.
        """
        positions = torch.arange(start, stop, device=device, dtype=torch.float32)
        angles = positions[:, None, None] * self.inverse_frequencies.to(device)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


@dataclass(frozen=True)
class StackConfig:
    """What one side (encoder or decoder) needs to run. Widths are counts of features, windows counts of tokens."""

    hidden_width: int
    mlp_width: int
    n_heads: int
    n_kv_heads: int
    head_width: int
    layer_types: tuple[str, ...]
    sliding_window: int | None
    norm_epsilon: float
    attention_scale: float
    activation: str
    ropes: dict[str, Rope]
    vocabulary_size: int
    eoi_token_id: int
    logit_softcap: float | None

    @property
    def query_width(self) -> int:
        """Features of all query heads together."""
        return self.n_heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Features of all key (or value) heads together."""
        return self.n_kv_heads * self.head_width


@dataclass(frozen=True)
class LayerWeights:
    """Weights of one layer; norm weights are stored as the checkpoint has them (the norm multiplies by 1 + weight).

    Shapes: query (query_width, hidden); key_value (2 * kv_width, hidden), keys first; out (hidden, query_width); gate and up
    (mlp_width, hidden); down (hidden, mlp_width); q_norm and k_norm (head_width,); the other norms (hidden,).
    """

    query: torch.Tensor
    key_value: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    out: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    pre_attention_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    pre_mlp_norm: torch.Tensor
    post_mlp_norm: torch.Tensor


@dataclass(frozen=True)
class StackWeights:
    """Weights of one side: its layers and its final norm (hidden,)."""

    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the matrix products; the residual stream and the norms are float32 in any case."""
        return self.layers[0].query.dtype


@dataclass(frozen=True)
class EmbeddingWeights:
    """Token embeddings (vocabulary, hidden), kept in the dtype of the file, and the end-of-image row (hidden,)."""

    tokens: torch.Tensor
    end_of_image: torch.Tensor

    def embed(self, token_ids: torch.Tensor, config: StackConfig, dtype: torch.dtype) -> torch.Tensor:
        """Look up token ids of shape (...) and return float32 embeddings (..., hidden), scaled by sqrt(hidden).

        `dtype` is the precision of the run: T5Gemma2 rounds the scale to it.
        """
        scale = torch.tensor(config.hidden_width**0.5, dtype=dtype, device=self.tokens.device).float()
        embeddings = F.embedding(token_ids, self.tokens).float() * scale
        is_end_of_image = token_ids == config.eoi_token_id
        if bool(is_end_of_image.any()):
            embeddings = torch.where(is_end_of_image[..., None], self.end_of_image.float(), embeddings)
        return embeddings


def linear(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return `x` (..., n_in) times the transpose of `matrix` (n_out, n_in), which may be packed."""
    if matrix.is_mkldnn:
        return packing.multiply(x, matrix)
    return F.linear(x, matrix)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
    """Normalise the last dimension in float32, multiply by 1 + weight and return the result as `dtype`."""
    if _is_fused(x):
        return F.rms_norm(x.float(), (x.shape[-1],), 1.0 + weight.float(), epsilon).to(dtype)
    return _over_rms(x, epsilon).mul_(1.0 + weight.float()).to(dtype)


def add_rms_norm(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return a residual, float32, plus the `rms_norm` of `x`."""
    if _is_fused(x):
        return residual + rms_norm(x, weight, epsilon, residual.dtype)
    return torch.addcmul(residual, _over_rms(x, epsilon), 1.0 + weight.float())


def _is_fused(x: torch.Tensor) -> bool:
    """Return whether PyTorch's own norm is to be used: on a CPU it goes through memory twice as often as need be."""
    return x.device.type != "cpu" or torch.is_grad_enabled()


def _over_rms(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return `x` over its root mean square as a float32 tensor of its own, which may be changed in place."""
    states = x.float()
    mean_square = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square() / states.shape[-1]
    factor = (mean_square + epsilon).rsqrt()
    return states * factor if states is x else states.mul_(factor)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary embeddings to `x` (batch, length, heads, head_width) with tables that broadcast against it."""
    half = x.shape[-1] // 2
    sin = sin.to(x.dtype)
    rotated = x * cos.to(x.dtype)
    rotated[..., :half].addcmul_(x[..., half:], sin[..., :half])
    rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return rotated


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attend with grouped heads: the heads of a group become rows of one query, so keys and values are not repeated.

    Args:
        queries: shape (batch, n_queries, n_heads, head_width).
        keys: shape (batch, n_kv_heads, n_keys, head_width).
        values: same shape as `keys`.
        mask: True where a query may attend. Shape: (batch or 1, n_queries, n_keys), or None for everywhere.
        scale: factor on the dot products.

    Returns:
        Shape: (batch, n_queries, n_heads * head_width).
    """
    batch, n_queries, n_heads, width = queries.shape
    n_kv_heads = keys.shape[1]
    group = n_heads // n_kv_heads
    rows = queries.unflatten(2, (n_kv_heads, group)).permute(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, n_kv_heads, group * n_queries, width)
    if mask is not None:
        mask = mask.repeat(1, group, 1)[:, None]
    if rows.dtype == torch.bfloat16 and rows.device.type == "cpu":
        # PyTorch's fused attention does not use the CPU's bfloat16 units, its matrix product does.
        scores = torch.matmul(rows, keys.transpose(2, 3)).float() * scale
        if mask is not None:
            # Not -infinity: a padded row may see nothing at all, and has to stay finite.
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        attended = torch.matmul(torch.softmax(scores, dim=-1).to(rows.dtype), values)
    else:
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
    attended = attended.view(batch, n_kv_heads, group, n_queries, width).permute(0, 3, 1, 2, 4)
    return attended.reshape(batch, n_queries, n_heads * width)


def project_queries(
    x: torch.Tensor, weights: LayerWeights, config: StackConfig, rope: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Return the rotated queries of normalised states `x` (batch, length, hidden): (batch, length, heads, width)."""
    queries = linear(x, weights.query).unflatten(-1, (config.n_heads, config.head_width))
    return rotate(rms_norm(queries, weights.q_norm, config.norm_epsilon, queries.dtype), *rope)


def project_keys_values(
    x: torch.Tensor,
    weights: LayerWeights,
    config: StackConfig,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of `x` (batch, length, hidden), each (batch, kv_heads, length, head_width).

    Passage states carry no position: their keys are not rotated (`rope` is None).
    """
    keys, values = linear(x, weights.key_value).chunk(2, dim=-1)
    keys = keys.unflatten(-1, (config.n_kv_heads, config.head_width))
    keys = rms_norm(keys, weights.k_norm, config.norm_epsilon, keys.dtype)
    if rope is not None:
        keys = rotate(keys, *rope)
    return keys.transpose(1, 2), values.unflatten(-1, (config.n_kv_heads, config.head_width)).transpose(1, 2)


def finish_layer(x: torch.Tensor, attended: torch.Tensor, weights: LayerWeights, config: StackConfig) -> torch.Tensor:
    """Add what attention found to the residual `x` (batch, length, hidden), then the gated MLP."""
    epsilon = config.norm_epsilon
    x = add_rms_norm(x, linear(attended, weights.out), weights.post_attention_norm, epsilon)
    normed = rms_norm(x, weights.pre_mlp_norm, epsilon, weights.gate.dtype)
    hidden = linear(_gate(normed, weights, config.activation), weights.down)
    return add_rms_norm(x, hidden, weights.post_mlp_norm, epsilon)


def _gate(x: torch.Tensor, weights: LayerWeights, activation: str) -> torch.Tensor:
    """Return activation(gate projection) * up projection; packed matrices do both while they multiply."""
    if weights.gate.is_mkldnn:
        return packing.multiply_gated(x, weights.gate, weights.up, activation)
    return ACTIVATIONS[activation](linear(x, weights.gate)) * linear(x, weights.up)
