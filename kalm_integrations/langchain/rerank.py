"""Reranking retrieved documents."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import (
    ensure_config,
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
    run_in_executor,
)
from pydantic import Field, model_validator

from kalm_integrations.core.ranking import check_fusion
from kalm_integrations.core.types import ENCODING_KEY, FUSED_SCORE_KEY, FusionMethod, RankedPassage
from kalm_integrations.errors import EncodingError, SettingsError
from kalm_integrations.langchain.documents import passage, with_encodings, with_metadata, without_encoding
from kalm_integrations.langchain.model import WithReranker

logger = logging.getLogger(__name__)

RUN_NAME = "KalmRerank"


class _Outcome(NamedTuple):
    documents: list[Document]
    counts: dict[str, int]
    """What a tracer is told."""


class KalmRerank(WithReranker, BaseDocumentCompressor):
    """Reranks documents, using the encodings that they carry and encoding those that carry none.

    Returns copies, best first, with `metadata["relevance_score"]` (P(yes), a float) and without encodings.

    ```python
    from langchain_classic.retrievers import ContextualCompressionRetriever

    retriever = ContextualCompressionRetriever(base_compressor=KalmRerank(top_n=3), base_retriever=vectorstore.as_retriever())
    ```
    """

    top_n: int | None = Field(3, gt=0)
    """How many documents to return at most; None returns all."""
    score_threshold: float | None = None
    """Documents that score less are left out, before `top_n` is applied."""
    fusion: FusionMethod | None = None
    """Order by the retriever's judgement too: "z_score" adds its scores, "reciprocal_rank" its ranks. `relevance_score` stays
    P(yes); what decides the order is returned as `metadata["fused_score"]`."""
    fusion_weight: float | None = None
    """The reranker's share in a fusion, from 0 to 1."""
    first_stage_score_key: str | None = None
    """Metadata key under which documents carry the retriever's score, higher being better. "z_score" needs one;
    "reciprocal_rank" takes the order of the documents without."""
    instruction: str | None = None
    """What makes a document relevant; may also be given per call. Invalidates no encoding."""
    strip_encodings: bool = True
    """Leave encodings out of what is returned, and so out of prompts, traces and checkpoints."""
    encoding_key: str = ENCODING_KEY
    """Metadata key of the encoding."""
    on_missing: Literal["encode", "error"] = "encode"
    """What to do about documents without a sound encoding."""
    write_back: Callable[[Sequence[Document]], object] | None = Field(None, repr=False)
    """Called after scoring with copies of the documents that had to be encoded, their new encodings in the metadata; see
    `write_back_to`. What it raises is logged."""

    @model_validator(mode="after")
    def _check_fusion(self) -> KalmRerank:
        check_fusion(self.fusion, self.fusion_weight)
        if self.fusion == "z_score" and self.first_stage_score_key is None:
            msg = (
                "fusion='z_score' needs first_stage_score_key, but got None; name the metadata key of the retriever's score, "
                "or use fusion='reciprocal_rank', which takes the order of the documents"
            )
            raise SettingsError(msg)
        if self.fusion is None and self.first_stage_score_key is not None:
            msg = f"first_stage_score_key={self.first_stage_score_key!r} is for fusion, but fusion is None; set fusion too"
            raise SettingsError(msg)
        return self

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,
        *,
        instruction: str | None = None,
        top_n: int | None = None,
    ) -> list[Document]:
        """Return the best documents, best first; ties keep their order.

        Args:
            documents: what to rerank; only `page_content` is judged.
            query: the query.
            callbacks: they see a run named KalmRerank with the query and counts, and no documents.
            instruction: replaces `self.instruction` for this call.
            top_n: replaces `self.top_n` for this call.

        Raises:
            EncodingError: `on_missing="error"`, and a document carries no sound encoding.
            SettingsError: an argument is out of range, a document lacks the score that `fusion` needs, or the reranker cannot
                be made from the settings.
            CheckpointError: the checkpoint is not there or cannot be used.
            NonFiniteScoreError: the model produced NaN or infinite logits.
        """
        return self._run(documents, query, ensure_config({"callbacks": callbacks}), instruction, top_n)

    async def acompress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,
        *,
        instruction: str | None = None,
        top_n: int | None = None,
    ) -> list[Document]:
        """Do what `compress_documents` does, with the model working off the event loop."""
        return await self._arun(documents, query, ensure_config({"callbacks": callbacks}), instruction, top_n)

    def as_runnable(self) -> Runnable[dict[str, Any], list[Document]]:
        """Return a runnable from `{"query": str, "documents": list, "instruction": str (optional)}` to documents.

        ```python
        chain = {"query": RunnablePassthrough(), "documents": vectorstore.as_retriever()} | KalmRerank().as_runnable()
        ```
        """
        return _RerankRunnable(self)

    def _run(
        self,
        documents: Sequence[Document],
        query: str,
        config: RunnableConfig,
        instruction: str | None,
        top_n: int | None,
    ) -> list[Document]:
        if not documents:
            return []
        manager = get_callback_manager_for_config(config)
        run = manager.on_chain_start(None, {"query": query, "n_documents": len(documents)}, **_identity(config))
        try:
            outcome = self._rerank(documents, query, instruction, top_n, is_traced=bool(manager.handlers))
        except BaseException as error:
            run.on_chain_error(error)
            raise
        run.on_chain_end(outcome.counts)
        return outcome.documents

    async def _arun(
        self,
        documents: Sequence[Document],
        query: str,
        config: RunnableConfig,
        instruction: str | None,
        top_n: int | None,
    ) -> list[Document]:
        if not documents:
            return []
        manager = get_async_callback_manager_for_config(config)
        run = await manager.on_chain_start(None, {"query": query, "n_documents": len(documents)}, **_identity(config))
        is_traced = bool(manager.handlers)
        try:
            outcome = await run_in_executor(None, self._rerank, documents, query, instruction, top_n, is_traced=is_traced)
        except BaseException as error:
            await run.on_chain_error(error)
            raise
        await run.on_chain_end(outcome.counts)
        return outcome.documents

    def _rerank(
        self, documents: Sequence[Document], query: str, instruction: str | None, top_n: int | None, *, is_traced: bool
    ) -> _Outcome:
        first_stage_scores = self._first_stage_scores(documents)
        reranker = self.reranker
        passages = [passage(document, self.encoding_key) for document in documents]
        missing: list[int] = []
        # The ranking reads every encoding itself; it is read twice only if somebody wants to know.
        if is_traced or self.write_back is not None or self.on_missing == "error":
            missing = reranker.find_unencoded(passages)
        if missing and self.on_missing == "error":
            msg = (
                f"with on_missing='error' every document must carry a sound {self.encoding_key!r} of its text and this model, "
                f"but {len(missing)} of {len(documents)} do not; encode them with KalmPassageEncoder or backfill"
            )
            raise EncodingError(msg)
        ranked = reranker.rank(
            query,
            passages,
            top_k=self.top_n if top_n is None else top_n,
            score_threshold=self.score_threshold,
            instruction=self.instruction if instruction is None else instruction,
            first_stage_scores=first_stage_scores,
            fusion=self.fusion,
            fusion_weight=self.fusion_weight,
        )
        if missing and self.write_back is not None:
            self._write_back([documents[index] for index in missing])
        returned = [self._scored(documents[place.index], place) for place in ranked]
        counts = {
            "n_stored": len(documents) - len(missing),
            "n_missing": len(missing),
            "n_returned": len(returned),
        }
        return _Outcome(returned, counts)

    def _first_stage_scores(self, documents: Sequence[Document]) -> list[Any] | None:
        if self.first_stage_score_key is None:
            return None
        scores = [document.metadata.get(self.first_stage_score_key) for document in documents]
        if None in scores:
            msg = (
                f"for fusion every document must carry a score under metadata[{self.first_stage_score_key!r}], but "
                f"{scores.count(None)} of {len(scores)} do not; have the retriever write it, or use fusion='reciprocal_rank' "
                "with first_stage_score_key=None"
            )
            raise SettingsError(msg)
        return scores

    def _scored(self, document: Document, place: RankedPassage) -> Document:
        metadata = without_encoding(document, self.encoding_key) if self.strip_encodings else document.metadata
        added = {"relevance_score": float(place.score)} | ({} if place.fused is None else {FUSED_SCORE_KEY: place.fused})
        return with_metadata(document, {**metadata, **added})

    def _write_back(self, documents: list[Document]) -> None:
        if self.write_back is None:
            return
        try:
            # From memory: the ranking has just encoded them.
            self.write_back(with_encodings(documents, range(len(documents)), self.reranker, self.encoding_key))
        except Exception:
            logger.exception("could not write back the encodings of %d documents; the query is answered", len(documents))


