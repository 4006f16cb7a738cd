"""One loaded model per checkpoint, device and dtype: shared, safe under threads, and honest about what it cannot do."""

from __future__ import annotations

import gc
import math
import shutil
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from kalm_integrations import KalmReranker
from kalm_integrations.core import passes
from kalm_integrations.core.runtime import choose_device, get_runtime
from kalm_integrations.errors import NonFiniteScoreError, OutOfMemoryError, PassError, SettingsError

MakeReranker = Callable[..., KalmReranker]

QUERY = "who won the Super Bowl?"
TEXTS = [f"Passage number {i} " + "about the Panthers defense " * (i % 4) for i in range(12)]


# --- sharing


def test_rerankers_of_a_checkpoint_share_one_runtime(make_reranker, tiny_checkpoint):
    reranker = make_reranker()
    others = [
        make_reranker(compression_ratio=8, instruction="Other.", cache_bytes=0),
        make_reranker(str(tiny_checkpoint)),
        make_reranker(tiny_checkpoint / ".." / tiny_checkpoint.name),
        make_reranker(device="cpu"),
        make_reranker(device="cpu:0"),
        make_reranker(device=torch.device("cpu")),
        make_reranker(dtype="fp32"),
        make_reranker(dtype=torch.float32),
    ]
    assert all(other.runtime is reranker.runtime for other in others)


def test_another_dtype_or_checkpoint_is_another_runtime(make_reranker, other_checkpoint):
    runtimes = [make_reranker().runtime, make_reranker(dtype="bf16").runtime, make_reranker(other_checkpoint).runtime]
    assert len({id(runtime) for runtime in runtimes}) == 3


def test_a_folder_written_anew_is_another_runtime(tiny_checkpoint, other_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    before = KalmReranker.from_pretrained(folder)
    scores = before.score(QUERY, TEXTS)
    shutil.copy(other_checkpoint / "model.safetensors", folder / "model.safetensors")
    after = KalmReranker.from_pretrained(folder)
    assert after.runtime is not before.runtime
    assert after.fingerprint != before.fingerprint
    assert after.score(QUERY, TEXTS) != scores


def test_a_runtime_that_nobody_uses_is_released(tiny_checkpoint):
    reranker = KalmReranker.from_pretrained(tiny_checkpoint, dtype="bfloat16")
    reranker.score(QUERY, TEXTS[:2])
    released = weakref.ref(reranker.runtime)
    weights = weakref.ref(reranker.runtime.stack("decoder"))
    del reranker
    gc.collect()
    assert released() is None
    assert weights() is None


def test_runtimes_made_at_once_by_threads_are_one(tiny_checkpoint):
    barrier = threading.Barrier(8)

    def open_it(_: int) -> KalmReranker:
        barrier.wait()
        return KalmReranker.from_pretrained(tiny_checkpoint, dtype="bfloat16")

    with ThreadPoolExecutor(8) as pool:
        rerankers = list(pool.map(open_it, range(8)))
    assert len({id(reranker.runtime) for reranker in rerankers}) == 1


def test_weights_are_loaded_when_first_needed(other_checkpoint):
    reranker = KalmReranker.from_pretrained(other_checkpoint)
    assert (reranker.runtime.loaded, reranker.runtime.nbytes) == ((), 0)
    [encoding] = reranker.encode_passages(["a"])
    assert reranker.runtime.loaded == ("encoder",)
    del reranker
    gc.collect()

    reader = KalmReranker.from_pretrained(other_checkpoint)
    reader.score(QUERY, [encoding])
    assert reader.runtime.loaded == ("decoder",)
    reader.warm_up()
    assert set(reader.runtime.loaded) == {"encoder", "decoder"}
    assert reader.runtime.nbytes > 0


# --- threads


def test_eight_threads_get_the_scores_of_one_and_encode_each_passage_once(make_reranker):
    queries = [f"{QUERY} {i % 2}" for i in range(8)]
    right = [make_reranker().score(query, TEXTS) for query in queries[:2]]
    shared = make_reranker()
    barrier = threading.Barrier(8)

    def work(thread: int) -> list[float]:
        barrier.wait()
        # Every thread starts elsewhere, so that they miss the same passages in different orders.
        scores = shared.score(queries[thread], TEXTS[thread:] + TEXTS[:thread])
        return scores[len(TEXTS) - thread :] + scores[: len(TEXTS) - thread]

    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(work, range(8)))
    for i, row in enumerate(scores):
        assert row == pytest.approx(right[i % 2], abs=1e-6)
    stats = shared.stats
    assert (stats.passages_encoded, stats.cache_misses) == (len(TEXTS), len(TEXTS))
    assert (stats.cache_hits, stats.passages_scored) == (7 * len(TEXTS), 8 * len(TEXTS))


def test_eight_threads_that_ask_the_same_get_the_same_scores(make_reranker):
    """But for the last bit: what shares a batch decides the order of sums."""
    reranker = make_reranker()
    right = reranker.score(QUERY, TEXTS)
    with ThreadPoolExecutor(8) as pool:
        for scores in pool.map(lambda _: reranker.score(QUERY, TEXTS), range(16)):
            assert scores == pytest.approx(right, abs=1e-6)


def test_threads_with_rerankers_of_their_own_share_the_model(make_reranker):
    right = make_reranker().score(QUERY, TEXTS)

    def work(ratio: int) -> list[float]:
        return make_reranker(compression_ratio=ratio).score(QUERY, TEXTS)

    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(work, [4, 1, 4, 2, 4, 8, 4, 16]))
    assert all(row == pytest.approx(right, abs=1e-6) for row in scores[::2])


# --- memory


