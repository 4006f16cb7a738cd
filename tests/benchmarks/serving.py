"""`python -m benchmarks.serving`: the service under load, with and without its store, beside an ordinary cross-encoder."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
from tools.services import wait_until_ready

from benchmarks import machine, trials
from benchmarks.peers import MINILM, PEERS
from benchmarks.rows import progress
from benchmarks.serving_app import MAX_STORE_BYTES, SMALL_CACHES
from benchmarks.serving_page import BOUNDED, FLOOR, OFF, PEER, STORED
from benchmarks.workload import Workload, make_workload_checkpoint
from kalm_integrations import KalmReranker

if TYPE_CHECKING:
    from typing_extensions import Self

N_DOCUMENTS = 20
N_PASSAGES = 300
PASSAGE_TOKENS = 128
SAMPLE_SECONDS = 5.0
NEW_SHARE = 0.1
"""Of the documents that are asked for while memory is watched: they have to be encoded, and stored."""


@dataclass(frozen=True)
class Load:
    """How many clients ask how often."""

    clients: int
    requests: dict[str, int]
    """By way."""


LOADS = {
    "pico": [Load(n, {STORED: 400, FLOOR: 400, OFF: max(n, 40), PEER: max(n, 24)}) for n in (1, 16, 64)],
    "nano": [Load(n, {STORED: 2 * n + 22, FLOOR: 2 * n + 22, OFF: max(n, 3), PEER: max(n, 24)}) for n in (1, 16, 64)],
    "toy": [Load(n, dict.fromkeys((STORED, FLOOR, OFF, PEER), 4)) for n in (1, 4)],
}
ROUNDS = 2


class Client:
    """One connection that is kept. Plain, so that it takes little of the machine that it measures."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = str(parts.hostname), int(parts.port or 0)

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=2**24)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def post(self, path: str, body: bytes) -> bytes:
        """Return the body of an answer, which must be a good one."""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length"))
        answer = await self._reader.readexactly(length)
        assert lines[0].split()[1] == "200", (lines[0], answer[:500])
        return answer


class Questions:
    """Requests over a pool of passages, in Cohere's format."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)
        self._words = sorted({word for text in texts for word in text.split()})

    def make_all(self) -> list[bytes]:
        """Return requests that ask for every passage once."""
        parts = [self.texts[start : start + N_DOCUMENTS] for start in range(0, len(self.texts), N_DOCUMENTS)]
        return [json.dumps({"query": "which", "documents": documents}).encode() for documents in parts]

    def make(self, n: int, seed: int, new_share: float = 0.0) -> list[bytes]:
        draw = random.Random(seed)
        bodies = []
        for _ in range(n):
            documents = draw.sample(self.texts, N_DOCUMENTS)
            if new_share:
                fresh = f" {draw.random()}"
                documents = [text + fresh if draw.random() < new_share else text for text in documents]
            query = " ".join(draw.choices(self._words, k=draw.randint(4, 12)))
            bodies.append(json.dumps({"query": query, "documents": documents}).encode())
        return bodies


@contextmanager
def service(way: str, model: Path | str, device: str, store: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The URL of a service that is ready, and its process."""
    command = [sys.executable, "-m", "benchmarks.serving_app", way, str(model), device, str(store)]
    environment = dict(os.environ)
    if way == BOUNDED:
        # As users start it; and oneDNN keeps few of the kernels that it makes for every shape.
        environment = {name: value for name, value in environment.items() if name not in machine.MALLOC["tuned"]}
        environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "16"
    # From the folder that has this package, wherever the measuring process was started.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[1])
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        wait_until_ready(url, process)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


async def ask(place: str | KalmReranker, n_clients: int, bodies: Sequence[bytes]) -> list[float]:
    """Return the seconds of each request; a client asks as soon as it has its answer.

    Args:
        place: the URL of a service, or a reranker of this process.
        n_clients: how many ask at a time.
        bodies: what they ask.
    """
    left, seconds = iter(bodies), []

    async def work(answer: Callable[[bytes], Awaitable[object]]) -> None:
        for body in left:
            started = time.perf_counter()
            await answer(body)
            seconds.append(time.perf_counter() - started)

    async def work_over_http(url: str) -> None:
        async with Client(url) as client:
            await work(lambda body: client.post("/v2/rerank", body))

    async def rank(body: bytes) -> object:
        asked = json.loads(body)
        return await place.arank(asked["query"], asked["documents"])

    await asyncio.gather(*(work_over_http(place) if isinstance(place, str) else work(rank) for _ in range(n_clients)))
    return seconds


def measure_load(places: dict[str, str | KalmReranker], questions: Questions, load: Load, rounds: int) -> dict[str, Any]:
    """Return, for each way and round, requests per second and the latencies at 50 and 99 of a hundred, in seconds."""
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in places}
    for index in range(rounds):
        for way, place in places.items():
            bodies = questions.make(load.requests[way], index)
            started = time.perf_counter()
            seconds = sorted(asyncio.run(ask(place, load.clients, bodies)))
            rate = len(seconds) / (time.perf_counter() - started)
            p50, p99 = (seconds[round(share * (len(seconds) - 1))] for share in (0.5, 0.99))
            measured[way].append({"rate": rate, "p50": p50, "p99": p99})
            progress(f"{load.clients} clients, {way}: {rate:.2f} requests/s, p50 {p50:.3f} s, p99 {p99:.3f} s")
    return {"clients": load.clients, "requests": load.requests, "ways": measured}


