"""What our own clients and the service say to each other, beside the formats of others.

A client sends texts first, and with them the names of the encodings that came with the documents (`held`). Where the service
has none of its own, it answers with what it wants instead of scores, and is asked again with those encodings. What it is sent
serves this client only, and of its passages only those that hold the very same: who can write one store decides nothing about
another's documents.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from kalm_integrations.core.types import Metadata, Status

Score = Annotated[float, Field(ge=0, le=1)]

FACTS_PATH = "/v1/kalm"
SCORE_PATH = "/v1/score"
ENCODINGS_PATH = "/v1/encodings"


def name_encoding(value: str) -> str:
    """Return the name of an encoding's string: BLAKE2b in 32 hex digits."""
    return hashlib.blake2b(value.encode(), digest_size=16).hexdigest()


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class _Answer(BaseModel):
    # A newer service may say more.
    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


class _OfModel(_Answer):
    """What says of which encodings it is."""

    fingerprint: str
    windows_fingerprint: str | None = None
    """Of passages in windows; None where they are cut, as all services did once."""

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """All that encodings may carry."""
        return (self.fingerprint,) if self.windows_fingerprint is None else (self.fingerprint, self.windows_fingerprint)


class ServiceFacts(_OfModel):
    """Answer of `GET /v1/kalm`: what the service's encodings are."""

    model: str
    compression_ratio: int
    storage_codec: str
    version: str
    spans: bool = False
    """Whether it scores sentences too; services before that said nothing."""
    max_passage_tokens: int | None = None
    """Of a passage that is read in one piece; told by services that read windows."""


class SentPassage(_Request):
    """A passage's text, and its encoding where the service asked for it."""

    text: str
    held: str | None = Field(default=None, max_length=64)
    """A name for the encoding that came with the passage, as `name_encoding` gives it; sent or not."""
    encoding: str | None = None


class ScoreRequest(_Request):
    """Body of `POST /v1/score`."""

    query: str
    passages: list[SentPassage]
    instruction: str | None = None
    client: str | None = None
    """A random name of the client, under which what it sends is kept in memory; None keeps nothing."""
    spans: bool = False
    """Whether the scores of the passages' sentences are wanted too."""


class SentSpan(_Answer):
    """A sentence's place in the text that was sent, in code points, and its score."""

    start: Annotated[int, Field(ge=0)]
    end: int
    score: Score


SentWindow = tuple[Annotated[int, Field(ge=0)], int]
"""Where a window begins and ends in the text that was sent, in code points."""


class ScoreAnswer(_OfModel):
    """Answer of `POST /v1/score`; the lists are as long as the passages, or empty if something is wanted."""

    margins: list[float] = Field(default_factory=list)
    scores: list[Score] = Field(default_factory=list)
    statuses: list[Status] = Field(default_factory=list)
    """What the service had of each passage before it encoded what was missing."""
    wanted: list[int] = Field(default_factory=list)
    """Indices of the passages whose encoding is to be sent; of those that hold one and did not bring it."""
    spans: list[list[SentSpan]] = Field(default_factory=list)
    """Those of each passage, best first, if they were asked for."""
    windows: list[SentWindow | None] = Field(default_factory=list)
    """The best window of each passage that was read in several; empty if none was."""


class EncodingsRequest(_Request):
    """Body of `POST /v1/encodings`; as NDJSON, one such object a line."""

    texts: list[str]
    model: str | None = None


class EncodingsAnswer(_Answer):
    """Answer of `POST /v1/encodings`: for each text, in order, what to store with it."""

    model: str
    fingerprint: str
    encodings: list[Metadata]
