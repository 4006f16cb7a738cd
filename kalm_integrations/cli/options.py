"""Options that several commands take, and what is made of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from kalm_integrations.cli import completion
from kalm_integrations.cli.terminal import note
from kalm_integrations.errors import SettingsError
from kalm_integrations.remote.address import API_KEY_VARIABLE, is_address

if TYPE_CHECKING:
    from kalm_integrations.core.reranker import KalmReranker
    from kalm_integrations.corpora.beir import Collection
    from kalm_integrations.remote.reranker import RemoteReranker

Value = TypeVar("Value")

Model = Annotated[
    str,
    typer.Option(
        help="nano, small, large, nano-r2, small-r2, large-r2, a hub id or a local folder; pico is built in and small, for "
        "trying things out.",
        autocompletion=completion.models,
    ),
]
ModelOrService = Annotated[
    str,
    typer.Option(
        help="nano, small, large, nano-r2, small-r2, large-r2, a hub id, a local folder, or the address of a service "
        "(http://host:port); pico is built in and small, for trying things out.",
        autocompletion=completion.models,
    ),
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Environment variable with the key, for a service that asks for one.",
        show_default=API_KEY_VARIABLE,
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub repository.", show_default="the alias's")]
Device = Annotated[
    str | None,
    typer.Option(help="A torch device, such as cpu or cuda:0.", show_default="CUDA if any", autocompletion=completion.devices),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32 or bfloat16.", show_default="bfloat16 on CUDA, float32 elsewhere", autocompletion=completion.dtypes
    ),
]
Ratio = Annotated[
    int | None, typer.Option(help="Tokens per stored state.", show_default="4", autocompletion=completion.ratios)
]
Codec = Annotated[
    str | None,
    typer.Option(help="fp32, fp16, bf16, int8, rot4, rot3 or rot2.", show_default="rot4", autocompletion=completion.codecs),
]
LongPassages = Annotated[
    str | None,
    typer.Option(
        metavar="cut|windows",
        help="What becomes of passages that are longer than the model's limit: windows encodes all of them, in windows that "
        "overlap; cut reads their beginning only.",
        show_default="windows",
        autocompletion=completion.long_passages,
    ),
]
MaxWindows = Annotated[
    int | None, typer.Option(help="Windows of a passage at most; what is behind them is not read.", show_default="64")
]
PayloadStore = Annotated[
    Path | None, typer.Option(help="Folder of an LMDB store for encodings that are too long for their row.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

TextField = Annotated[str, typer.Option(help="Field of a row that holds the passage.")]
TitleField = Annotated[
    str, typer.Option(help="Field that is put before the passage if a row has it, as in BEIR; '' for none.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Report bad lines and go on with the rest.")]

Split = Annotated[str, typer.Option(help="Which judgements.")]
FirstStage = Annotated[
    str,
    typer.Option(
        help="Where candidates come from: bm25, a TREC run file ({collection} in its path stands for the folder's name), or a "
        "bi-encoder of sentence-transformers."
    ),
]
SkipMissingQueries = Annotated[
    bool, typer.Option("--skip-missing-queries", help="Leave out judged queries that a run file has no passage for.")
]
TopK = Annotated[int, typer.Option(min=1, help="Candidates per query, the best of the first stage.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draw and of the bootstrap.")]
Codecs = Annotated[str, typer.Option(help="Codecs to compare.", autocompletion=completion.codec_lists)]
Ratios = Annotated[str, typer.Option(help="Compression ratios to compare.", autocompletion=completion.ratio_lists)]
Queries = Annotated[int | None, typer.Option(min=1, help="How many queries to draw.", show_default="all")]


def open_reranker(model: str, **settings: Any) -> KalmReranker:
    """Open a checkpoint; says so if it is the small built-in one.

    Raises:
        SettingsError: it is the address of a service, which this command cannot do with.
    """
    from kalm_integrations.hosting import as_reranker

    if is_address(model):
        msg = (
            "--model must name a checkpoint here, but got the address of a service; `kalm rerank --model` and `kalm encode "
            "--server` take one"
        )
        raise SettingsError(msg)
    # Any other name becomes the real reranker, whatever else the function takes.
    return cast("KalmReranker", as_reranker(model, **settings))


def fingerprints(reranker: KalmReranker) -> dict[str, str | None]:
    """Return what encodings were made by, for JSON; a reranker that cuts passages makes none in windows."""
    return {"fingerprint": reranker.fingerprint, "windows_fingerprint": next(iter(reranker.fingerprints[1:]), None)}


def read_collections(
    folders: Sequence[Path], split: str, first_stages: Sequence[str], *, skip_missing_queries: bool
) -> list[Collection]:
    """Read BEIR folders.

    Args:
        folders: of the collections.
        split: which judgements.
        first_stages: where candidates come from, run files among them.
        skip_missing_queries: leave out queries that a run file has no passage for, and say how many these are.

    Raises:
        SettingsError: a folder is no collection, or no queries are left.
    """
    from kalm_integrations.corpora.beir import Collection
    from kalm_integrations.corpora.first_stage import without_missing_queries

    collections = [Collection.read(folder, split) for folder in folders]
    if not skip_missing_queries:
        return collections
    kept = []
    for whole in collections:
        collection = whole
        for first_stage in first_stages:
            collection = without_missing_queries(collection, first_stage)
        if n_missing := len(whole.queries) - len(collection.queries):
            note(f"{whole.name}: left out {n_missing:,} of {len(whole.queries):,} judged queries, which a run file lacks")
        kept.append(collection)
    return kept


def open_service(url: str, api_key_env: str | None, max_retries: int = 3, **settings: Any) -> RemoteReranker:
    """Return a reranker that a service answers for.

    Args:
        url: its address.
        api_key_env: environment variable that has its key.
        max_retries: how often a request is sent again.
        **settings: options that would be without effect, and must not be set.

    Raises:
        SettingsError: one is set, the address is none, or the variable is empty.
    """
    from kalm_integrations.hosting.models import check_model
    from kalm_integrations.remote.reranker import RemoteReranker

    check_model(url, settings)
    api_key = None if api_key_env is None else os.environ.get(api_key_env)
    if api_key_env is not None and not api_key:
        msg = f"the environment variable of --api-key-env must hold the key of the service, but {api_key_env} is not set"
        raise SettingsError(msg)
    return RemoteReranker(url, api_key=api_key, max_retries=max_retries)


def existing(payload_store: Path | None) -> Path | None:
    """Return the folder of a store that is only read, which must not be made by looking into it.

    Raises:
        SettingsError: there is no such folder.
    """
    if payload_store is not None and not payload_store.is_dir():
        msg = f"a payload store that is read must be an existing folder, but got {str(payload_store)!r}"
        raise SettingsError(msg)
    return payload_store


def parse_list(text: str, name: str, rule: str, convert: Callable[[str], Value]) -> list[Value]:
    """Return the values of a comma-separated option.

    Args:
        text: what was given.
        name: the option, such as --ratios.
        rule: what the parts must be.
        convert: makes a value of a part; raises `ValueError` for a bad one.

    Raises:
        BadParameter: a part is something else, or there are none.
    """
    values = []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            values.append(convert(part))
        except ValueError as error:
            msg = f"must be {rule}, but got {part!r}"
            raise typer.BadParameter(msg, param_hint=name) from error
    if not values:
        msg = f"must be {rule}, but is empty"
        raise typer.BadParameter(msg, param_hint=name)
    return values


def parse_ratios(text: str) -> list[int]:
    """Return the ratios of --ratios.

    Raises:
        BadParameter: one is no positive whole number, or there are none.
    """
    return parse_list(text, "--ratios", "positive whole numbers such as 1,2,4", _positive)


def parse_codecs(text: str) -> list[str]:
    """Return the codecs of --codecs.

    Raises:
        BadParameter: there are none, or one is unknown.
    """
    from kalm_integrations.core.settings import CODEC_NAMES, check_codec

    return parse_list(text, "--codecs", f"out of {', '.join(CODEC_NAMES)}", check_codec)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError
    return int(text)
