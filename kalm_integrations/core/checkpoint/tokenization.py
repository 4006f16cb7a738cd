"""Token ids of passages and prompts, with the reference's truncation, and with special tokens as plain text by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kalm_integrations.core.checkpoint import prompts
from kalm_integrations.core.checkpoint.first_tokens import FirstTokens
from kalm_integrations.core.settings import INSTRUCTION, MAX_INSTRUCTION_TOKENS, SYSTEM_INSTRUCTION
from kalm_integrations.core.text import without_surrogates
from kalm_integrations.errors import InvalidCheckpointError, SettingsError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


MAX_PREFIXES = 64
"""Pairs of instructions whose tokens are kept."""

MAX_TEMPLATE_PART = 16
"""Characters of the parts of the template that hold no text from outside."""


class PromptTokenizer:
    """Turns passages and queries into token ids.

    Safe to share between threads: the tokenizer is configured once, here, and truncation is done by slicing.
    """

    def __init__(self, tokenizer: Tokenizer, *, allow_special_tokens: bool = False) -> None:
        """Take over a tokenizer.

        Args:
            tokenizer: from `Checkpoint.load_tokenizer`; it belongs to this object from now on.
            allow_special_tokens: read special-token strings in passages, queries and instructions as control tokens, as
                the reference code does. By default they are plain text.

        Raises:
            InvalidCheckpointError: the tokenizer lacks an answer, or cannot keep special tokens apart from text.
        """
        self._tokenizer = tokenizer
        self._first = FirstTokens(tokenizer, self._encodings)
        self._allow_special_tokens = allow_special_tokens
        self._parts: dict[str, list[int]] = {}
        self._prefixes: dict[tuple[str, str], list[int]] = {}
        self._special_ids = {
            token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.answer_ids = tuple(self._answer_id(answer) for answer in prompts.ANSWERS)
        if not allow_special_tokens:
            texts = (SYSTEM_INSTRUCTION, INSTRUCTION, " query \n ")
            parts = prompts.prompt_parts(*texts)
            reference = self._encode(["".join(text for text, _ in parts)])[0]
            tokenizer.encode_special_tokens = True
            controls = [text for text, is_control in parts if is_control]
            if self.prompt(*texts) != reference or any(tokenizer.token_to_id(c) in self._encode([c])[0] for c in controls):
                msg = (
                    "this checkpoint's tokenizer does not mark its control tokens as special, or does not tokenise the "
                    "prompt part by part as it does as a whole, so special tokens cannot be kept apart from text; pass "
                    "allow_special_tokens=True"
                )
                raise InvalidCheckpointError(msg)

    def passages(self, texts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
        """Return the ids of encoder texts (see `prompts.passage_text`): the first `max_tokens` of each, or all."""
        return self._encode(list(texts)) if max_tokens is None else self._first.ids(texts, max_tokens)

    def offsets(self, text: str, max_tokens: int) -> list[tuple[int, int]]:
        """Return where the first `max_tokens` tokens of a text begin and end in it, in characters of it without surrogates."""
        return self._first.offsets(text, max_tokens)

    def truncate_query(self, query: str, max_tokens: int) -> str:
        """Return the query cut to `max_tokens` tokens, by decoding them, as the reference does for every query."""
        [ids] = self._first.ids([query], max_tokens)
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def cut_texts(self, texts: Sequence[str], max_tokens: int) -> list[str]:
        """Return texts cut behind their first `max_tokens` tokens."""
        return self._first.cut([without_surrogates(text) for text in texts], max_tokens)

    def prompt(self, system_instruction: str, instruction: str, query: str) -> list[int]:
        """Return the ids of the whole prompt for a query that is already truncated."""
        parts = prompts.prompt_parts(system_instruction, instruction, query)
        if self._allow_special_tokens:
            return self._encode(["".join(text for text, _ in parts)])[0]
        # A special token separates texts: what stands between two of them is tokenised on its own in any case. A control
        # token that this tokenizer does not have is text, and so belongs to its neighbours.
        ids: list[int] = []
        text = ""
        for part, is_control in parts:
            if is_control and part in self._special_ids:
                ids += self._part(text)
                ids.append(self._special_ids[part])
                text = ""
            else:
                text += part
        return ids + self._part(text)

    def _part(self, text: str) -> list[int]:
        """Return the ids of a part of the prompt; those of the template's own are kept."""
        if len(text) > MAX_TEMPLATE_PART:
            return self._encode([text])[0]
        if text not in self._parts:
            self._parts[text] = self._encode([text])[0] if text else []
        return self._parts[text]

    def prompt_prefix(self, system_instruction: str, instruction: str) -> list[int]:
        """Return the ids that prompts begin with whatever the query, a token that merges with the query's start left out.

        Raises:
            SettingsError: there are more than `MAX_INSTRUCTION_TOKENS`.
        """
        known = self._prefixes.get((system_instruction, instruction))
        if known is not None:
            return known
        # Two queries that begin with nothing in common.
        first, second = (self.prompt(system_instruction, instruction, query) for query in ("which", "42"))
        n_tokens = n_shared(first, second)
        if n_tokens > MAX_INSTRUCTION_TOKENS:
            msg = (
                f"instruction and system_instruction may take {MAX_INSTRUCTION_TOKENS} tokens together with the template, but "
                f"take {n_tokens}; shorten them: they are never cut, and every query repeats them"
            )
            raise SettingsError(msg)
        if len(self._prefixes) >= MAX_PREFIXES:
            self._prefixes.clear()
        self._prefixes[system_instruction, instruction] = first[:n_tokens]
        return first[:n_tokens]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._encodings(texts)]

    def _encodings(self, texts: Sequence[str]) -> list[Encoding]:
        whole = [without_surrogates(text) for text in texts]
        if len(whole) == 1:
            # A batch starts threads, which takes longer than a query.
            return [self._tokenizer.encode(whole[0], add_special_tokens=False)]
        encodings: list[Encoding] = self._tokenizer.encode_batch(whole, add_special_tokens=False)
        return encodings

    def _answer_id(self, answer: str) -> int:
        ids = self._encode([answer])[0]
        if not ids:
            msg = f"the tokenizer must have a token for the answer {answer!r}, but gives none; it cannot score"
            raise InvalidCheckpointError(msg)
        return ids[-1]


def n_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common from the start."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
