"""A random checkpoint, and texts of exact token counts for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from tools.checkpoints import TEXTS, make_checkpoint
from tools.real_shape import SHAPES, make_random
from transformers import AutoTokenizer

from benchmarks.plan import Prompt
from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.core.checkpoint import prompts
from kalm_integrations.core.settings import INSTRUCTION, SYSTEM_INSTRUCTION
from kalm_integrations.training.tokenizer import train_tokenizer

VOCABULARY = 1000
"""Enough for each word of `TEXTS` and of the template to be one token."""

N_DISTINCT = 8
"""Passages that are really encoded where only the states matter; the others are made from these."""

MAKERS: dict[str, Callable[[Path], object]] = {
    "toy": partial(make_checkpoint, vocab_size=VOCABULARY),
    **{name: partial(make_random, text=text) for name, text in SHAPES.items()},
}


def make_workload_checkpoint(shape: str, folder: Path) -> Path:
    """Save a random checkpoint of a shape with a tokenizer that has words as tokens."""
    MAKERS[shape](folder)
    train_tokenizer(TEXTS, VOCABULARY, folder)
    return folder


class Workload:
    """Texts for a checkpoint made by `make_workload_checkpoint`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._words = sorted({word for text in TEXTS for word in text.split() if self._n_tokens(word) == 1})
        self._encodings: dict[int, list[EncodedPassage]] = {}

    def instruction(self, prompt: Prompt) -> str:
        """Return an instruction, made of the default one's words, that gives the prompt its prefix."""
        n_fixed = self._n_tokens("".join(self._prefix_parts("")))
        words = INSTRUCTION.replace(",", "").replace(".", "").split()
        instruction = " ".join(islice(cycle(words), prompt.n_prefix - n_fixed))
        assert self._n_tokens("".join(self._prefix_parts(instruction))) == prompt.n_prefix
        return instruction

    def query(self, prompt: Prompt, index: int) -> str:
        """Return a query that gives the prompt its length; those of other indices begin with another word."""
        start = index % len(self._words)
        query = " ".join(islice(cycle(self._words), start, start + prompt.n_query))
        parts = prompts.prompt_parts(SYSTEM_INSTRUCTION, self.instruction(prompt), query)
        assert self._n_tokens("".join(text for text, _ in parts)) == prompt.n_tokens
        return query

    def passages(self, n_tokens: int, n: int) -> list[str]:
        """Return different passages for each of which the encoder reads exactly `n_tokens` tokens."""
        draw = random.Random(n_tokens)
        n_words = n_tokens - self._n_tokens(prompts.passage_text(""))
        passages = [" ".join(draw.choices(self._words, k=n_words)) for _ in range(n)]
        assert all(self._n_tokens(prompts.passage_text(passage)) == n_tokens for passage in passages)
        return passages

    def encodings(self, reranker: KalmReranker, n_tokens: int, n: int) -> list[EncodedPassage]:
        """Return different encodings of passages of `n_tokens` tokens.

        The first are those of `passages`; encoding the others too would only take time, so they are made from the first.
        """
        made = self._encodings.setdefault(n_tokens, [])
        if not made:
            made += reranker.encode_passages(self.passages(n_tokens, N_DISTINCT))
        for index in range(len(made), n):
            original = made[index % N_DISTINCT]
            states = original.states * (1 + index * 1e-4)
            made.append(replace(original, states=states, text_hash=f"{index:032x}"))
        return made[:n]

    def take_over(self, n_tokens: int, encodings: list[EncodedPassage]) -> None:
        """Take over encodings that another workload on the same checkpoint made."""
        self._encodings[n_tokens] = encodings

    def _n_tokens(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @staticmethod
    def _prefix_parts(instruction: str) -> list[str]:
        parts = prompts.prompt_parts(SYSTEM_INSTRUCTION, instruction, "")
        return [text for text, _ in parts[:3]]
