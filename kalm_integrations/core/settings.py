"""Settings of a reranker. Encoder-side ones enter the fingerprint, query-side ones never do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from kalm_integrations.core.calibration import Calibration
from kalm_integrations.core.encoding import MAX_TOKENS, check_codec
from kalm_integrations.core.prompts import INSTRUCTION, SYSTEM_INSTRUCTION
from kalm_integrations.errors import SettingsError

COMPRESSION_RATIOS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Ratios the checkpoints are published for; R1 and pico reach 32."""

DEFAULT_CODEC = "fp16"


def poolable_ratios(ratio: int) -> tuple[int, ...]:
    """Return a ratio and the published ones that states at it can be pooled to, finest first."""
    return (ratio, *(coarser for coarser in COMPRESSION_RATIOS if coarser > ratio and coarser % ratio == 0))


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class EncoderSettings(_Settings):
    """What changes the states of a passage."""

    max_passage_tokens: int = Field(1024, ge=1, le=MAX_TOKENS)
    allow_special_tokens: bool = False


class StorageSettings(_Settings):
    """How states are pooled and written; the header of each encoding says how it was done."""

    compression_ratio: int = Field(4, ge=1, le=MAX_TOKENS)
    storage_codec: Annotated[str, AfterValidator(check_codec)] = DEFAULT_CODEC
    max_inline_bytes: PositiveInt | None = None
    storage_mode: Literal["auto", "inline", "reference"] = "auto"


class QuerySettings(_Settings):
    """What happens at query time."""

    max_query_tokens: PositiveInt = 512
    instruction: str = INSTRUCTION
    system_instruction: str = SYSTEM_INSTRUCTION
    encode_batch_size: PositiveInt | None = None
    score_batch_size: PositiveInt | None = None
    cache_bytes: int = Field(256 * 2**20, ge=0)
    prefix_cache_bytes: int = Field(2**30, ge=0)
    prefix_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    calibration: bool | Calibration = False
    """True takes the checkpoint's."""


AnySettings = TypeVar("AnySettings", bound=_Settings)


def make_settings(kind: type[AnySettings], given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> AnySettings:
    """Build settings; None means unset, first in what the user gave, then in the checkpoint's defaults.

    Raises:
        SettingsError: a value breaks a rule; the message names each.
    """
    fields = kind.model_fields
    values = {k: v for k, v in (defaults or {}).items() if k in fields and v is not None}
    values |= {k: v for k, v in given.items() if k in fields and v is not None}
    try:
        return kind(**values)
    except ValidationError as error:
        msg = f"invalid settings: {describe_problems(error)}"
        raise SettingsError(msg) from error


def describe_problems(error: ValidationError) -> str:
    """Return pydantic's findings as one line: where, which rule, and what was given."""
    return "; ".join(
        "".join(f"{place}: " for place in [".".join(map(str, problem["loc"]))] if place)
        # Our own validators say all of that themselves.
        + (
            f"{problem['ctx']['error']}"
            if problem["type"] == "value_error"
            else f"{problem['msg']}, but got {problem['input']!r}"
        )
        for problem in error.errors()
    )
