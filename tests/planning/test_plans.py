"""A plan's sizes are those of real encodings, prefix states and stores."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from uuid import UUID

import pytest
import torch
from benchmarks import plan as rows
from benchmarks import stores_page
from benchmarks.results import Results
from benchmarks.store_kinds import BATCH, Kind, Row, all_kinds
from tools.real_shape import SHAPES
from transformers import T5Gemma2DecoderConfig

from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.core.checkpoint.t5gemma2 import stack_config
from kalm_integrations.core.settings import CODEC_NAMES, MAX_TOKENS, EncoderSettings, QuerySettings
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.errors import SettingsError
from kalm_integrations.planning.arithmetic import Widths
from kalm_integrations.planning.plans import CANDIDATES, MEASURED, Plan, make_plan, read_measured
from kalm_integrations.planning.reading import read_of
from kalm_integrations.planning.shapes import PUBLISHED, shape_of
from kalm_integrations.planning.sizes import QUEUED
from kalm_integrations.planning.speed import BENCHMARK_CORES, Speed, product_rate
from kalm_integrations.samples import XQUAD_EN

TOLERANCE = 0.15
N_PASSAGES = 100
PREFIX_DTYPES = get_args(get_args(QuerySettings.model_fields["prefix_dtype"].annotation)[0])


def plan_for(*arguments: Any, **settings: Any) -> Plan:
    """Make a plan for the benchmark's machine, which need not be measured."""
    return make_plan(*arguments, **{"speed": 1.0, **settings})


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(Collection.read(XQUAD_EN).passages.values())[:N_PASSAGES]


@pytest.fixture(scope="module")
def encodings(texts: list[str]) -> list[EncodedPassage]:
    """Of real passages, by pico."""
    return KalmReranker.from_pretrained("pico").encode_passages(texts)


@pytest.fixture(scope="module")
def kinds() -> Iterator[dict[str, Callable[[Path], Kind]]]:
    with all_kinds() as made:
        yield made


def weigh(kind: Kind, passages: Sequence[Row]) -> dict[str, int]:
    """Fill a store, close it and weigh it."""
    for start in range(0, len(passages), BATCH):
        kind.add(passages[start : start + BATCH])
    kind.close()
    sizes = kind.weigh()
    kind.open()
    kind.end()
    return sizes


def stored_in(kind: Kind, encoding: EncodedPassage) -> str | bytes:
    """What a store holds of an encoding."""
    if not kind.holds_payloads:
        return encoding.to_metadata()
    payloads: dict[str, bytes] = {}
    encoding.to_metadata(payloads)
    return payloads.popitem()[1]


@pytest.mark.parametrize("codec", ["fp16", "int8"])
@pytest.mark.parametrize("name", ["Chroma", "Qdrant, local", "PGVector", "FAISS", "Redis", "LMDB payload store"])
def test_real_stores_take_what_the_plan_says(
    kinds: dict[str, Callable[[Path], Kind]],
    texts: list[str],
    encodings: list[EncodedPassage],
    tmp_path: Path,
    name: str,
    codec: str,
):
    """Real encodings of pico, within 15 %: what a store takes with them, less what it takes without."""
    bare, full = (kinds[name](folder) for folder in (tmp_path / "bare", tmp_path / "full") if not folder.mkdir())
    keys = [str(UUID(int=index)) for index in range(len(texts))]
    values = [stored_in(full, replace(encoding, codec=codec)) for encoding in encodings]
    without = weigh(bare, [Row(key, text, None) for key, text in zip(keys, texts, strict=True)])
    taken = weigh(full, [Row(*row) for row in zip(keys, texts, values, strict=True)])
    mean = round(sum(encoding.n_tokens for encoding in encodings) / len(encodings))
    planned = plan_for("pico", len(texts), mean, codec=codec).stores
    assert planned[name] == pytest.approx(taken["disk"] - without["disk"], rel=TOLERANCE)
    if "memory" in taken:
        assert planned[f"{name}, in memory"] == pytest.approx(taken["memory"] - without["memory"], rel=TOLERANCE)


