"""The shared runtime. It knows no framework; frameworks' adapters use `core.reranker` and `core.types` only."""
