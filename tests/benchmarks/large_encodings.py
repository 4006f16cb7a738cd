"""Encodings by the hundred thousand: of Nano's size, right for their texts, by the real codec, without an encoder's work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from uuid import UUID

import torch
from tools.checkpoints import make_checkpoint

from benchmarks.stores import TEXT_CHARACTERS, read_words
from kalm_integrations import EncodedPassage, KalmReranker, Passage
from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.core.passages.encoding import payload_key
from kalm_integrations.core.passages.header import CHECKSUM_BYTES, checksum, to_base64, write_header
from kalm_integrations.core.passages.strings import PREFIX, REFERENCE_PREFIX, hash_text

WIDTH = 640
"""Of Nano's states. The rest of the checkpoint is tiny, since nothing is encoded or scored."""
N_TOKENS = 256
N_PAYLOADS = 256
"""Different payloads; each is that of many texts. No store compares what it holds, and none can compress them."""


def key_of(index: int) -> str:
    """Return the id under which a passage is stored."""
    return str(UUID(int=index))


@dataclass(frozen=True)
class Encoded:
    """One passage and its encoding, in the three forms in which it can be stored."""

    key: str
    text: str
    inline: str
    reference: str
    payload_name: str
    """Key of the payload store."""
    payload: bytes


class Encodings:
    """Makes passages and encodings by their number; the same number gives the same."""

    def __init__(self, folder: Path) -> None:
        """Take a checkpoint's folder; a folder without one gets one."""
        self.checkpoint = folder
        if not (folder / "config.json").exists():
            make_checkpoint(folder, hidden_size=WIDTH)
        self._words = " ".join(read_words())
        reranker = self.open()
        self.fingerprint = reranker.fingerprint
        self._ratio, self._codec = reranker.compression_ratio, reranker.storage_codec

    def open(self, payload_store: str | Path | None = None, cache_bytes: int | None = None) -> KalmReranker:
        """Return a reranker with empty caches."""
        return KalmReranker.from_pretrained(
            self.checkpoint, device="cpu", payload_store=payload_store, cache_bytes=cache_bytes
        )

    @cached_property
    def _payloads(self) -> list[tuple[bytes, str]]:
        """Payloads, and what they are in a metadata string."""
        draw = torch.Generator().manual_seed(0)
        payloads = []
        for _ in range(N_PAYLOADS):
            states = torch.randn(N_TOKENS // self._ratio, WIDTH, generator=draw)
            made = EncodedPassage(states, N_TOKENS, self._ratio, self.fingerprint, "0" * 32, self._codec).as_stored()
            payload = made.to_payload()[CHECKSUM_BYTES:]
            payloads.append((payload, to_base64(payload)))
        return payloads

    def text(self, index: int) -> str:
        """Return a text of the length of 256 tokens of English."""
        start = index * 7919 % (len(self._words) - TEXT_CHARACTERS)
        return f"{index} {self._words[start : start + TEXT_CHARACTERS]}"

    def make(self, index: int) -> Encoded:
        """Return a passage with its encoding."""
        text = self.text(index)
        payload, characters = self._payloads[index % N_PAYLOADS]
        text_hash = hash_text(passage_text(text))
        shape = [N_TOKENS // self._ratio, WIDTH]
        fields = {"fp": self.fingerprint, "th": text_hash, "n": N_TOKENS, "r": self._ratio, "s": shape, "c": self._codec}
        return Encoded(
            key_of(index),
            text,
            f"{PREFIX}.{write_header(fields, payload)}.{characters}",
            f"{REFERENCE_PREFIX}.{write_header(fields)}",
            payload_key(self.fingerprint, text_hash, self._ratio, self._codec),
            checksum(fields, payload) + payload,
        )

    def passages(self, indices: list[int], *, with_reference: bool) -> list[Passage]:
        """Return passages as a store gives them that holds references, or none."""
        made = [self.make(index) for index in indices]
        return [Passage(each.text, each.reference if with_reference else None) for each in made]
