"""What was measured of stores and rates, as tables of docs/stores.md and as the constants of `kalm plan`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls
from tools.paths import DOCS

from benchmarks import plan, trials
from benchmarks.results import RATIO, Results
from benchmarks.tables import between_marks, significant, table
from kalm_integrations.corpora.jsonl import to_json
from kalm_integrations.planning.arithmetic import decoder_multiply_adds, encoder_multiply_adds
from kalm_integrations.planning.plans import MEASURED
from kalm_integrations.planning.sizes import QUEUED, StoreModel
from kalm_integrations.planning.speed import ENCODE, POOLED, PREFIX, PRODUCT

RESULTS = trials.FOLDER / "stores.json"
RATES = trials.FOLDER / "results.json"
PAGE = DOCS / "stores.md"
PLACES = {"disk": "", "memory": ", in memory"}
"""Where bytes were weighed, and what that adds to the store's name."""


def render(results: Path = RESULTS, page: Path = PAGE, constants: Path = MEASURED) -> None:
    """Write tables and constants."""
    measured = json.loads(results.read_text(encoding="utf-8"))
    page.write_text(updated_page(measured, page.read_text(encoding="utf-8")), encoding="utf-8")
    constants.write_text(make_constants(measured, json.loads(RATES.read_text(encoding="utf-8"))), encoding="utf-8")


def updated_page(measured: dict[str, Any], text: str) -> str:
    """Return a page with the tables between its marks."""
    tables = "\n\n".join((_about(measured), _on_disk(measured), _searches(measured)))
    return between_marks(text, "encodings on disk", tables)


def make_constants(measured: dict[str, Any], runs: dict[str, Any]) -> str:
    """Return the contents of measured.json."""
    stores = {name: _rounded(asdict(model)) for name, model, _ in fits(measured)}
    return to_json({"stores": stores, "speed": speeds(Results(runs["cpu nano"]))}, indent=1).decode() + "\n"


def fits(measured: dict[str, Any]) -> Iterator[tuple[str, StoreModel, float]]:
    """Yield each store and place, what fits it best, and the largest error of the fit relative to what was measured."""
    for store in measured["stores"]:
        for place, name in PLACES.items():
            if place in store["weighed"][0]:
                model = _fit(store, place)
                yield store["store"] + name, model, max(_errors(store, place, model))


def _fit(store: dict[str, Any], place: str) -> StoreModel:
    """Fit passages · a + bytes · b + queued bytes · c; relative errors count, and nothing is negative."""
    rows = []
    for weighed, taken in _taken(store, place):
        n, stored = weighed["passages"], weighed["stored"]
        rows.append(np.array([n, stored, stored * min(n, QUEUED) / n]) / taken)
    factors, _ = nnls(np.array(rows), np.ones(len(rows)))
    return StoreModel(*factors.tolist(), holds_payloads=store["holds_payloads"])


def _errors(store: dict[str, Any], place: str, model: StoreModel) -> Iterator[float]:
    for weighed, taken in _taken(store, place):
        mean = weighed["stored"] / weighed["passages"]
        yield abs(model.n_bytes(weighed["passages"], mean, mean) / taken - 1)