def measure_memory(url: str, process: psutil.Process, questions: Questions, seconds: float) -> dict[str, Any]:
    """Return the bytes in memory every few seconds under the load of 16 clients, who bring new documents, too."""
    samples: list[int] = []
    n_asked = 0

    async def watch() -> None:
        while True:
            samples.append(process.memory_info().rss)
            await asyncio.sleep(SAMPLE_SECONDS)

    async def run() -> None:
        nonlocal n_asked
        watching = asyncio.ensure_future(watch())
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            n_asked += len(await ask(url, 16, questions.make(16, 10**6 + n_asked, NEW_SHARE)))
        watching.cancel()

    asyncio.run(run())
    progress(f"memory: {min(samples) / 2**20:.0f} to {max(samples) / 2**20:.0f} MiB in {n_asked} requests")
    facts = {"seconds": seconds, "sample_seconds": SAMPLE_SECONDS, "cache_bytes": sum(SMALL_CACHES.values())}
    return {**facts, "requests": n_asked, "bytes": samples}


def make_peer(folder: Path) -> None:
    """Save a random cross-encoder of MiniLM's shape, with its vocabulary's size and a tokenizer of words, as `peer`."""
    from sentence_transformers import CrossEncoder
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    parts = folder / "parts"
    BertForSequenceClassification(BertConfig(**PEERS[MINILM].shape, num_labels=1)).save_pretrained(parts)
    PreTrainedTokenizerFast.from_pretrained(make_workload_checkpoint("toy", folder / "words")).save_pretrained(parts)
    CrossEncoder(str(parts), max_length=PEERS[MINILM].limit).save_pretrained(str(folder / "peer"))


def measure(shape: str, device: str, rounds: int, memory_seconds: float) -> dict[str, Any]:
    """Measure all loads of a shape, and the memory of the service with its store; without rounds, or seconds, not those."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make_workload_checkpoint("toy" if shape == "pico" else shape, folder / "model")
        n_tokens, n_passages = (16, 24) if shape == "toy" else (PASSAGE_TOKENS, N_PASSAGES)
        questions = Questions(Workload(made).passages(n_tokens, n_passages))
        model = "pico" if shape == "pico" else made
        facts: dict[str, Any] = {"shape": shape, "passage_tokens": n_tokens, "documents": N_DOCUMENTS}
        if rounds:
            facts |= {"rounds": rounds, "loads": measure_loads(shape, model, device, folder, questions, rounds)}
        if memory_seconds:
            with service(BOUNDED, model, device, folder / "bounded") as (url, process):
                facts["memory"] = measure_memory(url, process, questions, memory_seconds)
    return facts


def measure_loads(
    shape: str, model: Path | str, device: str, folder: Path, questions: Questions, rounds: int
) -> list[dict[str, Any]]:
    """Measure all loads of a shape."""
    # In a process of its own: what it imports would stay in this one, where the floor is measured.
    maker = multiprocessing.get_context("spawn").Process(target=make_peer, args=(folder,))
    maker.start()
    maker.join()
    models = {STORED: model, OFF: model, PEER: folder / "peer"}
    store = {"payload_store": folder / "store", "write_through": True, "max_store_bytes": MAX_STORE_BYTES}
    in_process = KalmReranker.from_pretrained(model, device=device, **store)
    with ExitStack() as stack:
        started = {way: stack.enter_context(service(way, model, device, folder / "store")) for way, model in models.items()}
        urls = {way: url for way, (url, _) in started.items()}
        places = {STORED: urls[STORED], FLOOR: in_process, OFF: urls[OFF], PEER: urls[PEER]}
        # Encodings and prefix states of all passages are made, and oneDNN has its kernels.
        warm = [body for _ in range(2) for body in questions.make_all()]
        for way, place in places.items():
            asyncio.run(ask(place, 4, warm if way in (STORED, FLOOR) else warm[:2]))
        return [measure_load(places, questions, load, rounds) for load in LOADS[shape]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the results."""
    parser = trials.parser("serving", __doc__)
    parser.add_argument("--shapes", choices=LOADS, nargs="+", default=("pico", "nano"))
    parser.add_argument("--memory-seconds", type=float, default=600.0, help="how long memory is watched, on the first shape")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="0 leaves the loads out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = trials.parse(parser, arguments)
    facts = machine.describe(options.device)
    seconds = options.memory_seconds
    for shape in options.shapes:
        made = measure(shape, options.device, options.rounds, seconds)
        seconds = 0.0
        # Written after every shape; what else was measured on this device stays.
        runs = json.loads(options.output.read_text()) if options.output.exists() else {}
        before = runs.get(options.device, {}).get("shapes", [])
        shapes = {one["shape"]: one for one in before}
        shapes[shape] = {**shapes.get(shape, {}), **made}
        trials.write(options.output, {**runs, options.device: {"machine": facts, "shapes": list(shapes.values())}})


if __name__ == "__main__":
    main()
