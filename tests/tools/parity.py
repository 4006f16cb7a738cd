"""The reference beside ours: the one helper of all parity tests, and the table of docs/parity.md.

The reference is `KaLMRerankerWrapper` of mteb, the published port of the authors' code. `python -m tools.parity`, run in
tests/, prints the table.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from datasets import Dataset
from mteb.models.model_implementations.kalm_reranker import KaLMRerankerWrapper
from torch.utils.data import DataLoader

from kalm_integrations import KalmReranker, Passage
from kalm_integrations.core.checkpoint.prompts import passage_text
from tools.checkpoints import TEXTS, make_checkpoint

TOLERANCE = 1e-5
"""What the scores may differ by in float32."""

RATIOS = (1, 2, 4, 8, 32)
LIMIT = 70
"""`max_passage_tokens` of the matrix: more than two groups of the coarsest ratio, and not a multiple of it."""


class Parity:
    """The reference and our rerankers on one checkpoint, under the same limits."""

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_passage_tokens: int = 1024,
        max_query_tokens: int = 512,
        allow_special_tokens: bool = False,
    ) -> None:
        self.folder = folder
        self.settings = {
            "device": device,
            "dtype": dtype,
            "max_passage_tokens": max_passage_tokens,
            "max_query_tokens": max_query_tokens,
            # As the reference does.
            "long_passages": "cut",
            "allow_special_tokens": allow_special_tokens,
            "storage_codec": "fp32",
        }
        self.reference = KaLMRerankerWrapper(
            str(folder), device=device, dtype=dtype, max_length=max_passage_tokens, query_max_length=max_query_tokens
        )
        # It reads the score at the last real position, which is right for right padding only.
        self.reference.tokenizer.padding_side = "right"

    def reference_scores(
        self,
        query: str,
        passages: Sequence[str],
        *,
        ratio: int = 4,
        instruction: str | None = None,
        batch_size: int = 32,
    ) -> list[float]:
        """Return the reference's P(yes) of each passage."""
        # A ratio of 1 pools nothing: None is how the reference says that.
        self.reference.chunk_size = None if ratio == 1 else ratio
        queries = {"text": [query] * len(passages)}
        if instruction is not None:
            queries["instruction"] = [instruction] * len(passages)
        loaders = [DataLoader(Dataset.from_dict(columns), batch_size=64) for columns in (queries, {"text": list(passages)})]
        scores = self.reference.predict(
            *loaders, task_metadata=None, hf_split="test", hf_subset="default", batch_size=batch_size
        )
        return [float(score) for score in scores]

    def make_reranker(self, ratio: int = 4, batch_size: int | None = None, **more: object) -> KalmReranker:
        """Return a reranker of the checkpoint with empty caches."""
        return KalmReranker.from_pretrained(
            self.folder,
            compression_ratio=ratio,
            encode_batch_size=batch_size,
            score_batch_size=batch_size,
            **self.settings,
            **more,
        )

    def differences(
        self,
        query: str,
        passages: Sequence[str],
        *,
        ratio: int = 4,
        instruction: str | None = None,
        batch_size: int = 32,
    ) -> dict[str, float]:
        """Return max |difference| to the reference.

        Cold, warm, from metadata in a reranker that encodes nothing, with prefix states that another query left, and with the
        prompt computed whole.
        """
        expected = self.reference_scores(query, passages, ratio=ratio, instruction=instruction, batch_size=batch_size)
        first = self.make_reranker(ratio, batch_size)
        scores = {"cold": first.score(query, passages, instruction)}
        n_encoded = first.stats.passages_encoded
        scores["warm"] = first.score(query, passages, instruction)
        stored = [encoding.to_metadata() for encoding in first.encode_passages(passages)]
        assert first.stats.passages_encoded == n_encoded, "the second call encoded what the first one had"
        second = self.make_reranker(ratio, batch_size)
        scores["stored"] = second.score(query, list(map(Passage, passages, stored)), instruction)
        assert second.stats.passages_encoded == 0, "a reranker encoded what had been stored"
        third = self.make_reranker(ratio, batch_size)
        encodings = first.encode_passages(passages)
        third.score(f"another query than {query!r}", encodings, instruction)
        scores["prefix"] = third.score(query, encodings, instruction)
        assert third.stats.prefix_hits == third.stats.prefix_misses == len(set(passages)), "prefix states were not used"
        whole = self.make_reranker(ratio, batch_size, prefix_cache_bytes=0)
        scores["whole"] = whole.score(query, encodings, instruction)
        assert whole.stats.prefix_hits == whole.stats.prefix_misses == 0, "prefix states were switched off"
        return {
            how: max(abs(ours - theirs) for ours, theirs in zip(ours, expected, strict=True)) for how, ours in scores.items()
        }

    def check(self, query: str, passages: Sequence[str], *, tolerance: float = TOLERANCE, **how: object) -> None:
        """Assert that cold, warm and stored scores are the reference's."""
        differences = self.differences(query, passages, **how)
        assert max(differences.values()) <= tolerance, differences

    def n_tokens(self, passage: str) -> int:
        """Return how many tokens the encoder would read for a passage that is not cut."""
        return len(self.reference.tokenizer(passage_text(passage), add_special_tokens=False)["input_ids"])

    def passage_of(self, n_tokens: int) -> str:
        """Return a passage for which the encoder reads exactly `n_tokens` tokens, "<Document>: " included."""
        empty = self.n_tokens("")
        candidates = sorted({word for text in TEXTS for word in text.split() if self.n_tokens(word) == empty + 1})
        passage = " ".join(islice(cycle(candidates), n_tokens - empty))
        assert self.n_tokens(passage) == n_tokens
        return passage

    def passages_by_length(self, ratio: int) -> dict[str, str]:
        """Return a passage for each class of lengths around a ratio.

        The template's prefix counts, so r stands for the smallest multiple of the ratio that a passage can reach.
        """
        shortest = self.n_tokens("") + 1
        full_groups = -(-(shortest + 1) // ratio) * ratio
        return {
            "empty": "",
            "1 token": self.passage_of(shortest),
            "r - 1": self.passage_of(full_groups - 1),
            "r": self.passage_of(full_groups),
            "r + 1": self.passage_of(full_groups + 1),
            "over the limit": self.passage_of(self.settings["max_passage_tokens"] + 30),
        }


QUERIES = (
    "Which NFL team represented the AFC at Super Bowl 50?",
    "  lift of a slender wing, \n\n(theory)? 東京 naïve café",
)


def main() -> None:
    """Print the largest difference of each ratio and class of lengths, as a Markdown table."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        parity = Parity(make_checkpoint(Path(folder)), max_passage_tokens=LIMIT)
        print("| ratio | " + " | ".join(parity.passages_by_length(1)) + " | all in one batch |")
        print("|---" * 8 + "|")
        for ratio in RATIOS:
            passages = parity.passages_by_length(ratio)
            batches = [[passage] for passage in passages.values()] + [list(passages.values())]
            worst = [
                max(max(parity.differences(query, batch, ratio=ratio).values()) for query in QUERIES) for batch in batches
            ]
            print(f"| {ratio} | " + " | ".join(f"{value:.1e}" for value in worst) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