class _RerankRunnable(Runnable[dict[str, Any], list[Document]]):
    """A step of a chain. Not a RunnableLambda: that one would hand its input, encodings included, to tracers."""

    name = RUN_NAME

    def __init__(self, rerank: KalmRerank) -> None:
        self._rerank = rerank

    def invoke(self, input: dict[str, Any], config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:  # noqa: A002
        return self._rerank._run(*_arguments(input, config, kwargs))  # noqa: SLF001

    async def ainvoke(
        self,
        input: dict[str, Any],  # noqa: A002
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        return await self._rerank._arun(*_arguments(input, config, kwargs))  # noqa: SLF001


def _arguments(
    step_input: dict[str, Any], config: RunnableConfig | None, kwargs: dict[str, Any]
) -> tuple[Sequence[Document], str, RunnableConfig, str | None, int | None]:
    given = {**step_input, **kwargs}
    required, optional = {"query", "documents"}, {"instruction", "top_n"}
    if not required <= given.keys() <= required | optional:
        msg = f"the input must have query and documents, and may have instruction and top_n, but has {', '.join(given)}"
        raise SettingsError(msg)
    return given["documents"], given["query"], ensure_config(config), given.get("instruction"), given.get("top_n")


def _identity(config: RunnableConfig) -> dict[str, Any]:
    return {"name": config.get("run_name") or RUN_NAME, "run_id": config.get("run_id")}
