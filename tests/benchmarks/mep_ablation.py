"""What training on pooled states is worth: two small models from nothing, one trained at ratio 1 alone, one at all ratios.

`python -m benchmarks.mep_ablation TRAIN TEST` takes two BEIR folders (squad-train and squad-dev for the table of
docs/training.md) and prints the table: nDCG@10 of BM25's candidates in the reranker's order, by ratio, with the 95 % interval
of the difference that pooling in training makes (paired bootstrap over queries).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from statistics import fmean

import torch

from kalm_integrations import KalmReranker
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import find_candidates, order
from kalm_integrations.corpora.measures import ndcg_at_10
from kalm_integrations.evaluation.differences import mean_differences
from kalm_integrations.evaluation.scoring import encode_candidates, score_settings
from kalm_integrations.training.config import ArchitectureConfig, CollectionConfig, PhaseConfig, TrainConfig
from kalm_integrations.training.trainer import train

RATIOS = (1, 2, 4, 8, 16, 32)
TRAINED_RATIOS = {"without": (1,), "with": (1, 2, 4, 8, 16)}
"""Each step draws one of these."""
TOP_K = 20

ARCHITECTURE = ArchitectureConfig(vocabulary_size=8192, hidden_width=192, mlp_width=384, n_layers=2, n_heads=2, head_width=96)


def main() -> None:
    """Train both, measure both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="BEIR folder to train on")
    parser.add_argument("test", type=Path, help="BEIR folder to measure on")
    parser.add_argument("--split", default="test", help="of the folder to measure on")
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--queries", type=int, default=500, help="how many to measure on")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    collection = Collection.read(options.test, options.split)
    candidates = find_candidates(collection, top_k=TOP_K, n_queries=options.queries)
    first_stage = ndcg_at_10(collection.qrels, {q: found.ids for q, found in candidates.items()})
    values: dict[str, dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, ratios in TRAINED_RATIOS.items():
            model = train(configuration(Path(folder) / name, options.train, ratios, options.steps))
            reranker = KalmReranker.from_pretrained(model, compression_ratio=1, storage_codec="fp32", cache_bytes=0)
            encoded = encode_candidates(reranker, collection, candidates)
            values[name] = {}
            for scored in score_settings(reranker, candidates, encoded, RATIOS, ["fp32"]):
                orders = {q: order(found.ids, scored.margins[q]) for q, found in candidates.items()}
                values[name][scored.ratio] = ndcg_at_10(collection.qrels, orders)
    print(table(values, fmean(first_stage.values())))


def configuration(output: Path, data: Path, ratios: tuple[int, ...], n_steps: int) -> TrainConfig:
    """Return the run; nothing but the ratios differs between the two."""
    phase = PhaseConfig(
        steps=n_steps,
        max_passage_tokens=128,
        max_query_tokens=40,
        passages_per_cluster=8,
        compression_ratios=ratios,
    )
    return TrainConfig(
        output=output,
        seed=1,
        architecture=ARCHITECTURE,
        collections=(CollectionConfig(path=data),),
        phases=(phase,),
        save_steps=n_steps,
        logging_steps=100,
    )


def table(values: dict[str, dict[int, dict[str, float]]], first_stage: float) -> str:
    """Return the table as Markdown."""
    n_queries = len(values["with"][1])
    lines = [
        f"| ratio | trained at ratio 1 | trained at all ratios | difference, {n_queries:,} queries |",
        "|---|---|---|---|",
    ]
    gains = [[values["with"][r][q] - values["without"][r][q] for q in values["with"][r]] for r in RATIOS]
    for ratio, difference in zip(RATIOS, mean_differences(gains), strict=True):
        means = [fmean(values[name][ratio].values()) for name in ("without", "with")]
        lines.append(f"| {ratio} | {means[0]:.3f} | {means[1]:.3f} | {difference} |")
    return "\n".join([*lines, f"| BM25's order | {first_stage:.3f} | {first_stage:.3f} | |"])


if __name__ == "__main__":
    main()
