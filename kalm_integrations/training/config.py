"""The settings of a training run, read from a TOML file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from kalm_integrations.core.checkpoint.locate import ALIASES, BUILT_IN_ALIASES
from kalm_integrations.core.settings import describe_problems
from kalm_integrations.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Share = Annotated[float, Field(ge=0, le=1)]

ExportDtype = Literal["float32", "bfloat16"]
"""What the weights of a trained checkpoint are written in."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ArchitectureConfig(_Section):
    """Shape of a model made from nothing: encoder and decoder alike, one key/value head, full attention everywhere."""

    vocabulary_size: PositiveInt = 12_288
    hidden_width: PositiveInt = 256
    mlp_width: PositiveInt = 512
    n_layers: PositiveInt = 3
    n_heads: PositiveInt = 2
    head_width: PositiveInt = 128
    rope_theta: PositiveFloat = 1e6
    max_passage_tokens: PositiveInt = 1024
    max_query_tokens: PositiveInt = 512
    token_embeddings: str | None = None
    """A bi-encoder of sentence-transformers (folder or hub id) whose embeddings of the tokens' texts the token embeddings
    start from."""


class CollectionConfig(_Section):
    """Data to train on: a BEIR folder, a file of examples, or a folder of a Hugging Face dataset."""

    path: Path
    name: str = ""
    """What phases call it; the file's or folder's own name if empty."""
    split: str = "train"
    """Of a folder."""
    weight: PositiveFloat | None = None
    """Share of the clusters, relative to the others'. Unset for all: every example is seen equally often."""
    instruction: str | None = None
    """Of queries that do not bring their own; unset, the checkpoint's."""


class LoraConfig(_Section):
    """Low-rank updates of the layers' matrices instead of training all weights; the export has them merged."""

    rank: PositiveInt = 96
    alpha: PositiveInt = 48
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )


class TeacherConfig(_Section):
    """A teacher for queries without a teacher's scores: BM25 and a bi-encoder, weighed so that they find the gold passages."""

    bi_encoder: str
    """Folder or hub id of a sentence-transformers model."""
    max_tokens: PositiveInt | None = None
    """Of a text, for the bi-encoder; unset, its own limit."""


class PseudoQueryConfig(_Section):
    """Queries made of spans of the passages, drawn beside the real ones."""

    per_passage: PositiveInt = 2
    min_words: PositiveInt = 4
    max_words: PositiveInt = 16
    dropped: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of a span's words that is left out."""
    rate: Share = 0.25
    """How often one takes the place of a real query; passages with too few real ones are filled up with them anyway."""

    @model_validator(mode="after")
    def _check_words(self) -> PseudoQueryConfig:
        if self.max_words < self.min_words:
            msg = f"max_words must not be below min_words, but got {self.max_words} and {self.min_words}"
            raise ValueError(msg)
        return self


class DevConfig(_Section):
    """A small collection that is ranked during training: the best step is kept, and training can stop early.

    A BEIR folder is ranked as in use: the first stage finds candidates. In a file of training data, a query's candidates are
    its positives and negatives; where it has none, BM25 finds them among the file's passages.
    """

    path: Path
    split: str = "dev"
    """Of a BEIR folder."""
    first_stage: str = "bm25"
    """Of a BEIR folder: bm25, a bi-encoder of sentence-transformers, or a run file."""
    queries: PositiveInt = 200
    """How many are drawn, if there are more."""
    top_k: PositiveInt = 20
    """Candidates of each."""
    compression_ratio: PositiveInt = 4
    every_steps: PositiveInt = 100
    """Steps from one evaluation to the next; the start and the end of each phase are evaluated, too."""
    patience: PositiveInt | None = None
    """Evaluations in a row without a new best one, after which a phase ends. Unset: it runs to its end."""
    instruction: str | None = None
    """Of queries that do not bring their own; unset, the checkpoint's."""


class CardConfig(_Section):
    """What the model card of the export says that the run does not know."""

    name: str | None = None
    """Title; `owner/name` if it is known where on the hub the checkpoint will be. Unset, the output folder's name."""
    description: str | None = None
    license: str | None = None
    """Of the trained weights, as the hub names it, such as apache-2.0."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes, such as en."""
    datasets: tuple[str, ...] = ()
    """Data of the hub that was trained on, by its ids."""


