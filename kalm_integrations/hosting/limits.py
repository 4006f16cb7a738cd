"""What stores refuse, by their own documentation; docs/stores.md has the remedies."""

from __future__ import annotations

LUCENE_TERM_BYTES = 32_766
"""OpenSearch and Elasticsearch: the default mapping makes a term of a string."""

MILVUS_VARCHAR_BYTES = 65_535
"""Milvus: a field of a static schema."""

MILVUS_DYNAMIC_BYTES = 65_536
"""A Milvus server, unless it is told otherwise: all dynamic fields of a row together. Milvus Lite has no such limit."""

PINECONE_METADATA_BYTES = 40_960
"""Pinecone: all metadata of a record together, its text among them."""
