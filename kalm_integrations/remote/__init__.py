"""A reranker that runs elsewhere: the client of `kalm serve`. Without torch."""
