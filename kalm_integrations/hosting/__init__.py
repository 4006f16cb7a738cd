"""What every host of rerankers needs, once: LangChain, LlamaIndex and Haystack translate, and the rules are here.

* `models`: a component's model, from its settings to an open reranker.
* `fields`: the settings of components as pydantic fields, checked together and assigned whole or not at all.
* `documents`: where an encoding lies in a document's metadata, and what may be passed as documents.
* `pruning`: which sentences of a document's own text a query finds, and the text without the others.
* `ranking`: one query: what is missing, fetched, told and written back.
* `fetching`: encodings that documents came without, by id from a store that may fail or hang.
* `write_back`: the queue by which it is written after the answer.
* `stores`: encodings into documents that a store has already (write-back and backfill), and out of them.
* `qdrant`: what stores of several hosts do with Qdrant's client.

Importing this loads neither torch nor a framework.
"""

from __future__ import annotations

from kalm_integrations.hosting.models import as_reranker
from kalm_integrations.hosting.write_back import WriteBackStats, wait_for_write_back, write_back_stats

__all__ = ["WriteBackStats", "as_reranker", "wait_for_write_back", "write_back_stats"]
