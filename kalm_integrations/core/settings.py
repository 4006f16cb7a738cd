"""Settings of a reranker, and the rules that they keep. Encoder-side ones enter the fingerprint, query-side ones never do.

Neither torch nor transformers is needed here, so that components of frameworks can check their settings before anything is
loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from kalm_integrations.core.text import check_instruction_length
from kalm_integrations.core.types import plain, shown
from kalm_integrations.errors import SettingsError

SYSTEM_INSTRUCTION = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
INSTRUCTION = "Given a query, retrieve documents that answer the query."
"""The sentences of the model cards of KaLM-Reranker-V1."""

COMPRESSION_RATIOS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Ratios the checkpoints are published for; R1 and pico reach 32."""

MAX_TOKENS = 2**17
"""Tokens of a passage, and ratios, that the encoding format knows; the position limit that the model cards claim."""

MIN_WINDOW_TOKENS = 64
"""A single character may take half of them, once it is normalised. Where passages are shorter, long ones are cut."""

WINDOW_OVERLAP = 8
"""Which part of a window the next one repeats at most: an eighth, so that no sentence is cut in two in both."""

CODEC_NAMES = ("fp32", "fp16", "bf16", "int8", "rot4", "rot3", "rot2")
"""How states are written; see `passages.codecs`."""

DEFAULT_CODEC = "rot4"

DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
"""What a run may be computed in, and torch's name for it."""


MAX_INSTRUCTION_TOKENS = 8_192
"""Of what stands before the query in a prompt: both instructions and the template."""


def poolable_ratios(ratio: int) -> tuple[int, ...]:
    """Return a ratio and the published ones that states at it can be pooled to, finest first."""
    return (ratio, *(coarser for coarser in COMPRESSION_RATIOS if coarser > ratio and coarser % ratio == 0))


def check_codec(codec: str) -> str:
    """Return `codec` if it is known.

    Raises:
        SettingsError: it is not.
    """
    if codec not in CODEC_NAMES:
        int4 = "; what is stored in it is still read; rot4 takes about as much room and loses less"
        hint = int4 if codec == "int4" else did_you_mean(codec, CODEC_NAMES)
        msg = f"storage_codec must be one of {', '.join(CODEC_NAMES)}, but got {shown(codec)}{hint}"
        raise SettingsError(msg)
    return codec


def check_dtype(dtype: object) -> str:
    """Return torch's name of what a run is to be computed in.

    Args:
        dtype: a name or a torch.dtype.

    Raises:
        SettingsError: it is not offered.
    """
    name = (plain(dtype) if isinstance(dtype, str) else shown(dtype)).removeprefix("torch.")
    if name not in DTYPES:
        why = "; T5Gemma2 overflows in float16" if name in ("float16", "fp16", "half") else ""
        msg = f"dtype must be one of {', '.join(DTYPES)}, but got {shown(dtype)}{why}"
        raise SettingsError(msg)
    return DTYPES[name]


Instruction = Annotated[str, AfterValidator(check_instruction_length)]


class Calibration(BaseModel):
    """P(yes) becomes sigmoid(margin / temperature + bias). The order of passages stays, for the temperature is positive.

    The two numbers make P(yes) the share of relevant passages, on data like those that they were fitted on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    temperature: float = Field(gt=0)
    """Above 1 scores move towards the middle, below 1 away from it."""
    bias: float
    """Added to all; mostly it says how common relevant passages are among the candidates."""

    def apply(self, margin: float) -> float:
        """Return the calibrated logit of a margin."""
        return margin / self.temperature + self.bias


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    _plain = field_validator("*", mode="before")(plain)


class EncoderSettings(_Settings):
    """What changes the states of a passage."""

    max_passage_tokens: int = Field(default=1024, ge=1, le=MAX_TOKENS)
    allow_special_tokens: bool = False
    long_passages: Literal["cut", "windows"] = "windows"
    max_windows: PositiveInt = 64
    """Of a passage, beside what `MAX_TOKENS` allows."""

    @property
    def n_windows(self) -> int | None:
        """How many windows of `max_passage_tokens` a long passage may become; None where it is cut."""
        if self.long_passages == "cut" or self.max_passage_tokens < MIN_WINDOW_TOKENS:
            return None
        return min(self.max_windows, MAX_TOKENS // self.max_passage_tokens)

    @property
    def facts(self) -> dict[str, Any]:
        """What all fingerprints depend on."""
        return self.model_dump(include={"max_passage_tokens", "allow_special_tokens"})

    @property
    def window_facts(self) -> dict[str, Any]:
        """What the fingerprint of passages in windows depends on."""
        return {**self.facts, "long_passages": "windows", "max_windows": self.n_windows, "overlap": WINDOW_OVERLAP}


class StorageSettings(_Settings):
    """How states are pooled and written; the header of each encoding says how it was done."""

    compression_ratio: int = Field(default=4, ge=1, le=MAX_TOKENS)
    storage_codec: Annotated[str, AfterValidator(check_codec)] = DEFAULT_CODEC
    max_inline_bytes: PositiveInt | None = None
    storage_mode: Literal["auto", "inline", "reference"] = "auto"
    write_through: bool = False
    max_store_bytes: int | None = Field(default=None, ge=2**20)


class QuerySettings(_Settings):
    """What happens at query time."""

    max_query_tokens: PositiveInt = 512
    instruction: Instruction = INSTRUCTION
    system_instruction: Instruction = SYSTEM_INSTRUCTION
    encode_batch_size: PositiveInt | None = None
    score_batch_size: PositiveInt | None = None
    cache_bytes: int = Field(default=256 * 2**20, ge=0)
    prefix_cache_bytes: int = Field(default=2**30, ge=0)
    prefix_dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    calibration: bool | Calibration = False
    """True takes the checkpoint's."""
    max_queued_pairs: PositiveInt = 2**16
    """Pairs (or passages to encode) that may wait for the model, of all callers together, for a new request to be taken."""


