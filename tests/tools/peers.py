"""Random models of sentence-transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

SHAPE = {"hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 400}


def make_cross_encoder(checkpoint: Path, folder: Path, num_labels: int = 1) -> str:
    """Save a random cross-encoder that has the tokenizer of a checkpoint, and return its folder."""
    model = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=num_labels))
    CrossEncoder(str(_save(checkpoint, folder / "parts", model))).save_pretrained(str(folder / "cross-encoder"))
    return str(folder / "cross-encoder")


def make_bi_encoder(checkpoint: Path, folder: Path) -> str:
    """Save a random bi-encoder that has the tokenizer of a checkpoint, and return its folder."""
    parts = _save(checkpoint, folder / "parts", BertModel(BertConfig(**SHAPE)))
    SentenceTransformer(str(parts)).save_pretrained(str(folder / "bi-encoder"))
    return str(folder / "bi-encoder")


def _save(checkpoint: Path, folder: Path, model: torch.nn.Module) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that texts get different scores.
            parameter.normal_(std=0.3, generator=generator)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(checkpoint).save_pretrained(folder)
    return folder
