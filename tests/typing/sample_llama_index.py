"""Calls of the LlamaIndex adapter as the documentation shows them: type-checked, never run."""

from pathlib import Path

from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle, TextNode

from kalm_integrations import KalmReranker
from kalm_integrations.llama_index import (
    BackfillReport,
    KalmPassageEncoder,
    KalmRerank,
    LoadReport,
    Written,
    backfill,
    drop_encodings,
    load_encodings,
    write_back_to,
)


def use(index: VectorStoreIndex, nodes: list[BaseNode]) -> list[NodeWithScore]:
    reranker = KalmReranker.from_pretrained("pico")
    encoder = KalmPassageEncoder("nano", compression_ratio=8, metadata_mode=MetadataMode.NONE)
    pipeline = IngestionPipeline(transformations=[SentenceSplitter(), KalmPassageEncoder(reranker)])
    encoded: list[BaseNode] = [*encoder(nodes), *pipeline.run(nodes=[TextNode(text="a")])]
    rerank = KalmRerank(Path("folder"), top_n=None, write_back=write_back_to(index.docstore), device="cpu")
    rerank.top_n = 7
    report: BackfillReport = backfill(index.docstore, encoder, batch_size=8)
    engine = index.as_query_engine(similarity_top_k=50, node_postprocessors=[KalmRerank("pico", top_n=5), rerank])
    rows = ({"key": n, "kalm_encoding": "kalm1", "kalm_fp": "a"} for n in range(2))
    loaded: LoadReport = load_encodings(index.docstore, rows, id_field="key", metadata_mode=MetadataMode.NONE)
    dropped: Written = drop_encodings(index.docstore, encoding_key="kalm_old", documents_per_second=50)
    print(report.n_missing, loaded.n_written, dropped.n_written, engine.query("query"))
    scored = [NodeWithScore(node=node) for node in encoded]
    return [*rerank.postprocess_nodes(scored, query_str="query"), *rerank.postprocess_nodes(scored, QueryBundle("query"))]
