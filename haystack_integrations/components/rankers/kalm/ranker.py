"""KalmRanker: ranks documents for a query."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from haystack import Document, component, default_from_dict
from haystack.utils import ComponentDevice, Secret, deserialize_callable, serialize_callable
from pydantic import AfterValidator, Field, model_validator

from haystack_integrations.common.kalm.component import HUB_TOKEN, ComponentFields, KalmComponent
from haystack_integrations.common.kalm.stores import access_to, check_updatable, fetch_from
from kalm_integrations.core.base import Reranker
from kalm_integrations.core.fallback import OnError
from kalm_integrations.core.ranking import check_count, check_fusion, check_threshold
from kalm_integrations.core.types import ENCODING_KEY, FusionMethod, RankedPassage, Ranking, shown
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.documents import checked_documents
from kalm_integrations.hosting.fetching import Fetcher
from kalm_integrations.hosting.fields import Count, RerankFields
from kalm_integrations.hosting.models import FUNCTIONS
from kalm_integrations.hosting.pruning import check_pruning
from kalm_integrations.hosting.ranking import HostQuery, arank, rank
from kalm_integrations.hosting.stores import DocumentId, write_encodings


class _RankerFields(ComponentFields, RerankFields):
    top_k: Count
    document_store: Annotated[Any, AfterValidator(check_updatable)] = Field(repr=False)
    fetch_encodings: bool

    @model_validator(mode="after")
    def _check_stores(self) -> "_RankerFields":
        if self.document_store is not None and self.write_back is not None:
            msg = "encodings are written back by document_store or by write_back, but got both; leave one out"
            raise SettingsError(msg)
        if self.fetch_encodings and self.fetch is not None:
            msg = "encodings are fetched from document_store (fetch_encodings) or by fetch, but got both; leave one out"
            raise SettingsError(msg)
        return self

    def fetcher(self) -> Fetcher[Any] | None:
        if not self.fetch_encodings or self.document_store is None:
            return super().fetcher()
        if self._fetcher is None:
            self._fetcher = Fetcher(fetch_from(self.document_store, encoding_key=self.encoding_key))
        return self._fetcher

    def shared_parts(self) -> Iterator[object]:
        yield from super().shared_parts()
        yield self.document_store


@component
class KalmRanker(KalmComponent):
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

    _fields_class: ClassVar[type[ComponentFields]] = _RankerFields
    _fields: _RankerFields

    def __init__(
        self,
        *,
        model: str | os.PathLike[str] | Reranker = "pico",
        revision: str | None = None,
        device: ComponentDevice | str | None = None,
        dtype: str | None = None,
        token: Secret | str | None = HUB_TOKEN,
        top_k: int | None = 10,
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
        long_passages: Literal["cut", "windows"] | None = None,
        max_windows: int | None = None,
        max_query_tokens: int | None = None,
        calibration: bool | dict[str, float] | None = None,
        highlight: bool = False,
        prune: bool = False,
        prune_threshold: float | None = None,
        strip_encodings: bool = True,
        encoding_key: str = ENCODING_KEY,
        on_missing: Literal["encode", "error"] = "encode",
        timeout: float | None = None,
        on_error: OnError = "raise",
        document_store: Any = None,
        fetch_encodings: bool = False,
        write_back: Callable[[list[Document]], object] | None = None,
        fetch: Callable[[list[Document]], Sequence[Any]] | None = None,
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
            top_k: how many documents to return at most; None returns all.
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
            storage_codec: of what is encoded: fp32, fp16, bf16, int8, rot4, rot3 or rot2.
            max_inline_bytes: bound of the strings that are written back.
            max_passage_tokens: longer documents are read in windows of so many tokens, or cut; 1,024 by default; the same as
                the encoder's.
            long_passages: "windows", the default, reads all of a longer document, in windows that overlap: its score is
                that of the best one; "cut" reads its first `max_passage_tokens`; the same as the encoder's.
            max_windows: windows of a document at most; 64 by default; the same as the encoder's.
            max_query_tokens: longer queries are cut; 512 by default.
            calibration: make scores probabilities: True takes what `kalm calibrate` saved beside the checkpoint, or give
                `{"temperature": ..., "bias": ...}`.
            highlight: return in `meta["relevant_spans"]` the sentences of `content` with their scores, best first. Of one
                that was read in windows they are those of the best window, and `meta["relevant_window"]` says where it lies.
            prune: return copies whose `content` is cut to the best sentence and to those that `prune_threshold` lets stay, all
                of the best window if there are windows; `meta["kept_spans"]` says where in the original they lie.
            prune_threshold: part of the best sentence's odds, score / (1 - score), that a sentence must have for it; 0.001
                by default.
            strip_encodings: return documents without encodings, so that none reaches a prompt or a trace. They are never on
                content that was cut by `prune`, which they do not fit.
            encoding_key: meta key of the encoding.
            on_missing: what to do with documents whose encoding is missing or stale: "encode" them, or raise an "error".
            timeout: seconds in which a query must be answered; None waits as long as it takes.
            on_error: "keep_order" goes on without reranking if that is late or fails: the first documents as they came, with
                their scores, and `meta["reranked"]` False. Why is logged.
            document_store: write encodings made at query time into this store, through its `update_by_filter`, in the
                background after the answer; see `kalm_integrations.haystack.wait_for_write_back`.
            fetch_encodings: before anything is encoded, ask `document_store` for the encodings that documents came without, as
                far as memory has them not: for searches that leave the long strings out.
            write_back: or hand them to this callable: copies of the documents that were encoded, with encodings in `meta`.
            fetch: or ask this callable for encodings, as one of `kalm_integrations.haystack.fetch_from`: it takes documents
                and returns for each its encoding or None.
            model_kwargs: further arguments of `KalmReranker.from_pretrained`, such as `cache_bytes` and `payload_store`.

        Raises:
            SettingsError: one breaks a rule, or has no effect; it is a ValueError.
        """
        self._keep(
            model=model,
            revision=revision,
            device=device,
            dtype=dtype,
            token=token,
            top_k=top_k,
            score_threshold=score_threshold,
            fusion=fusion,
            fusion_weight=fusion_weight,
            instruction=instruction,
            system_instruction=system_instruction,
            meta_fields_to_embed=meta_fields_to_embed,
            embedding_separator=embedding_separator,
            compression_ratio=compression_ratio,
            storage_codec=storage_codec,
            max_inline_bytes=max_inline_bytes,
            max_passage_tokens=max_passage_tokens,
            long_passages=long_passages,
            max_windows=max_windows,
            max_query_tokens=max_query_tokens,
            calibration=calibration,
            highlight=highlight,
            prune=prune,
            prune_threshold=prune_threshold,
            strip_encodings=strip_encodings,
            encoding_key=encoding_key,
            on_missing=on_missing,
            timeout=timeout,
            on_error=on_error,
            document_store=document_store,
            fetch_encodings=fetch_encodings,
            write_back=write_back,
            fetch=fetch,
            model_kwargs=model_kwargs,
        )
        check_fusion(fusion, fusion_weight)
        check_pruning(prune, prune_threshold)
        if fetch_encodings and document_store is None:
            msg = "fetch_encodings=True needs document_store, which is asked, but got None; give one, or fetch"
            raise SettingsError(msg)

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
            SettingsError: a part lives in this process only: `model` is a reranker, `payload_store` a mapping, `write_back` or
                `fetch` no function that can be imported, or `token` a plain token.
            SerializationError: `write_back` or `fetch` is a method.
        """
        described = KalmComponent.to_dict(self)
        parameters = described["init_parameters"]
        # What may have been left from before something was switched off, the constructor would refuse.
        if self.fusion is None:
            parameters["fusion_weight"] = None
        if not self.prune:
            parameters["prune_threshold"] = None
        parameters["fetch_encodings"] = self.fetch_encodings and self.document_store is not None
        for name in FUNCTIONS:
            if parameters[name] is not None:
                parameters[name] = serialize_callable(parameters[name])
        return described

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "KalmRanker":
        """Return the component that `to_dict` described.

        Raises:
            DeserializationError: `write_back` or `fetch` lies in a module that Haystack was not told to trust.
        """
        parameters = dict(data.get("init_parameters", {}))
        for name in FUNCTIONS:
            if parameters.get(name) is not None:
                parameters[name] = deserialize_callable(parameters[name])
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
            documents: any iterable of documents; they are not changed.
            top_k: replaces the component's for this call.
            score_threshold: replaces the component's for this call.
            instruction: replaces the component's for this call.

        Returns:
            `documents`: copies with P(yes) as `score`, best first by it, or by the fused score; ties keep their order.

        Raises:
            SettingsError: `documents` are something else, `query` is empty, a number is out of range, or a document lacks the
                score that `fusion` needs; it is a ValueError.
            EncodingError: a document has no valid encoding, and `on_missing` is "error".
        """
        candidates, asked = self._query(query, documents, top_k, score_threshold, instruction)
        return self._answer(candidates, rank(asked)) if candidates else {"documents": []}

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        score_threshold: float | None = None,
        instruction: str | None = None,
    ) -> dict[str, list[Document]]:
        """Rank documents; no thread waits for the model, and what is cancelled is not computed any more. See `run`."""
        candidates, asked = self._query(query, documents, top_k, score_threshold, instruction)
        return self._answer(candidates, await arank(asked)) if candidates else {"documents": []}

    def _query(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None,
        score_threshold: float | None,
        instruction: str | None,
    ) -> tuple[list[Document], HostQuery[Document]]:
        given = checked_documents(documents, Document, "KalmRanker")
        if not isinstance(query, str) or not query:
            msg = f"query must be a non-empty string, but got {shown(query)}"
            raise SettingsError(msg)
        fields = self._fields
        layout = fields.layout
        candidates = _best_of_each_id(given)

        def write(encoded: list[Document]) -> None:
            by_id: dict[DocumentId, Document] = {document.id: document for document in encoded}
            write_encodings(access_to(fields.document_store), layout.kind, by_id)

        return candidates, HostQuery(
            self,
            fields,
            query,
            candidates,
            [layout.passage(document) for document in candidates],
            [document.id for document in candidates],
            lambda index: layout.bare(candidates[index]),
            layout.attach,
            top_k=check_count(fields.top_k if top_k is None else top_k, "top_k"),
            score_threshold=check_threshold(score_threshold, "score_threshold"),
            instruction=instruction,
            first_stage_scores=[document.score for document in candidates] if fields.fusion == "z_score" else None,
            write=None if fields.document_store is None else write,
            store=fields.document_store,
        )

    def _answer(self, candidates: list[Document], ranking: Ranking) -> dict[str, list[Document]]:
        fields = self._fields
        layout, strip = fields.layout, fields.strip_encodings

        def returned(document: Document, place: RankedPassage) -> Document:
            return layout.scored(document, place, fields.excerpt(document.content or "", place), strip=strip)

        return {"documents": [returned(candidates[place.index], place) for place in ranking]}


def _best_of_each_id(documents: list[Document]) -> list[Document]:
    """Return one document for each id, the one with the highest score, at the place of the first."""
    best: dict[str, Document] = {}
    for document in documents:
        kept = best.setdefault(document.id, document)
        if document.score is not None and (kept.score is None or document.score > kept.score):
            best[document.id] = document
    return list(best.values())
