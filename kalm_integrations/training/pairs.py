"""Queries and passages as token ids, made as the runtime makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kalm_integrations.core.checkpoint import prompts
from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.checkpoint.tokenization import PromptTokenizer
from kalm_integrations.core.settings import INSTRUCTION, SYSTEM_INSTRUCTION, EncoderSettings, QuerySettings
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
        defaults = checkpoint.defaults
        return cls(
            PromptTokenizer(checkpoint.load_tokenizer()),
            defaults.system_instruction or SYSTEM_INSTRUCTION,
            defaults.instruction or INSTRUCTION,
            defaults.max_passage_tokens or EncoderSettings().max_passage_tokens,
            defaults.max_query_tokens or QuerySettings().max_query_tokens,
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

    def n_cut(self, texts: Sequence[str]) -> int:
        """Return how many passages are longer than the limit."""
        return sum(len(ids) > self.max_passage_tokens for ids in self._whole(texts))

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.passages([prompts.passage_text(text) for text in texts])