class LossConfig(_Section):
    """Weights of the losses that are summed."""

    softmax: NonNegativeFloat = 0.0
    """Cross-entropy of a query's passages: which one is it?"""
    nll: NonNegativeFloat = 0.0
    """Negative log-likelihood of yes and no, mean over the pairs."""
    distillation: NonNegativeFloat = 0.0
    """Binary cross-entropy to sigmoid(margin) of a teacher, mean over the pairs; the data must bring its margins."""

    @model_validator(mode="after")
    def _check_any(self) -> LossConfig:
        if not (self.softmax or self.nll or self.distillation):
            msg = "one of softmax, nll and distillation must be above 0, but all are 0"
            raise ValueError(msg)
        return self


class PhaseConfig(_Section):
    """One phase of training; the learning rate warms up and decays over each phase on its own."""

    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    """Instead of `steps`: how often to go through the examples."""
    collections: tuple[str, ...] | None = None
    """Names of the collections to train on; unset, all."""
    max_passage_tokens: PositiveInt | None = None
    """Longer passages are cut. Unset: the checkpoint's limit, which holds in use, too."""
    max_query_tokens: PositiveInt | None = None
    """Likewise, of queries."""
    clusters_per_step: PositiveInt = 2
    """On each device."""
    accumulated_steps: PositiveInt = 1
    """Batches whose gradients make one step."""
    passages_per_cluster: PositiveInt = Field(default=10, ge=2)
    queries_per_passage: PositiveInt = 2
    grouped: bool = False
    """Ask one query per cluster, with its passage and negatives. Otherwise the queries of all its passages are asked."""
    losses: LossConfig = LossConfig(softmax=1.0, nll=0.25)
    teacher_weight: Share = 0.5
    """Share of the teacher in the labels of `softmax` and `nll`, where there is a teacher; the rest is gold."""
    compression_ratios: tuple[PositiveInt, ...] = Field(default=(1, 2, 4, 4, 8), min_length=1)
    ratios_per_step: Literal["one", "all"] = "one"
    """With `one`, a ratio is drawn: repeat it to draw it more often. With `all`, the loss is the sum over the ratios."""
    optimizer: Literal["adamw", "muon"] | None = None
    """muon: Muon for the layers' matrices, AdamW for the rest. Unset: muon for a model from nothing, else adamw."""
    matrix_learning_rate: PositiveFloat = 0.01
    """Of Muon."""
    learning_rate: PositiveFloat | None = None
    """Of AdamW. Unset: 2e-3 for a model from nothing, 2e-4 with LoRA, 2e-5 for all weights of a trained model."""
    weight_decay: NonNegativeFloat = 0.01
    """Of the layers' matrices."""
    warmup_steps: NonNegativeInt | None = None
    """Unset: 60, but at most a tenth of the phase."""

    @model_validator(mode="after")
    def _check_length(self) -> PhaseConfig:
        if (self.steps is None) == (self.epochs is None):
            msg = "a phase must have either steps or epochs, but has both or neither"
            raise ValueError(msg)
        return self


