"""KaLM reranking for LlamaIndex: encode nodes at ingest, rerank them in query engines.

Needs llama-index-core only. See docs/llama-index.md.
"""

try:
    import llama_index.core  # noqa: F401
except ImportError as error:
    from kalm_integrations.errors import MissingExtraError

    msg = 'kalm_integrations.llama_index needs llama-index-core; run: pip install "kalm-integrations[llama-index]"'
    raise MissingExtraError(msg) from error

from kalm_integrations.hosting.filling import BackfillReport
from kalm_integrations.hosting.stores import DocumentAccess
from kalm_integrations.hosting.write_back import WriteBackStats, wait_for_write_back, write_back_stats
from kalm_integrations.llama_index.encode import KalmPassageEncoder
from kalm_integrations.llama_index.payloads import KVPayloadStore
from kalm_integrations.llama_index.rerank import Fetch, KalmRerank, WriteBack
from kalm_integrations.llama_index.stores import backfill, fetch_from, write_back_to

__all__ = [
    "BackfillReport",
    "DocumentAccess",
    "Fetch",
    "KVPayloadStore",
    "KalmPassageEncoder",
    "KalmRerank",
    "WriteBack",
    "WriteBackStats",
    "backfill",
    "fetch_from",
    "wait_for_write_back",
    "write_back_stats",
    "write_back_to",
]
