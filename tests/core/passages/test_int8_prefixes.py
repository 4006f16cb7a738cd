"""Prefix states in int8: a quarter of the bytes, close scores, and nothing in a store that fails a query."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from tools.checkpoints import TEXTS

from kalm_integrations import KalmReranker
from kalm_integrations.core.model import kv_cache
from kalm_integrations.core.model.prefix_states import PrefixStates, keep, kept_bytes
from kalm_integrations.core.passages import prefixes
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import find_candidates
from kalm_integrations.errors import NonFiniteScoreError
from kalm_integrations.samples import XQUAD_EN

MakeReranker = Callable[..., KalmReranker]

PASSAGES = [*TEXTS[:3], "", "one"]
FIRST, SECOND = "Which team won?", "who gave up 308 points?"
INT8 = {"prefix_dtype": "int8"}


def restore(states: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return states (n_layers, 2, n_heads, n_tokens, width) after they were kept in int8."""
    target = torch.empty(states.shape, dtype=dtype)
    PrefixStates(0, *keep(states, torch.int8)).write_to(target, slice(None))
    return target


@pytest.mark.parametrize("width", [256, 128, 24, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_off_by_more_than_half_a_step(width: int, dtype: torch.dtype) -> None:
    """Whatever the magnitude, from nothing to the bound of what is stored; zeros stay zeros."""
    magnitudes = torch.tensor([0.0, 1e-30, 1.0, 2.0**40])[:, None]
    states = (torch.randn(2, 2, 3, 4, width, generator=torch.Generator().manual_seed(0)) * magnitudes).to(dtype)
    errors = (restore(states).double() - states.double()).abs().amax(-1)
    assert bool((errors <= states.double().abs().amax(-1) / 127 * 0.51).all())


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(number: float) -> None:
    states = torch.ones(1, 2, 1, 3, 64)
    states[0, 0, 0, 1, 5] = number
    kept = restore(states)
    assert not bool(kept[0, 0, 0, 1, :32].isfinite().any())
    assert bool(kept[0, 1].isfinite().all())
    assert bool(restore(torch.zeros(1, 2, 1, 3, 64)).eq(0).all())


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_broken_model_still_fails(make_reranker: MakeReranker, number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = make_reranker(**INT8)
    layer = reranker.runtime.stack("decoder").layers[0]
    broken = layer.k_norm.clone()
    broken[0] = number
    monkeypatch.setitem(vars(layer), "k_norm", broken)
    for _ in range(2):
        with pytest.raises(NonFiniteScoreError):
            reranker.score(FIRST, PASSAGES)


def test_bytes_at_the_shape_of_nano() -> None:
    """18 layers, one head of 256 features, 64 states and a prompt of 53 tokens: 4.1 MiB in float32."""
    states = torch.randn(1, 1, 117, 256)
    cache = kv_cache.PaddedKVCache(64, 53, (states,) * 18, (states,) * 18, torch.tensor([64]))
    [exact], [kept] = cache.split(torch.float32), cache.split(torch.int8)
    assert kept.nbytes <= 1.1 * 2**20 < 4 * 2**20 < exact.nbytes
    assert kept.nbytes == kept_bytes(exact.pairs.shape, torch.int8)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_close_and_do_not_depend_on_who_came_first(
    make_reranker: MakeReranker, at_once: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first query scores what is kept, too; also where all layers are gathered together, as on a GPU."""
    monkeypatch.setattr(kv_cache, "gathers_at_once", lambda _: at_once)
    warm, exact = make_reranker(dtype=dtype, **INT8), make_reranker(dtype=dtype)
    tolerance = 5e-3 if dtype == "float32" else 3e-2
    assert warm.score(FIRST, PASSAGES) == pytest.approx(exact.score(FIRST, PASSAGES), abs=tolerance)
    cold = make_reranker(dtype=dtype, **INT8).score(SECOND, PASSAGES)
    assert warm.score(SECOND, PASSAGES) == pytest.approx(cold, abs=1e-6)
    assert warm.stats.prefix_hits == len(PASSAGES)


def test_real_questions_are_scored_much_the_same() -> None:
    """pico on questions of XQuAD, candidates of BM25; with 200 questions scores differ by .0001 on average."""
    collection = Collection.read(XQUAD_EN)
    candidates = find_candidates(collection, top_k=20, n_queries=8)
    rerankers = [KalmReranker.from_pretrained("pico", prefix_dtype=name) for name in ("float32", "int8")]
    differences = []
    for found in candidates.values():
        texts = [collection.passages[i] for i in found.ids]
        exact, kept = (reranker.score(found.query, texts) for reranker in rerankers)
        differences += [abs(a - b) for a, b in zip(exact, kept, strict=True)]
    assert 0 < max(differences) <= 1e-2
    assert sum(differences) / len(differences) <= 3e-4


def test_a_small_cache_counts_the_scales(make_reranker: MakeReranker) -> None:
    """What the cache holds is what was reckoned with: exactly as many passages as fit are scored from it."""
    whole = make_reranker(**INT8)
    whole.score(FIRST, PASSAGES)
    full = whole._ranker.scorer.prefixes.nbytes
    for missing, n in ((0, len(PASSAGES)), (1, len(PASSAGES) - 1)):
        reranker = make_reranker(prefix_cache_bytes=full - missing, **INT8)
        reranker.score(FIRST, PASSAGES)
        assert len(reranker._ranker.scorer.prefixes) == reranker.stats.prefix_misses == n


def test_states_on_disk_give_the_same_scores(make_reranker: MakeReranker) -> None:
    store: dict[str, bytes] = {}
    first = make_reranker(prefix_store=store, **INT8)
    first.prepare(PASSAGES)
    second = make_reranker(prefix_store=store, **INT8)
    assert second.score(FIRST, PASSAGES) == first.score(FIRST, PASSAGES)
    assert (second.stats.prefix_store_hits, second.stats.prefix_misses) == (len(PASSAGES), 0)
    other = make_reranker(prefix_store=store, prefix_dtype="float16")
    other.score(FIRST, PASSAGES)
    assert (other.stats.prefix_store_hits, other.stats.prefix_corrupt) == (0, 0), "kept apart"


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 3e38, -1e30, 1e12])
def test_a_forged_scale_is_refused_and_replaced(make_reranker: MakeReranker, scale: float) -> None:
    """It has a right checksum, and would overflow."""
    store: dict[str, bytes] = {}
    make_reranker(prefix_store=store, **INT8).prepare(PASSAGES)
    valid = dict(store)
    for name, value in valid.items():
        data = bytearray(value[len(prefixes._head(b"", name)) :])
        data[-2:] = torch.tensor([scale]).bfloat16().view(torch.uint8).numpy().tobytes()
        store[name] = prefixes._head(bytes(data), name) + bytes(data)
    reranker = make_reranker(prefix_store=store, **INT8)
    assert reranker.score(FIRST, PASSAGES) == pytest.approx(make_reranker(**INT8).score(FIRST, PASSAGES), abs=1e-6)
    assert reranker.stats.prefix_corrupt == len(PASSAGES)
    assert store == valid
