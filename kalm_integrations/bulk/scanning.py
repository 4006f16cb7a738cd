"""A corpus read once before anything is encoded: bad rows are found, and what is to be known beforehand."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kalm_integrations.bulk.arrow import RowSchema
from kalm_integrations.bulk.repeats import find_repeated, hash_texts
from kalm_integrations.bulk.sources import Source
from kalm_integrations.core.base import Reranker

if TYPE_CHECKING:
    import pyarrow as pa

    from kalm_integrations.core.reranker import KalmReranker

N_SAMPLED = 256
"""Passages from which the size of the output is estimated."""
WHOLE = (1.0, 1.0)
COMPRESSED = (0.4, 0.76)
"""Of the bytes of rows and of encodings, what is left by gzip and zstd: a character of base64 has six bits."""
STORED = (0.0, 0.76)
"""In a payload store, without rows and without base64."""


@dataclass(frozen=True)
class Scan:
    """What is known of a corpus."""

    n_rows: int
    identity: str
    """What tells it from others."""
    n_bytes: int
    """Of its rows as JSON, or of the passages of a table."""
    sample: list[str]
    """Passages drawn at random."""
    repeated: np.ndarray[Any, np.dtype[np.uint64]] = field(repr=False)
    """Hashes of the texts that it has several times; see `find_repeated`."""
    schema: pa.Schema | None = None
    """Of its rows, if it was asked for."""


def scan(source: Source, folder: Path, report: Callable[[str], None] | None, *, with_schema: bool) -> Scan:
    """Read a corpus.

    Args:
        source: the corpus.
        folder: where the hashes of its texts are kept meanwhile, 8 bytes for each.
        report: takes the message about a bad row.
        with_schema: find the Arrow schema of rows that are no table.

    Raises:
        SettingsError: a row is bad and there is no `report`, or the rows have no schema.
    """
    digest = hashlib.blake2b(source.identity(), digest_size=16)
    draw = random.Random(0)
    sample: list[str] = []
    n_rows = n_bytes = 0
    schema = RowSchema() if with_schema and source.schema is None else None
    path = folder / "hashes"
    with path.open("wb") as file:
        for block in source.scan(report):
            texts = [candidate.text for candidate in block.candidates]
            hash_texts(texts).tofile(file)
            for piece in source.identify(block):
                digest.update(piece)
                n_bytes += len(piece)
            for text in texts:
                n_rows += 1
                place = draw.randrange(n_rows)
                if len(sample) < N_SAMPLED:
                    sample.append(text)
                elif place < N_SAMPLED:
                    sample[place] = text
            if schema is not None:
                schema.add([candidate.row for candidate in block.candidates])
    repeated = find_repeated(path)
    path.unlink()
    found = source.schema if schema is None else schema.finished()
    return Scan(n_rows, digest.hexdigest(), n_bytes, sample, repeated, found)


def estimate_bytes(reranker: Reranker, found: Scan, max_inline_bytes: int | None, shares: tuple[float, float]) -> int | None:
    """Return the bytes that an output will have, or None where only a service knows.

    Args:
        reranker: makes the encodings.
        found: the corpus.
        max_inline_bytes: of an encoding.
        shares: what the output takes of the rows' bytes, and of the encodings' characters.
    """
    if not hasattr(reranker, "runtime") or not found.sample:
        return None
    # They load torch, which a service's client does without.
    from kalm_integrations.core.checkpoint.prompts import passage_text
    from kalm_integrations.core.passages.encoding import inline_length
    from kalm_integrations.core.windowing import expected_windows

    opened = cast("KalmReranker", reranker)
    tokenizer = opened.runtime.tokenizer(allow_special_tokens=False)
    token_ids = tokenizer.passages([passage_text(text) for text in found.sample], opened.max_tokens_read)
    width, ratio, codec = opened.runtime.checkpoint.encoder_config.hidden_width, opened.compression_ratio, opened.storage_codec
    limit = opened.max_passage_tokens
    sizes = []
    for ids in token_ids:
        windows = expected_windows(len(ids), limit, opened.max_tokens_read // limit) if len(ids) > limit else None
        sizes.append(inline_length(len(ids), ratio, width, codec, windows))
    if max_inline_bytes is not None:
        sizes = [min(size, max_inline_bytes) for size in sizes]
    encodings = found.n_rows * sum(sizes) / len(sizes)
    return round(found.n_bytes * shares[0] + encodings * shares[1])