def fail_above(limit: int, function: Callable, sizes: list[int], error: Exception) -> Callable:
    """Wrap a pass of the model so that batches of more than `limit` passages run out of memory."""

    def run(rows: torch.Tensor, *args):
        # The encoder's passages lie end to end, and their lengths come behind.
        sizes.append(len(args[0]) if function.__name__ == "encode" else len(rows))
        if sizes[-1] > limit:
            raise error
        return function(rows, *args)

    return run


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("name", ["encode", "project_passages"], ids=["encoding", "scoring"])
def test_out_of_memory_halves_the_batch_and_keeps_the_order(make_reranker, monkeypatch, name, error):
    one_by_one = make_reranker()
    right = [one_by_one.score(QUERY, [text])[0] for text in TEXTS]
    sizes: list[int] = []
    monkeypatch.setattr(passes, name, fail_above(3, getattr(passes, name), sizes, error))
    reranker = make_reranker()
    assert reranker.score(QUERY, TEXTS) == pytest.approx(right, abs=1e-6)
    # 12 and 6 do not fit; 3 does, and stays for the rest of the call.
    assert sizes == [12, 6, 3, 3, 3, 3]
    assert reranker.stats.passages_encoded == len(TEXTS)


def test_a_single_passage_that_does_not_fit_is_an_error(make_reranker, monkeypatch):
    sizes: list[int] = []
    error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(passes, "encode", fail_above(0, passes.encode, sizes, error))
    with pytest.raises(OutOfMemoryError, match="CUDA out of memory"):
        make_reranker().score(QUERY, TEXTS[:4])
    assert sizes == [4, 2, 1]


def test_other_errors_are_not_taken_for_a_lack_of_memory(make_reranker, monkeypatch):
    sizes: list[int] = []
    error = RuntimeError("shapes cannot be multiplied")
    monkeypatch.setattr(passes, "encode", fail_above(0, passes.encode, sizes, error))
    with pytest.raises(PassError, match="shapes"):
        make_reranker().score(QUERY, TEXTS)
    assert sizes == [len(TEXTS)]


def test_a_failed_call_leaves_nothing_behind(make_reranker, monkeypatch):
    """The engine goes on, and nothing half-made is in the cache."""
    reranker = make_reranker()
    with monkeypatch.context() as patch:
        patch.setattr(passes, "encode", fail_above(0, passes.encode, [], RuntimeError("broken")))
        with pytest.raises(PassError, match="broken"):
            reranker.score(QUERY, TEXTS)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(reranker.score, QUERY, TEXTS).result(timeout=60) == make_reranker().score(QUERY, TEXTS)


def test_a_cached_encoding_holds_its_own_states_only(make_reranker):
    """Rows of a batch are views of it: kept as such they would keep the whole batch alive."""
    for encoding in make_reranker().encode_passages(TEXTS):
        assert encoding.states.untyped_storage().nbytes() == encoding.nbytes


# --- numbers


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error_and_never_a_score(tiny_checkpoint, tmp_path, bad):
    """The checkpoint's soft cap would make a finite number of an infinite logit."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.decoder.norm.weight"][0] = bad
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    reranker = KalmReranker.from_pretrained(folder)
    for call in (reranker.score, reranker.rank):
        with pytest.raises(NonFiniteScoreError, match=r"3 of 3 passages gave NaN or infinity in torch\.float32"):
            call(QUERY, TEXTS[:3])


def test_bfloat16_scores_are_close_and_its_encodings_are_the_same_kind(make_reranker):
    exact, half = make_reranker(storage_codec="fp32"), make_reranker(dtype="bfloat16", storage_codec="fp32")
    assert half.score(QUERY, TEXTS) == pytest.approx(exact.score(QUERY, TEXTS), abs=0.05)
    assert half.score(QUERY, exact.encode_passages(TEXTS)) == pytest.approx(exact.score(QUERY, TEXTS), abs=0.05)
    assert {encoding.states.dtype for encoding in half.encode_passages(TEXTS)} == {torch.float32}


# --- devices and dtypes


@pytest.mark.parametrize("dtype", ["float16", "fp16", "half", torch.float16])
def test_float16_is_refused_with_the_reason(make_reranker, dtype):
    with pytest.raises(SettingsError, match=r"dtype must be one of float32, .* overflows in float16"):
        make_reranker(dtype=dtype)


@pytest.mark.parametrize("dtype", ["float64", torch.int64, "", "fp8", 32])
def test_an_unknown_dtype_is_refused(make_reranker, dtype):
    with pytest.raises(SettingsError, match="dtype must be one of float32"):
        make_reranker(dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "", "cpu cpu", [], 3.5, object()], ids=repr)
def test_what_is_no_device_is_refused(make_reranker, device):
    with pytest.raises(SettingsError, match="device must be a torch device such as 'cpu' or 'cuda:0'"):
        make_reranker(device=device)


@pytest.mark.parametrize("device", ["cuda:99", torch.device("cuda", 99)])
def test_a_device_that_is_not_there_is_refused(make_reranker, device):
    with pytest.raises(SettingsError, match=r"was asked for, but there are \d+ CUDA devices; use device='cpu'"):
        make_reranker(device=device)


def test_bad_devices_and_dtypes_are_refused_before_a_checkpoint_is_looked_for():
    for settings in ({"device": "gpu"}, {"dtype": "float16"}):
        with pytest.raises(SettingsError):
            get_runtime("no/such-checkpoint", **settings)


def test_a_gpu_is_taken_where_there_is_one():
    device = choose_device(None)
    assert device == (torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def test_states_that_are_not_finite_are_an_error_at_ingest(tiny_checkpoint, tmp_path):
    """Not only when they are stored or scored: nobody keeps them in memory either."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.encoder.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteScoreError, match="encoder states must be finite"):
        KalmReranker.from_pretrained(folder).encode_passages(["a passage"])
