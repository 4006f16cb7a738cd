"""A new, small T5Gemma2 reranker, initialised so that it can learn to match a query with a passage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kalm_integrations.corpora.peers import embed, load_bi_encoder

if TYPE_CHECKING:
    from kalm_integrations.training.config import ArchitectureConfig

POST_NORM_WEIGHT = -0.7
"""Start of the norms behind attention and MLP: layers add little (a factor of .3) until they have learnt something."""

QUERY_NORM_WEIGHT = 0.5
"""Start of the query norms: attention a little sharper than with plain norms."""


def create_checkpoint(architecture: ArchitectureConfig, folder: Path, seed: int) -> None:
    """Write config.json, kalm_reranker.json and freshly initialised weights into `folder`, which holds the tokenizer.

    Queries and passages meet in merged attention, where self keys and passage keys come from one projection: left alone, a
    query token matches itself best and never looks at the passage. The mirror breaks this within the same architecture: the
    encoder's final norm starts at alternating +1 and -1 (weights 0 and -2), and every decoder query projection starts as the
    key projection times those signs. A query token then finds its own kind in the passage and is nearly orthogonal to itself.
    """
    torch.manual_seed(seed)
    config = _config(architecture)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    limits = {"max_passage_tokens": architecture.max_passage_tokens, "max_query_tokens": architecture.max_query_tokens}
    (folder / "kalm_reranker.json").write_text(json.dumps(limits, indent=2) + "\n", encoding="utf-8")
    weights = _weights(architecture)
    if architecture.token_embeddings is not None:
        known = token_embeddings(architecture.token_embeddings, folder, architecture.hidden_width)
        for token_id, embedding in known.items():
            weights["model.encoder.embed_tokens.weight"][token_id] = embedding
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def token_embeddings(bi_encoder: str, tokenizer_folder: Path, width: int) -> dict[int, torch.Tensor]:
    """Return the start of the tokens that have a text: what a bi-encoder makes of it, so that like words start alike.

    The embeddings are centred and reduced to their principal components. These are scaled by the square root of their
    singular values, between keeping the few directions that most words share and treating all alike. The rows are scaled to
    length 1, that of the random start, and rotated at random, because attention heads see slices of them.

    Args:
        bi_encoder: of sentence-transformers, folder or hub id; embeds the texts.
        tokenizer_folder: holds the tokenizer.
        width: of the embeddings returned.

    Returns:
        Embeddings (width,) by token id; special tokens and parts of characters are left out.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    texts = {i: str(tokenizer.decode([i])).strip() for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids}
    texts = {i: text for i, text in texts.items() if text and "\ufffd" not in text}
    embeddings = embed(load_bi_encoder(bi_encoder), list(texts.values()), "passage").double()
    left, singular_values, _ = torch.linalg.svd(embeddings - embeddings.mean(0), full_matrices=False)
    components = (left * singular_values.sqrt())[:, :width]
    components = F.pad(components, (0, width - components.shape[1]))
    rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.double))[0]
    rows = (F.normalize(components, dim=1) @ rotation).float()
    return dict(zip(texts, rows, strict=True))


def _config(a: ArchitectureConfig) -> dict[str, object]:
    """Return the T5Gemma2 configuration; the vision tower, which transformers demands, is the smallest possible."""
    rope = {"rope_type": "default", "rope_theta": a.rope_theta}
    text = {
        "vocab_size": a.vocabulary_size,
        "hidden_size": a.hidden_width,
        "intermediate_size": a.mlp_width,
        "num_hidden_layers": a.n_layers,
        "num_attention_heads": a.n_heads,
        "num_key_value_heads": 1,
        "head_dim": a.head_width,
        "query_pre_attn_scalar": a.head_width,
        "layer_types": ["full_attention"] * a.n_layers,
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        "sliding_window": a.max_passage_tokens,
        "max_position_embeddings": 4 * a.max_passage_tokens,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "tie_word_embeddings": True,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
    }
    # Image token ids that no tokenizer of this vocabulary produces.
    images = {"image_token_index": a.vocabulary_size, "eoi_token_index": a.vocabulary_size + 1}
    return {
        "model_type": "t5gemma2",
        "architectures": ["T5Gemma2ForConditionalGeneration"],
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        **images,
        "encoder": {
            "model_type": "t5gemma2_encoder",
            "text_config": {"model_type": "t5gemma2_text", **text},
            "vision_config": vision,
            "mm_tokens_per_image": 4,
            "boi_token_index": a.vocabulary_size + 2,
            **images,
        },
        "decoder": {"model_type": "t5gemma2_decoder", **text},
    }


def _weights(a: ArchitectureConfig) -> dict[str, torch.Tensor]:
    def linear(n_out: int, n_in: int) -> torch.Tensor:
        return torch.randn(n_out, n_in) / math.sqrt(n_in)

    hidden = a.hidden_width
    mirror = torch.ones(hidden)
    mirror[1::2] = -1
    weights = {
        "model.encoder.embed_tokens.weight": torch.randn(a.vocabulary_size, hidden) * hidden**-0.5,
        "model.encoder.embed_tokens.eoi_embedding": torch.zeros(hidden),
        "model.encoder.norm.weight": mirror - 1,
        "model.decoder.norm.weight": torch.zeros(hidden),
    }
    for side in ("encoder", "decoder"):
        for index in range(a.n_layers):
            prefix = f"model.{side}.layers.{index}."
            key = linear(a.head_width, hidden)
            query = linear(a.n_heads * a.head_width, hidden)
            if side == "decoder":
                query = (key * mirror).repeat(a.n_heads, 1)
            weights |= {
                prefix + "self_attn.q_proj.weight": query,
                prefix + "self_attn.k_proj.weight": key,
                prefix + "self_attn.v_proj.weight": linear(a.head_width, hidden),
                prefix + "self_attn.o_proj.weight": linear(hidden, a.n_heads * a.head_width),
                prefix + "self_attn.q_norm.weight": torch.full((a.head_width,), QUERY_NORM_WEIGHT),
                prefix + "self_attn.k_norm.weight": torch.zeros(a.head_width),
                prefix + "mlp.gate_proj.weight": linear(a.mlp_width, hidden),
                prefix + "mlp.up_proj.weight": linear(a.mlp_width, hidden),
                prefix + "mlp.down_proj.weight": linear(hidden, a.mlp_width),
                prefix + "pre_self_attn_layernorm.weight": torch.zeros(hidden),
                prefix + "post_self_attn_layernorm.weight": torch.full((hidden,), POST_NORM_WEIGHT),
                prefix + "pre_feedforward_layernorm.weight": torch.zeros(hidden),
                prefix + "post_feedforward_layernorm.weight": torch.full((hidden,), POST_NORM_WEIGHT),
            }
    return weights
