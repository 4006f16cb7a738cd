"""The multiply-adds of encoder and decoder."""

from __future__ import annotations

from dataclasses import replace

import torch
from benchmarks.stacks import draw_embedding, draw_stack, make_config

from kalm_integrations.core.model.encoder import encode
from kalm_integrations.planning.arithmetic import Widths, decoder_multiply_adds, encoder_multiply_adds


def test_multiply_adds_of_nano():
    """The formula gives, for 100 passages of 64 states and a prompt of 80 tokens, the sum done by hand."""
    kinds = (*["sliding_attention"] * 17, "full_attention")
    nano = Widths(kinds, 512, hidden_width=640, query_width=1024, kv_width=256, mlp_width=2048)
    pooled = decoder_multiply_adds(nano, 100, 64, 0, 80)
    per_token = 640 * 1536 + 1024 * 640 + 3 * 640 * 2048
    saved_in_layer_0 = 99 * 80 * 640 * 1536
    saved_in_last_layer = 100 * 79 * (per_token - 640 * 512)
    attention = 100 * 2048 * (17 * sum(64 + i for i in range(1, 81)) + 144)
    passages = 100 * 64 * 18 * 640 * 512
    assert sum(pooled.values()) == 100 * 80 * 18 * per_token - saved_in_layer_0 - saved_in_last_layer + attention + passages
    prefix = decoder_multiply_adds(nano, 100, 64, 56, 24)
    assert sum(prefix.values()) < 0.3 * sum(pooled.values())
    encoding = encoder_multiply_adds(nano, 100, 256)
    assert encoding["attention"] == 100 * 2048 * 18 * 256**2


def test_windows_are_counted():
    """An encoder layer with a window counts the pairs of tokens of which one really depends on the other."""
    draw = torch.Generator().manual_seed(0)
    config = replace(make_config("toy"), layer_types=("sliding_attention",))
    weights, embedding = draw_stack(config, torch.float32, draw), draw_embedding(config, draw)
    n = 30
    embedding.tokens.requires_grad_(True)
    states = encode(torch.arange(n), [n], embedding, weights, config)
    seen = [torch.autograd.grad(state.sum(), embedding.tokens, retain_graph=True)[0][:n].any(dim=1) for state in states]
    widths = Widths(("sliding_attention",), config.sliding_window, 4, 4, 4, 4)
    assert encoder_multiply_adds(widths, 1, n)["attention"] == 2 * 4 * int(torch.stack(seen).sum())
