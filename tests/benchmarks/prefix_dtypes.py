"""What keeping prefix states in fewer bits changes, on real questions: bytes, scores, order, and the time of a hot query.

`python -m benchmarks.prefix_dtypes` prints a table: `pico`, questions of the built-in XQuAD sample, candidates of BM25 or
drawn at random. Differences are to states in float32; ÷ is the median over rounds of the CPU seconds of one thread, divided
by those with float16 in the same round.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import torch

from benchmarks.rows import PREFIX_CACHE_BYTES, timed
from benchmarks.storage import PREFIX_DTYPES
from benchmarks.tables import table
from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.core.ranking import sigmoid
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import Candidates, find_candidates
from kalm_integrations.evaluation.differences import kendall_tau
from kalm_integrations.evaluation.scoring import encode_candidates, score_candidates
from kalm_integrations.samples import XQUAD_EN

EXACT, BASE = "float32", "float16"


def measure(
    rerankers: Mapping[str, KalmReranker],
    candidates: Mapping[str, Candidates],
    encoded: Mapping[str, EncodedPassage],
    rounds: int,
) -> str:
    """Return the table, a row for each reranker by its dtype."""
    margins = {name: score_candidates(reranker, candidates, encoded) for name, reranker in rerankers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in rerankers}
    for found in list(candidates.values())[:rounds]:
        encodings = [encoded[i] for i in found.ids]
        for name, reranker in rerankers.items():
            _, cpu, _ = timed(lambda reranker=reranker: reranker.score(found.query, encodings), "cpu")  # noqa: B023
            seconds[name].append(cpu)
    rows = []
    for name, reranker in rerankers.items():
        changes = [
            abs(sigmoid(a) - sigmoid(b)) for q in candidates for a, b in zip(margins[name][q], margins[EXACT][q], strict=True)
        ]
        cache = reranker._ranker.scorer.prefixes
        rows.append(
            (
                name,
                f"{cache.nbytes / len(cache):,.0f}",
                f"{max(changes):.1e}",
                f"{fmean(changes):.1e}",
                f"{fmean(kendall_tau(margins[name][q], margins[EXACT][q]) for q in candidates):.4f}",
                f"{median(own / base for own, base in zip(seconds[name], seconds[BASE], strict=True)):.2f}",
            )
        )
    return table(("kept in", "bytes a passage", "max \\|Δp\\|", "mean \\|Δp\\|", "Kendall tau", f"time ÷ {BASE}"), rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=XQUAD_EN, help="BEIR folder; default: the built-in sample")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--random", action="store_true", help="candidates drawn at random instead of BM25's")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    collection = Collection.read(options.folder)
    candidates = find_candidates(collection, top_k=options.top_k, n_queries=options.queries)
    if options.random:
        draw, ids = random.Random(0), sorted(collection.passages)
        candidates = {q: replace(found, ids=draw.sample(ids, options.top_k)) for q, found in candidates.items()}
    rerankers = {
        name: KalmReranker.from_pretrained("pico", prefix_dtype=name, prefix_cache_bytes=PREFIX_CACHE_BYTES)
        for name in PREFIX_DTYPES
    }
    encoded = encode_candidates(rerankers[EXACT], collection, candidates)
    print(measure(rerankers, candidates, encoded, options.rounds))


if __name__ == "__main__":
    main()
