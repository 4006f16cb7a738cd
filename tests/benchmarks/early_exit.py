"""`python -m benchmarks.early_exit FOLDER…`: what dropping candidates between the decoder's layers would save, and cost.

After a layer, a candidate whose margin is a gap or more below the k-th best cannot reach the top k any more, it is hoped, and
its other layers are not computed. The gaps are chosen on the first half of the queries, all combinations being tried, so this
is for models of few layers; the second half shows what they do. Everything is computed from full passes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks import floor, machine, trials
from benchmarks.rows import progress
from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.core.model.decoder import answer_logits
from kalm_integrations.core.model.layers import StackWeights
from kalm_integrations.core.passages.prefixes import Candidate
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.evaluation.candidates import encode_candidates, find_candidates, order
from kalm_integrations.evaluation.metrics import bootstrap_interval, ndcg_at_10

TOLERANCE = 0.002
"""Of nDCG@10, which may be lost."""
WANTED_SAVING = 0.25
TOP_KS = (10, 3)
RATIO = 4


@dataclass(frozen=True)
class Asked:
    """A query with its candidates, in the first stage's order."""

    ids: list[str]
    margins: np.ndarray
    """Read off the last position after each layer. Shape: (n_layers, n_candidates)."""
    costs: np.ndarray
    """Multiply-adds. Shape: (n_candidates, n_layers)."""

    def rank(self, gaps: Sequence[float], top_k: int) -> tuple[list[str], float]:
        """Return the best passages, with candidates dropped by the gap after each layer but the last, and the share saved."""
        alive, saved = np.arange(len(self.ids)), 0
        for layer, gap in enumerate(gaps):
            margins = self.margins[layer, alive]
            is_kept = margins >= np.sort(margins)[::-1][:top_k][-1] - gap
            saved += self.costs[alive[~is_kept], layer + 1 :].sum()
            alive = alive[is_kept]
        ranked = order([self.ids[i] for i in alive], self.margins[-1, alive].tolist())
        return ranked[:top_k], float(saved / self.costs.sum())


Qrels = Mapping[str, Mapping[str, int]]


def layer_costs(widths: floor.Widths, n_states: int, n_prefix: int, n_new: int) -> list[int]:
    """Return a candidate's multiply-adds in each layer, its prefix states being kept; see `floor` for the arithmetic."""
    size = {name: n_in * n_out for name, (n_in, n_out) in floor.product_shapes(widths).items()}
    per_token = size["out"] + size["gate_up"] + size["down"]
    costs = []
    for kind in widths.layer_types:
        seen = [n_states + floor._within(kind, widths, n_prefix + i + 1) for i in range(n_new)]
        costs.append(n_new * (size["qkv"] + per_token) + 2 * widths.query_width * sum(seen))
    # Layer 0 sees the same prompt for all candidates, and of the last layer only the last position is read.
    costs[0] -= n_new * size["qkv"]
    costs[-1] = n_new * size["kv"] + widths.hidden_width * widths.query_width + per_token + 2 * widths.query_width * seen[-1]
    return costs


@torch.inference_mode()
def ask(reranker: KalmReranker, query: str, ids: list[str], encodings: Sequence[EncodedPassage]) -> Asked:
    """Score a query's candidates by the decoder's first layer alone, by its first two, and so on up to all of them."""
    runtime, settings = reranker.runtime, reranker._query
    weights, config, embedding = runtime.stack("decoder"), runtime.checkpoint.decoder_config, runtime.embedding()
    tokenizer = runtime.tokenizer(allow_special_tokens=False)
    instructions = settings.system_instruction, settings.instruction
    prompt = tokenizer.prompt(*instructions, tokenizer.truncate_query(query, settings.max_query_tokens))
    n_prefix = len(tokenizer.prompt_prefix(*instructions))
    memory = runtime._remember([Candidate(encoding.states, ()) for encoding in encodings])
    token_ids, last = torch.tensor([prompt]), torch.tensor([len(prompt) - 1])
    head = embedding.tokens[list(tokenizer.answer_ids)]
    margins = []
    for n_layers in range(1, len(weights.layers) + 1):
        first = StackWeights(weights.layers[:n_layers], weights.final_norm)
        shallow = replace(config, layer_types=config.layer_types[:n_layers])
        logits = answer_logits(memory, token_ids, last, embedding, first, head, shallow)
        margins.append((logits[:, 0] - logits[:, 1]).numpy())
    n_new = len(prompt) - n_prefix
    costs = [layer_costs(floor.Widths.of(config), len(encoding.states), n_prefix, n_new) for encoding in encodings]
    return Asked(ids, np.stack(margins), np.array(costs))


