"""Queries and passages as token ids, made as the runtime makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kalm_integrations.core.checkpoint import prompts
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.checkpoint.tokenization import PromptTokenizer
from kalm_integrations.core.settings import EncoderSettings, QuerySettings, with_defaults
from kalm_integrations.training.config import PhaseConfig


@dataclass(frozen=True)
class PairTokenizer:
    """A checkpoint's tokenizer with its instructions and limits."""

    tokenizer: PromptTokenizer
    system_instruction: str
    instruction: str
    """Of queries without their own."""
    max_passage_tokens: int
    max_query_tokens: int

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> PairTokenizer:
        """Return a checkpoint's, with the limits that hold in use."""
        encoder = with_defaults(EncoderSettings(), checkpoint.defaults)
        query = with_defaults(QuerySettings(), checkpoint.defaults)
        return cls(
            PromptTokenizer(checkpoint.load_tokenizer()),
            query.system_instruction,
            query.instruction,
            encoder.max_passage_tokens,
            query.max_query_tokens,
        )

    def limited_to(self, phase: PhaseConfig) -> PairTokenizer:
        """Return one with the limits of a phase, where it sets any."""
        return replace(
            self,
            max_passage_tokens=phase.max_passage_tokens or self.max_passage_tokens,
            max_query_tokens=phase.max_query_tokens or self.max_query_tokens,
        )

    def passages(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of passages, cut to the limit."""
        return [ids[: self.max_passage_tokens] for ids in self._whole(texts)]

    def prompt(self, query: str, instruction: str | None) -> list[int]:
        """Return the ids of the whole prompt of a query, which is cut to the limit."""
        cut = self.tokenizer.truncate_query(query, self.max_query_tokens)
        return self.tokenizer.prompt(self.system_instruction, instruction or self.instruction, cut)

    def n_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each passage has, whatever the limit."""
        return [len(ids) for ids in self._whole(texts)]

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.passages([prompts.passage_text(text) for text in texts])
