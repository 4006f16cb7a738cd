"""Who batches better in a replica of Ray Serve: `serve.batch`, or the engine that every reranker has?

Run in tests/: `python -m benchmarks.ray_batching`. Two replicas of a core each, pico, passages whose encodings and prefix
states are in memory: what is left is the queue and the decoder. Rounds of the two take turns, because a machine that is
shared is never the same twice; what counts is their ratio.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray import serve
from tools.checkpoints import TEXTS

from benchmarks.machine import describe

N_REPLICAS = 2
N_DOCUMENTS = 20
N_PASSAGES = 200
CLIENTS = (1, 16, 64)
N_ROUNDS = 9
REQUESTS_PER_ROUND = 128
MAX_ONGOING = 64
BATCHES = ((8, 0.0), (8, 0.005), (32, 0.005))
"""Requests of a batch, and the seconds for which it waits for them."""


class Replica:
    """A reranker that knows the passages already."""

    def __init__(self) -> None:
        from kalm_integrations import KalmReranker

        self.reranker = KalmReranker.from_pretrained("pico")
        self.passages = [f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(N_PASSAGES)]
        self.reranker.rank("a query", self.passages)

    def candidates(self, number: int) -> list[str]:
        return [self.passages[(number * 7 + i * 13) % N_PASSAGES] for i in range(N_DOCUMENTS)]


class Engine(Replica):
    async def __call__(self, number: int) -> float:
        ranking = await self.reranker.arank(f"what is number {number}?", self.candidates(number))
        return ranking[0].score


def batching(size: int, wait: float) -> type[Replica]:
    class Batch(Replica):
        @serve.batch(max_batch_size=size, batch_wait_timeout_s=wait)
        async def __call__(self, numbers: list[int]) -> list[float]:
            queries = [f"what is number {number}?" for number in numbers]
            lists = [self.candidates(number) for number in numbers]
            rankings = await asyncio.to_thread(self.reranker.rank_many, queries, lists)
            return [ranking[0].score for ranking in rankings]

    return Batch


def deploy(replica: type[Replica], name: str) -> serve.handle.DeploymentHandle:
    options = {"num_cpus": 1}
    deployment = serve.deployment(
        replica, name=name, num_replicas=N_REPLICAS, ray_actor_options=options, max_ongoing_requests=MAX_ONGOING
    )
    return serve.run(deployment.bind(), name=name, route_prefix=None)


async def load(handle: serve.handle.DeploymentHandle, n_clients: int) -> tuple[float, float]:
    """Return requests per second and the median of the seconds that one took."""
    numbers = iter(range(REQUESTS_PER_ROUND))
    seconds: list[float] = []

    async def client() -> None:
        for number in numbers:
            started = time.perf_counter()
            await handle.remote(number)
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(n_clients)))
    return REQUESTS_PER_ROUND / (time.perf_counter() - started), statistics.median(seconds)


async def compare(handles: dict[str, serve.handle.DeploymentHandle]) -> None:
    for n_clients in CLIENTS:
        rates: dict[str, list[float]] = {name: [] for name in handles}
        waits: dict[str, list[float]] = {name: [] for name in handles}
        for number in range(1 + N_ROUNDS):
            for name in sorted(handles, reverse=number % 2 == 0):
                rate, wait = await load(handles[name], n_clients)
                if number:  # the first round warms up
                    rates[name].append(rate)
                    waits[name].append(wait)
        for name in handles:
            ratios = sorted(rate / engine for rate, engine in zip(rates[name], rates["engine"], strict=True))
            print(
                f"{n_clients:3} clients, {name:22}: {statistics.median(rates[name]):6.1f} requests/s, "
                f"{1000 * statistics.median(waits[name]):6.1f} ms; of the engine's rate {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )


def main() -> None:
    machine = describe("cpu")
    print(f"{machine['cpu']}, {machine['cores']} cores, load before {machine['load_before']}")
    n_deployments = 1 + len(BATCHES)
    ray.init(num_cpus=N_REPLICAS * n_deployments, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    try:
        handles = {"engine": deploy(Engine, "engine")}
        for number, (size, wait) in enumerate(BATCHES):
            name = f"serve.batch of {size}, {1000 * wait:g} ms"
            handles[name] = deploy(batching(size, wait), f"batch-{number}")
        asyncio.run(compare(handles))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
