"""Encoding what a store holds without an encoding, or with an old one."""

from __future__ import annotations

from langchain_core.documents import Document
from tqdm.auto import tqdm

from kalm_integrations.core.types import FINGERPRINT_KEY
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.stores import BackfillReport
from kalm_integrations.langchain.documents import find_unencoded
from kalm_integrations.langchain.encode import KalmPassageEncoder, encode_missing
from kalm_integrations.langchain.stores import access_to


def backfill(
    store: object,
    encoder: KalmPassageEncoder | None = None,
    *,
    check_texts: bool = False,
    batch_size: int = 64,
    show_progress: bool = True,
) -> BackfillReport:
    """Encode a store's documents that have no encoding of the encoder's model, in place and without embedding them again.

    Each batch is written when it is done, so a run that was stopped is resumed by the next one.

    Args:
        store: what `write_back_to` takes.
        encoder: brings model and settings; `KalmPassageEncoder()` for None.
        check_texts: read every document, not only those whose `kalm_fp` differs, to find encodings whose text has changed
            under them (children of an encoded parent; Chroma's upsert, which merges metadata).
        batch_size: documents read, encoded and written at a time.
        show_progress: draw a progress bar.

    Raises:
        SettingsError: the store is not known, or `batch_size` is not positive.
        EncodingTooLargeError: an encoding does not fit `max_inline_bytes`.
    """
    if batch_size < 1:
        msg = f"batch_size must be a positive whole number, but got {batch_size}"
        raise SettingsError(msg)
    encoder = KalmPassageEncoder() if encoder is None else encoder
    access, reranker, key = access_to(store), encoder.reranker, encoder.encoding_key
    ids = access.find_ids(None if check_texts else reranker.fingerprint)
    n_checked = n_missing = n_stale = 0
    with tqdm(total=len(ids), desc="Encoding documents", unit="doc", disable=not show_progress) as bar:
        for start in range(0, len(ids), batch_size):
            held = access.read(ids[start : start + batch_size])
            documents = list(held.values())
            outdated = find_unencoded(documents, reranker, key)
            n_without = sum(key not in documents[index].metadata for index in outdated)
            n_checked += len(documents)
            n_missing += n_without
            n_stale += len(outdated) - n_without
            encoded = encode_missing(encoder, documents, outdated) if documents else []
            changes = {i: _changes(old, new, key) for (i, old), new in zip(held.items(), encoded, strict=True)}
            changes = {i: added for i, added in changes.items() if added}
            if changes:
                access.add_metadata(changes)
            bar.update(min(batch_size, len(ids) - start))
    return BackfillReport(n_checked, n_missing, n_stale)


def _changes(old: Document, new: Document, encoding_key: str) -> dict[str, str]:
    return {k: new.metadata[k] for k in (encoding_key, FINGERPRINT_KEY) if old.metadata.get(k) != new.metadata[k]}
