"""The page's section on the service, from serving.json."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.tables import significant, table

STORED, FLOOR, OFF, PEER = "stored", "in process", "off", "cross-encoder"
"""Ways: with store and prefix states; the same reranker without HTTP, which is the floor; without store and states; and a
cross-encoder of MiniLM's shape in the same service."""

BOUNDED = "bounded"
"""Way whose memory is watched: as stored, with caches that are full after a minute or two."""

MEBIBYTE = 2**20


def serving_section(measured: dict[str, Any]) -> str:
    """Return the tables of all devices and shapes."""
    return "\n\n".join(part for device, run in measured.items() for part in _run(device, run))


def _run(device: str, run: dict[str, Any]) -> Iterator[str]:
    facts = run["machine"]
    where = facts["gpu"] or f"{facts['cpu']}, {facts['threads']} threads"
    yield f"{where}; load before {facts['load_before']:.2f}; clients on the same machine."
    for shape in run["shapes"]:
        if "loads" not in shape:
            continue
        work = f"{shape['documents']} documents of {shape['passage_tokens']} tokens a request"
        yield f"### {shape['shape'].capitalize()} on {device.upper()}, {work}"
        yield _loads(shape)
        if shape.get("memory"):
            yield _memory(shape["memory"])


def _loads(shape: dict[str, Any]) -> str:
    head = ("clients", "", "requests/s", "p50 s", "p99 s", *(f"÷ {way}" for way in (FLOOR, OFF, PEER)))
    rows = []
    for load in shape["loads"]:
        for way, rounds in load["ways"].items():
            figures = [median(one[name] for one in rounds) for name in ("rate", "p50", "p99")]
            ratios = [_ratio(load, other) if way == STORED else "" for other in (FLOOR, OFF, PEER)]
            rows.append((load["clients"], way, *map(significant, figures), *ratios))
    return table(head, rows)


def _ratio(load: dict[str, Any], other: str) -> str:
    """Return how many times as many requests are answered as by another way, the median over the rounds."""
    if other not in load["ways"]:
        return "not measured"
    pairs = zip(load["ways"][STORED], load["ways"][other], strict=True)
    return f"{median(one['rate'] / another['rate'] for one, another in pairs):.2f}"


def _memory(memory: dict[str, Any]) -> str:
    samples = [n_bytes / MEBIBYTE for n_bytes in memory["bytes"]]
    third = max(1, len(samples) // 3)
    last = len(samples) - third
    first, *others = (median(samples[start : start + third]) for start in (0, min(third, last), last))
    return (
        f"Memory over {memory['seconds'] / 60:.0f} minutes of 16 clients, {memory['requests']:,} requests, one document in "
        f"ten new, caches of {memory['cache_bytes'] / MEBIBYTE:.0f} MiB: {first:,.0f} MiB in the median of the first third, "
        f"{others[0]:,.0f} and {others[1]:,.0f} MiB in those of the others; {max(samples):,.0f} MiB at most."
    )
