"""KalmDocumentEncoder: encodes documents at ingest."""

import os
from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import ComponentDevice, Secret

from haystack_integrations.common.kalm.documents import DocumentLayout, check_documents
from haystack_integrations.common.kalm.models import HUB_TOKEN, WithReranker
from kalm_integrations.core.types import ENCODING_KEY, FINGERPRINT_KEY, Reranker


@component
class KalmDocumentEncoder(WithReranker):
    """Puts each document's encoding for `KalmRanker` into its `meta`, where every document store keeps it.

    Its place is after the splitter and before the `DocumentWriter`; a splitter after it would copy a parent's encoding into
    the parts, which are other texts. Documents that carry a sound encoding are not encoded again.

    ```python
    from haystack import Document
    from haystack_integrations.components.embedders.kalm import KalmDocumentEncoder

    encoder = KalmDocumentEncoder(progress_bar=False)
    documents = encoder.run([Document(content="Sarajevo is the capital of Bosnia.")])["documents"]
    print(sorted(documents[0].meta))  # ['kalm_encoding', 'kalm_fp']
    ```
    """

    def __init__(
        self,
        *,
        model: str | os.PathLike[str] | Reranker = "pico",
        revision: str | None = None,
        device: ComponentDevice | None = None,
        dtype: str | None = None,
        token: Secret | None = HUB_TOKEN,
        batch_size: int | None = None,
        progress_bar: bool = True,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        compression_ratio: int | None = None,
        storage_codec: str | None = None,
        max_inline_bytes: int | None = None,
        max_passage_tokens: int | None = None,
        encoding_key: str = ENCODING_KEY,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Remember the settings; nothing is loaded.

        Args:
            model: an alias (`pico`, `nano`, `small`, ...), a hub id, a folder, or a reranker to share, which brings its own
                settings and cannot be serialised.
            revision: branch, tag or commit of a hub id.
            device: None takes CUDA if there is one.
            dtype: "float32" or "bfloat16"; None takes bfloat16 on CUDA and float32 elsewhere.
            token: for private hub repositories.
            batch_size: documents per encoder batch; None chooses by device.
            progress_bar: draw one.
            meta_fields_to_embed: meta fields whose values are put in front of the content; the same as the ranker's.
            embedding_separator: stands between them and the content; the same as the ranker's.
            compression_ratio: encoder tokens per stored state; 4 by default.
            storage_codec: fp32, fp16, bf16, int8 or int4.
            max_inline_bytes: if set, the finest ratio whose string is not longer is chosen for each document.
            max_passage_tokens: longer documents are cut; 1,024 by default; the same as the ranker's.
            encoding_key: meta key of the encoding.
            model_kwargs: further arguments of `KalmReranker.from_pretrained`, such as `storage_mode` and `payload_store`.

        Raises:
            SettingsError: `encoding_key` cannot be used.
        """
        self._layout = DocumentLayout(tuple(meta_fields_to_embed or ()), embedding_separator, encoding_key)
        self.model = os.fspath(model) if isinstance(model, (str, os.PathLike)) else model
        self.revision = revision
        self.device = device
        self.dtype = dtype
        self.token = token
        self.batch_size = batch_size
        self.progress_bar = progress_bar
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator
        self.compression_ratio = compression_ratio
        self.storage_codec = storage_codec
        self.max_inline_bytes = max_inline_bytes
        self.max_passage_tokens = max_passage_tokens
        self.encoding_key = encoding_key
        self.model_kwargs = model_kwargs

    def to_dict(self) -> dict[str, Any]:
        """Return the component as a dictionary.

        Raises:
            SettingsError: `model` is a reranker object.
        """
        return default_to_dict(self, **self._init_parameters())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "KalmDocumentEncoder":
        """Return the component that `to_dict` described."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        """Encode documents.

        Args:
            documents: the documents; they are not changed.

        Returns:
            `documents`: copies in the same order, with the same ids, with encodings in `meta`.

        Raises:
            TypeError: `documents` is not a list of Documents.
            EncodingTooLargeError: an encoding does not fit `max_inline_bytes`, and there is no `payload_store`.
        """
        check_documents(documents, "KalmDocumentEncoder")
        return {"documents": self.encode(documents, show_progress=self.progress_bar) if documents else []}

    def encode(self, documents: list[Document], *, show_progress: bool) -> list[Document]:
        """Return copies of documents, in order, with encodings; those that carry a sound one keep it."""
        reranker = self.reranker
        passages = [self._layout.passage(document) for document in documents]
        missing = reranker.find_unencoded(passages)
        made = reranker.encode_to_metadata([passages[index].text for index in missing], show_progress) if missing else []
        # A kept encoding may come without its companion, from an export or another host.
        companion = {FINGERPRINT_KEY: reranker.fingerprint}
        encoded = [replace(document, meta={**document.meta, **companion}) for document in documents]
        for index, metadata in zip(missing, made, strict=True):
            encoded[index] = self._layout.attach(documents[index], metadata)
        return encoded

    def warm_up(self) -> None:
        """Open the checkpoint, fetching it if need be, and load its encoder.

        Raises:
            SettingsError: a setting is unknown or breaks a rule, or settings came with a reranker that has its own.
            CheckpointError: the checkpoint cannot be used.
        """
        self.reranker.warm_up(decoder=False)

    def _settings(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "dtype": self.dtype,
            "encode_batch_size": self.batch_size,
            "compression_ratio": self.compression_ratio,
            "storage_codec": self.storage_codec,
            "max_inline_bytes": self.max_inline_bytes,
            "max_passage_tokens": self.max_passage_tokens,
        }
