"""A retriever that reranks another one's documents, with nothing but langchain-core."""

from __future__ import annotations

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from pydantic import Field

from kalm_integrations.core.ranking import check_count
from kalm_integrations.hosting.fields import CheckedModel, Count
from kalm_integrations.langchain.rerank import KalmRerank


class KalmRetriever(CheckedModel, BaseRetriever):
    """Retrieves with `base_retriever` and returns the `k` best of it.

    `k` and `instruction` may be given per query: `retriever.invoke("who won?", k=1)`. Let the base retriever fetch more
    documents than `k`, or there is nothing to choose from.

    ```python
    retriever = KalmRetriever(base_retriever=vectorstore.as_retriever(search_kwargs={"k": 50}), k=5)
    ```
    """

    base_retriever: RetrieverLike
    """Fetches the candidates."""
    reranker: KalmRerank = Field(default_factory=KalmRerank)
    """Ranks them."""
    k: Count = None
    """How many documents to return at most; None leaves it to `reranker.top_n`."""

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        instruction: str | None = None,
    ) -> list[Document]:
        callbacks = run_manager.get_child()
        documents = self.base_retriever.invoke(query, {"callbacks": callbacks})
        top_n = check_count(self.k if k is None else k, "k")
        return self.reranker.compress_documents(documents, query, callbacks, instruction=instruction, top_n=top_n)

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        instruction: str | None = None,
    ) -> list[Document]:
        callbacks = run_manager.get_child()
        documents = await self.base_retriever.ainvoke(query, {"callbacks": callbacks})
        top_n = check_count(self.k if k is None else k, "k")
        return await self.reranker.acompress_documents(documents, query, callbacks, instruction=instruction, top_n=top_n)