def test_characters_are_those_of_real_strings(encodings: list[EncodedPassage]):
    """At every codec, and at every ratio that an encoding can be pooled to."""
    encoding = max(encodings, key=lambda each: each.n_tokens)
    made = plan_for("pico", 7, encoding.n_tokens, codec="int8")
    assert list(made.lengths) == [1, 2, 4, 8, 16, 32]
    assert all(list(by_codec) == list(CODEC_NAMES) for by_codec in made.lengths.values())
    for ratio in (4, 8, 32):
        for codec, length in made.lengths[ratio].items():
            assert len(replace(encoding.pool(ratio), codec=codec).to_metadata()) == length
    assert made.characters == made.lengths[4]["int8"]
    assert made.total == 7 * made.characters
    assert made.memory.encoding == replace(encoding, codec="int8").as_stored().nbytes
    assert made.states == len(encoding.states)


@pytest.mark.parametrize("dtype", PREFIX_DTYPES)
@pytest.mark.parametrize("ratio", [1, 4])
def test_prefix_states_are_as_large_as_planned(make_reranker: Callable[..., KalmReranker], dtype: str, ratio: int):
    """Grouped heads, a prompt of the checkpoint's own tokenizer, an odd number of tokens."""
    reranker = make_reranker(prefix_dtype=dtype, compression_ratio=ratio, device="cpu")
    [encoding] = reranker.encode_passages(["high angles of attack in theory and experiment " * 3])
    reranker.prepare([encoding])
    made = plan_for(str(reranker.runtime.checkpoint.folder), 1, encoding.n_tokens, ratio=ratio, prefix_dtype=dtype)
    assert made.memory.prefix == reranker._ranker.scorer.prefixes.nbytes
    assert made.memory.prefixes == 2**30 // made.memory.prefix


def test_published_shapes_are_those_of_their_configurations():
    for name, text in SHAPES.items():
        config = stack_config(T5Gemma2DecoderConfig(**text), 0, Path())
        assert PUBLISHED[name] == (Widths.of(config), config.n_kv_heads)
    assert shape_of("nano-r2").max_ratio == 128
    assert shape_of("KaLM-Embedding/KaLM-Reranker-V1-Small") == shape_of("small")


def test_prefix_states_of_nano_are_what_the_benchmark_weighed():
    run = json.loads(stores_page.RATES.read_text())["cpu nano"]
    for measured in run["prefix_states"]:
        made = plan_for("nano", 1, measured["n_tokens"], prefix_dtype=measured["dtype"])
        assert made.memory.prefix == measured["bytes"]


def test_seconds_are_those_of_the_benchmark_on_its_machine():
    """At a length that was measured; a machine of twice the speed takes half of them."""
    results = Results(json.loads(stores_page.RATES.read_text())["cpu nano"])
    nano, speed = shape_of("nano"), read_measured()["speed"]
    for dtype in ("float32", "bfloat16"):
        for n_tokens in (256, 1024):
            cold, pooled, prefix = (
                results.find(name, dtype, n_tokens).seconds for name in (rows.OURS_COLD, rows.OURS_POOLED, rows.OURS_PREFIX)
            )
            one, two = (Speed(scale, speed[dtype]["rates"]) for scale in (1, 2))
            expected = {"nothing": cold, "encodings": pooled, "prefix states": prefix}
            read = read_of(n_tokens, EncoderSettings())
            assert one.query_seconds(nano, CANDIDATES, read, 4) == pytest.approx(expected, rel=1e-3)
            assert one.encode_seconds(nano, 1000, read) == pytest.approx(10 * (cold - pooled), rel=1e-3)
            assert two.encode_seconds(nano, 500, read) == pytest.approx(one.encode_seconds(nano, 250, read))


