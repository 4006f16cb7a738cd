"""KalmPassageEncoder: encodes nodes at ingest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from llama_index.core.schema import BaseNode, TransformComponent
from pydantic import Field

from kalm_integrations.core.types import FINGERPRINT_KEY
from kalm_integrations.llama_index.component import RerankerComponent
from kalm_integrations.llama_index.nodes import attach, to_passage


class KalmPassageEncoder(RerankerComponent, TransformComponent):
    """Encodes nodes, as the last transformation of an ingestion pipeline.

    Returns copies that carry the encoding in their metadata, out of sight of LLMs and embedding models. A node that has a
    sound encoding of its text already is not encoded again.

    ```python
    pipeline = IngestionPipeline(transformations=[splitter, embed_model, KalmPassageEncoder("pico")])
    ```
    """

    show_progress: bool = Field(default=False, exclude=True)
    """Draw a progress bar."""

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "KalmPassageEncoder"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
        """Return a copy of each node, in order, with its encoding.

        Args:
            nodes: the nodes, split, and with all the metadata that belongs to their text.
            **kwargs: what the pipeline gives to every transformation; ignored.

        Raises:
            EncodingTooLargeError: a passage does not fit `max_inline_bytes`.
        """
        del kwargs
        if not nodes:
            return []
        passages = [to_passage(node, self.encoding_key, self.metadata_mode) for node in nodes]
        missing = self.reranker.find_unencoded(passages)
        encoded = self._encode([passages[i].text for i in missing], show_progress=self.show_progress)
        metadata = [{self.encoding_key: p.encoding or "", FINGERPRINT_KEY: self.reranker.fingerprint} for p in passages]
        for i, values in zip(missing, encoded, strict=True):
            metadata[i] = values
        return [attach(node, values, self.encoding_key) for node, values in zip(nodes, metadata, strict=True)]

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
        """Do the same in a thread, so that the event loop is not held up."""
        return await asyncio.to_thread(self, nodes, **kwargs)
