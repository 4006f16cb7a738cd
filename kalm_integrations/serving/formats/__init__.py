"""The formats in which clients ask for rankings: one file each, and what their bodies have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

Index = Annotated[int, Field(ge=0)]


class Body(BaseModel):
    """A request; what clients send beside is passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class Answer(BaseModel):
    """An answer."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())


def _not_blank(query: str) -> str:
    if not query.strip():
        msg = "must hold a word at least, but is empty"
        raise ValueError(msg)
    return query


def _text_of(document: Any) -> Any:
    """Return the text of a document that is an object."""
    if isinstance(document, Mapping):
        document = document.get("text")
    if isinstance(document, str):
        return document
    msg = "must be a string, or an object whose `text` is one"
    raise ValueError(msg)


Query = Annotated[str, AfterValidator(_not_blank), Field(min_length=1, description="The query.")]

Document = Annotated[
    str,
    BeforeValidator(_text_of),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
            ]
        }
    ),
]
"""A text, or an object with one."""

Documents = Annotated[list[Document], Field(description="Texts, or objects with a `text`; none at all give no results.")]

TopN = Annotated[int | None, Field(ge=0, description="How many results to return; none and 0 return all.")]

Instruction = Annotated[str | None, Field(description="What makes a document relevant; replaces the model's own instruction.")]

Model = Annotated[str | None, Field(description="One of the names that /v1/models lists; none is the model that there is.")]

MaxTokens = Annotated[
    int | None,
    Field(
        ge=1,
        description="Documents are cut to their first tokens, if that is less than the model reads; what is left of them is "
        "read in windows.",
    ),
]


def printable(text: str) -> str:
    """Return a text as UTF-8 can carry it: JSON may hold halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()
