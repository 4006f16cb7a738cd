"""Rows in, the same rows with encodings out: what every way of bulk encoding does with the rows that it has in hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kalm_integrations import tracing
from kalm_integrations.core.base import Reranker
from kalm_integrations.core.passages.strings import REFERENCE_PREFIX
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, Metadata, Passage
from kalm_integrations.corpora.jsonl import PassageFields, Row
from kalm_integrations.errors import EncodingTooLargeError, SettingsError
from kalm_integrations.hosting.models import kept_fingerprint


@dataclass(frozen=True)
class RowCounts:
    """What became of rows."""

    rows: int = 0
    passed_through: int = 0
    """Carried a valid encoding, and kept it."""
    encoded: int = 0
    """Texts that were encoded, or sent to a service; each once."""
    repeated: int = 0
    """Took the encoding of another row with the same text."""
    stale: int = 0
    """Carried an encoding of another checkpoint, setting or text, which was replaced."""
    corrupt: int = 0
    """Carried something that is no encoding, or a damaged one, which was replaced."""
    characters: int = 0
    """Of all encodings that went out."""
    references: int = 0
    """Encodings whose payload lies in the payload store."""
    windowed: int = 0
    """Texts that were encoded in several windows. This and `truncated` are 0 where a service encodes."""
    truncated: int = 0
    """Texts that were encoded, but not to their end."""

    def plus(self, other: RowCounts) -> RowCounts:
        """Return the sums."""
        return RowCounts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    def to_dict(self) -> dict[str, int]:
        """Return the counts, for JSON."""
        return asdict(self)


class RowEncoder:
    """Encodes rows; those that carry a valid encoding keep it, and the same text is encoded once a call."""

    def __init__(self, reranker: Reranker, fields: PassageFields | None = None) -> None:
        """Encode with a reranker, `KalmReranker` or `RemoteReranker`.

        Args:
            reranker: makes the encodings.
            fields: which fields of a row make its passage; None takes `text`, behind `title` if there is one.
        """
        self.reranker = reranker
        self.fields = fields or PassageFields()
        self.counts = RowCounts()

    def encode(self, rows: Sequence[Row]) -> list[Row]:
        """Return copies of rows, in order, with `kalm_encoding` and `kalm_fp`.

        Raises:
            SettingsError: a row has no passage.
            EncodingTooLargeError: an encoding is longer than `max_inline_bytes` allows; its `index` is the row's.
            EngineError: the model fails, or the service does not answer.
        """
        texts = [self.fields.read(row) for row in rows]
        return [{**row, **metadata} for row, metadata in zip(rows, self.encode_texts(texts, rows), strict=True)]

    def encode_texts(
        self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]], known: dict[str, str] | None = None
    ) -> list[Metadata]:
        """Return what to store with passages, in order; see `encode`.

        Args:
            texts: of the rows' passages.
            rows: may carry encodings.
            known: encodings of other calls by text. What is in it is not encoded; it is given what is made or carried here.
        """
        reranker = self.reranker
        passages = [Passage(text, row.get(ENCODING_KEY)) for text, row in zip(texts, rows, strict=True)]
        reading = reranker.read(passages)
        missing = reading.not_stored
        kept = {index: passages[index].encoding or "" for index in set(range(len(texts))).difference(missing)}
        by_text = {texts[index]: value for index, value in sorted(kept.items(), reverse=True)}
        if known is not None:
            wanted = dict.fromkeys(texts[index] for index in missing)
            by_text = {**{text: known[text] for text in wanted if text in known}, **by_text}
        # The first row with a text stands for it.
        unknown: dict[str, int] = {}
        for index in missing:
            if texts[index] not in by_text:
                unknown.setdefault(texts[index], index)
        by_text.update(self._make(unknown))
        if known is not None:
            known.update(by_text)
        values = [kept[index] if index in kept else by_text[text] for index, text in enumerate(texts)]
        self.counts = self.counts.plus(
            RowCounts(
                rows=len(texts),
                passed_through=len(kept),
                encoded=len(unknown),
                repeated=len(missing) - len(unknown),
                stale=reading.counts["stale"],
                corrupt=reading.counts["corrupt"],
                characters=sum(map(len, values)),
                references=sum(value.startswith(REFERENCE_PREFIX) for value in values),
            )
        )
        # A kept encoding may come without its companion, from an export or another host.
        return [{ENCODING_KEY: value, FINGERPRINT_KEY: kept_fingerprint(reranker, value)} for value in values]

    def fill_store(self, texts: Sequence[str]) -> None:
        """Have the reranker's payload store take the encodings that it lacks; there they are found by text.

        Raises:
            SettingsError: the reranker has none, or writes encodings into metadata.
        """
        unique = list(dict.fromkeys(texts))
        statuses = self.reranker.read(unique)
        missing = [text for text, status in zip(unique, statuses, strict=True) if status not in ("found", "cached")]
        made = self._make({text: index for index, text in enumerate(missing)})
        if not all(value.startswith(REFERENCE_PREFIX) for value in made.values()):
            msg = (
                "where no rows are written, the encodings must go to a payload store, but this reranker puts them into "
                "metadata; open it with payload_store and storage_mode='reference'"
            )
            raise SettingsError(msg)
        self.counts = self.counts.plus(
            RowCounts(
                rows=len(texts),
                passed_through=len(unique) - len(missing),
                encoded=len(missing),
                repeated=len(texts) - len(unique),
                characters=sum(map(len, made.values())),
                references=len(made),
            )
        )

    def _make(self, indices: Mapping[str, int]) -> dict[str, str]:
        """Return the encodings of texts, each of which has its first row's index."""
        if not indices:
            return {}
        before = self.reranker.stats
        try:
            with tracing.encoding(self.reranker, len(indices)):
                made = self.reranker.encode_to_metadata(list(indices))
        except EncodingTooLargeError as error:
            if error.index is None:
                raise
            # The core counts the texts that it was given.
            raise EncodingTooLargeError(error.reason, index=list(indices.values())[error.index]) from error
        after = self.reranker.stats
        self.counts = self.counts.plus(
            RowCounts(windowed=after.windowed - before.windowed, truncated=after.truncated - before.truncated)
        )
        return {text: metadata[ENCODING_KEY] for text, metadata in zip(indices, made, strict=True)}
