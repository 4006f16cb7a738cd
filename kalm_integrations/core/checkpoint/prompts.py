"""The texts the model reads: passage text for the encoder, prompt for the decoder. Pure functions.

Source of the templates: the model cards of KaLM-Reranker-V1 and the reference code published beside the weights (also in mteb,
`kalm_reranker.py`).
"""

from __future__ import annotations

PASSAGE_TEMPLATE = "<Document>: {passage}"
ANSWERS = ("yes", "no")


def passage_text(passage: str) -> str:
    """Return the text that the encoder reads for a passage."""
    return PASSAGE_TEMPLATE.format(passage=passage)


def prompt_parts(system_instruction: str, instruction: str, query: str) -> list[tuple[str, bool]]:
    """Return the decoder's prompt as (text, is_control) parts.

    Parts with is_control are single special tokens, meant as such; the other parts hold text from outside.
    The query is the last part from outside: everything before it depends on the instructions only.
    """
    return [
        ("<bos>", True),
        ("<start_of_turn>", True),
        (f"user\n{system_instruction}\n\n<Instruct>: {instruction}\n<Query>: {query}", False),
        ("<end_of_turn>", True),
        ("\n", False),
        ("<start_of_turn>", True),
        ("model\n\n\n\n", False),
    ]