def _taken(store: dict[str, Any], place: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield what was weighed with encodings, and by how much it is more than without."""
    bare = {weighed["passages"]: weighed[place] for weighed in store["weighed"] if not weighed["stored"]}
    for weighed in store["weighed"]:
        if weighed["stored"]:
            yield weighed, weighed[place] - bare[weighed["passages"]]


def speeds(results: Results) -> dict[str, Any]:
    """Return by dtype the rate of the product that compares machines, and the rates that the work of our rows reached."""
    made: dict[str, Any] = {}
    for dtype in results.run["rates"]:
        rates: dict[str, list[tuple[int, float]]] = {ENCODE: [], POOLED: [], PREFIX: []}
        for n_tokens in sorted({row.passage_tokens for row in results.rows if row.dtype == dtype}):
            cold, pooled, prefix = (
                results.find(name, dtype, n_tokens) for name in (plan.OURS_COLD, plan.OURS_POOLED, plan.OURS_PREFIX)
            )
            encoding = sum(encoder_multiply_adds(results.widths, cold.candidates, n_tokens).values())
            rates[ENCODE].append((n_tokens, round(encoding / (cold.seconds - pooled.seconds), -6)))
            for work, row in ((POOLED, pooled), (PREFIX, prefix)):
                n_states, (n_prefix, n_new) = -(-n_tokens // RATIO), (row.prompt.n_prefix, row.prompt.n_new)
                kept = (n_prefix, n_new) if work == PREFIX else (0, n_prefix + n_new)
                multiply_adds = decoder_multiply_adds(results.widths, row.candidates, n_states, *kept)
                rates[work].append((n_tokens, round(sum(multiply_adds.values()) / row.seconds, -6)))
        made[dtype] = {"product": round(results.rates(dtype)[PRODUCT], -6), "rates": rates}
    return made


def _about(measured: dict[str, Any]) -> str:
    facts = measured["machine"]
    sizes = _mean_characters(measured)
    described = ", ".join(f"{characters:,.0f} ({name})" for name, characters in sizes.items())
    n = max(weighed["passages"] for weighed in measured["stores"][0]["weighed"])
    asked = measured["stores"][0]["fetched"][0]["passages"]
    error = max(error for _, _, error in fits(measured))
    return (
        f"{facts['cpu']}, {facts['cores']} cores, load before {facts['load_before']:.1f}; {n:,} passages of "
        f"{measured['text_characters']:,} characters, vectors of {measured['vector_width']} numbers, and metadata strings of "
        f"{described} characters on average: 256 tokens of Nano at ratio 4. The factors are a fit to all sizes and numbers of "
        f"passages, within {100 * error:.0f} % of each. A search, of {asked} passages, is the best of {measured['rounds']}."
    )


def _mean_characters(measured: dict[str, Any]) -> dict[str, float]:
    [first, *_] = (store for store in measured["stores"] if not store["holds_payloads"])
    return {each["payload"]: each["stored"] / each["passages"] for each in first["weighed"] if each["stored"]}


def _on_disk(measured: dict[str, Any]) -> str:
    names = list(measured["payloads"])
    rows = []
    models = {name: model for name, model, _ in fits(measured)}
    for store in measured["stores"]:
        n = max(weighed["passages"] for weighed in store["weighed"])
        by_payload = {weighed["payload"]: weighed for weighed in store["weighed"] if weighed["passages"] == n}
        for place, suffix in PLACES.items():
            if place not in by_payload["none"]:
                continue
            name = store["store"] + suffix
            bare = by_payload["none"][place]
            cells = [_megabytes(by_payload[payload][place] - bare, n) for payload in names]
            rows.append((name, _megabytes(bare, n), *cells, _factor(models[name])))
    head = ("MB for 1,000 passages", "text and vector", *(f"+ {name}" for name in names), "bytes a character")
    return table(head, rows)


def _megabytes(n_bytes: float, n: int) -> str:
    return significant(n_bytes / n / 1000)


def _factor(model: StoreModel) -> str:
    of = " a byte of payload" if model.holds_payloads else ""
    queued = f", + {model.per_queued_byte:.2f} for {QUEUED:,} of them" if model.per_queued_byte >= 0.05 else ""
    return f"{model.per_byte:.2f}{of}{queued}"


def _searches(measured: dict[str, Any]) -> str:
    names = ["none", *measured["payloads"]]
    rows = [
        (
            store["store"],
            fetched["k"],
            *(significant(fetched["milliseconds"][name]) if name in fetched["milliseconds"] else "–" for name in names),
        )
        for store in measured["stores"]
        for fetched in store["fetched"]
    ]
    return table(("ms for a search", "k", "without", *names[1:]), rows)


def _rounded(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, bool) else float(f"{value:.4g}") for name, value in fields.items()}
