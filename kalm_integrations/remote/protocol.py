"""What our own clients and the service say to each other, beside the formats of others.

A client sends texts first and says at which of them it has an encoding that came with the document (`held`). Where the service
has none of its own, it answers with what it wants instead of scores, and is asked again with those encodings.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from kalm_integrations.core.types import Metadata, Status

FACTS_PATH = "/v1/kalm"
SCORE_PATH = "/v1/score"
ENCODINGS_PATH = "/v1/encodings"


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class _Answer(BaseModel):
    # A newer service may say more.
    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


class ServiceFacts(_Answer):
    """Answer of `GET /v1/kalm`: what the service's encodings are."""

    model: str
    fingerprint: str
    compression_ratio: int
    storage_codec: str
    version: str


class SentPassage(_Request):
    """A passage's text, and its encoding where the service asked for it."""

    text: str
    encoding: str | None = None


class ScoreRequest(_Request):
    """Body of `POST /v1/score`."""

    query: str
    passages: list[SentPassage]
    instruction: str | None = None
    held: list[int] = Field(default_factory=list)
    """Indices of the passages whose encoding the client has, and has not sent."""
    client: str | None = None
    """A random name of the client. Encodings that it sends serve no other, and are kept in memory for it."""


class ScoreAnswer(_Answer):
    """Answer of `POST /v1/score`; the lists are as long as the passages, or empty if something is wanted."""

    fingerprint: str
    margins: list[float] = Field(default_factory=list)
    scores: list[Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=list)
    statuses: list[Status] = Field(default_factory=list)
    """What the service had of each passage before it encoded what was missing."""
    wanted: list[int] = Field(default_factory=list)
    """Indices out of `held` whose encoding is to be sent."""


class EncodingsRequest(_Request):
    """Body of `POST /v1/encodings`; as NDJSON, one such object a line."""

    texts: list[str]
    model: str | None = None


class EncodingsAnswer(_Answer):
    """Answer of `POST /v1/encodings`: for each text, in order, what to store with it."""

    model: str
    fingerprint: str
    encodings: list[Metadata]