def test_larger_models_and_longer_passages_take_longer():
    plans = [plan_for(model, 10, tokens) for model in ("nano", "small", "large") for tokens in (64, 300, 2000)]
    for before, after in itertools.pairwise(plans):
        if before.model == after.model:
            assert before.memory.prefix < after.memory.prefix
            assert before.characters < after.characters
    for made in plans:
        query = made.seconds.query
        assert query["nothing"] > query["encodings"] > query["prefix states"] > 0


def test_this_machine_is_measured_where_no_speed_is_given(monkeypatch: pytest.MonkeyPatch):
    """By the product whose rate the benchmark has, in both dtypes."""
    assert product_rate(torch.bfloat16, 0.01) > 0
    rate = read_measured()["speed"]["float32"]["product"]
    monkeypatch.setattr("kalm_integrations.planning.speed.product_rate", lambda _dtype, _seconds: 2 * rate)
    measured, given = make_plan("nano", 10, 256), make_plan("nano", 10, 256, speed=2)
    per_core = measured.seconds.passages_per_hour_and_core
    assert replace(measured, seconds=replace(measured.seconds, passages_per_hour_and_core=0)) == replace(
        given, seconds=replace(given.seconds, passages_per_hour_and_core=0)
    )
    assert measured.seconds.encoding == plan_for("nano", 5, 256).seconds.encoding
    assert per_core * measured.seconds.encoding == pytest.approx(10 * 3600 / torch.get_num_threads())
    assert given.seconds.passages_per_hour_and_core * given.seconds.encoding == pytest.approx(10 * 3600 / BENCHMARK_CORES)


def test_limits_name_the_finest_ratio_that_fits():
    made = plan_for("nano", 1, 256)
    assert made.room == {
        "OpenSearch, Elasticsearch": 32_766,
        "Milvus, static schema": 65_535,
        "Pinecone, less the text": 40_960 - 1152,
    }
    for name, room in made.room.items():
        for codec, ratio in made.finest[name].items():
            fitting = [each for each in made.lengths if made.lengths[each][codec] <= room]
            assert ratio == min(fitting, default=None)
    assert made.finest["OpenSearch, Elasticsearch"]["fp16"] == 16
    assert set(plan_for("large", 1, MAX_TOKENS).finest["OpenSearch, Elasticsearch"].values()) == {None}


def test_queued_copies_are_counted_once():
    """Chroma's room for what waits does not grow with the collection."""
    plans = {n: plan_for("nano", n, 256).stores["Chroma"] for n in (QUEUED, 2 * QUEUED, 3 * QUEUED)}
    first, second, third = plans.values()
    assert third - second == pytest.approx(second - first, abs=2)
    assert first > 1.3 * (second - first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"passages": 0}, "passages must be a whole number from 1 to .*, but got 0"),
        ({"tokens": MAX_TOKENS + 1}, "tokens must be a whole number from 1 to 131,072, but got 131073"),
        ({"ratio": 0}, "compression_ratio: .*, but got 0"),
        ({"codec": "zip"}, "storage_codec must be one of .*, but got 'zip'"),
        ({"prefix_dtype": "int3"}, "prefix_dtype: .*, but got 'int3'"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"speed": 0.0}, "speed must be positive, .*, but got 0.0"),
        ({"model": "who/knows"}, "a model to plan for must be one of pico, nano, .*, or a local folder, but got 'who/knows'"),
    ],
)
def test_what_cannot_be_planned_for_is_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        plan_for(**{"model": "nano", "passages": 10, "tokens": 256, **arguments})


def test_constants_and_tables_are_those_of_the_results():
    """`python -m benchmarks.stores render`, in tests/, changes nothing."""
    measured = json.loads(stores_page.RESULTS.read_text(encoding="utf-8"))
    runs = json.loads(stores_page.RATES.read_text(encoding="utf-8"))
    assert MEASURED.read_text(encoding="utf-8") == stores_page.make_constants(measured, runs)
    page = stores_page.PAGE.read_text(encoding="utf-8")
    assert page == stores_page.updated_page(measured, page)
    assert max(error for _, _, error in stores_page.fits(measured)) < TOLERANCE
