"""Evaluation of rerankers (extra `eval`)."""
