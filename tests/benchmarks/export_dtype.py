"""What is left of a fine-tune in a bfloat16 checkpoint: short runs of `pico`, exported in float32 and in bfloat16.

`python -m benchmarks.export_dtype FOLDER` takes a BEIR folder (xquad-de for the tables of docs/publishing.md), trains on part
of its queries, and prints two tables. The first has the weights: which share of the change (by its norm) rounding undoes, and
how many weights are back where they started. The second has the rest of the queries, BM25's candidates in the reranker's
order: nDCG@10 at ratio 1, and how far the margins moved on average, by what is computed in and what the file is written in.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from statistics import fmean, median

import torch
from tools.corpora import write_collection

from benchmarks.tables import table
from kalm_integrations import KalmReranker
from kalm_integrations.core.checkpoint.locate import resolve
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import Candidates, find_candidates, order
from kalm_integrations.corpora.measures import ndcg_at_10
from kalm_integrations.evaluation.scoring import encode_candidates, score_candidates
from kalm_integrations.training.config import CollectionConfig, LoraConfig, PhaseConfig, TrainConfig
from kalm_integrations.training.exporting import export_checkpoint
from kalm_integrations.training.trainer import train

START = "pico"
TOP_K = 20
MAX_PASSAGE_TOKENS = 256
DTYPES = ("float32", "bfloat16")
ROUNDS = 5
"""Of loading; the median counts."""
LORA = LoraConfig(rank=16, alpha=32)

Margins = dict[str, list[float]]


def configuration(output: Path, data: Path, n_steps: int, lora: LoraConfig | None) -> TrainConfig:
    """Return a fine-tune at the default learning rates: 2e-5 for all weights, 2e-4 with LoRA."""
    phase = PhaseConfig(
        steps=n_steps,
        max_passage_tokens=MAX_PASSAGE_TOKENS,
        passages_per_cluster=5,
        queries_per_passage=1,
        compression_ratios=(1, 2, 4),
        warmup_steps=10,
    )
    return TrainConfig(
        output=output,
        model=START,
        lora=lora,
        collections=(CollectionConfig(path=data),),
        phases=(phase,),
        bf16=False,
        save_steps=n_steps,
    )


def weight_row(name: str, start: Checkpoint, folders: dict[str, Path]) -> tuple[str, ...]:
    """Return what rounding does to the weights, the size of both files, and how long they take to load."""
    opened = {dtype: Checkpoint.open(folder) for dtype, folder in folders.items()}
    change = undone = 0.0
    moved = stuck = 0
    for key in start.text_names():
        before, exact, rounded = (
            dict(each.tensors([key]))[key].double() for each in (start, opened["float32"], opened["bfloat16"])
        )
        change += float((exact - before).square().sum())
        undone += float((exact - rounded).square().sum())
        moved += int((exact != before).sum())
        stuck += int(((exact != before) & (rounded == before)).sum())
    sizes = " / ".join(f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}" for folder in folders.values())
    seconds = " / ".join(f"{1000 * load_seconds(each):.0f}" for each in opened.values())
    return name, f"{(undone / change) ** 0.5:.0%}", f"{stuck / moved:.0%}", sizes, seconds


def load_seconds(opened: Checkpoint) -> float:
    """Return the seconds in which a checkpoint's weights enter memory in float32, its file being in the page cache."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        opened.load_embedding(torch.device("cpu"))
        for side in ("encoder", "decoder"):
            opened.load_stack(side, torch.device("cpu"), torch.float32)
        times.append(time.perf_counter() - began)
    return median(times)


def score(folder: Path, dtype: str, collection: Collection, candidates: dict[str, Candidates]) -> Margins:
    """Return the margins of the candidates, computed in a dtype."""
    reranker = KalmReranker.from_pretrained(
        folder, dtype=dtype, compression_ratio=1, storage_codec="fp32", max_passage_tokens=MAX_PASSAGE_TOKENS
    )
    return score_candidates(reranker, candidates, encode_candidates(reranker, collection, candidates))


def quality_rows(
    name: str,
    folders: dict[str, Path],
    before: dict[str, Margins],
    collection: Collection,
    candidates: dict[str, Candidates],
) -> list[tuple[str, ...]]:
    """Return a row for each dtype that is computed in, with what was measured of the start and of both files."""
    rows = []
    for computed, start in before.items():
        margins = [score(folder, computed, collection, candidates) for folder in folders.values()]
        values = []
        for each in (start, *margins):
            rankings = {q: order(found.ids, each[q]) for q, found in candidates.items()}
            values.append(f"{fmean(ndcg_at_10(collection.qrels, rankings).values()):.3f}")
        rows.append((name, computed, *values, *(f"{mean_change(each, start):.2f}" for each in margins)))
    return rows


def mean_change(margins: Margins, others: Margins) -> float:
    """Return the mean absolute difference of margins."""
    return fmean(abs(a - b) for q in margins for a, b in zip(margins[q], others[q], strict=True))


def main() -> None:
    """Train, export in both, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="BEIR folder")
    parser.add_argument("--split", default="test", help="of the folder")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50, 200], help="of the runs")
    parser.add_argument("--held-out", type=int, default=390, help="queries to measure on; the others are trained on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR)
    logging.getLogger("bm25s").setLevel(logging.ERROR)
    collection = Collection.read(options.folder, options.split)
    candidates = find_candidates(collection, top_k=TOP_K, n_queries=options.held_out)
    trained = [q for q in collection.queries if q not in candidates]
    part = Collection(
        collection.name,
        collection.passages,
        {q: collection.queries[q] for q in trained},
        {q: collection.qrels[q] for q in trained},
    )
    start = Checkpoint.open(resolve(START))
    before = {dtype: score(start.folder, dtype, collection, candidates) for dtype in DTYPES}
    weights, qualities = [], []
    with tempfile.TemporaryDirectory() as place:
        data = write_collection(part, Path(place) / "data", split="train")
        for steps in options.steps:
            for kind, lora in (("all weights, 2e-5", None), ("LoRA, 2e-4", LORA)):
                name = f"{kind}, {steps} steps"
                exact = train(configuration(Path(place) / name, data, steps, lora))
                tensors = dict(Checkpoint.open(exact).tensors(start.text_names()))
                rounded = export_checkpoint(resolve(START), tensors, exact.with_name("rounded"), "bfloat16")
                folders = dict(zip(DTYPES, (exact, rounded), strict=True))
                weights.append(weight_row(name, start, folders))
                qualities += quality_rows(name, folders, before, collection, candidates)
    print(table(("run", "of the change undone", "weights back at the start", "MB", "ms to load"), weights))
    print()
    columns = ("run", "computed in", "nDCG@10 of the start", *(f"{dtype} file" for dtype in DTYPES))
    columns = (*columns, *(f"margins moved by, {dtype} file" for dtype in DTYPES))
    print(table(columns, qualities))


if __name__ == "__main__":
    main()
