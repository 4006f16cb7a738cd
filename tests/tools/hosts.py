"""The three hosts behind one face, so that one suite can hold all adapters to the same contract."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from haystack import Document as HaystackDocument
from langchain_core.documents import Document as LangChainDocument
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from kalm_integrations import haystack, langchain, llama_index


class Host(Protocol):
    """What the contract needs of a host. `Any` is the host's own kind of document."""

    name: str
    top: str
    """What the host calls the number of results."""
    z_score: dict[str, Any]
    """What else a component needs for fusion by z-scores."""

    def document(self, key: str, text: str, metadata: dict[str, Any]) -> Any: ...
    def retrieved(self, document: Any, score: float | None) -> Any: ...
    def with_text(self, document: Any, text: str) -> Any: ...
    def key(self, document: Any) -> str: ...
    def text(self, document: Any) -> str: ...
    def score(self, document: Any) -> Any: ...
    def metadata(self, document: Any) -> dict[str, Any]: ...
    def ingest(self, model: Any, documents: Sequence[Any]) -> list[Any]: ...
    def rerank(self, model: Any, query: str, documents: Sequence[Any], top: int, **settings: Any) -> list[Any]: ...
    def fuse(self, model: Any, query: str, retrieved: Sequence[Any], **settings: Any) -> list[Any]: ...
    def reranker(self, **settings: Any) -> Any: ...
    def encoder(self, **settings: Any) -> Any: ...
    def use(self, component: Any, query: str, documents: Any) -> list[Any]: ...
    def encode(self, component: Any, documents: Any) -> list[Any]: ...
    async def ause(self, component: Any, query: str, documents: Sequence[Any]) -> list[Any]: ...
    async def aencode(self, component: Any, documents: Sequence[Any]) -> list[Any]: ...
    def dump(self, component: Any) -> dict[str, Any]: ...
    async def arerank(self, model: Any, query: str, documents: Sequence[Any], top: int) -> list[Any]: ...


class LangChain:
    name = "langchain"
    top = "top_n"
    z_score: ClassVar = {"first_stage_score_key": "bm25"}

    def document(self, key, text, metadata):
        return LangChainDocument(id=key, page_content=text, metadata=metadata)

    def retrieved(self, document, score):
        return document if score is None else document.model_copy(update={"metadata": {**document.metadata, "bm25": score}})

    def with_text(self, document, text):
        return document.model_copy(update={"page_content": text})

    def key(self, document):
        return document.id

    def text(self, document):
        return document.page_content

    def score(self, document):
        return document.metadata["relevance_score"]

    def metadata(self, document):
        return {k: v for k, v in document.metadata.items() if k not in ("relevance_score", "bm25")}

    def ingest(self, model, documents):
        return list(langchain.KalmPassageEncoder(model=model).transform_documents(documents))

    def rerank(self, model, query, documents, top, **settings):
        return list(langchain.KalmRerank(model=model, top_n=top, **settings).compress_documents(documents, query))

    def fuse(self, model, query, retrieved, **settings):
        key = "bm25" if settings["fusion"] == "z_score" else None
        return self.rerank(model, query, retrieved, None, first_stage_score_key=key, **settings)

    def reranker(self, **settings):
        return langchain.KalmRerank(**settings)

    def encoder(self, **settings):
        return langchain.KalmPassageEncoder(**settings)

    def use(self, component, query, documents):
        return list(component.compress_documents(documents, query))

    def encode(self, component, documents):
        return list(component.transform_documents(documents))

    async def ause(self, component, query, documents):
        return list(await component.acompress_documents(documents, query))

    async def aencode(self, component, documents):
        return list(await component.atransform_documents(documents))

    def dump(self, component):
        return json.loads(component.model_dump_json())

    async def arerank(self, model, query, documents, top):
        return list(await langchain.KalmRerank(model=model, top_n=top).acompress_documents(documents, query))


