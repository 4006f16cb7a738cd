"""The hub and a checkpoint: whether it is there, whole and readable, and ranks two passages."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_integrations.cli.checks.findings import Finding, broken, note, ok
from kalm_integrations.cli.checks.folders import ELSEWHERE, is_writable
from kalm_integrations.cli.terminal import format_bytes, format_seconds
from kalm_integrations.core.settings import build_settings
from kalm_integrations.files import nearest_existing
from kalm_integrations.remote.address import is_address

if TYPE_CHECKING:
    from kalm_integrations.core.base import Reranker
    from kalm_integrations.core.checkpoint.hub import Answer
    from kalm_integrations.core.checkpoint.locate import Repository

QUERY = "What do otters eat?"
PASSAGES = ("The Rhine rises in the Swiss Alps.", "Otters live on fish, crabs and frogs.")

SERVICE_SECONDS = 10.0


def check_checkpoint(model: str, settings: dict[str, Any]) -> Iterator[Finding]:
    """Look for a checkpoint without fetching it, and rank two passages with it; or ask a service to.

    Args:
        model: an alias, a hub id, a folder, or the address of a service.
        settings: of `KalmReranker.from_pretrained`; None means unset.
    """
    build_settings(settings)
    if is_address(model):
        yield from _check_service(model)
        return
    from kalm_integrations.core.checkpoint.hub import ask
    from kalm_integrations.core.checkpoint.locate import cached_folder, is_offline, place_of

    place = place_of(model, settings.get("revision"))
    repository = None if isinstance(place, Path) else place
    folder = place if isinstance(place, Path) else cached_folder(place)
    if is_offline():
        yield note("hub", "is not asked, because HF_HUB_OFFLINE is set: only what is in the cache can be used")
        answer = None
    else:
        answer = ask(repository if folder is None else None)
        if answer.is_reached:
            yield ok("hub", f"{answer.endpoint} answers")
        else:
            remedy = "check the network and proxies (HTTPS_PROXY); HF_HUB_OFFLINE=1 uses the cache without asking the hub"
            yield note("hub", f"{answer.endpoint} cannot be reached ({answer.problem})", remedy)
    if folder is None:
        assert repository is not None
        yield _not_cached(repository, answer)
        return
    where = "comes with the package" if model == "pico" else "a local folder" if repository is None else "in the hub's cache"
    yield ok("found", f"{model}: {where}, {folder}")
    yield from _check_files(folder, repository)
    # By its folder: an alias would be looked for on the hub once more.
    yield from _rank(folder, {name: value for name, value in settings.items() if name != "revision"})


def _not_cached(repository: Repository, answer: Answer | None) -> Finding:
    """Say what it takes to have a checkpoint that is not in the cache.

    Args:
        repository: of the hub.
        answer: of the hub; None if it must not be asked.
    """
    from kalm_integrations.core.checkpoint.locate import cache_folder

    at = f" --revision {repository.revision}" if repository.revision else ""
    fetch = f"hf download {repository.hub_id}{at}"
    elsewhere = f"download it where there is a network ({fetch} --local-dir FOLDER), and pass the folder"
    absent = f"{repository} is not in the hub's cache"
    if answer is None:
        return broken("found", f"{absent}, and the hub must not be asked", f"unset HF_HUB_OFFLINE, or {elsewhere}")
    if not answer.is_reached:
        return broken("found", f"{absent}, and the hub cannot be reached", elsewhere)
    if answer.problem:
        return broken(
            "found", f"{absent}, and the hub refuses it: {answer.problem}", "check the name; HF_TOKEN opens private ones"
        )
    place = nearest_existing(cache_folder())
    if not is_writable(place):
        return broken("found", f"{absent}, and {place} cannot be written", ELSEWHERE)
    free = shutil.disk_usage(place).free
    if free < answer.n_bytes:
        room = f"{absent}, takes {format_bytes(answer.n_bytes)}, and there are {format_bytes(free)} free in {cache_folder()}"
        return broken("found", room, f"make room, or {ELSEWHERE}")
    size = format_bytes(answer.n_bytes)
    return note("found", f"{absent}; the first use fetches {size}", f"to fetch it now: {fetch}")


def _check_files(folder: Path, repository: Repository | None) -> Iterator[Finding]:
    from kalm_integrations.core.checkpoint.opened import Checkpoint
    from kalm_integrations.errors import InvalidCheckpointError

    try:
        checkpoint = Checkpoint.open(folder)
        checkpoint.text_names()
        checkpoint.load_tokenizer()
    except InvalidCheckpointError as error:
        again = "" if repository is None else f"if a fetch was cut short: hf download {repository.hub_id}"
        yield broken("files", str(error), again)
        return
    sizes = checkpoint.encoder_config, checkpoint.decoder_config
    n_bytes = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    layers = " + ".join(str(len(config.layer_types)) for config in sizes)
    yield ok("files", f"whole and readable: {layers} layers of width {sizes[0].hidden_width}, {format_bytes(n_bytes)}")


def _rank(folder: Path, settings: dict[str, Any]) -> Iterator[Finding]:
    from kalm_integrations.core.reranker import KalmReranker

    started = time.perf_counter()
    reranker = KalmReranker.from_pretrained(folder, **settings)
    reranker.warm_up()
    yield ok(
        "loading", f"took {format_seconds(time.perf_counter() - started)}, {format_bytes(reranker.runtime.nbytes)} in memory"
    )
    yield _ranked(reranker)


def _check_service(url: str) -> Iterator[Finding]:
    from kalm_integrations.remote.reranker import RemoteReranker

    service = RemoteReranker(url, timeout=SERVICE_SECONDS, max_retries=0)
    service.warm_up()
    yield ok(
        "service",
        f"{service.url} answers with {service.model_name}, ratio {service.compression_ratio} in {service.storage_codec}",
    )
    yield _ranked(service)


def _ranked(reranker: Reranker) -> Finding:
    started = time.perf_counter()
    ranking = reranker.rank(QUERY, list(PASSAGES))
    seconds = time.perf_counter() - started
    scores = ", ".join(f"{hit.score:.4f}" for hit in ranking)
    found = f"two passages in {format_seconds(seconds)}, scores {scores}"
    if ranking[0].index == 1 and math.isfinite(ranking[0].score):
        return ok("ranking", found)
    return note("ranking", f"{found}: the one that answers is not first", "weights that were not trained to rank do that")
