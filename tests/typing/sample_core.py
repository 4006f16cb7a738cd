"""Calls of the core as the documentation shows them: type-checked, never run."""

from kalm_integrations import EncodedPassage, KalmReranker, Passage, RankedPassage, Ranking, Reading, Reranker, RuntimeStats
from kalm_integrations.sentence_transformers import KalmCrossEncoder
from kalm_integrations.testing import FakeReranker

reranker = KalmReranker.from_pretrained("nano", device="cuda", compression_ratio=8, storage_codec="int8")
encodings: list[EncodedPassage] = reranker.encode_passages(["a", "b"])
metadata: list[dict[str, str]] = reranker.encode_to_metadata(text for text in ("a", "b"))
stored = [Passage(text, m["kalm_encoding"]) for text, m in zip(("a", "b"), metadata, strict=True)]

reading: Reading = reranker.read(stored)
for status in reading:
    print(status.upper())
ranking: Ranking = reranker.rank("query", reading, top_k=3, score_threshold=0.1, instruction="Find it.")
same: list[RankedPassage] = reranker.rank("query", ["a", *encodings, *stored], fusion="reciprocal_rank")
for hit in ranking:
    print(hit.index, hit.score + hit.margin, hit.text)
to_store: dict[int, dict[str, str]] = ranking.made
many: list[Ranking] = reranker.rank_many(
    ["q", "r"], [["a"], reading], first_stage_scores=[[1.0], [2.0, 3.0]], fusion="z_score"
)
scores: list[float] = reranker.score("query", iter(["a"]))
stats: RuntimeStats = reranker.stats
fake: Reranker = FakeReranker()
predicted = KalmCrossEncoder(fake).predict([("query", "passage")])
