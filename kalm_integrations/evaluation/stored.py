"""Encodings kept on disk between runs, found by text."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from kalm_integrations.core.passages.expected import is_current
from kalm_integrations.core.passages.stores import LmdbPayloadStore
from kalm_integrations.core.passages.strings import fingerprint_of, hash_text, header_of
from kalm_integrations.core.types import ENCODING_KEY, AnyPassage, Passage
from kalm_integrations.errors import CorruptEncodingError

if TYPE_CHECKING:
    from kalm_integrations.core.reranker import KalmReranker

PASSAGES_PER_BLOCK = 512
"""Passages that are encoded before what they gave is written: what an interrupted run may lose."""


class StoredEncodings:
    """Encodings of passages in an LMDB folder, each made once for a fingerprint, ratio and codec.

    Short passages have the same fingerprint whether long ones are cut or read in windows, and are made once for both.
    """

    def __init__(self, reranker: KalmReranker, folder: str | os.PathLike[str], setting: str) -> None:
        """Open or create the folder.

        Args:
            reranker: encodes what is missing. If it keeps its payloads in the same folder, they are not kept twice.
            folder: of the LMDB store.
            setting: what of its encodings the fingerprint does not say: ratio and codec.
        """
        self._reranker = reranker
        self._store = LmdbPayloadStore(folder)
        self._setting = setting

    def get_many(self, texts: Iterable[str], show_progress: bool = False) -> dict[str, AnyPassage]:
        """Return texts with their encodings, by text; those that are not there yet are encoded and kept."""
        found: dict[str, AnyPassage] = {}
        missing = []
        for text in dict.fromkeys(texts):
            value = self._find(text)
            if value is None:
                missing.append(text)
            else:
                found[text] = Passage(text, value)
        with tqdm(total=len(missing), desc="Encoding", unit="passage", disable=not show_progress) as progress:
            # By length, so that no block, and no batch in it, is padded to one long passage.
            missing.sort(key=len)
            for start in range(0, len(missing), PASSAGES_PER_BLOCK):
                block = missing[start : start + PASSAGES_PER_BLOCK]
                values = [metadata[ENCODING_KEY] for metadata in self._reranker.encode_to_metadata(block)]
                named = ((self._key(text, fingerprint_of(value)), value) for text, value in zip(block, values, strict=True))
                self._store.update({key: value.encode() for key, value in named})
                found.update({text: Passage(text, value) for text, value in zip(block, values, strict=True)})
                progress.update(len(block))
        return found

    def _find(self, text: str) -> str | None:
        """Return a text's encoding, or None if there is none that the reranker would make."""
        whole, *of_windows = self._reranker.fingerprints
        for fingerprint in (*of_windows, whole):
            stored = self._store.get(self._key(text, fingerprint))
            if stored is not None and self._is_current(value := stored.decode("ascii", "replace"), whole, *of_windows):
                return value
        return None

    def _is_current(self, value: str, whole: str, of_windows: str | None = None) -> bool:
        try:
            fields = header_of(value)
        except CorruptEncodingError:
            return False
        return is_current(fields, whole, of_windows, self._reranker.max_passage_tokens)

    def _key(self, text: str, fingerprint: str) -> str:
        return f"passage:{fingerprint}:{self._setting}:{hash_text(text)}"
