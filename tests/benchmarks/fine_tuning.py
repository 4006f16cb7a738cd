"""What fine-tuning `pico` for code search is worth, and what it costs on questions about Wikipedia.

    python -m tools.code_search CODE
    python -m benchmarks.fine_tuning CODE SQUAD_DEV

CODE is a folder for the collections of code, SQUAD_DEV a BEIR folder of SQuAD's development set. Each recipe is trained on
CODE's `train` and measured on its `test`, which shares no package with it. Start, fine-tuned and BM25 order the same
candidates; intervals are paired bootstraps over queries. Figures are written after each recipe, and those that the output
has are not made again.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from tools.code_search import WORD
from tools.paths import DOCS

from kalm_integrations import KalmReranker
from kalm_integrations.core.ranking import fuse
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import Candidates, find_candidates, order
from kalm_integrations.corpora.measures import measure, ndcg_at_10
from kalm_integrations.evaluation.differences import mean_differences
from kalm_integrations.evaluation.scoring import encode_candidates, score_settings
from kalm_integrations.training.config import CollectionConfig, PhaseConfig, TrainConfig
from kalm_integrations.training.exporting import average_checkpoints
from kalm_integrations.training.trainer import train

OUTPUT = DOCS / "figures" / "fine_tuning.json"
START = "pico"
RATIO, TOP_K = 4, 20


@dataclass(frozen=True)
class Recipe:
    """A way to train, or another recipe's model averaged with the start."""

    text: str
    optimizer: Literal["muon", "adamw"] = "muon"
    matrix_learning_rate: float = 0.005
    learning_rate: float = 1e-3
    seed: int = 1
    mean_with: str | None = None


RECIPES = {
    "muon": Recipe("Muon 5e-3, AdamW 1e-3"),
    "mean": Recipe("mean of `pico` and the first", mean_with="muon"),
    "adamw": Recipe("AdamW 2e-5, the default", optimizer="adamw", learning_rate=2e-5),
    "seed 2": Recipe("the first, another seed", seed=2),
}


@dataclass(frozen=True)
class Task:
    """Queries with their candidates."""

    collection: Collection
    candidates: Mapping[str, Candidates]

    @classmethod
    def read(cls, folder: Path, n_queries: int, *, cuts_names: bool = False) -> Task:
        """Draw queries of a folder's test split, and find BM25's candidates; its texts may have names cut into words."""
        collection = searched = Collection.read(folder, "test")
        if cuts_names:
            searched = replace(collection, passages=_cut(collection.passages), queries=_cut(collection.queries))
        found = find_candidates(searched, top_k=TOP_K, n_queries=n_queries)
        return cls(collection, {q: replace(each, query=collection.queries[q]) for q, each in found.items()})

    def first_stage(self) -> dict[str, list[str]]:
        """Return BM25's order."""
        return {q: found.ids for q, found in self.candidates.items()}

    def values(self, model: str) -> dict[str, dict[str, float]]:
        """Return nDCG@10 by query, of a model's order and of the order by its sum with BM25."""
        reranker = KalmReranker.from_pretrained(model, compression_ratio=RATIO, storage_codec="fp32", cache_bytes=0)
        encoded = encode_candidates(reranker, self.collection, self.candidates)
        [scored] = score_settings(reranker, self.candidates, encoded, [RATIO], ["fp32"])
        alone, summed = {}, {}
        for query, found in self.candidates.items():
            alone[query] = order(found.ids, scored.margins[query])
            summed[query] = order(found.ids, fuse(scored.margins[query], found.scores, "z_score"))
        return {"alone": ndcg_at_10(self.collection.qrels, alone), "summed": ndcg_at_10(self.collection.qrels, summed)}


