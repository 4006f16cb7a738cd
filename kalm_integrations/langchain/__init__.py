"""LangChain: encode documents at ingest, rerank them with the stored encodings. Needs only langchain-core.

```python
from kalm_integrations.langchain import KalmPassageEncoder, KalmRerank, KalmRetriever

vectorstore.add_documents(KalmPassageEncoder().transform_documents(splits))      # encode after splitting
retriever = KalmRetriever(base_retriever=vectorstore.as_retriever(), reranker=KalmRerank(top_n=3))
```
"""

from __future__ import annotations

try:
    import langchain_core as _langchain_core  # noqa: F401
except ModuleNotFoundError as error:
    from kalm_integrations.errors import MissingExtraError

    _message = 'kalm_integrations.langchain needs langchain-core; pip install "kalm-integrations[langchain]"'
    raise MissingExtraError(_message) from error

from kalm_integrations.hosting.filling import BackfillReport
from kalm_integrations.hosting.qdrant import LeanQdrantClient
from kalm_integrations.hosting.write_back import WriteBackStats, wait_for_write_back, write_back_stats
from kalm_integrations.langchain.cross_encoder import KalmCrossEncoder
from kalm_integrations.langchain.encode import KalmPassageEncoder, kalm_key_encoder
from kalm_integrations.langchain.payloads import ByteStorePayloads
from kalm_integrations.langchain.rerank import KalmRerank
from kalm_integrations.langchain.retriever import KalmRetriever
from kalm_integrations.langchain.stores import DocumentAccess, backfill, fetch_from, write_back_to

__all__ = [
    "BackfillReport",
    "ByteStorePayloads",
    "DocumentAccess",
    "KalmCrossEncoder",
    "KalmPassageEncoder",
    "KalmRerank",
    "KalmRetriever",
    "LeanQdrantClient",
    "WriteBackStats",
    "backfill",
    "fetch_from",
    "kalm_key_encoder",
    "wait_for_write_back",
    "write_back_stats",
    "write_back_to",
]