class TrainConfig(_Section):
    """A whole run: from nothing (`architecture`), or from an existing checkpoint (`model`)."""

    output: Path
    seed: int = 0
    model: str | None = None
    """Alias, hub id or folder of the checkpoint to start from."""
    architecture: ArchitectureConfig = ArchitectureConfig()
    lora: LoraConfig | None = None
    collections: tuple[CollectionConfig, ...] = Field(min_length=1)
    teacher: TeacherConfig | None = None
    pseudo_queries: PseudoQueryConfig | None = None
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    dev: DevConfig | None = None
    max_grad_norm: NonNegativeFloat = 1.0
    """Longer gradients are scaled down to this length; 0: none is."""
    bf16: bool = True
    """Compute in bfloat16; the weights are kept in float32."""
    checkpointed_passages: PositiveInt | None = None
    """Gradient checkpointing: how many passages' activations are in memory at a time (those of the others are computed again
    for the backward pass). Unset: all."""
    save_steps: PositiveInt = 500
    logging_steps: PositiveInt | None = None
    """Unset: 50, but at least ten times in a phase."""
    report_to: tuple[str, ...] = ()
    """Where transformers' Trainer reports to, such as tensorboard or wandb."""
    keep_intermediate: bool = False
    """Keep what only an unfinished run needs: the start's copy, the teacher's embeddings, the weights after each phase."""
    export_dtype: ExportDtype = "float32"
    """Of the weights in the exported checkpoint. bfloat16 takes half the space, and rounds small changes of weights away."""
    card: CardConfig = CardConfig()

    @model_validator(mode="before")
    @classmethod
    def _name_collections(cls, values: Any) -> Any:
        # Here, because the rules on names need them, whoever left them out.
        if isinstance(values, dict) and isinstance(values.get("collections"), (list, tuple)):
            named = [_named(c) for c in values["collections"]]
            values = {**values, "collections": named}
        return values

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
        names = [c.name for c in self.collections]
        if len(set(names)) < len(names):
            msg = f"collections must have different names, but have {', '.join(names)}; give each a `name`"
            raise ValueError(msg)
        unknown = {name for phase in self.phases for name in phase.collections or ()} - set(names)
        if unknown:
            msg = f"a phase's collections must be among {', '.join(names)}, but got {', '.join(sorted(unknown))}"
            raise ValueError(msg)
        if len({c.weight is None for c in self.collections}) > 1:
            msg = "either all collections have a weight or none has, but only some have"
            raise ValueError(msg)
        if self.model is not None and "architecture" in self.model_fields_set:
            msg = f"a run starts from `model` or from `architecture`, but got both (model = {self.model!r}); leave one out"
            raise ValueError(msg)
        if self.lora is not None and self.model is None:
            msg = "lora trains a small part of a trained model, but there is no `model` to start from"
            raise ValueError(msg)
        return self

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        """Read a TOML file; relative paths in it count from the file's folder.

        Raises:
            SettingsError: the file is not TOML, or a setting is unknown or out of range.
        """
        try:
            with path.open("rb") as file:
                config = cls.model_validate(tomllib.load(file))
        except tomllib.TOMLDecodeError as error:
            msg = f"a training configuration must be TOML, but {path} is not: {error}"
            raise SettingsError(msg) from error
        except ValidationError as error:
            msg = f"{path} is not a valid training configuration: {describe_problems(error)}"
            raise SettingsError(msg) from error
        # Absolute, so that a run that goes on is known from wherever it is started.
        return config.with_paths_from(path.parent.absolute())

    def with_paths_from(self, base: Path) -> TrainConfig:
        """Return the settings with relative paths, also those of models that are folders, counted from a folder."""
        update: dict[str, Any] = {
            "output": base / self.output,
            "collections": tuple(c.model_copy(update={"path": base / c.path}) for c in self.collections),
            "model": _model_from(base, self.model),
            "architecture": _with_model_from(base, self.architecture, "token_embeddings"),
        }
        if self.dev is not None:
            dev = self.dev.model_copy(update={"path": base / self.dev.path})
            update["dev"] = dev.model_copy(update={"first_stage": _first_stage_from(base, dev.first_stage)})
        if self.teacher is not None:
            update["teacher"] = _with_model_from(base, self.teacher, "bi_encoder")
        return self.model_copy(update=update)

    def collections_of(self, phase: PhaseConfig) -> Iterable[CollectionConfig]:
        """Return the collections that a phase trains on."""
        return [c for c in self.collections if phase.collections is None or c.name in phase.collections]


def _named(collection: Any) -> Any:
    if isinstance(collection, CollectionConfig):
        return collection if collection.name else collection.model_copy(update={"name": _name_of(collection.path)})
    if isinstance(collection, dict) and not collection.get("name") and "path" in collection:
        return {**collection, "name": _name_of(collection["path"])}
    return collection


def _name_of(path: Path | str) -> str:
    name = Path(path)
    return name.stem if name.suffix in (".jsonl", ".parquet", ".csv", ".tsv") else name.name


def _model_from(base: Path, model: str | None) -> str | None:
    """Return the path of a model that is a folder below `base`, and any other name as it is."""
    if model is None or model in (*BUILT_IN_ALIASES, *ALIASES) or not (base / model).is_dir():
        return model
    return str(base / model)


def _first_stage_from(base: Path, first_stage: str) -> str:
    """Return the path of a run file or bi-encoder below `base`, and any other name as it is."""
    return str(base / first_stage) if (base / first_stage).exists() else first_stage


def _with_model_from(base: Path, section: Any, field: str) -> Any:
    return section.model_copy(update={field: _model_from(base, getattr(section, field))})
