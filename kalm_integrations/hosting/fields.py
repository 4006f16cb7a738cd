"""Settings of components as pydantic fields: checked together, assigned whole or not at all, the same in every host.

LangChain's and LlamaIndex' components are these classes beside their framework's own; Haystack's check theirs by them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SkipValidation,
    Strict,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_serializer,
    model_validator,
)

from kalm_integrations.core.base import Reranker, is_reranker
from kalm_integrations.core.fallback import OnError, check_timeout
from kalm_integrations.core.ranking import check_count, check_fusion, check_threshold
from kalm_integrations.core.settings import STORE_SETTINGS, check_names, describe_problems
from kalm_integrations.core.types import ENCODING_KEY, FusionMethod, RankedPassage, plain
from kalm_integrations.errors import SettingsError
from kalm_integrations.hosting.documents import check_encoding_key
from kalm_integrations.hosting.fetching import Fetch, Fetcher
from kalm_integrations.hosting.models import (
    FUNCTIONS,
    Opened,
    WithModel,
    check_model,
    check_model_kwargs,
    check_no_token,
    fingerprints_of,
)
from kalm_integrations.hosting.pruning import (
    DEFAULT_PRUNE_THRESHOLD,
    Excerpt,
    check_prune_threshold,
    check_pruning,
    excerpt,
)

MODEL_FIELDS = (
    "revision",
    "device",
    "dtype",
    "compression_ratio",
    "storage_codec",
    "max_inline_bytes",
    "max_passage_tokens",
    "long_passages",
    "max_windows",
    "max_query_tokens",
    "system_instruction",
    "calibration",
)
"""Fields that are settings of `KalmReranker.from_pretrained`. Not the instruction: it goes with each query, so that components
with different ones can share a reranker."""


def _count(value: object, info: ValidationInfo) -> int | None:
    return check_count(value, info.field_name or "")


def _threshold(value: object, info: ValidationInfo) -> float | None:
    return check_threshold(value, info.field_name or "")


def _name(value: object) -> object:
    """Return a torch.device or torch.dtype as its name, which can be copied, compared and written."""
    is_torch = type(value).__module__.partition(".")[0] == "torch"
    return str(value).removeprefix("torch.") if is_torch else value


Count = Annotated[int | None, BeforeValidator(_count)]
"""How many results, at most; None: all."""
Whole = Annotated[int | None, Strict(), BeforeValidator(plain)]
Threshold = Annotated[float | None, BeforeValidator(_threshold)]
PruneThreshold = Annotated[float | None, BeforeValidator(check_prune_threshold)]
Timeout = Annotated[float | None, BeforeValidator(check_timeout)]
TorchName = Annotated[str | None, BeforeValidator(_name)]
EncodingKey = Annotated[str, BeforeValidator(check_encoding_key)]
Model = Annotated[SkipValidation[str | os.PathLike[str] | Reranker], WithJsonSchema({"type": "string"})]
Function = Annotated[Callable[[Any], object], WithJsonSchema({"type": "null"})]
FetchFunction = Annotated[Fetch, WithJsonSchema({"type": "null"})]


class CheckedModel(BaseModel):
    """A pydantic model whose errors are ours, and that an assignment which is refused leaves as it was."""

    # What was given may hold a token; our own messages show the rest.
    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", hide_input_in_errors=True)

    def __init__(self, **values: Any) -> None:
        """Check the fields, all together.

        Raises:
            SettingsError: one is unknown or breaks a rule; the message names it.
        """
        kind = type(self)
        _check_names(kind, values, kind.__name__)
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(kind.__name__, error) from error

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign a field if the model is valid with it.

        Raises:
            SettingsError: it is not, or there is no such field; nothing has changed.
        """
        if name.startswith("_"):
            super().__setattr__(name, value)
            return
        fields = type(self).model_fields
        values = {field: getattr(self, field) for field in fields} | {name: value}
        changed = assigned(type(self), values, type(self).__name__)
        self.__dict__[name] = changed.__dict__[name]
        self.__pydantic_fields_set__.add(name)


AnyModel = TypeVar("AnyModel", bound=BaseModel)


