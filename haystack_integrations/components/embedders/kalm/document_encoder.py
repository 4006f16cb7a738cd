"""KalmDocumentEncoder: encodes documents at ingest."""

import os
from typing import Annotated, Any, ClassVar, Literal

from haystack import Document, component
from haystack.utils import ComponentDevice, Secret
from pydantic import PositiveInt, Strict, model_validator

from haystack_integrations.common.kalm.component import HUB_TOKEN, ComponentFields, KalmComponent
from kalm_integrations.core.base import Reranker
from kalm_integrations.core.types import ENCODING_KEY, Metadata, Passage
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.documents import checked_documents
from kalm_integrations.hosting.ranking import aencode, encode


class _EncoderFields(ComponentFields):
    batch_size: Annotated[PositiveInt, Strict()] | None
    progress_bar: bool

    @model_validator(mode="after")
    def _check_batch_size(self) -> "_EncoderFields":
        if "encode_batch_size" in self.model_kwargs:
            msg = "model_kwargs must not repeat batch_size, but got encode_batch_size; give batch_size"
            raise SettingsError(msg)
        return self

    def model_settings(self) -> dict[str, Any]:
        return super().model_settings() | {"encode_batch_size": self.batch_size}


@component
class KalmDocumentEncoder(KalmComponent):
    """Puts each document's encoding for `KalmRanker` into its `meta`, where every document store keeps it.

    Its place is after the splitter and before the `DocumentWriter`; a splitter after it would copy a parent's encoding into
    the parts, which are other texts. Documents that carry a valid encoding are not encoded again.

    ```python
    from haystack import Document
    from haystack_integrations.components.embedders.kalm import KalmDocumentEncoder

    encoder = KalmDocumentEncoder(progress_bar=False)
    documents = encoder.run([Document(content="Sarajevo is the capital of Bosnia.")])["documents"]
    print(sorted(documents[0].meta))  # ['kalm_encoding', 'kalm_fp']
    ```
    """

    _fields_class: ClassVar[type[ComponentFields]] = _EncoderFields

    def __init__(
        self,
        *,
        model: str | os.PathLike[str] | Reranker = "pico",
        revision: str | None = None,
        device: ComponentDevice | str | None = None,
        dtype: str | None = None,
        token: Secret | str | None = HUB_TOKEN,
        batch_size: int | None = None,
        progress_bar: bool = True,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        compression_ratio: int | None = None,
        storage_codec: str | None = None,
        max_inline_bytes: int | None = None,
        max_passage_tokens: int | None = None,
        long_passages: Literal["cut", "windows"] | None = None,
        max_windows: int | None = None,
        encoding_key: str = ENCODING_KEY,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Check and keep the parameters; nothing is loaded.

        Args:
            model: an alias (`pico`, `nano`, `small`, ...), a hub id, a folder, the address of a service
                (`http://host:port`; its key is taken from the environment variable `KALM_API_KEY`), or a reranker to share,
                which cannot be serialised. The last two bring their own settings.
            revision: branch, tag or commit of a hub id.
            device: None takes CUDA if there is one.
            dtype: "float32" or "bfloat16"; None takes bfloat16 on CUDA and float32 elsewhere.
            token: for private hub repositories; one that is given as a string cannot be serialised. No service is sent it.
            batch_size: documents per encoder batch; None chooses by device.
            progress_bar: draw one.
            meta_fields_to_embed: meta fields whose values are put in front of the content; the same as the ranker's.
            embedding_separator: stands between them and the content; the same as the ranker's.
            compression_ratio: encoder tokens per stored state; 4 by default.
            storage_codec: fp32, fp16, bf16, int8, rot4, rot3 or rot2.
            max_inline_bytes: if set, the finest ratio whose string is not longer is chosen for each document.
            max_passage_tokens: longer documents are read in windows of so many tokens, or cut; 1,024 by default; the same as
                the ranker's.
            long_passages: "windows", the default, reads all of a longer document, in windows that overlap: its score is
                that of the best one; "cut" reads its first `max_passage_tokens`; the same as the ranker's.
            max_windows: windows of a document at most; 64 by default; the same as the ranker's.
            encoding_key: meta key of the encoding.
            model_kwargs: further arguments of `KalmReranker.from_pretrained`, such as `storage_mode` and `payload_store`.

        Raises:
            SettingsError: one breaks a rule, or has no effect.
        """
        self._keep(
            model=model,
            revision=revision,
            device=device,
            dtype=dtype,
            token=token,
            batch_size=batch_size,
            progress_bar=progress_bar,
            meta_fields_to_embed=meta_fields_to_embed,
            embedding_separator=embedding_separator,
            compression_ratio=compression_ratio,
            storage_codec=storage_codec,
            max_inline_bytes=max_inline_bytes,
            max_passage_tokens=max_passage_tokens,
            long_passages=long_passages,
            max_windows=max_windows,
            encoding_key=encoding_key,
            model_kwargs=model_kwargs,
        )

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        """Encode documents.

        Args:
            documents: any iterable of documents; they are not changed.

        Returns:
            `documents`: copies in the same order, with the same ids, with encodings in `meta`.

        Raises:
            SettingsError: `documents` are something else.
            EncodingTooLargeError: an encoding does not fit `max_inline_bytes`, and there is no `payload_store`.
        """
        given = checked_documents(documents, Document, "KalmDocumentEncoder")
        if not given:
            return {"documents": []}
        return self._encoded(given, encode(self.reranker, self._passages(given), show_progress=self.progress_bar))

    @component.output_types(documents=list[Document])
    async def run_async(self, documents: list[Document]) -> dict[str, list[Document]]:
        """Encode documents; no thread waits for the model, and what is left is not encoded if it is cancelled. See `run`."""
        given = checked_documents(documents, Document, "KalmDocumentEncoder")
        if not given:
            return {"documents": []}
        return self._encoded(given, await aencode(self, self._passages(given), show_progress=self.progress_bar))

    def _passages(self, documents: list[Document]) -> list[Passage]:
        return [self.layout.passage(document) for document in documents]

    def _encoded(self, documents: list[Document], made: list[Metadata]) -> dict[str, list[Document]]:
        pairs = zip(documents, made, strict=True)
        return {"documents": [self.layout.attach(document, metadata) for document, metadata in pairs]}

    def warm_up(self) -> None:
        """Open the checkpoint, fetching it if need be, and load its encoder.

        Raises:
            SettingsError: a setting is unknown or breaks a rule, or settings came with a reranker that has its own.
            CheckpointError: the checkpoint cannot be used.
        """
        self.reranker.warm_up(decoder=False)