STORE_SETTINGS = ("payload_store", "prefix_store")
"""Settings that are byte stores; see `passages.stores`."""

SETTING_NAMES = (
    "revision",
    "token",
    "device",
    "dtype",
    *STORE_SETTINGS,
    *EncoderSettings.model_fields,
    *StorageSettings.model_fields,
    *QuerySettings.model_fields,
)
"""Everything that `KalmReranker.from_pretrained` takes beside `model`."""

AnySettings = TypeVar("AnySettings", bound=_Settings)


def make_settings(kind: type[AnySettings], given: Mapping[str, Any]) -> AnySettings:
    """Build settings of a kind; names of other kinds are passed over, and None means unset.

    Raises:
        SettingsError: a value breaks a rule; the message names each.
    """
    try:
        return kind(**{name: value for name, value in given.items() if name in kind.model_fields and value is not None})
    except ValidationError as error:
        msg = f"invalid settings: {describe_problems(error)}"
        raise SettingsError(msg) from error


def with_defaults(settings: AnySettings, defaults: BaseModel) -> AnySettings:
    """Return settings in which what was not given is what a checkpoint says, if it says something."""
    # A checkpoint's calibration is for who asks for it.
    fields = type(settings).model_fields.keys() - settings.model_fields_set - {"calibration"}
    found = {name: getattr(defaults, name, None) for name in fields}
    return settings.model_copy(update={name: value for name, value in found.items() if value is not None})


def build_settings(given: Mapping[str, Any]) -> tuple[EncoderSettings, StorageSettings, QuerySettings]:
    """Return the settings in what `KalmReranker.from_pretrained` is given, all of it checked as far as nothing is loaded.

    Raises:
        SettingsError: a name is unknown, or a value breaks a rule.
    """
    check_names(given, SETTING_NAMES, "settings")
    if given.get("dtype") is not None:
        check_dtype(given["dtype"])
    for name in ("revision", "token"):
        if given.get(name) is not None and not isinstance(given[name], str):
            msg = f"{name} must be a string or None, but got {type(given[name]).__name__}"
            raise SettingsError(msg)
    token = given.get("token") or ""
    if any(not "!" <= character <= "~" for character in token):
        # HTTP libraries refuse it in a message that shows it.
        msg = "token must be of printable ASCII characters without spaces, but got another one; strip line ends from it"
        raise SettingsError(msg)
    storage = make_settings(StorageSettings, given)
    if given.get("payload_store") is None and storage.storage_mode == "reference":
        msg = "storage_mode='reference' needs a payload_store, but got None; pass a mapping or the folder of an LMDB store"
        raise SettingsError(msg)
    if given.get("payload_store") is None and storage.write_through:
        msg = "write_through=True needs a payload_store to write to, but got None; pass a mapping or a folder"
        raise SettingsError(msg)
    if storage.max_store_bytes is not None and not storage.write_through:
        msg = "max_store_bytes bounds what write_through=True puts into a store, but write_through is False; set it too"
        raise SettingsError(msg)
    return make_settings(EncoderSettings, given), storage, make_settings(QuerySettings, given)


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Check names against those that there are.

    Raises:
        SettingsError: one is not among them; the message says which are, and which is near.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            msg = f"{what} must be out of {', '.join(known)}, but got {name!r}{did_you_mean(str(name), known)}"
            raise SettingsError(msg)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint, for the end of a message, at the known name that is close to one, whatever its case; or nothing."""
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower, 1)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def describe_problems(error: ValidationError) -> str:
    """Return pydantic's findings as one line: where, which rule, and what was given."""
    described = []
    for problem in error.errors():
        given = problem["input"]
        if problem["type"] == "too_short" and isinstance(given, (list, tuple)) and len(given) >= problem["ctx"]["min_length"]:
            # Pydantic counts the items that are right. What is wrong with the others is a problem of its own.
            continue
        place = ".".join(map(str, problem["loc"]))
        if problem["type"] == "value_error":
            # Our own validators say all of that themselves.
            rule = str(problem["ctx"]["error"]).removeprefix("invalid settings: ")
        else:
            rule = f"{problem['msg']}, but got {_shown(problem['loc'], problem['input'])}"
        described.append(rule if not place or rule.startswith(place) else f"{place}: {rule}")
    return "; ".join(described)


def _shown(place: tuple[str | int, ...], given: object) -> str:
    """Return what was given, for a message; only its type where a token may be in it."""
    items = given if isinstance(given, (list, tuple)) else [given]
    is_plain = all(item is None or isinstance(item, (bool, int, float, str, bytes)) for item in items)
    return shown(given) if is_plain and not {"token", "model_kwargs"} & set(place) else type(given).__name__
