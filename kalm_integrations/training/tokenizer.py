"""A small English tokenizer for models that are trained from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, repeat
from pathlib import Path

from kalm_integrations.core.checkpoint import prompts
from kalm_integrations.core.settings import INSTRUCTION, SYSTEM_INSTRUCTION

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
"""In the order of Gemma's ids, so that pad, end and begin are 0, 1 and 2 as T5Gemma2's configuration expects."""


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, folder: Path) -> None:
    """Learn a byte-level BPE vocabulary and save it as a Hugging Face tokenizer.

    Text is lower-cased and every word, number or punctuation mark becomes a piece of its own that starts with a space, so a
    word is the same token at the start of a text, after a space, after a quote or after a bracket: a small model matches
    words, and each spelling of a word would have to be learnt on its own. Runs of newlines are pieces too.

    Args:
        texts: what the vocabulary is learnt from.
        vocabulary_size: number of tokens, special ones included.
        folder: where the tokenizer is written.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), "removed"),
            pre_tokenizers.Split(Regex(r"\n+|\p{N}+|[\p{L}\p{M}]+|[^\s\p{L}\p{M}\p{N}]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    template = [text for text, is_control in prompts.prompt_parts(SYSTEM_INSTRUCTION, INSTRUCTION, "") if not is_control]
    # The template's words and newline runs must become whole tokens, however rare they are in the texts.
    every_prompt = chain.from_iterable(repeat([*template, *prompts.ANSWERS, prompts.passage_text("")], 2000))
    tokenizer.train_from_iterator(chain(texts, every_prompt), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
