"""Rerankers of other families: their shapes with random weights, run through transformers as people run them.

Generous to them: token ids are given, so nothing is tokenised; all passages have one length, so nothing is padded; the
causal model computes the logits of the last position only and keeps no key/value cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    PretrainedConfig,
    Qwen3Config,
    XLMRobertaConfig,
)

from benchmarks.plan import BGE, MINILM, QWEN, Prompt

BATCH_SIZE = 32


@dataclass(frozen=True)
class PeerSpec:
    """A shape and how a pair is read."""

    config: Callable[..., PretrainedConfig]
    shape: dict[str, Any]
    limit: int
    """Tokens of a pair that the model can read."""
    n_special: int = 0
    """Special tokens around a pair; the query comes without an instruction."""
    is_causal: bool = False
    """A language model that answers at the last position; it reads a prompt as long as ours."""


PEERS = {
    BGE: PeerSpec(
        XLMRobertaConfig,
        {
            "vocab_size": 250_002,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": 8194,
            "type_vocab_size": 1,
        },
        limit=8192,
        n_special=4,
    ),
    QWEN: PeerSpec(
        Qwen3Config,
        {
            "vocab_size": 151_669,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        limit=8192,
        is_causal=True,
    ),
    MINILM: PeerSpec(
        BertConfig,
        {
            "vocab_size": 30_522,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
        },
        limit=512,
        n_special=3,
    ),
}

TINY = {"vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FIRST_ID = 10
"""Smaller ids are special in some vocabulary."""


class Peer:
    """A model of a peer's shape with random weights."""

    def __init__(self, spec: PeerSpec, dtype: str, device: str, *, is_tiny: bool = False) -> None:
        self._spec = spec
        shape = {**spec.shape, **(TINY if is_tiny else {})}
        if is_tiny and spec.is_causal:
            shape |= {"num_key_value_heads": 1, "head_dim": 8}
        self._device = device
        self._vocabulary_size = shape["vocab_size"]
        kind = AutoModelForCausalLM if spec.is_causal else AutoModelForSequenceClassification
        head = {} if spec.is_causal else {"num_labels": 1}
        config = spec.config(**shape, **head)
        self._model = kind.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa").to(device).eval()

    def token_ids(self, prompt: Prompt, passage_tokens: int, n: int) -> torch.Tensor:
        """Return random pairs, cut to what the model can read. Shape: (n, tokens)."""
        n_query = prompt.n_tokens if self._spec.is_causal else prompt.n_query
        length = min(n_query + passage_tokens + self._spec.n_special, self._spec.limit)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(FIRST_ID, self._vocabulary_size, (n, length), generator=generator)

    def score(self, token_ids: torch.Tensor) -> list[float]:
        """Score pairs in batches."""
        scores: list[float] = []
        with torch.inference_mode():
            for batch in token_ids.split(BATCH_SIZE):
                ids = batch.to(self._device)
                options = {"logits_to_keep": 1, "use_cache": False} if self._spec.is_causal else {}
                logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits
                answers = logits[:, -1, :2].softmax(dim=-1)[:, 0] if self._spec.is_causal else logits[:, 0].sigmoid()
                scores += answers.float().cpu().tolist()
        return scores
