"""Reranking retrieved documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import (
    ensure_config,
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
)
from pydantic import BaseModel, model_validator

from kalm_integrations.core.ranking import check_count
from kalm_integrations.core.types import Metadata, RankedPassage, Ranking
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.documents import (
    RELEVANCE_SCORE_KEY,
    RERANKED_KEY,
    checked_documents,
    ranked_metadata,
    with_encoding,
    without_encodings,
)
from kalm_integrations.hosting.fields import Count, RerankFields
from kalm_integrations.hosting.ranking import HostQuery, arank, rank
from kalm_integrations.langchain.documents import to_passage, with_metadata

RUN_NAME = "KalmRerank"


class _Outcome(NamedTuple):
    documents: list[Document]
    counts: dict[str, int]
    """What a tracer is told."""


class KalmRerank(RerankFields, BaseDocumentCompressor):
    """Reranks documents, using the encodings that they carry and encoding those that carry none.

    Returns copies, best first, with `metadata["relevance_score"]` (P(yes), a float) and without encodings.

    ```python
    from kalm_integrations.langchain import KalmRerank, KalmRetriever

    retriever = KalmRetriever(base_retriever=vectorstore.as_retriever(), reranker=KalmRerank(top_n=3))
    ```
    """

    top_n: Count = 3
    """How many documents to return at most; None returns all."""
    first_stage_score_key: str | None = None
    """Metadata key under which documents carry the retriever's score, higher being better. "z_score" needs one;
    "reciprocal_rank" takes the order of the documents without."""

    def _check_used(self) -> None:
        super()._check_used()
        if self.fusion is None and self.first_stage_score_key is not None:
            msg = f"first_stage_score_key={self.first_stage_score_key!r} is for fusion, but fusion is None; set fusion too"
            raise SettingsError(msg)

    @model_validator(mode="after")
    def _check_score_key(self) -> KalmRerank:
        if self.fusion == "z_score" and self.first_stage_score_key is None:
            msg = (
                "fusion='z_score' needs first_stage_score_key, but got None; name the metadata key of the retriever's score, "
                "or use fusion='reciprocal_rank', which takes the order of the documents"
            )
            raise SettingsError(msg)
        return self

    def compress_documents(
        self,
        documents: Iterable[Document],
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
            EncodingError: `on_missing="error"`, and a document carries no valid encoding.
            SettingsError: an argument is out of range, a document lacks the score that `fusion` needs, or the reranker cannot
                be made from the settings.
            CheckpointError: the checkpoint is not there or cannot be used.
            NonFiniteScoreError: the model produced NaN or infinite logits.
            EngineError: the answer did not come in time, too much waits already, or torch failed.
        """
        return self._run(documents, query, ensure_config({"callbacks": callbacks}), instruction, top_n)

    async def acompress_documents(
        self,
        documents: Iterable[Document],
        query: str,
        callbacks: Callbacks | None = None,
        *,
        instruction: str | None = None,
        top_n: int | None = None,
    ) -> list[Document]:
        """Do what `compress_documents` does; no thread waits for the model, and what is cancelled is not computed any more."""
        return await self._arun(documents, query, ensure_config({"callbacks": callbacks}), instruction, top_n)

    def as_runnable(self) -> Runnable[dict[str, Any], list[Document]]:
        """Return a runnable from `{"query": str, "documents": list}` to documents; `instruction` and `top_n` may come too.

        Other keys are passed by. It can be a tool: `KalmRerank().as_runnable().as_tool(description=...)`.

        ```python
        chain = {"query": RunnablePassthrough(), "documents": vectorstore.as_retriever()} | KalmRerank().as_runnable()
        ```
        """
        return _RerankRunnable(self)

    def _run(
        self,
        documents: Iterable[Document],
        query: str,
        config: RunnableConfig,
        instruction: str | None,
        top_n: int | None,
    ) -> list[Document]:
        given = checked_documents(documents, Document, RUN_NAME)
        if not given:
            return []
        manager = get_callback_manager_for_config(config)
        run = manager.on_chain_start(None, {"query": query, "n_documents": len(given)}, **_identity(config))
        try:
            outcome = self._outcome(given, rank(self._query(given, query, instruction, top_n)))
        except BaseException as error:
            run.on_chain_error(error)
            raise
        run.on_chain_end(outcome.counts)
        return outcome.documents

    async def _arun(
        self,
        documents: Iterable[Document],
        query: str,
        config: RunnableConfig,
        instruction: str | None,
        top_n: int | None,
    ) -> list[Document]:
        given = checked_documents(documents, Document, RUN_NAME)
        if not given:
            return []
        manager = get_async_callback_manager_for_config(config)
        run = await manager.on_chain_start(None, {"query": query, "n_documents": len(given)}, **_identity(config))
        try:
            outcome = self._outcome(given, await arank(self._query(given, query, instruction, top_n)))
        except BaseException as error:
            await run.on_chain_error(error)
            raise
        await run.on_chain_end(outcome.counts)
        return outcome.documents

    def _query(
        self, documents: Sequence[Document], query: str, instruction: str | None, top_n: int | None
    ) -> HostQuery[Document]:
        key = self.encoding_key
        scores = None
        if self.fusion is not None and self.first_stage_score_key is not None:
            scores = [document.metadata.get(self.first_stage_score_key) for document in documents]

        def copy(index: int) -> Document:
            return with_metadata(documents[index], without_encodings(documents[index].metadata, key))

        def attach(document: Document, metadata: Metadata) -> Document:
            return with_metadata(document, with_encoding(document.metadata, metadata, key))

        return HostQuery(
            self,
            self,
            query,
            documents,
            [to_passage(document, key) for document in documents],
            [document.id or f"document {index}" for index, document in enumerate(documents)],
            copy,
            attach,
            top_k=check_count(self.top_n if top_n is None else top_n, "top_n"),
            instruction=instruction,
            first_stage_scores=scores,
        )

    def _outcome(self, documents: Sequence[Document], ranking: Ranking) -> _Outcome:
        returned = [self._returned(documents[place.index], place) for place in ranking]
        found = {f"n_{status}": n for status, n in ranking.counts.items() if n or status in ("stored", "missing")}
        told = found if ranking.reranked else {RERANKED_KEY: False}
        return _Outcome(returned, {**told, "n_returned": len(returned)})

    def _returned(self, document: Document, place: RankedPassage) -> Document:
        excerpt = self.excerpt(document.page_content, place)
        # An encoding does not fit a text that was cut.
        strip = self.strip_encodings or excerpt.text is not None
        metadata = ranked_metadata(document.metadata, place, self.encoding_key, strip=strip)
        scored = {RELEVANCE_SCORE_KEY: place.score} if place.is_scored else {}
        returned = with_metadata(document, {**metadata, **excerpt.metadata, **scored})
        return returned if excerpt.text is None else returned.model_copy(update={"page_content": excerpt.text})


class RerankInput(BaseModel):
    """What the runnable takes, for tools and schemas."""

    query: str
    documents: list[Document]
    instruction: str | None = None
    top_n: int | None = None


class _RerankRunnable(Runnable[dict[str, Any], list[Document]]):
    """A step of a chain. Not a RunnableLambda: that one would hand its input, encodings included, to tracers."""

    name = RUN_NAME

    def __init__(self, rerank: KalmRerank) -> None:
        self._rerank = rerank

    def get_input_schema(self, config: RunnableConfig | None = None) -> type[BaseModel]:
        del config
        return RerankInput

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
) -> tuple[Iterable[Document], str, RunnableConfig, str | None, int | None]:
    given = {**step_input, **kwargs}
    if not {"query", "documents"} <= given.keys():
        msg = f"the input must have query and documents, and may have instruction and top_n, but has {', '.join(given)}"
        raise SettingsError(msg)
    return given["documents"], given["query"], ensure_config(config), given.get("instruction"), given.get("top_n")


def _identity(config: RunnableConfig) -> dict[str, Any]:
    return {"name": config.get("run_name") or RUN_NAME, "run_id": config.get("run_id")}