def calibrate(asked: Mapping[str, Asked], qrels: Qrels, top_k: int, n_gaps: int) -> tuple[float, ...]:
    """Return the gaps that save most while the mean nDCG@10 stays within the tolerance; infinity drops nothing."""
    n_exits = len(next(iter(asked.values())).margins) - 1
    grid = []
    for layer in range(n_exits):
        rows = [np.sort(one.margins[layer])[::-1] for one in asked.values()]
        below = np.concatenate([row[:top_k][-1] - row[top_k:] for row in rows])
        grid.append([math.inf, *np.quantile(below, np.linspace(0, 1, n_gaps)).tolist()] if len(below) else [math.inf])
    allowed = [gaps for gaps in itertools.product(*grid) if fmean(apply(asked, qrels, gaps, top_k)[0].values()) >= -TOLERANCE]
    return max(allowed, key=lambda gaps: fmean(one.rank(gaps, top_k)[1] for one in asked.values()))


def apply(asked: Mapping[str, Asked], qrels: Qrels, gaps: Sequence[float], top_k: int) -> tuple[dict[str, float], float]:
    """Return each query's change of nDCG@10 against full passes (both of the `top_k` best), and the share saved."""
    ranked = {query: one.rank(gaps, top_k) for query, one in asked.items()}
    whole = {query: one.rank([math.inf] * len(gaps), top_k)[0] for query, one in asked.items()}
    before, after = ndcg_at_10(qrels, whole), ndcg_at_10(qrels, {query: ids for query, (ids, _) in ranked.items()})
    saved = fmean(share for _, share in ranked.values())
    return {query: after[query] - before[query] for query in asked}, saved


def measure(
    reranker: KalmReranker, collection: Collection, n_queries: int, n_candidates: int, n_gaps: int
) -> list[dict[str, Any]]:
    """Calibrate and apply for each k."""
    found = find_candidates(collection, top_k=n_candidates, n_queries=n_queries)
    encodings = encode_candidates(reranker, collection, found)
    asked = {q: ask(reranker, one.query, one.ids, [encodings[i] for i in one.ids]) for q, one in found.items()}
    queries = list(asked)
    halves = [{q: asked[q] for q in part} for part in (queries[: len(queries) // 2], queries[len(queries) // 2 :])]
    rows = []
    for top_k in TOP_KS:
        gaps = calibrate(halves[0], collection.qrels, top_k, n_gaps)
        (own, own_saved), (changes, saved) = (apply(half, collection.qrels, gaps, top_k) for half in halves)
        row = {
            "collection": collection.name,
            "n_queries": len(queries),
            "candidates": n_candidates,
            "top_k": top_k,
            "gaps": [None if gap == math.inf else gap for gap in gaps],
            "calibration_change": fmean(own.values()),
            "calibration_saved": own_saved,
            "change": fmean(changes.values()),
            "interval": bootstrap_interval(list(changes.values())),
            "saved": saved,
        }
        progress(f"{collection.name}, top {top_k}: {row['change']:+.4f}, {saved:.2f} saved")
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = trials.parser("early_exit", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="BEIR folders")
    parser.add_argument("--model", default="pico")
    parser.add_argument("--queries", type=int, default=150)
    parser.add_argument("--candidates", type=int, nargs="+", default=[20], help="of each folder, or of all")
    parser.add_argument("--gaps", type=int, default=24, help="to try after each layer")
    options = trials.parse(parser, arguments)
    numbers = options.candidates * (len(options.folders) if len(options.candidates) == 1 else 1)
    reranker = KalmReranker.from_pretrained(options.model, compression_ratio=RATIO)
    rows = []
    for folder, n_candidates in zip(options.folders, numbers, strict=True):
        rows += measure(reranker, Collection.read(folder), options.queries, n_candidates, options.gaps)
    measured = {"machine": machine.describe("cpu"), "model": Path(options.model).name, "rows": rows}
    trials.write(options.output, {**measured, "tolerance": TOLERANCE, "wanted_saving": WANTED_SAVING})


if __name__ == "__main__":
    main()
