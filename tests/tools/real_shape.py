"""A random checkpoint of Nano's real shape, and what it costs to load: ours beside the reference.

`cd tests && python -m tools.real_shape` prints the table of docs/parity.md. Linux only: the peak comes from /proc.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

from kalm_integrations.training.tokenizer import train_tokenizer
from tools.checkpoints import TEXTS, make_checkpoint
from tools.paths import TESTS

N_PARAMETERS = 786_029_296
"""All parameters of the published Nano, vision tower included."""

NANO = {
    "vocab_size": 262_144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
}
SMALL = {**NANO, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
LARGE = {
    **NANO,
    "hidden_size": 2560,
    "intermediate_size": 10_240,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 1024,
}
SHAPES = {"nano": NANO, "small": SMALL, "large": LARGE}
"""Configuration of both sides of the published checkpoints."""
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
QUERY, PASSAGES = "Which team won?", TEXTS[:2]


def make_nano(folder: Path) -> None:
    """Save a checkpoint of Nano's shape in bfloat16 (1.6 GB), with a small tokenizer."""
    assert make_random(folder, NANO) == N_PARAMETERS


def make_random(folder: Path, text: dict[str, Any]) -> int:
    """Save a random checkpoint in bfloat16 with a small tokenizer, and return its number of parameters."""
    config = T5Gemma2Config(encoder={"text_config": text, "vision_config": VISION}, decoder=text, dtype="bfloat16")
    with torch.device("meta"):
        model = T5Gemma2ForConditionalGeneration(config).bfloat16()
    model.to_empty(device="cpu")
    model.tie_weights()
    # A block of noise, repeated: drawing each of the numbers would take longer than all the rest.
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if "norm" in name or parameter.ndim < 2 else parameter.shape[-1] ** -0.5
            for block in parameter.view(-1).split(len(noise)):
                torch.mul(noise[: len(block)], scale, out=block)
    model.save_pretrained(folder)
    train_tokenizer(TEXTS, 300, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def measure(side: str, folder: Path) -> dict[str, float | list[float]]:
    """Load and score in a process of its own.

    Args:
        side: "ours" or "reference".
        folder: the checkpoint.

    Returns:
        scores; peak: bytes of memory above what the process had after its imports; text_weights: bytes of the weights that
        ours holds (0 for the reference); CPU seconds until both sides are in memory (load) and of the first score.
    """
    command = [sys.executable, "-m", "tools.real_shape", side, str(folder)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=TESTS).stdout
    return json.loads(output.splitlines()[-1])


def _measure_here(side: str, folder: Path) -> dict[str, float | list[float]]:
    with tempfile.TemporaryDirectory() as tiny:
        # Everything that is imported late is imported by this.
        from tools.parity import Parity  # mteb, which a machine that only measures need not have

        Parity(make_checkpoint(Path(tiny))).differences(QUERY, PASSAGES)
    before = read_memory("VmRSS")
    started = time.process_time()
    load = _load_ours if side == "ours" else _load_reference
    score, count = load(folder)
    loaded = time.process_time()
    scores = score()
    return {
        "scores": scores,
        "peak": read_memory("VmHWM") - before,
        "text_weights": count(),
        "load_seconds": loaded - started,
        "score_seconds": time.process_time() - loaded,
    }


def _load_ours(folder: Path) -> tuple[Callable[[], list[float]], Callable[[], int]]:
    from kalm_integrations import KalmReranker

    reranker = KalmReranker.from_pretrained(folder, device="cpu", dtype="float32", storage_codec="fp32")
    assert reranker.fingerprint
    reranker.warm_up()
    return lambda: reranker.score(QUERY, PASSAGES), lambda: reranker.runtime.nbytes


def _load_reference(folder: Path) -> tuple[Callable[[], list[float]], Callable[[], int]]:
    from tools.parity import Parity

    parity = Parity(folder)
    return lambda: parity.reference_scores(QUERY, PASSAGES), lambda: 0


def read_memory(field: str) -> int:
    """Return a field of this process's memory in bytes."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def print_table(ours: dict[str, float], reference: dict[str, float]) -> None:
    """Print both measurements as a Markdown table."""
    weights = ours["text_weights"]
    print("| | peak memory | ÷ text weights | load | first score of two passages |")
    print("|---|---|---|---|---|")
    for name, figures in (("KalmReranker", ours), ("mteb wrapper", reference)):
        print(
            f"| {name} | {figures['peak'] / 2**20:,.0f} MiB | {figures['peak'] / weights:.2f} "
            f"| {figures['load_seconds']:.1f} s | {figures['score_seconds']:.1f} s |"
        )
    print(f"\nText weights: {weights / 2**20:,.0f} MiB.")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(_measure_here(sys.argv[1], Path(sys.argv[2]))))
    else:
        with tempfile.TemporaryDirectory() as name:
            make_nano(Path(name))
            print_table(measure("ours", Path(name)), measure("reference", Path(name)))
