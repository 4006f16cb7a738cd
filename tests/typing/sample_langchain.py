"""Calls of the LangChain adapter as the documentation shows them: type-checked, never run."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore

from kalm_integrations import KalmReranker
from kalm_integrations.langchain import (
    BackfillReport,
    KalmCrossEncoder,
    KalmPassageEncoder,
    KalmRerank,
    KalmRetriever,
    LoadReport,
    Written,
    backfill,
    drop_encodings,
    kalm_key_encoder,
    load_encodings,
    write_back_to,
)


def use(store: VectorStore, documents: list[Document]) -> list[Document]:
    reranker = KalmReranker.from_pretrained("pico")
    encoder = KalmPassageEncoder(model=reranker, show_progress=True, store=store)
    store.add_documents(encoder.transform_documents(document for document in documents))
    rerank = KalmRerank(model="nano", top_n=None, score_threshold=0.2, write_back=write_back_to(store), device="cpu")
    fused = KalmRerank(fusion="z_score", first_stage_score_key="score", model_kwargs={"cache_bytes": 0})
    fused.top_n = 7
    retriever = KalmRetriever(base_retriever=store.as_retriever(search_kwargs={"k": 50}), reranker=rerank, k=5)
    report: BackfillReport = backfill(store, KalmPassageEncoder(model=reranker), batch_size=8, check_texts=False)
    print(report.n_missing, KalmCrossEncoder(model=reranker).score([("query", "text")]))
    print(kalm_key_encoder(documents[0]), partial(kalm_key_encoder, encoding_key="vec")(documents[0]))
    chained: list[Document] = rerank.as_runnable().invoke({"query": "query", "documents": documents})
    compressed: list[Document] = rerank.compress_documents(documents, "query", instruction="Find it.", top_n=2)
    return [*retriever.invoke("query", k=1), *chained, *compressed]


def move(store: VectorStore, rows: Iterable[Mapping[str, Any]]) -> int:
    loaded: LoadReport = load_encodings(store, rows, id_field="_id", encoding_key="kalm_encoding_2", documents_per_second=50)
    dropped: Written = drop_encodings(store, batch_size=8, show_progress=False)
    return loaded.n_written + dropped.n_written


async def use_async(rerank: KalmRerank, documents: list[Document]) -> list[Document]:
    return await rerank.acompress_documents(documents, "query")