def assigned(kind: type[AnyModel], values: Mapping[str, Any], component: str) -> AnyModel:
    """Return a model of fields that were assigned one by one, some of which may be without effect.

    Args:
        kind: the class.
        values: of its fields.
        component: the name to call it by in messages.

    Raises:
        SettingsError: one is unknown or breaks a rule.
    """
    _check_names(kind, values, component)
    made = kind.__new__(kind)
    try:
        # Not by the constructor, which refuses what is without effect.
        kind.__pydantic_validator__.validate_python(dict(values), self_instance=made)
    except ValidationError as error:
        raise _refusal(component, error) from error
    return made


def _check_names(kind: type[BaseModel], values: Mapping[str, Any], component: str) -> None:
    what = f"settings of {component}"
    if "token" not in kind.model_fields:
        check_no_token(values, what)
    check_names(values, kind.model_fields, what)


def _refusal(component: str, error: ValidationError) -> SettingsError:
    return SettingsError(f"invalid settings of {component}: {describe_problems(error)}")


class ModelFields(CheckedModel, WithModel):
    """Fields that name a model and say how it encodes."""

    model: Model = "pico"
    """An alias (`pico` is built in; `nano`, `small`, `large`, …), a hub id, a local folder, the address of a service
    (`http://host:port`), or a reranker to share. The last two bring settings of their own; a service's key is taken from the
    environment variable `KALM_API_KEY`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    device: TorchName = None
    """A torch device; None takes CUDA if there is one."""
    dtype: TorchName = None
    """"float32" or "bfloat16"; None chooses by device."""
    compression_ratio: Whole = None
    """Encoder tokens per stored state; 4 if not set."""
    storage_codec: str | None = None
    """How states are stored and scored: fp32, fp16, bf16, int8, rot4, rot3 or rot2."""
    max_inline_bytes: Whole = None
    """If set, each encoding is pooled until its metadata string is not longer."""
    max_passage_tokens: Whole = None
    """Longer passages are read in windows of so many tokens, or cut; 1,024 if not set."""
    long_passages: Literal["cut", "windows"] | None = None
    """"windows", the default, reads all of a longer passage, in windows that overlap: its score is that of the best one. "cut"
    reads its first `max_passage_tokens`."""
    max_windows: Whole = None
    """Windows of a passage at most; 64 if not set."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict, repr=False)
    """What else `KalmReranker.from_pretrained` takes: storage_mode, payload_store, cache_bytes, batch sizes, … A token belongs
    into HF_TOKEN, a saved login, or a reranker that is given as model."""

    _opened: Opened | None = PrivateAttr(None)

    def model_settings(self) -> dict[str, Any]:
        """Return what `as_reranker` takes beside the model.

        Raises:
            SettingsError: a token was put into `model_kwargs` after they were checked.
        """
        check_no_token(self.model_kwargs, "model_kwargs")
        return {name: value for name in MODEL_FIELDS if (value := getattr(self, name, None)) is not None} | self.model_kwargs

    @model_validator(mode="after")
    def _check_model(self) -> ModelFields:
        if isinstance(self.model, os.PathLike):
            self.__dict__["model"] = os.fspath(self.model)
        check_model_kwargs(self.model_kwargs, type(self).model_fields)
        check_model(self.model, self.model_settings())
        return self

    @field_serializer("model")
    def _serialize_model(self, model: Any) -> str:
        # Caches are keyed by this: one reranker must not be served what another has encoded.
        return ":".join((type(model).__name__, *fingerprints_of(model))) if is_reranker(model) else os.fspath(model)

    @field_serializer("model_kwargs")
    def _serialize_model_kwargs(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        stores = {name: model_kwargs[name] for name in STORE_SETTINGS if name in model_kwargs}
        paths = {name: os.fspath(store) for name, store in stores.items() if isinstance(store, (str, os.PathLike))}
        # Mappings live in this process, and a token that was put in after the check is nobody else's affair.
        return {name: value for name, value in model_kwargs.items() if name not in (*stores, "token")} | paths

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> ModelFields:
        """Return a copy that shares the model, its stores, and what it calls."""
        return super().__deepcopy__(self.share(memo or {}))

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as settings.

        Raises:
            SettingsError: a part lives in this process only.
        """
        self.check_travels()
        fields = type(self).model_fields
        values = {name: value for name, value in self.__dict__.items() if name in FUNCTIONS or not fields[name].exclude}
        return assigned, (type(self), values, type(self).__name__)


class QueryFields(ModelFields):
    """Fields of a component that scores."""

    instruction: str | None = None
    """What makes a passage relevant. Encodings do not depend on it."""
    system_instruction: str | None = None
    """The sentence that tells the model to judge."""
    max_query_tokens: Whole = None
    """Longer queries are cut; 512 if not set."""
    calibration: bool | dict[str, float] | None = None
    """Make scores probabilities: True takes what `kalm calibrate` saved in the checkpoint, or give temperature and bias."""


class EncodingFields(ModelFields):
    """The field of a component that reads or writes encodings in metadata."""

    encoding_key: EncodingKey = ENCODING_KEY
    """Metadata key of the encoding."""


class RerankFields(QueryFields, EncodingFields):
    """Fields of a component that reranks."""

    score_threshold: Threshold = None
    """Results that score less are left out, before the list is cut."""
    fusion: FusionMethod | None = None
    """Order by the retriever's judgement too: "z_score" adds its scores, "reciprocal_rank" its ranks. The score stays P(yes);
    what decides the order is returned as metadata `fused_score`."""
    fusion_weight: float | None = None
    """The reranker's share in a fusion, from 0 to 1."""
    highlight: bool = False
    """Return in the metadata `relevant_spans` the sentences of a document's text with their scores, best first. Of one that
    was read in windows they are those of the best window, and `relevant_window` says where it lies."""
    prune: bool = False
    """Return copies that are cut to the best sentence and to those that `prune_threshold` lets stay, all of the best window if
    there are windows. The metadata `kept_spans` say where in the original they lie."""
    prune_threshold: PruneThreshold = None
    """Part of the best sentence's odds, score / (1 - score), that a sentence must have for `prune`; None takes 0.001."""
    strip_encodings: bool = True
    """Leave encodings out of what is returned, and so out of prompts, traces and checkpoints. They are never on a text that
    was cut by `prune`, which they do not fit."""
    on_missing: Literal["encode", "error"] = "encode"
    """What to do about documents without a valid encoding of their text."""
    timeout: Timeout = None
    """Seconds in which a query must be answered; None waits as long as it takes."""
    on_error: OnError = "raise"
    """"keep_order" goes on without reranking if that is late or fails: with the first documents as they came, unscored, their
    metadata `reranked` False. Why is logged."""
    write_back: Function | None = Field(default=None, repr=False, exclude=True)
    """Called after the answer, in a background thread, with copies of the documents that came without a valid encoding, their
    encodings in the metadata; see `write_back_to`. What it raises is logged, and fails no query."""
    fetch: FetchFunction | None = Field(default=None, repr=False, exclude=True)
    """Called before anything is encoded, with the documents that came without an encoding and are not in memory; returns for
    each its encoding, or None. See `fetch_from`. What it raises is logged, and the documents are encoded."""

    _fetcher: Fetcher[Any] | None = PrivateAttr(None)

    def __init__(self, **values: Any) -> None:
        """Check the fields, all together; what would be without effect is refused here, where all are given at once.

        Raises:
            SettingsError: one is unknown, breaks a rule or needs another one.
        """
        super().__init__(**values)
        self._check_used()

    def fetcher(self) -> Fetcher[Any] | None:
        """Return what asks a store for encodings, if there is one; it stays the same as long as `fetch` does."""
        if self.fetch is None:
            return None
        fetcher = self._fetcher
        if fetcher is None or fetcher.fetch is not self.fetch:
            self._fetcher = fetcher = Fetcher(self.fetch)
        return fetcher

    @property
    def needs_spans(self) -> bool:
        """Whether the reranker is to be asked for spans."""
        return self.highlight or self.prune

    def excerpt(self, text: str, place: RankedPassage) -> Excerpt:
        """Return what `highlight` and `prune` make of a returned document, whose own text is given."""
        threshold = DEFAULT_PRUNE_THRESHOLD if self.prune_threshold is None else self.prune_threshold
        return excerpt(text, place, highlight=self.highlight, threshold=threshold if self.prune else None)

    def _check_used(self) -> None:
        """Check that every setting has an effect."""
        check_fusion(self.fusion, self.fusion_weight)
        check_pruning(self.prune, self.prune_threshold)

    @model_validator(mode="after")
    def _check_fusion(self) -> RerankFields:
        # A weight is kept while fusion is switched off, so that every state can be reached one assignment at a time.
        if self.fusion is not None or self.fusion_weight is not None:
            check_fusion(self.fusion or "reciprocal_rank", self.fusion_weight)
        return self
