"""The settings of a training run, read from a TOML file."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from kalm_integrations.core.settings import describe_problems
from kalm_integrations.errors import SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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


class CollectionConfig(_Section):
    """A BEIR folder to train on. `weight` is its share of the clusters, relative to the others'."""

    path: Path
    split: str = "train"
    weight: PositiveFloat = 1.0


class PhaseConfig(_Section):
    """One phase of training; the learning rate warms up and decays over each phase on its own."""

    steps: PositiveInt
    max_passage_tokens: PositiveInt = 208
    max_query_tokens: PositiveInt = 48
    clusters_per_step: PositiveInt = 2
    passages_per_cluster: PositiveInt = Field(default=10, ge=2)
    queries_per_passage: PositiveInt = 2
    compression_ratios: tuple[PositiveInt, ...] = (1, 2, 4, 4, 8)
    """One is drawn per step; repeat a ratio to draw it more often."""
    matrix_learning_rate: PositiveFloat = 0.01
    """Of Muon, which updates the matrices of the layers."""
    learning_rate: PositiveFloat = 2e-3
    """Of AdamW, which updates embeddings and norms."""
    warmup_steps: int = Field(default=60, ge=0)


class TrainConfig(_Section):
    """A whole run: from nothing (`architecture`), or from an existing checkpoint (`model`)."""

    output: Path
    seed: int = 0
    model: str | None = None
    architecture: ArchitectureConfig = ArchitectureConfig()
    collections: tuple[CollectionConfig, ...] = Field(min_length=1)
    phases: tuple[PhaseConfig, ...] = Field(min_length=1)
    save_steps: PositiveInt = 500

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
        base = path.parent
        collections = tuple(c.model_copy(update={"path": base / c.path}) for c in config.collections)
        return config.model_copy(update={"collections": collections, "output": base / config.output})
