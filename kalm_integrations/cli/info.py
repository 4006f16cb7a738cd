"""`kalm info`."""

from __future__ import annotations

import platform

from kalm_integrations import __version__
from kalm_integrations.cli import options
from kalm_integrations.cli.terminal import print_facts, print_json


def info(
    model: options.Model = "pico",
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Show checkpoint, device and memory.

    The checkpoint is loaded for this, so that the memory of its weights can be counted.
    """
    import torch
    import transformers

    reranker = options.open_reranker(model, revision=revision, device=device, dtype=dtype)
    reranker.warm_up()
    runtime = reranker.runtime
    checkpoint = runtime.checkpoint
    calibration = checkpoint.defaults.calibration
    facts = {
        "model": model,
        "folder": str(checkpoint.folder),
        "checkpoint": checkpoint.identity,
        **options.fingerprints(reranker),
        "encoder_layers": len(checkpoint.encoder_config.layer_types),
        "decoder_layers": len(checkpoint.decoder_config.layer_types),
        "width": checkpoint.encoder_config.hidden_width,
        "vocabulary": checkpoint.encoder_config.vocabulary_size,
        "device": str(runtime.device),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "weight_bytes": runtime.nbytes,
        "calibration": None if calibration is None else calibration.model_dump(),
        "versions": f"kalm-integrations {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
    }
    if as_json:
        print_json(facts)
        return
    memory = f"{runtime.nbytes:,} ({runtime.nbytes / 2**20:,.1f} MiB) in memory"
    print_facts({**facts, "weight_bytes": memory, "calibration": calibration or "none"})