def main(arguments: list[str] | None = None) -> None:
    """Train and measure what the output lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", type=Path, help="what tools.code_search made")
    parser.add_argument("squad", type=Path, help="BEIR folder of squad-dev")
    parser.add_argument("--queries", type=int, default=600, help="of the code; of squad-dev 500 at most")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--runs", type=Path, help="folder to keep the runs in")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    tasks = {
        "code": Task.read(options.code / "test", options.queries),
        "names cut": Task.read(options.code / "test", options.queries, cuts_names=True),
        "squad": Task.read(options.squad, min(500, options.queries)),
    }
    measured = json.loads(options.output.read_text()) if options.output.exists() else _first(tasks, options)
    with tempfile.TemporaryDirectory() as temporary:
        runs = options.runs or Path(temporary)
        for name in options.recipes:
            if name not in measured["recipes"]:
                measured["recipes"][name] = _measure(RECIPES[name], tasks, measured, runs, options)
                _write(options.output, measured)


def _first(tasks: Mapping[str, Task], options: argparse.Namespace) -> dict[str, Any]:
    """Return what is measured of BM25 and of the start."""
    measured: dict[str, Any] = {"steps": options.steps, "ratio": RATIO, "top_k": TOP_K, "tasks": {}, "recipes": {}}
    for name, task in tasks.items():
        orders = task.first_stage()
        found = measure(task.collection.qrels, orders, ["nDCG@10", f"R@{TOP_K}"])
        values = {"bm25": found["nDCG@10"], **task.values(START)}
        measured["tasks"][name] = {
            "queries": len(orders),
            "recall": fmean(found[f"R@{TOP_K}"].values()),
            "means": {system: fmean(by_query.values()) for system, by_query in values.items()},
            "differences": {system: _difference(values[system], values["bm25"]) for system in ("alone", "summed")},
            # Recipes that are measured later are compared with these, query by query.
            "values": {system: [round(by_query[q], 4) for q in sorted(by_query)] for system, by_query in values.items()},
        }
    _write(options.output, measured)
    return measured


def _measure(
    recipe: Recipe, tasks: Mapping[str, Task], measured: Mapping[str, Any], runs: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Return what a recipe's model is worth, and the CPU seconds that it took."""
    started = time.process_time()
    output = runs / recipe.text.replace(" ", "-")
    if recipe.mean_with is None:
        model = train(configuration(recipe, output, options.code / "train", options.steps))
    else:
        other = RECIPES[recipe.mean_with]
        trained = train(configuration(other, runs / other.text.replace(" ", "-"), options.code / "train", options.steps))
        model = average_checkpoints([START, str(trained)], output)
    row: dict[str, Any] = {"recipe": asdict(recipe), "cpu_seconds": round(time.process_time() - started)}
    for name, task in tasks.items():
        before = measured["tasks"][name]["values"]
        row[name] = {}
        for system, values in task.values(str(model)).items():
            after = [values[q] for q in sorted(values)]
            row[name][system] = {
                "mean": fmean(after),
                "to start": _paired(after, before[system]),
                "to bm25": _paired(after, before["bm25"]),
            }
    return row


def configuration(recipe: Recipe, output: Path, data: Path, n_steps: int) -> TrainConfig:
    """Return a run."""
    phase = PhaseConfig(
        steps=n_steps,
        queries_per_passage=1,
        warmup_steps=20,
        optimizer=recipe.optimizer,
        matrix_learning_rate=recipe.matrix_learning_rate,
        learning_rate=recipe.learning_rate,
    )
    return TrainConfig(
        output=output,
        seed=recipe.seed,
        model=START,
        collections=(CollectionConfig(path=data),),
        phases=(phase,),
    )


def _cut(texts: Mapping[str, str]) -> dict[str, str]:
    """Return texts as the words that their names are made of."""
    return {key: " ".join(WORD.findall(text)) for key, text in texts.items()}


def _difference(values: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    return _paired([values[q] for q in sorted(values)], [others[q] for q in sorted(values)])


def _paired(values: list[float], others: list[float]) -> dict[str, float]:
    [found] = mean_differences([[a - b for a, b in zip(values, others, strict=True)]])
    return asdict(found)


def _write(path: Path, measured: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