class LlamaIndex:
    name = "llama_index"
    top = "top_n"
    z_score: ClassVar = {}

    def document(self, key, text, metadata):
        # Metadata out of the text, which the other hosts do not put into it either.
        return TextNode(id_=key, text=text, metadata=metadata, excluded_embed_metadata_keys=list(metadata))

    def retrieved(self, document, score):
        return NodeWithScore(node=document, score=score)

    def with_text(self, document, text):
        return document.model_copy(update={"text": text})

    def key(self, document):
        return document.node_id

    def text(self, document):
        return document.text

    def score(self, document):
        return document.score

    def metadata(self, document):
        return document.metadata

    def ingest(self, model, documents):
        return list(llama_index.KalmPassageEncoder(model)(documents))

    def rerank(self, model, query, documents, top, **settings):
        nodes = [NodeWithScore(node=node, score=0.5) for node in documents]
        return llama_index.KalmRerank(model, top_n=top, **settings).postprocess_nodes(nodes, QueryBundle(query))

    def fuse(self, model, query, retrieved, **settings):
        return llama_index.KalmRerank(model, top_n=None, **settings).postprocess_nodes(retrieved, QueryBundle(query))

    def reranker(self, **settings):
        return llama_index.KalmRerank(**settings)

    def encoder(self, **settings):
        return llama_index.KalmPassageEncoder(**settings)

    def use(self, component, query, documents):
        if isinstance(documents, Iterable) and not isinstance(documents, (str, dict, TextNode)):
            # One by one, so that a generator stays one.
            documents = (NodeWithScore(node=node, score=0.5) if isinstance(node, TextNode) else node for node in documents)
        return component.postprocess_nodes(documents, QueryBundle(query))

    def encode(self, component, documents):
        return list(component(documents))

    async def ause(self, component, query, documents):
        nodes = [NodeWithScore(node=node, score=0.5) if isinstance(node, TextNode) else node for node in documents]
        return await component.apostprocess_nodes(nodes, QueryBundle(query))

    async def aencode(self, component, documents):
        return await component.acall(documents)

    def dump(self, component):
        return json.loads(component.to_json())

    async def arerank(self, model, query, documents, top):
        nodes = [NodeWithScore(node=node, score=0.5) for node in documents]
        return await llama_index.KalmRerank(model, top_n=top).apostprocess_nodes(nodes, QueryBundle(query))


class Haystack:
    name = "haystack"
    top = "top_k"
    z_score: ClassVar = {}

    def document(self, key, text, metadata):
        return HaystackDocument(id=key, content=text, meta=metadata)

    def retrieved(self, document, score):
        return replace(document, score=score)

    def with_text(self, document, text):
        return replace(document, content=text)

    def key(self, document):
        return document.id

    def text(self, document):
        return document.content

    def score(self, document):
        return document.score

    def metadata(self, document):
        return document.meta

    def ingest(self, model, documents):
        return haystack.KalmDocumentEncoder(model=model, progress_bar=False).run(list(documents))["documents"]

    def rerank(self, model, query, documents, top, **settings):
        return haystack.KalmRanker(model=model, top_k=top, **settings).run(query, list(documents))["documents"]

    def fuse(self, model, query, retrieved, **settings):
        return self.rerank(model, query, retrieved, 10, **settings)

    def reranker(self, **settings):
        return haystack.KalmRanker(**settings)

    def encoder(self, **settings):
        return haystack.KalmDocumentEncoder(progress_bar=False, **settings)

    def use(self, component, query, documents):
        return component.run(query, documents)["documents"]

    def encode(self, component, documents):
        return component.run(documents)["documents"]

    async def ause(self, component, query, documents):
        return (await component.run_async(query, documents))["documents"]

    async def aencode(self, component, documents):
        return (await component.run_async(documents))["documents"]

    def dump(self, component):
        return json.loads(json.dumps(component.to_dict()))

    async def arerank(self, model, query, documents, top):
        return (await haystack.KalmRanker(model=model, top_k=top).run_async(query, list(documents)))["documents"]


HOSTS: list[Host] = [LangChain(), LlamaIndex(), Haystack()]


async def gather(host: Host, model: Any, queries: Sequence[str], documents: Sequence[Any], top: int) -> list[list[Any]]:
    """Rerank for all queries at once."""
    return await asyncio.gather(*(host.arerank(model, query, documents, top) for query in queries))
