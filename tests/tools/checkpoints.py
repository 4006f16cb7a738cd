"""Random T5Gemma2 checkpoints, saved by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

from kalm_integrations.training.tokenizer import train_tokenizer

TEXTS = [
    "The Panthers defense gave up just 308 points, ranking sixth in the league, in 2015.",
    "Which NFL team represented the AFC at Super Bowl 50? naïve café 東京 Ünïcödé",
    "Lift and drag of a slender wing in a slipstream at high angles of attack (theory and experiment).",
] * 20

TINY_TEXT: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "final_logit_softcapping": 6.0,
}
TINY_VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 16,
    "patch_size": 4,
}


def make_checkpoint(folder: Path, seed: int = 0, max_shard_size: str = "5GB", **text: Any) -> Path:
    """Save a tiny random checkpoint with tokenizer; `text` overrides fields of both sides' configuration."""
    both = {**TINY_TEXT, **text}
    images = {"image_token_index": both["vocab_size"] - 1, "eoi_token_index": both["vocab_size"] - 2}
    config = T5Gemma2Config(
        encoder={"text_config": both, "vision_config": TINY_VISION, "mm_tokens_per_image": 4, **images},
        decoder=both,
        **images,
    )
    model = T5Gemma2ForConditionalGeneration(config)
    # Its own: what the process has drawn before, in whatever thread, must not show.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Large enough that every part of the model shows in a score.
            scale = 0.3 if "norm" in name or parameter.ndim < 2 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(std=scale, generator=generator)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    train_tokenizer(TEXTS, 300, folder)
    return folder
