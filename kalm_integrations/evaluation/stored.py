"""Encodings kept on disk between runs, found by text."""

from __future__ import annotations

import os
from collections.abc import Iterable

from tqdm.auto import tqdm

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.passages.stores import LmdbPayloadStore
from kalm_integrations.core.passages.strings import hash_text
from kalm_integrations.core.types import ENCODING_KEY, AnyPassage, Passage

PASSAGES_PER_BLOCK = 512
"""Passages that are encoded before what they gave is written: what an interrupted run may lose."""


class StoredEncodings:
    """Encodings of passages in an LMDB folder, each made once for a fingerprint, ratio and codec."""

    def __init__(self, reranker: Reranker, folder: str | os.PathLike[str], setting: str) -> None:
        """Open or create the folder.

        Args:
            reranker: encodes what is missing. If it keeps its payloads in the same folder, they are not kept twice.
            folder: of the LMDB store.
            setting: what of its encodings the fingerprint does not say: ratio and codec.
        """
        self._reranker = reranker
        self._store = LmdbPayloadStore(folder)
        self._prefix = f"passage:{reranker.fingerprint}:{setting}"

    def get_many(self, texts: Iterable[str], show_progress: bool = False) -> dict[str, AnyPassage]:
        """Return texts with their encodings, by text; those that are not there yet are encoded and kept."""
        found: dict[str, AnyPassage] = {}
        missing = []
        for text in dict.fromkeys(texts):
            value = self._store.get(self._key(text))
            if value is None:
                missing.append(text)
            else:
                found[text] = Passage(text, value.decode())
        with tqdm(total=len(missing), desc="Encoding", unit="passage", disable=not show_progress) as progress:
            # By length, so that no block, and no batch in it, is padded to one long passage.
            missing.sort(key=len)
            for start in range(0, len(missing), PASSAGES_PER_BLOCK):
                block = missing[start : start + PASSAGES_PER_BLOCK]
                values = [metadata[ENCODING_KEY] for metadata in self._reranker.encode_to_metadata(block)]
                self._store.update({self._key(text): value.encode() for text, value in zip(block, values, strict=True)})
                found.update({text: Passage(text, value) for text, value in zip(block, values, strict=True)})
                progress.update(len(block))
        return found

    def _key(self, text: str) -> str:
        return f"{self._prefix}:{hash_text(text)}"
