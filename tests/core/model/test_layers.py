"""The parts under a score: pooling and pooling again, attention windows, padding, and how a KV cache is continued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.stacks import VOCABULARY, draw_embedding, draw_stack, make_config, pack_stack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mteb.models.model_implementations.kalm_reranker import KaLMRerankerWrapper
from torch.testing import assert_close
from transformers.models.t5gemma2.modeling_t5gemma2 import sliding_window_mask_function

from kalm_integrations import KalmReranker
from kalm_integrations.core.model import decoder, encoder, passage_attention
from kalm_integrations.core.model.decoder import answer_logits, prefill, project_passages
from kalm_integrations.core.model.kv_cache import PaddedKVCache
from kalm_integrations.core.model.layers import add_rms_norm, rms_norm, rotate
from kalm_integrations.core.model.pooling import pool_states, repool_states
from kalm_integrations.core.runtime import Runtime
from kalm_integrations.core.sizes import n_pooled_states
from kalm_integrations.errors import SettingsError

N_PROMPT = 23
PROMPT = torch.randint(6, 290, (1, N_PROMPT), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def runtime(tiny_checkpoint: Path) -> Runtime:
    """The tiny model: window of 9 tokens, on layers 0 and 2."""
    return KalmReranker.from_pretrained(tiny_checkpoint).runtime


def random_states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8, 32, 1000])
def test_pooling_is_the_reference_s(ratio: int) -> None:
    """1, r - 1, r, r + 1 and more tokens in one padded batch."""
    n_tokens = torch.tensor(sorted({1, max(ratio - 1, 1), ratio, ratio + 1, 3 * ratio + 2}))
    states = random_states(len(n_tokens), int(n_tokens.max()), 5)
    mask = (torch.arange(states.shape[1]) < n_tokens[:, None]).long()
    expected, expected_mask = KaLMRerankerWrapper._pool_encoder_chunks(states, mask, ratio)
    pooled = pool_states(states, n_tokens, ratio)
    assert_close(pooled, expected)
    assert expected_mask.sum(1).tolist() == [n_pooled_states(int(n), ratio) for n in n_tokens]


def test_padding_never_enters_a_mean() -> None:
    """Not even if the encoder left NaN where there is no token."""
    states = random_states(1, 6, 4)
    padded = torch.cat((states, torch.full((1, 3, 4), torch.nan)), dim=1)
    assert_close(pool_states(padded, torch.tensor([6]), 4)[:, :2], pool_states(states, torch.tensor([6]), 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 300, 640), (3, 1, 4, 64)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_norms_are_pytorch_s_and_change_nothing_that_they_are_given(shape: tuple[int, ...], dtype: torch.dtype, scale: float):
    x, weight = (random_states(*shape) * scale).to(dtype), random_states(shape[-1], seed=1).to(dtype)
    x[0, 0] = 0
    given_x, residual = x.clone(), random_states(*shape, seed=2)
    expected = torch.nn.functional.rms_norm(x.float(), shape[-1:], 1 + weight.float(), 1e-6)
    with torch.inference_mode():
        assert_close(rms_norm(x, weight, 1e-6, torch.float32), expected, atol=1e-6, rtol=2e-6)
        assert_close(add_rms_norm(residual, x, weight, 1e-6), residual + expected, atol=1e-6, rtol=2e-6)
    assert torch.equal(x, given_x)
    assert torch.equal(residual, random_states(*shape, seed=2))
    learnt = weight.float().requires_grad_()
    add_rms_norm(residual, x, learnt, 1e-6).sum().backward()
    assert learnt.grad is not None
    assert learnt.grad.isfinite().all()


def test_rotation_is_the_formula_s() -> None:
    """Of the halves (a, b): (a cos - b sin, b cos + a sin); the tables have the sign."""
    x, angles = random_states(2, 5, 3, 8), random_states(5, 1, 4, seed=1)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    first, second = x.chunk(2, dim=-1)
    expected = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    assert_close(rotate(x, cos, sin), torch.cat(expected, dim=-1))


@given(n_tokens=st.integers(1, 200), ratio=st.integers(1, 9), factor=st.integers(1, 40), second=st.integers(1, 5))
def test_pooling_again_is_exact(n_tokens: int, ratio: int, factor: int, second: int) -> None:
    """Coarser from finer equals coarser from tokens, the last partial groups included, in one step or two."""
    states = random_states(1, n_tokens, 3, seed=n_tokens).double()
    count = torch.tensor([n_tokens])
    coarser = ratio * factor * second
    expected = pool_states(states, count, coarser)[0]
    finer = pool_states(states, count, ratio)[0]
    assert_close(repool_states(finer, n_tokens, ratio, coarser), expected)
    between = repool_states(finer, n_tokens, ratio, ratio * factor)
    assert_close(repool_states(between, n_tokens, ratio * factor, coarser), expected)


@pytest.mark.parametrize("ratio", [0, -4, 2, 3, 6])
def test_pooling_again_needs_a_multiple(ratio: int) -> None:
    with pytest.raises(SettingsError, match=f"multiple of the stored one, 4, but got {ratio}"):
        repool_states(random_states(5, 3), 17, 4, ratio)


@pytest.mark.parametrize("ratio", [2, 4, 8, 32])
def test_finer_encodings_serve_coarser_requests(make_reranker: Callable[..., KalmReranker], ratio: int) -> None:
    """An encoding stored at ratio 1 scores like one made at the coarser ratio, whatever its length."""
    passages = ["", "one", "word " * 7, "theory of wings " * 20]
    finest = make_reranker(compression_ratio=1).encode_passages(passages)
    coarse = make_reranker(compression_ratio=ratio)
    assert coarse.score("query", finest) == pytest.approx(coarse.score("query", passages), abs=1e-6)
    assert [e.pool(ratio).n_tokens for e in finest] == [e.n_tokens for e in coarse.encode_passages(passages)]


@given(window=st.integers(1, 20), length=st.integers(1, 40))
def test_encoder_windows_are_those_of_transformers(window: int, length: int) -> None:
    """Half behind, half ahead, and one side longer for even widths; None only where it hides nothing."""
    may_look = sliding_window_mask_function(window, is_causal=False)
    expected = torch.tensor([[may_look(0, 0, q, k) for k in range(length)] for q in range(length)])
    seen = torch.zeros(length, length, dtype=torch.bool)
    for block in passage_attention._blocks(torch.tensor([length]), window, torch.zeros(1)):
        part = seen[block.queries, block.keys]
        part |= True if block.bias is None else block.bias[0] == 0
        assert (block.bias is None) == bool(part.all())
    assert torch.equal(seen, expected)
    assert all(block.bias is None for block in passage_attention._blocks(torch.tensor([length]), None, torch.zeros(1)))


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(window=st.integers(1, 30), block=st.integers(1, 20), n_tokens=st.lists(st.integers(1, 60), min_size=1, max_size=3))
def test_blocks_of_queries_see_what_they_see_together(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, window: int, block: int, n_tokens: list[int]
) -> None:
    """Windows of either parity, blocks that do not divide the length, and passages of several lengths."""
    config = replace(runtime.checkpoint.encoder_config, sliding_window=window)
    token_ids = torch.cat([PROMPT[0].repeat(3)[:n] for n in n_tokens])

    def encode(query_block: int) -> torch.Tensor:
        monkeypatch.setattr(passage_attention, "WINDOW_BLOCK", query_block)
        monkeypatch.setattr(passage_attention, "WHOLE_BLOCK", query_block)
        return encoder.encode(token_ids, n_tokens, runtime.embedding(), runtime.stack("encoder"), config)

    assert_close(encode(block), encode(1000), atol=1e-5, rtol=1e-5)


@given(
    window=st.integers(1, 12),
    n_read=st.integers(0, 15),
    n_new=st.integers(1, 15),
    n_states=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    kind=st.sampled_from(["full_attention", "sliding_attention"]),
)
def test_decoder_windows(window: int, n_read: int, n_new: int, n_states: list[int], kind: str) -> None:
    """A prompt token sees all real passage states, and prompt tokens up to itself, in a window if the layer has one."""
    width = max(n_states)
    cache = PaddedKVCache(width, n_read, (), (), torch.tensor(n_states))
    positions = n_read + torch.arange(n_new)[None]
    expected = torch.tensor(
        [
            [
                [s < n for s in range(width)]
                + [k <= q and (kind == "full_attention" or q - k < window) for k in range(n_read + n_new)]
                for q in range(n_read, n_read + n_new)
            ]
            for n in n_states
        ]
    )
    mask = decoder._mask(kind, cache, positions, n_new, window)
    assert torch.equal(torch.ones_like(expected) if mask is None else mask.expand_as(expected), expected)


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("n_kv_heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passages_that_share_a_batch_do_not_change_each_other(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, n_kv_heads: int, is_packed: bool
) -> None:
    """In any order, alone or with others, with oneDNN, or padded to like lengths without it; within and beyond windows."""
    monkeypatch.setattr(passage_attention, "LIKE", 0.5)
    draw = torch.Generator().manual_seed(0)
    config = replace(make_config("toy"), n_kv_heads=n_kv_heads, sliding_window=9)
    weights, embedding = draw_stack(config, dtype, draw), draw_embedding(config, draw)
    n_tokens = [3, 60, 23, 60, 31, 1, 16]
    passages = [torch.randint(VOCABULARY, (n,), generator=draw) for n in n_tokens]
    used = pack_stack(weights) if is_packed else weights
    together = encoder.encode(torch.cat(passages), n_tokens, embedding, used, config).split(n_tokens)
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    for ids, states in zip(passages, together, strict=True):
        alone = encoder.encode(ids, [len(ids)], embedding, weights, config)
        assert_close(states, alone, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [1, 4, 9, 40])
@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, N_PROMPT - 1), second_cut=st.integers(1, N_PROMPT - 1))
def test_a_prompt_continues_where_the_cache_ends(runtime: Runtime, window: int, cut: int, second_cut: int) -> None:
    """Prompt in one piece, or prefilled in two or three, gives the same logits, within and beyond windows."""
    config = replace(runtime.checkpoint.decoder_config, sliding_window=window)
    weights, embedding = runtime.stack("decoder"), runtime.embedding()
    head = embedding.tokens[[7, 8]]
    cache = project_passages(random_states(3, 6, config.hidden_width), torch.tensor([1, 4, 6]), weights, config)

    def logits(cache: PaddedKVCache, ids: torch.Tensor) -> torch.Tensor:
        return answer_logits(cache, ids, torch.tensor([ids.shape[1] - 1]), embedding, weights, head, config)

    first, last = sorted((cut, second_cut))
    whole = logits(cache, PROMPT)
    prefilled = prefill(cache, PROMPT[:, :first], embedding, weights, config)
    if first < last:
        prefilled = prefill(prefilled, PROMPT[:, first:last], embedding, weights, config)
    assert_close(logits(prefilled, PROMPT[:, last:]), whole, atol=1e-5, rtol=1e-5)


def test_prompts_padded_on_the_right(runtime: Runtime) -> None:
    """In one batch each row is read at its own last token, and what stands behind it does not matter."""
    config, weights, embedding = runtime.checkpoint.decoder_config, runtime.stack("decoder"), runtime.embedding()
    head = embedding.tokens[[7, 8]]
    states, n_states = random_states(2, 5, config.hidden_width), torch.tensor([5, 2])
    ids = torch.cat((torch.nn.functional.pad(PROMPT[:, :12], (0, N_PROMPT - 12)), PROMPT))
    cache = project_passages(states, n_states, weights, config)
    together = answer_logits(cache, ids, torch.tensor([11, N_PROMPT - 1]), embedding, weights, head, config)
    for row, length in enumerate((12, N_PROMPT)):
        cache = project_passages(states[row : row + 1], n_states[row : row + 1], weights, config)
        alone = answer_logits(cache, PROMPT[:, :length], torch.tensor([length - 1]), embedding, weights, head, config)
        assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)


def test_pooling_to_one_state_takes_no_more_memory_than_the_passage():
    """The largest ratio of the format pads to the passage, not to itself."""
    states = torch.arange(10.0).view(5, 2)
    torch.testing.assert_close(repool_states(states, 5, 1, 2**17), states.mean(0, keepdim=True))
    torch.testing.assert_close(repool_states(states, 5, 1, 2**60), states.mean(0, keepdim=True))
