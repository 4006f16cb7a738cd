"""KalmRanker: ranks documents for a query."""

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from haystack import Document, component, default_from_dict, default_to_dict, logging
from haystack.utils import ComponentDevice, Secret, deserialize_callable, serialize_callable

from haystack_integrations.common.kalm.documents import DocumentLayout, check_documents
from haystack_integrations.common.kalm.models import HUB_TOKEN, WithReranker
from haystack_integrations.common.kalm.stores import check_updatable, write_encodings
from kalm_integrations.core.ranking import check_fusion
from kalm_integrations.core.types import ENCODING_KEY, FUSED_SCORE_KEY, FusionMethod, Passage, RankedPassage, Reranker
from kalm_integrations.errors import EncodingError, SettingsError

logger = logging.getLogger(__name__)

# A store's connection may not be shared by threads, and pipelines run components in several. For the whole process: a lock
# in each component would forbid copying it.
_writing = threading.Lock()


@component
class KalmRanker(WithReranker):
    """Ranks documents by how well they answer a query, best first.

    Documents that `KalmDocumentEncoder` has encoded cost no encoder pass: their encodings come with them from the document
    store. Others are encoded on the spot, and written back if you say so.

    ```python
    from haystack import Document
    from haystack_integrations.components.rankers.kalm import KalmRanker

    ranker = KalmRanker(top_k=1)
    documents = [Document(content="Lyon lies on the Rhone."), Document(content="Sarajevo is the capital of Bosnia.")]
    print(ranker.run(query="capital of Bosnia", documents=documents)["documents"])
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
        top_k: int = 10,
        score_threshold: float | None = None,
        fusion: FusionMethod | None = None,
        fusion_weight: float | None = None,
        instruction: str | None = None,
        system_instruction: str | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        compression_ratio: int | None = None,
        storage_codec: str | None = None,
        max_inline_bytes: int | None = None,
        max_passage_tokens: int | None = None,
        max_query_tokens: int | None = None,
        calibration: bool | dict[str, float] | None = None,
        strip_encodings: bool = True,
        encoding_key: str = ENCODING_KEY,
        on_missing: Literal["encode", "error"] = "encode",
        document_store: Any = None,
        write_back: Callable[[list[Document]], object] | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Check and remember the settings; nothing is loaded.

        Args:
            model: an alias (`pico`, `nano`, `small`, ...), a hub id, a folder, or a reranker to share, which brings its own
                settings and cannot be serialised.
            revision: branch, tag or commit of a hub id.
            device: None takes CUDA if there is one.
            dtype: "float32" or "bfloat16"; None takes bfloat16 on CUDA and float32 elsewhere.
            token: for private hub repositories.
            top_k: how many documents to return at most.
            score_threshold: documents that score less (0 to 1) are left out, before `top_k` is applied.
            fusion: order by the retriever's judgement too: "z_score" adds the scores that documents come with,
                "reciprocal_rank" the ranks in which they come. `score` stays P(yes); what decides the order is returned as
                `meta["fused_score"]`.
            fusion_weight: the reranker's share in a fusion, from 0 to 1.
            instruction: what makes a document relevant; changing it leaves encodings valid.
            system_instruction: the sentence that tells the model to judge.
            meta_fields_to_embed: meta fields whose values are put in front of the content; the same as the encoder's.
            embedding_separator: stands between them and the content; the same as the encoder's.
            compression_ratio: encoder tokens per state to score with; 4 by default. Finer stored encodings are pooled to it.
            storage_codec: of encodings that are written back: fp32, fp16, bf16, int8 or int4.
            max_inline_bytes: bound of the strings that are written back.
            max_passage_tokens: longer documents are cut; 1,024 by default; the same as the encoder's.
            max_query_tokens: longer queries are cut; 512 by default.
            calibration: make scores probabilities: True takes what `kalm calibrate` saved beside the checkpoint, or give
                `{"temperature": ..., "bias": ...}`.
            strip_encodings: return documents without encodings, so that none reaches a prompt or a trace.
            encoding_key: meta key of the encoding.
            on_missing: what to do with documents whose encoding is missing or stale: "encode" them, or raise an "error".
            document_store: write encodings made at query time into this store, through its `update_by_filter`.
            write_back: or hand them to this callable: copies of the documents that were encoded, with encodings in `meta`.
            model_kwargs: further arguments of `KalmReranker.from_pretrained`, such as `cache_bytes` and `payload_store`.

        Raises:
            SettingsError: a value breaks a rule; it is a ValueError.
        """
        _check_top_k(top_k)
        check_fusion(fusion, fusion_weight)
        if on_missing not in ("encode", "error"):
            msg = f"on_missing must be 'encode' or 'error', but got {on_missing!r}"
            raise SettingsError(msg)
        if document_store is not None:
            check_updatable(document_store)
            if write_back is not None:
                msg = "encodings are written back by document_store or by write_back, but got both; leave one out"
                raise SettingsError(msg)
        self._layout = DocumentLayout(tuple(meta_fields_to_embed or ()), embedding_separator, encoding_key)
        self.model = os.fspath(model) if isinstance(model, (str, os.PathLike)) else model
        self.revision = revision
        self.device = device
        self.dtype = dtype
        self.token = token
        self.top_k = top_k
        self.score_threshold = score_threshold
        self.fusion = fusion
        self.fusion_weight = fusion_weight
        self.instruction = instruction
        self.system_instruction = system_instruction
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator
        self.compression_ratio = compression_ratio
        self.storage_codec = storage_codec
        self.max_inline_bytes = max_inline_bytes
        self.max_passage_tokens = max_passage_tokens
        self.max_query_tokens = max_query_tokens
        self.calibration = calibration
        self.strip_encodings = strip_encodings
        self.encoding_key = encoding_key
        self.on_missing = on_missing
        self.document_store = document_store
        self.write_back = write_back
        self.model_kwargs = model_kwargs

    def warm_up(self) -> None:
        """Open the checkpoint, fetching it if need be, and load its decoder.

        The encoder is loaded with the first document that has no encoding: a service whose documents are all encoded never
        holds it.

        Raises:
            SettingsError: a setting is unknown or breaks a rule, or settings came with a reranker that has its own.
            CheckpointError: the checkpoint cannot be used.
        """
        self.reranker.warm_up(encoder=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the component as a dictionary.

        Raises:
            SettingsError: `model` is a reranker object.
            SerializationError: `write_back` is a lambda, a method or a nested function.
        """
        parameters = self._init_parameters()
        if self.write_back is not None:
            parameters["write_back"] = serialize_callable(self.write_back)
        return default_to_dict(self, **parameters)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "KalmRanker":
        """Return the component that `to_dict` described.

        Raises:
            DeserializationError: `write_back` lies in a module that Haystack was not told to trust.
        """
        parameters = dict(data.get("init_parameters", {}))
        if parameters.get("write_back") is not None:
            parameters["write_back"] = deserialize_callable(parameters["write_back"])
        return default_from_dict(cls, {**data, "init_parameters": parameters})

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        score_threshold: float | None = None,
        instruction: str | None = None,
    ) -> dict[str, list[Document]]:
        """Rank documents.

        Of documents with the same id only the one with the highest retrieval score takes part.

        Args:
            query: the query.
            documents: the documents; they are not changed.
            top_k: replaces the component's for this call.
            score_threshold: replaces the component's for this call.
            instruction: replaces the component's for this call.

        Returns:
            `documents`: copies with P(yes) as `score`, best first by it, or by the fused score; ties keep their order.

        Raises:
            TypeError: `documents` is not a list of Documents.
            SettingsError: `query` is empty, `top_k` is not positive, or a document lacks the score that `fusion` needs; it is
                a ValueError.
            EncodingError: a document has no sound encoding, and `on_missing` is "error".
        """
        check_documents(documents, "KalmRanker")
        if not query:
            msg = f"query must be a non-empty string, but got {query!r}"
            raise SettingsError(msg)
        if top_k is not None:
            _check_top_k(top_k)
        if not documents:
            return {"documents": []}
        reranker = self.reranker
        candidates = _best_of_each_id(documents)
        passages = [self._layout.passage(document) for document in candidates]
        missing = self._find_missing(reranker, candidates, passages)
        ranked = reranker.rank(
            query,
            passages,
            top_k=self.top_k if top_k is None else top_k,
            score_threshold=self.score_threshold if score_threshold is None else score_threshold,
            instruction=self.instruction if instruction is None else instruction,
            first_stage_scores=_retrieval_scores(candidates) if self.fusion == "z_score" else None,
            fusion=self.fusion,
            fusion_weight=self.fusion_weight,
        )
        ranked_documents = [self._scored(candidates[place.index], place) for place in ranked]
        if missing:
            self._write_back(reranker, [candidates[i] for i in missing], [passages[i].text for i in missing])
        return {"documents": ranked_documents}

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        score_threshold: float | None = None,
        instruction: str | None = None,
    ) -> dict[str, list[Document]]:
        """Rank documents off the event loop; see `run`."""
        return await asyncio.to_thread(self.run, query, documents, top_k, score_threshold, instruction)

    def _find_missing(self, reranker: Reranker, documents: list[Document], passages: list[Passage]) -> list[int]:
        """Return the indices of documents without a sound encoding, if anything depends on them.

        Raises:
            EncodingError: there are some, and `on_missing` is "error".
        """
        writes_back = self.document_store is not None or self.write_back is not None
        if self.on_missing == "encode" and not writes_back:
            return []
        missing = reranker.find_unencoded(passages)
        if missing and self.on_missing == "error":
            msg = (
                f"with on_missing='error' every document must carry a sound encoding, but {len(missing)} of {len(documents)} "
                f"do not, first {documents[missing[0]].id}; run backfill over the store, or use on_missing='encode'"
            )
            raise EncodingError(msg)
        return missing

    def _scored(self, document: Document, place: RankedPassage) -> Document:
        meta = self._layout.strip(document.meta) if self.strip_encodings else dict(document.meta)
        if place.fused is not None:
            meta[FUSED_SCORE_KEY] = place.fused
        return replace(document, score=place.score, meta=meta)

    def _write_back(self, reranker: Reranker, documents: list[Document], texts: list[str]) -> None:
        """Hand encodings to the store. The query has its answer: whatever goes wrong is logged."""
        try:
            # Made a moment ago for this query, so they come from the reranker's memory.
            made = reranker.encode_to_metadata(texts)
            encoded = [self._layout.attach(*pair) for pair in zip(documents, made, strict=True)]
            with _writing:
                if self.write_back is not None:
                    self.write_back(encoded)
                else:
                    write_encodings(self.document_store, encoded, self.encoding_key)
        except Exception as error:
            logger.warning("{n} encodings were not written back: {error}", n=len(documents), error=error, exc_info=True)

    def _settings(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "dtype": self.dtype,
            "system_instruction": self.system_instruction,
            "compression_ratio": self.compression_ratio,
            "storage_codec": self.storage_codec,
            "max_inline_bytes": self.max_inline_bytes,
            "max_passage_tokens": self.max_passage_tokens,
            "max_query_tokens": self.max_query_tokens,
            "calibration": self.calibration,
        }


def _check_top_k(top_k: int) -> None:
    if top_k <= 0:
        msg = f"top_k must be > 0, but got {top_k}"
        raise SettingsError(msg)


def _best_of_each_id(documents: list[Document]) -> list[Document]:
    """Return one document for each id, the one with the highest score, at the place of the first."""
    best: dict[str, Document] = {}
    for document in documents:
        kept = best.get(document.id)
        if kept is None or _retrieval_score(document) > _retrieval_score(kept):
            best[document.id] = document
    return list(best.values())


def _retrieval_scores(documents: list[Document]) -> list[float]:
    """Return the scores that documents came with.

    Raises:
        SettingsError: one has none.
    """
    unscored = [document.id for document in documents if document.score is None]
    if unscored:
        msg = (
            f"fusion='z_score' needs documents with a score, but {len(unscored)} of {len(documents)} have none, first "
            f"{unscored[0]}; use a retriever that gives scores, or fusion='reciprocal_rank'"
        )
        raise SettingsError(msg)
    return [_retrieval_score(document) for document in documents]


def _retrieval_score(document: Document) -> float:
    return float("-inf") if document.score is None else document.score
