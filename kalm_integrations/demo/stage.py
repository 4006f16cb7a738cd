"""What the second part runs in processes of its own: `python -m kalm_integrations.demo.stage STAGE FOLDER SAMPLE MODEL`.

Prints a JSON object per step.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.errors import MissingExtraError

N_CANDIDATES = 20

FRAMEWORKS = {"langchain": "LangChain", "llama_index": "LlamaIndex", "haystack": "Haystack"}


class Application(Protocol):
    """What an `on_*` module has."""

    def ingest(self, folder: Path, passages: Sequence[str], reranker: KalmReranker) -> None:
        """Encode passages, and leave them and their encodings in the folder."""

    def ask(self, folder: Path, question: str, n_candidates: int, reranker: KalmReranker) -> list[str]:
        """Find candidates in what the folder holds, and return the best passages, best first."""


@dataclass(frozen=True)
class Step:
    """What a step did."""

    framework: str
    name: str = ""
    encoded: int = 0
    from_store: int = 0
    """Passages whose encoding came with them from the store."""
    seconds: float = 0.0
    best: str = ""
    """The passage that came first."""
    problem: str = ""
    """Why nothing was done."""


def run(stage: str, folder: Path, sample: Collection, model: str) -> Iterator[Step]:
    """Run a stage, "ingest" or "restart", under each framework."""
    # Held until the end, so that the weights stay in memory from step to step. A restart needs no encoder.
    shared = KalmReranker.from_pretrained(model)
    shared.warm_up(encoder=stage == "ingest")
    question = first_question(sample)
    for module, framework in FRAMEWORKS.items():
        try:
            import_module(f"kalm_integrations.{module}")
        except MissingExtraError as error:
            yield Step(framework, problem=str(error))
            continue
        application = cast("Application", import_module(f"kalm_integrations.demo.on_{module}"))
        if stage == "ingest":
            yield _ingest(application, framework, folder, list(sample.passages.values()), model)
        yield _ask(application, framework, "ask" if stage == "ingest" else "ask again", folder, question, model)


def first_question(sample: Collection) -> str:
    """Return the question that the frameworks are asked."""
    return next(iter(sample.queries.values()))


def _ingest(application: Application, framework: str, folder: Path, passages: Sequence[str], model: str) -> Step:
    reranker = KalmReranker.from_pretrained(model)
    started = time.perf_counter()
    application.ingest(folder, passages, reranker)
    return Step(framework, "ingest", reranker.stats.passages_encoded, seconds=time.perf_counter() - started)


def _ask(application: Application, framework: str, name: str, folder: Path, question: str, model: str) -> Step:
    # Not the one that has ingested: what that has in memory would hide what comes from the store.
    reranker = KalmReranker.from_pretrained(model)
    started = time.perf_counter()
    best = application.ask(folder, question, N_CANDIDATES, reranker)[0]
    took, stats = time.perf_counter() - started, reranker.stats
    return Step(framework, name, stats.passages_encoded, stats.metadata_hits, took, best)


if __name__ == "__main__":
    # What frameworks print must not get between the results.
    results, sys.stdout = sys.stdout, sys.stderr
    for step in run(sys.argv[1], Path(sys.argv[2]), Collection.read(Path(sys.argv[3])), sys.argv[4]):
        results.write(f"{json.dumps(asdict(step))}\n")
