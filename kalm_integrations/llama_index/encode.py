"""KalmPassageEncoder: encodes nodes at ingest."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.schema import BaseNode, TransformComponent
from pydantic import Field

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.types import Metadata, Passage
from kalm_integrations.hosting.documents import checked_documents
from kalm_integrations.hosting.ranking import aencode, encode
from kalm_integrations.llama_index.nodes import NodeFields, to_passage, with_encoding


class KalmPassageEncoder(NodeFields, TransformComponent):
    """Encodes nodes, as the last transformation of an ingestion pipeline.

    Returns copies that carry the encoding in their metadata, out of sight of LLMs and embedding models. A node that has a
    valid encoding of its text already is not encoded again.

    ```python
    pipeline = IngestionPipeline(transformations=[splitter, embed_model, KalmPassageEncoder("pico")])
    ```
    """

    show_progress: bool = Field(default=False, exclude=True)
    """Draw a progress bar."""

    def __init__(self, model: str | os.PathLike[str] | Reranker = "pico", **settings: Any) -> None:
        """Check and keep settings; nothing is loaded.

        Args:
            model: an alias, a hub id, a folder, the address of a service, or a reranker to share; the last two bring
                settings of their own.
            **settings: the fields of the class.

        Raises:
            SettingsError: a setting is unknown, breaks a rule, or is given beside a reranker that has its own.
        """
        super().__init__(model=model, **settings)

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "KalmPassageEncoder"

    def __call__(self, nodes: Iterable[BaseNode], **kwargs: Any) -> list[BaseNode]:
        """Return a copy of each node, in order, with its encoding.

        Args:
            nodes: the nodes, split, and with all the metadata that belongs to their text.
            **kwargs: what the pipeline gives to every transformation; ignored.

        Raises:
            SettingsError: something else than nodes was given, or the reranker cannot be made from the settings.
            CheckpointError: the checkpoint is not there or cannot be used.
            EncodingTooLargeError: a passage does not fit `max_inline_bytes`.
        """
        del kwargs
        given = self._checked(nodes)
        if not given:
            return []
        return self._encoded(given, encode(self.reranker, self._passages(given), show_progress=self.show_progress))

    async def acall(self, nodes: Iterable[BaseNode], **kwargs: Any) -> list[BaseNode]:
        """Do the same; no thread waits for the model."""
        del kwargs
        given = self._checked(nodes)
        if not given:
            return []
        return self._encoded(given, await aencode(self, self._passages(given), show_progress=self.show_progress))

    def _checked(self, nodes: Iterable[BaseNode]) -> list[BaseNode]:
        return checked_documents(nodes, BaseNode, self.class_name())  # type: ignore[type-abstract] # only for isinstance

    def _passages(self, nodes: Sequence[BaseNode]) -> list[Passage]:
        return [to_passage(node, self.encoding_key, self.metadata_mode) for node in nodes]

    def _encoded(self, nodes: Sequence[BaseNode], made: Sequence[Metadata]) -> list[BaseNode]:
        return [with_encoding(node, metadata, self.encoding_key) for node, metadata in zip(nodes, made, strict=True)]
