"""The benchmark programs run end to end at toy size; the committed page is what they make of the committed results."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import callers, floor, helpers, ingest, plan, serving, steps, stores, stores_page, trials, windows
from benchmarks.__main__ import PARTS, main
from benchmarks.bars import BARS
from benchmarks.parts import FUNCTIONS, REST
from benchmarks.render import RESULTS, make_page
from benchmarks.results import Results
from benchmarks.rows import BUILDERS, Models
from benchmarks.store_kinds import Kind, LangChainFaiss, LlamaIndexSimple, Lmdb
from benchmarks.ways import DTYPES, POOLED, PREFIX, WAYS
from benchmarks.workload import Workload, make_workload_checkpoint
from tools.parity import TOLERANCE

from kalm_integrations import KalmReranker
from kalm_integrations.planning.sizes import StoreModel


@pytest.fixture(scope="module")
def results_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("docs") / "benchmarks" / "results.json"
    main(["measure", "--shape", "toy", "--results", str(path)])
    steps.main(["--shape", "toy", "--candidates", "3", "--rounds", "1", "--output", str(path.with_name("steps.json"))])
    toy_blocks = ["--shape", "toy", "--passages", "2", "--rounds", "1", "--blocks", "4"]
    windows.main([*toy_blocks, "--output", str(path.with_name("windows.json"))])
    toy_texts = ["--shape", "toy", "--passages", "2", "--tokens", "12", "--rounds", "1"]
    helpers.main([*toy_texts, "--output", str(path.with_name("helpers.json"))])
    toy_passages = ["--shape", "toy", "--passages", "4", "--rounds", "1", "--seconds", "0.01"]
    for name in ("ingest", "ingest_before", "ingest_cuda"):
        ingest.main([*toy_passages, "--output", str(path.with_name(f"{name}.json"))])
    callers.main(["--shapes", "toy", "--output", str(path.with_name("callers.json"))])
    serving.main(
        ["--shapes", "toy", "--rounds", "1", "--memory-seconds", "1", "--output", str(path.with_name("serving.json"))]
    )
    main(["render", "--results", str(path)])
    return path


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> Workload:
    workload = Workload(make_workload_checkpoint("toy", tmp_path_factory.mktemp("workload")))
    reranker = KalmReranker.from_pretrained(workload.folder, storage_codec="fp32")
    workload.encodings(reranker, 12, 3)
    return workload


@pytest.fixture(scope="module")
def run(results_path: Path) -> dict[str, Any]:
    return json.loads(results_path.read_text())["cpu toy"]


def test_every_row_of_the_plan_is_measured(run: dict[str, Any]):
    """At toy size nothing is left out: the plan has all rows, lengths, dtypes and curves of the real one."""
    full = plan.cpu_plan()
    assert len(run["rows"]) == len(full.rows)
    assert {(row["name"], row["dtype"]) for row in run["rows"]} == {(row.name, row.dtype) for row in full.rows}
    assert {(curve["axis"], curve["name"]) for curve in run["curves"]} == {
        (curve.axis, curve.base.name) for curve in full.curves
    }
    assert all(run[part] for part in PARTS)
    assert run["machine"]["cpu"]


def test_rows_say_what_they_are(run: dict[str, Any]):
    """Every row has its sizes, its threads, and wall and CPU seconds of every round."""
    for row in [*run["rows"], *(point for curve in run["curves"] for point in curve["points"])]:
        assert row["threads"] >= 1
        assert row["prompt"]["n_prefix"] in (53, 56)
        assert min(row["candidates"], row["measured"], row["passage_tokens"]) > 0
        assert len(row["wall"]) == len(row["cpu"]) == row["rounds"]
        assert min(row["wall"]) > 0


def test_all_exact_rows_score_alike(run: dict[str, Any]):
    """Whatever a row starts from, in float32 it gives the reference's scores."""
    differences = [
        row["max_difference"]
        for row in run["rows"]
        if row["name"].startswith("ours") and row["dtype"] == "float32" and row["prompt"]["n_prefix"] == 53
        if row["name"] not in (plan.OURS_HALF, plan.OURS_INT8)
    ]
    assert len(differences) == 9
    assert max(differences) <= TOLERANCE


