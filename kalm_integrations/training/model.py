"""The reranker as a trainable module: the runtime's own encoder and decoder, under autograd."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from kalm_integrations.core.checkpoint import SIDE_PREFIXES, Checkpoint, stack_weights
from kalm_integrations.core.decoder import Memory, answer_logits, extend, remember_passages
from kalm_integrations.core.encoder import encode
from kalm_integrations.core.layers import EmbeddingWeights, StackConfig, StackWeights
from kalm_integrations.core.pooling import pool_states

BCE_WEIGHT = 0.25
"""Weight of the binary loss beside the ranking loss: it makes the score a probability, not only an order."""


class TrainableReranker(nn.Module):
    """A reranker whose parameters carry the checkpoint's own names, so that a state dict is a checkpoint."""

    def __init__(self, folder: Path, answer_ids: tuple[int, ...]) -> None:
        """Load the weights of a single-file checkpoint in float32; `answer_ids` are the tokens of yes and no."""
        super().__init__()
        self.answer_ids = list(answer_ids)
        checkpoint = Checkpoint.open(folder)
        self.encoder_config = checkpoint.encoder_config
        self.decoder_config = checkpoint.decoder_config
        for name, tensor in load_file(folder / "model.safetensors").items():
            _register(self, name, tensor.float())

    def forward(
        self,
        passages: torch.Tensor,
        n_tokens: torch.Tensor,
        prefix: torch.Tensor,
        queries: torch.Tensor,
        last: torch.Tensor,
        relevant: torch.Tensor,
        compression_ratio: int,
    ) -> dict[str, torch.Tensor]:
        """Score every query of a cluster against every passage of it and return the loss.

        Args:
            passages: token ids, right-padded. Shape: (n_clusters * n_passages, length).
            n_tokens: real tokens of each passage. Shape: (n_clusters * n_passages,).
            prefix: the prompt up to the query. Shape: (prefix length,).
            queries: query and end of the prompt, right-padded. Shape: (n_clusters, n_queries, length).
            last: index of each query's last real token. Shape: (n_clusters, n_queries).
            relevant: which passage answers the query. Shape: (n_clusters, n_queries).
            compression_ratio: of this step.

        Returns:
            loss, and margins (n_clusters, n_queries, n_passages).
        """
        n_clusters, n_queries, length = queries.shape
        n_passages = len(passages) // n_clusters
        tensors = dict(self.named_parameters())
        embedding = EmbeddingWeights(
            tensors["model.encoder.embed_tokens.weight"], tensors["model.encoder.embed_tokens.eoi_embedding"]
        )
        encoder = _stack(tensors, "encoder", self.encoder_config)
        decoder = _stack(tensors, "decoder", self.decoder_config)
        states = encode(passages, n_tokens, embedding, encoder, self.encoder_config)
        states = pool_states(states, n_tokens, compression_ratio)
        n_states = (n_tokens + compression_ratio - 1) // compression_ratio
        memory = remember_passages(states, n_states, decoder, self.decoder_config)
        memory = extend(memory, prefix[None], embedding, decoder, self.decoder_config)
        # Rows of a cluster: query-major, so that row q * n_passages + p pairs query q with passage p.
        rows = torch.arange(len(passages), device=passages.device).view(n_clusters, 1, n_passages)
        rows = rows.expand(-1, n_queries, -1).reshape(-1)
        pair_queries = queries[:, :, None].expand(-1, -1, n_passages, -1).reshape(-1, length)
        pair_last = last[:, :, None].expand(-1, -1, n_passages).reshape(-1)
        head = embedding.tokens[self.answer_ids]
        logits = answer_logits(_select(memory, rows), pair_queries, pair_last, embedding, decoder, head, self.decoder_config)
        margins = (logits[:, 0] - logits[:, 1]).view(n_clusters * n_queries, n_passages)
        target = relevant.reshape(-1)
        ranking = F.cross_entropy(margins, target)
        binary = F.binary_cross_entropy_with_logits(margins, F.one_hot(target, n_passages).float())
        return {"loss": ranking + BCE_WEIGHT * binary, "margins": margins.detach()}


def _stack(tensors: Mapping[str, torch.Tensor], side: str, config: StackConfig) -> StackWeights:
    prefix = next(p for p in SIDE_PREFIXES[side] if p + "norm.weight" in tensors)
    return stack_weights(lambda name: tensors[prefix + name], config)


def _select(memory: Memory, rows: torch.Tensor) -> Memory:
    return Memory(
        tuple(keys[rows] for keys in memory.keys),
        tuple(values[rows] for values in memory.values),
        memory.n_states[rows],
        memory.width,
        memory.n_prompt,
    )


def _register(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Register a parameter under its dotted name, so that `named_parameters` gives the name back."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(leaf, nn.Parameter(tensor))
