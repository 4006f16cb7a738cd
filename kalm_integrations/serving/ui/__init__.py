"""The page of `kalm ui`: ask, and see what reranking changes. It is files of this package, and asks nobody else."""
