"""Training of T5Gemma2 rerankers (extra `train`)."""
