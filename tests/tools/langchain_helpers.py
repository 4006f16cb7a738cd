"""Documents, and embeddings that need no model and count what they embed."""

from __future__ import annotations

import hashlib
from uuid import UUID, uuid5

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings

TEXTS = [
    "The Panthers defense gave up just 308 points in 2015.",
    "Lift and drag of a slender wing in a slipstream.",
    "A café in Tokyo serves naïve visitors.",
    "The league ranked the Panthers sixth.",
    "High angles of attack, in theory and experiment.",
]


class CountingEmbeddings(Embeddings):
    """Bags of hashed words."""

    def __init__(self) -> None:
        self.n_documents = 0

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        self.n_documents += len(texts)
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        vector = [0.01] * 16
        for word in text.lower().split():
            vector[hashlib.md5(word.encode()).digest()[0] % 16] += 1
        return vector


def make_documents(texts: list[str] = TEXTS) -> list[Document]:
    """Documents with lasting ids, which are UUIDs because Qdrant takes nothing else, and with metadata of their own."""
    return [Document(text, id=str(uuid5(UUID(int=0), text)), metadata={"source": f"page {i}"}) for i, text in enumerate(texts)]
