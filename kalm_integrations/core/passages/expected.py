"""What a reranker's encodings have in common, and whether one can be its own. Without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kalm_integrations.core.passages.header import refuse
from kalm_integrations.core.passages.windows import Window
from kalm_integrations.errors import StaleEncodingError


def fingerprint(facts: dict[str, Any]) -> str:
    """Return the hash (BLAKE2b, 32 hex digits) of JSON-able facts about what makes an encoding."""
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def is_current(fields: Mapping[str, Any], fingerprint: str, windows_fingerprint: str | None, max_tokens: int | None) -> bool:
    """Return whether a reranker makes encodings of a header's kind.

    Args:
        fields: a checked header.
        fingerprint: the reranker's.
        windows_fingerprint: of what it encodes in windows; None if it cuts passages.
        max_tokens: its `max_passage_tokens`. A passage that fills them may have been cut, so windows are wanted of it, too.
    """
    if "w" in fields:
        return bool(fields["fp"] == windows_fingerprint)
    may_be_cut = windows_fingerprint is not None and (max_tokens is None or fields["n"] >= max_tokens)
    return bool(fields["fp"] == fingerprint and not may_be_cut)


@dataclass(frozen=True)
class Expected:
    """What all encodings of one checkpoint and one setting of its encoder have in common."""

    fingerprint: str
    width: int
    max_tokens: int
    """`max_passage_tokens`."""
    limit: float
    """What no magnitude in a state may exceed."""
    windows_fingerprint: str | None = None
    """Of what is encoded in windows; None where long passages are cut."""
    max_windows: int = 1

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """All that its encodings carry: of passages that fit, and of those in windows."""
        return (self.fingerprint,) if self.windows_fingerprint is None else (self.fingerprint, self.windows_fingerprint)

    def check_fields(self, fields: Mapping[str, Any]) -> None:
        """Compare what a checked header says with what is expected.

        Raises:
            StaleEncodingError: another checkpoint or encoder setting made it.
            CorruptEncodingError: nothing made it: the fingerprint allows no such number.
        """
        remedy = "encode the text again, or pass Passage(text, encoding), which does so by itself"
        if fields["fp"] not in self.fingerprints or fields["s"][1] != self.width:
            wanted = " or ".join(self.fingerprints)
            msg = (
                f"an encoding must carry this reranker's fingerprint {wanted} and states of width {self.width}, but has "
                f"{fields['fp']} and {fields['s'][1]}; {remedy}"
            )
            raise StaleEncodingError(msg)
        if "w" not in fields and fields["n"] > self.max_tokens:
            refuse(f"be of at most max_passage_tokens={self.max_tokens} tokens, but has {fields['n']}")
        if not is_current(fields, self.fingerprint, self.windows_fingerprint, self.max_tokens):
            msg = (
                f"an encoding of max_passage_tokens={self.max_tokens} tokens or more must be in windows and carry the "
                f"fingerprint {self.windows_fingerprint} (long_passages='windows'), but has {fields['n']} tokens, "
                f"{fields.get('w', 'no')} windows and {fields['fp']}; {remedy}"
            )
            raise StaleEncodingError(msg)
        if fields.get("w", 1) > self.max_windows:
            refuse(f"be of at most max_windows={self.max_windows} windows, but has {fields['w']}")

    def check_windows(self, windows: Sequence[Window]) -> None:
        """Compare windows with what is expected, beyond what their header says.

        Raises:
            CorruptEncodingError: one has more tokens than a window can have.
        """
        longest = max(window.n_tokens for window in windows)
        if longest > self.max_tokens:
            refuse(f"be of windows of at most max_passage_tokens={self.max_tokens} tokens, but has one of {longest}")
