"""The HTTP service: rerankers for clients of Cohere, Jina and TEI, and for our own adapters."""
