"""Text as the model's tokenizer reads it. Without torch."""

from __future__ import annotations


def without_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates by U+FFFD: stores hold such text, and tokenizers refuse it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