class Recording(Models):
    """Keeps the rerankers that rows make."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.made: list[KalmReranker] = []

    def reranker(self, **settings: Any) -> KalmReranker:
        self.made.append(super().reranker(**settings))
        return self.made[-1]

    def count(self) -> Counter[str]:
        """Return the statistics of all of them together."""
        return sum((Counter(asdict(reranker.stats)) for reranker in self.made), Counter())


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        (plan.OURS_COLD, {"passages_encoded": 3, "prefix_hits": 0, "prefix_misses": 0}),
        (plan.OURS_POOLED, {"passages_encoded": 0, "prefix_hits": 0, "prefix_misses": 0}),
        (plan.OURS_FIRST, {"passages_encoded": 0, "prefix_hits": 0, "prefix_misses": 3}),
        (plan.OURS_PREFIX, {"passages_encoded": 0, "prefix_hits": 3, "prefix_misses": 0}),
        (plan.OURS_HALF, {"passages_encoded": 0, "prefix_hits": 3, "prefix_misses": 0}),
        (plan.OURS_INT8, {"passages_encoded": 0, "prefix_hits": 3, "prefix_misses": 0}),
        (plan.OURS_DISK, {"passages_encoded": 0, "prefix_store_hits": 3, "prefix_misses": 0}),
    ],
)
def test_rows_do_what_their_names_say(workload: Workload, name: str, counts: dict[str, int]):
    """Every round encodes, makes prefix states or finds them, for each candidate or for none."""
    models = Recording(workload, "float32", "cpu", are_peers_tiny=True)
    spec = plan.RowSpec(name, "float32", plan.SHORT, 12, 3, 3, 2)
    work = BUILDERS[name](models, spec)
    for query in range(2):
        work.before(query)
        before = models.count()
        work.score(query)
        after = models.count()
        assert {field: after[field] - before[field] for field in counts} == counts
        assert after["passages_scored"] - before["passages_scored"] == 3


def test_page_has_every_section_and_plot(results_path: Path):
    """Nothing on the page of a whole run is missing but the GPU, and its plots exist."""
    page = results_path.parent.with_suffix(".md").read_text()
    before, _, after = page.partition("## GPU")
    # The toy's lengths are not the ones that the first plot and the bars are about.
    assert "Not measured" not in before.partition("## Side by side")[2]
    assert "Not measured. No GPU was at hand." in after
    assert {path.name for path in results_path.parent.glob("*.svg")} == {
        "float32-4x12.svg",
        "float32-4x24.svg",
        "bfloat16-4x12.svg",
        "bfloat16-4x24.svg",
        "growth.svg",
    }


def test_parts_measured_alone_leave_the_others(results_path: Path, tmp_path: Path):
    """A run of one part keeps what the file had of the others."""
    path = tmp_path / "results.json"
    path.write_text(results_path.read_text())
    main(["measure", "--shape", "toy", "--results", str(path), "--parts", "storage"])
    before, after = (json.loads(file.read_text())["cpu toy"] for file in (results_path, path))
    assert after["rows"] == before["rows"]
    assert after["storage"] != before["storage"]


def test_verdicts_follow_from_the_figures(run: dict[str, Any]):
    """A bar is met or not by the measured medians, and says so; without the rows it is not measured."""
    rows = [
        {**row, "passage_tokens": 256, "candidates": 100, "measured": 50, "wall": [1.0, seconds, 1000.0]}
        for row in run["rows"]
        if row["passage_tokens"] == 12 and row["dtype"] == "float32" and row["prompt"]["n_prefix"] == 53
        for seconds in [{plan.REFERENCE_COLD: 80.0, plan.OURS_PREFIX: 2.0}.get(row["name"], 10.0)]
    ]
    results = Results({**run, "rows": rows})
    assert results.find(plan.OURS_PREFIX).seconds == 4.0
    verdicts = {bar.text: bar.verdict(results) for bar in BARS}
    assert verdicts["prefix, against the reference cold"] == ("≥ 40 ×", "40.00 ×", "met")
    assert verdicts["prefix, against the reference given pooled states"] == ("≥ 20 ×", "5.00 ×", "**not met**")
    assert verdicts["prefix in bfloat16, 100 candidates"] == ("< 1 s", "–", "not measured")


def test_floor_is_the_work_at_the_rates_of_its_products():
    """Attention, which has no product of its own, gets the best rate."""
    assert floor.floor_seconds({"out": 6, "attention": 8}, {"out": 2.0, "down": 4.0}) == 5.0


def test_every_step_is_switched_off_and_margins_stay(results_path: Path):
    """In both modes and dtypes as far as a step belongs to them; the steps are exact."""
    rows = json.loads(results_path.with_name("steps.json").read_text())["rows"]
    cases = {(dtype, mode, name) for name, way in WAYS.items() for mode in way.modes for dtype in way.dtypes}
    assert {(row["dtype"], row["mode"], row["way"]) for row in rows} == cases
    for dtype, tolerance in zip(DTYPES, (1e-4, 0.5), strict=True):
        assert max(row["max_difference"] for row in rows if row["dtype"] == dtype) <= tolerance


def test_every_part_of_a_pass_takes_time(results_path: Path):
    """A function that the decoder no longer calls by that name would show up as a part of no seconds."""
    parts = json.loads(results_path.with_name("steps.json").read_text())["parts"]
    assert [(part["dtype"], part["mode"]) for part in parts] == [(d, m) for d in DTYPES for m in (POOLED, PREFIX)]
    for part in parts:
        for seconds in part["rounds"]:
            assert set(seconds) == {*FUNCTIONS, REST}
            assert all(value > 0 for value in seconds.values())


def test_the_service_is_measured_in_all_ways(results_path: Path):
    [shape] = json.loads(results_path.with_name("serving.json").read_text())["cpu"]["shapes"]
    assert [load["clients"] for load in shape["loads"]] == [1, 4]
    for load in shape["loads"]:
        for rounds in load["ways"].values():
            assert all(one["rate"] > 0 and one["p50"] <= one["p99"] for one in rounds)
    assert shape["memory"]["bytes"]
    page = results_path.parent.with_suffix(".md").read_text()
    assert "| 4 | stored |" in page
    assert "Memory over" in page


def test_callers_are_measured_in_all_ways(results_path: Path):
    [shape] = json.loads(results_path.with_name("callers.json").read_text())["shapes"]
    assert [(cell["callers"], cell["candidates"]) for cell in shape["cells"]] == [(1, 3), (4, 3)]
    for cell in shape["cells"]:
        assert set(cell["ways"]) == {"one after the other", "plain lock", "threads", "coroutines"}
        for rows in cell["ways"].values():
            assert all(0 < row["p50"] <= row["p99"] and row["rate"] > 0 for row in rows)
    ingest = shape["ingest"]
    assert len(ingest["alone"]) == len(ingest["beside"]) == 5
    assert ingest["batch"] > 0
    page = results_path.parent.with_suffix(".md").read_text()
    assert "## Many callers" in page
    assert "A query over 12 stored candidates takes" in page


def test_ingest_is_measured_for_all_lengths_and_dtypes(results_path: Path):
    """The floor is that of the passages, and the page has the rows and what other checkpoints make of them."""
    rows = json.loads(results_path.with_name("ingest.json").read_text())["rows"]
    assert [(row["dtype"], row["tokens"]) for row in rows] == [(dtype, name) for dtype in DTYPES for name in ingest.SETS]
    assert all(
        row["floor"] > 0
        and row["multiply_adds"]["down"] == rows[0]["multiply_adds"]["down"] // rows[0]["total_tokens"] * row["total_tokens"]
        for row in rows
    )
    page = results_path.parents[1].joinpath("benchmarks.md").read_text()
    assert "| bfloat16 | 64 to 1,024 |" in page
    assert "passages of 256 tokens an hour and core" in page


def test_windows_are_measured_whole_and_by_blocks(results_path: Path):
    rows = json.loads(results_path.with_name("windows.json").read_text())["rows"]
    assert [(row["dtype"], row["n_tokens"]) for row in rows] == [(d, n) for d in ("float32", "bfloat16") for n in (16, 24)]
    assert all(set(row["wall"]) == {"whole", "4"} and min(map(min, row["wall"].values())) > 0 for row in rows)
    assert "blocks of 4: ÷" in results_path.parents[1].joinpath("benchmarks.md").read_text()


def test_switched_off_steps_compute_something_else():
    """Every function that stands in for one of the decoder's is called, and the decoder's own is back afterwards."""
    made = steps.Decoder("toy", torch.bfloat16, 2)
    for way in WAYS.values():
        if way.replaced is not None:
            module, name, function = way.replaced
            own, calls = getattr(module, name), []

            def count(*arguments: Any, function: Any = function, calls: list[int] = calls) -> torch.Tensor:
                calls.append(1)
                return function(*arguments)

            with torch.inference_mode():
                made.margins("prefix", replace(way, replaced=(module, name, count)), 2)
            assert calls
            assert getattr(module, name) is own


def test_committed_page_is_rendered_from_committed_results():
    """`python -m benchmarks render` changes nothing."""
    runs = json.loads(RESULTS.read_text())
    assert RESULTS.parent.with_suffix(".md").read_text(encoding="utf-8") == make_page(runs, trials.read(RESULTS.parent))


@pytest.mark.parametrize("kind", [LangChainFaiss, LlamaIndexSimple, Lmdb])
def test_stores_are_weighed_and_asked_with_and_without_encodings(kind: type[Kind]):
    """At every count, bytes with encodings are more than without; a search is timed at the smallest."""
    measured = stores.measure_kind(kind, {"short": 3_000, "long": 9_000}, (30, 150), (3, 7), rounds=2)
    weighed = {(row["payload"], row["passages"]): row for row in measured["weighed"]}
    assert list(weighed) == [(payload, n) for n in (30, 150) for payload in ("none", "short", "long")]
    for n in (30, 150):
        none, short, long = (weighed[payload, n] for payload in ("none", "short", "long"))
        assert none["stored"] == 0
        assert long["disk"] - none["disk"] > 0.9 * long["stored"] > 2 * short["stored"]
    payloads = {"short", "long"} if kind.holds_payloads else {"none", "short", "long"}
    assert [(row["k"], set(row["milliseconds"])) for row in measured["fetched"]] == [(3, payloads), (7, payloads)]
    assert all(value > 0 for row in measured["fetched"] for value in row["milliseconds"].values())


def test_the_factors_of_a_store_are_found():
    """Bytes that were made by factors give these factors back."""
    expected = StoreModel(500, 2, 0.75, holds_payloads=False)
    weighed = [
        {"passages": n, "stored": n * size, "disk": n * 3000 + (expected.n_bytes(n, size, 0) if size else 0)}
        for n in (500, 2000)
        for size in (0, 20_000, 30_000, 110_000)
    ]
    measured = {"stores": [{"store": "made", "holds_payloads": False, "weighed": weighed}]}
    [(name, model, error)] = stores_page.fits(measured)
    assert (name, model.holds_payloads) == ("made", False)
    assert (model.per_passage, model.per_byte, model.per_queued_byte) == pytest.approx((500, 2, 0.75), rel=1e-3)
    assert error < 1e-3
