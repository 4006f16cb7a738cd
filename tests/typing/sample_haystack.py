"""Calls of the Haystack adapter as the documentation shows them: type-checked, never run."""

from haystack import Document, Pipeline
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.utils import ComponentDevice, Secret

from haystack_integrations.components.embedders.kalm import KalmDocumentEncoder
from haystack_integrations.components.rankers.kalm import KalmRanker
from kalm_integrations import KalmReranker
from kalm_integrations.haystack import BackfillReport, LoadReport, Written, backfill, drop_encodings, load_encodings


def use(documents: list[Document]) -> list[Document]:
    store = InMemoryDocumentStore()
    reranker = KalmReranker.from_pretrained("pico")
    encoder = KalmDocumentEncoder(model=reranker, progress_bar=False, meta_fields_to_embed=["title"])
    store.write_documents(encoder.run(documents)["documents"])
    ranker = KalmRanker(model="nano", top_k=None, device=ComponentDevice.from_str("cpu"), document_store=store)
    other = KalmRanker(device="cpu", token=Secret.from_env_var("HF_TOKEN"), fusion="z_score", fusion_weight=0.4)
    other.top_k = 7
    pipeline = Pipeline()
    pipeline.add_component("ranker", ranker)
    report: BackfillReport = backfill(store, encoder, batch_size=8, check_texts=False)
    rows = [{"id": document.id, **document.meta} for document in documents]
    loaded: LoadReport = load_encodings(store, rows, meta_fields_to_embed=["title"], documents_per_second=0.5)
    dropped: Written = drop_encodings(store, encoding_key="kalm_old", progress_bar=False)
    print(loaded.n_written, dropped.n_written)
    print(report.n_missing, pipeline.run({"ranker": {"query": "query", "documents": documents}}))
    return other.run(query="query", documents=documents, top_k=3, instruction="Find it.")["documents"]


async def use_async(ranker: KalmRanker, documents: list[Document]) -> dict[str, list[Document]]:
    return await ranker.run_async(query="query", documents=documents)
