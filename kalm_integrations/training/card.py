"""The model card of a trained checkpoint: README.md with the hub's metadata, data, recipe, figures, licence and use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kalm_integrations import __version__
from kalm_integrations.core.checkpoint.locate import LICENCE_FILES, Repository, place_of
from kalm_integrations.training.config import TrainConfig

CARD = "README.md"

LIBRARY = "kalm-integrations"


@dataclass(frozen=True)
class TrainedOn:
    """A collection of the training data."""

    name: str
    source: str
    """Name of the file or folder, without the folders above it."""
    n_queries: int
    n_passages: int


@dataclass(frozen=True)
class Figure:
    """A measure on a collection, of the start and of the trained checkpoint."""

    collection: str
    measure: str
    """Such as nDCG@10."""
    value: float
    before: float | None = None
    """Of the start; None: not measured."""
    n_queries: int | None = None
    compression_ratio: int | None = None
    chose_step: bool = False
    """The weights are those of the step that this measure was best at."""


@dataclass(frozen=True)
class CardFacts:
    """What a card tells; nothing in it names a place on the machine."""

    name: str
    """The title; `owner/name` if it is known where on the hub the checkpoint will be."""
    made_from: str = ""
    """What the weights were made from, in words."""
    base_models: tuple[str, ...] = ()
    """Those of the hub that the weights were made from, by their ids."""
    relation: str = "finetune"
    """To the base models, in the hub's terms: finetune or merge."""
    license: str | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    """Of the hub, by their ids."""
    description: str | None = None
    collections: tuple[TrainedOn, ...] = ()
    recipe: Mapping[str, Any] | None = None
    """Settings of the run, as plain values."""
    figures: tuple[Figure, ...] = ()


class Texts(Protocol):
    """What is counted of a collection."""

    @property
    def queries(self) -> Sequence[Any]:
        """The queries."""

    @property
    def passages(self) -> Sequence[str]:
        """The passages."""


def facts_of_run(config: TrainConfig, sets: Mapping[str, Texts], figures: Iterable[Figure] = ()) -> CardFacts:
    """Return what the card of a run's checkpoint tells.

    Args:
        config: of the run.
        sets: what was read of each collection, by its name; queries that the run made itself do not count.
        figures: measured on data that was not trained on.
    """
    made_from, base_models = ("random weights", ()) if config.model is None else base_of(config.model)
    sources = {collection.name: collection.path.name for collection in config.collections}
    return CardFacts(
        name=config.card.name or config.output.absolute().name,
        made_from=made_from,
        base_models=base_models,
        license=config.card.license,
        languages=config.card.languages,
        datasets=config.card.datasets,
        description=config.card.description,
        collections=tuple(
            TrainedOn(name, sources[name], len(texts.queries), len(texts.passages)) for name, texts in sets.items()
        ),
        recipe=recipe_of(config),
        figures=tuple(figures),
    )


def base_of(model: str) -> tuple[str, tuple[str, ...]]:
    """Return what a model is in words, and its id if it is one of the hub."""
    place = Path(model) if Path(model).is_absolute() else place_of(model)
    if isinstance(place, Repository):
        at = f" at revision `{place.revision}`" if place.revision else ""
        return f"[{place.hub_id}](https://huggingface.co/{place.hub_id}){at}", (place.hub_id,)
    return f"`{place.name}`, a checkpoint that is not on the hub", ()


def recipe_of(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of a run as plain values, with the last part of each path only."""
    left_out = {"output", "card", *(["architecture"] if config.model is not None else [])}
    settings: dict[str, Any] = _without_folders(config.model_dump(exclude=left_out, exclude_none=True))
    return settings


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(each) for each in value]
    # Models may be folders, too.
    if isinstance(value, Path) or (isinstance(value, str) and (Path(value).is_absolute() or Path(value).is_dir())):
        return Path(value).name
    return value


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Write the card into a checkpoint's folder, in place of one that is there.

    Returns:
        The file.
    """
    data = ModelCardData(
        model_name=facts.name,
        base_model=list(facts.base_models) or None,
        base_model_relation=facts.relation if facts.base_models else None,
        license=facts.license,
        language=list(facts.languages) or None,
        datasets=list(facts.datasets) or None,
        library_name=LIBRARY,
        pipeline_tag="text-ranking",
        tags=["reranker", "t5gemma2"],
        eval_results=[_result(figure) for figure in facts.figures] or None,
    )
    licences = sorted(path.name for pattern in LICENCE_FILES for path in folder.glob(pattern))
    parts = [
        f"# {facts.name}",
        facts.description or "A reranker: it scores how well passages answer a query.",
        f"The weights were made with kalm_integrations {__version__} from {facts.made_from}." if facts.made_from else "",
        "## Use\n\n```console\npip install kalm-integrations\n```",
        f"```python\n{USE.format(name=facts.name)}```",
        *_data(facts.collections),
        *_figures(facts.figures),
        *_recipe(facts.recipe),
        f"## Licence\n\n{_licence(facts, licences)}",
    ]
    path = folder / CARD
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n").save(path)
    return path


USE = """from kalm_integrations import KalmReranker

reranker = KalmReranker.from_pretrained("{name}")
reranker.rank("a query", ["a passage", "another passage"])
"""


def stated_licence(folder: Path) -> str | None:
    """Return the licence that the metadata of a checkpoint's card states; None: there is no card, or nothing of the kind."""
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.license or None
    except Exception:  # anybody may have written it, and the classes of the YAML reader are not the client's
        return None


def _result(figure: Figure) -> EvalResult:
    ratio = f", ratio {figure.compression_ratio}" if figure.compression_ratio else ""
    return EvalResult(
        task_type="text-ranking",
        dataset_type=figure.collection,
        dataset_name=figure.collection,
        metric_type=figure.measure,
        metric_name=f"{figure.measure}{ratio}",
        metric_value=round(figure.value, 4),
    )


def _data(collections: Sequence[TrainedOn]) -> list[str]:
    if not collections:
        return []
    rows = [(each.name, each.source, f"{each.n_queries:,}", f"{each.n_passages:,}") for each in collections]
    return ["## Data", _table(("collection", "file or folder", "queries", "passages"), rows)]


def _figures(figures: Sequence[Figure]) -> list[str]:
    if not figures:
        return []
    rows = [
        (
            each.collection,
            str(each.compression_ratio or ""),
            f"{each.n_queries:,}" if each.n_queries is not None else "",
            each.measure,
            f"{each.before:.3f}" if each.before is not None else "",
            f"{each.value:.3f}",
        )
        for each in figures
    ]
    chosen = [each.collection for each in figures if each.chose_step]
    note = f"The step was chosen by {', '.join(chosen)}: on data that chose nothing, expect a little less." if chosen else ""
    head = ("collection", "ratio", "queries", "measure", "start", "this checkpoint")
    return ["## Figures", _table(head, rows), note]


def _recipe(recipe: Mapping[str, Any] | None) -> list[str]:
    if recipe is None:
        return []
    return ["## Recipe", f"```json\n{json.dumps(recipe, indent=2, ensure_ascii=False, default=str)}\n```"]


def _licence(facts: CardFacts, files: Sequence[str]) -> str:
    said = (
        f"{facts.license}."
        if facts.license
        else "No licence was stated. Until its owner states one, in the field `license` at the top of this file, nobody else "
        "may use this checkpoint."
    )
    based = f" The licence of {facts.made_from} applies as well." if facts.base_models else ""
    kept = f" Its texts: {', '.join(files)}." if files else ""
    return said + based + kept


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
