"""`kalm info`: checkpoint, device and memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tools.command_line import Run

from kalm_integrations import KalmReranker


def test_info_tells_what_runs_where(run: Run, model: Any, make_reranker: Callable[..., KalmReranker]) -> None:
    printed = json.loads(run("info", "--json", "--device", "cpu", "--dtype", "bfloat16", *model).stdout)
    full = json.loads(run("info", "--json", "--device", "cpu", "--dtype", "float32", *model).stdout)
    reranker = make_reranker()
    reranker.warm_up()
    assert (full["fingerprint"], full["weight_bytes"]) == (reranker.fingerprint, reranker.runtime.nbytes)
    assert (full["device"], full["dtype"], printed["dtype"]) == ("cpu", "float32", "bfloat16")
    assert (full["encoder_layers"], full["decoder_layers"], full["width"]) == (4, 4, 48)
    assert printed["weight_bytes"] < full["weight_bytes"]
    assert reranker.fingerprint in run("info", *model).stdout
