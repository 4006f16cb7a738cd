"""Fitting a calibration to labelled pairs, and how far scores are from probabilities before and after."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from kalm_integrations.core.base import Reranker
from kalm_integrations.core.checkpoint.locate import ALIASES, BUILT_IN_ALIASES, DEFAULTS_FILE
from kalm_integrations.core.settings import Calibration
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.first_stage import Candidates
from kalm_integrations.corpora.jsonl import PassageFields, parse_file, parse_object, to_json
from kalm_integrations.errors import SettingsError
from kalm_integrations.evaluation.differences import load_scipy
from kalm_integrations.evaluation.plots import plot_reliability
from kalm_integrations.evaluation.reliability import Reliability, measure_reliability
from kalm_integrations.files import written_beside

if TYPE_CHECKING:
    from rich.table import Table

UNCALIBRATED = Calibration(temperature=1.0, bias=0.0)


@dataclass(frozen=True)
class Judged:
    """A query with passages of which it is known whether they are relevant."""

    query: str
    passages: list[str]
    is_relevant: list[bool]


@dataclass(frozen=True)
class CalibrationReport:
    """A calibration, and what one from half of the queries does to the other half."""

    calibration: Calibration
    """Fitted to all pairs."""
    half: Calibration
    """Fitted to the pairs of half of the queries."""
    n_queries: int
    n_pairs: int
    share_relevant: float
    seed: int
    """Of the draw of the half."""
    before: Reliability
    """Of plain scores, on the other half."""
    after: Reliability
    """Of scores calibrated by `half`, on the other half."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self) | {"calibration": self.calibration.model_dump(), "half": self.half.model_dump()}

    def to_table(self) -> Table:
        """Return a table for the terminal."""
        from rich.table import Table

        title = f"{self.n_queries:,} queries, {self.n_pairs:,} pairs, {self.share_relevant:.1%} relevant; on the held-out half"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        table.add_column("scores")
        for name in ("log-likelihood (negative)", "Brier", "calibration error"):
            table.add_column(name, justify="right")
        for name, measured in (("plain", self.before), ("calibrated", self.after)):
            values = (measured.negative_log_likelihood, measured.brier, measured.calibration_error)
            table.add_row(name, *(f"{value:.4f}" for value in values))
        return table

    def save_diagram(self, path: Path) -> None:
        """Draw the reliability diagram; see `plot_reliability`.

        Args:
            path: of the picture; its suffix names the format.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        plot_reliability({"plain": self.before, "calibrated": self.after}, path)


def read_judged(path: Path) -> list[Judged]:
    """Read labelled pairs: JSON lines with `query`, `text` (and `title`) and `label` (1 or true: relevant; 0 or false: not).

    Raises:
        SettingsError: a line is malformed.
    """

    def parse_line(line: str) -> tuple[str, str, bool]:
        row = parse_object(line)
        query, label = row.get("query"), row.get("label")
        if not isinstance(query, str) or label not in (0, 1) or isinstance(label, float):
            msg = f"a row must have a string as 'query' and 0, 1, false or true as 'label', but has {query!r} and {label!r}"
            raise SettingsError(msg)
        return query, PassageFields().read(row), bool(label)

    pairs: dict[str, list[tuple[str, bool]]] = {}
    for query, text, is_relevant in parse_file(path, parse_line):
        pairs.setdefault(query, []).append((text, is_relevant))
    return [Judged(query, [text for text, _ in found], [label for _, label in found]) for query, found in pairs.items()]


def judge_candidates(collection: Collection, candidates: Mapping[str, Candidates]) -> list[Judged]:
    """Label candidates by a collection's judgements: relevant are grades above 0; what nobody judged is not."""
    return [
        Judged(
            found.query,
            [collection.passages[i] for i in found.ids],
            [collection.qrels[query_id].get(i, 0) > 0 for i in found.ids],
        )
        for query_id, found in candidates.items()
    ]


def calibrate(
    reranker: Reranker, judged: Sequence[Judged], *, seed: int = 0, show_progress: bool = False
) -> CalibrationReport:
    """Fit a calibration to labelled pairs, and measure one from half of the queries on the other half.

    Args:
        reranker: scores the pairs; a calibration that it has plays no part.
        judged: the pairs, by query, such as a first stage finds them: the bias learns how common relevant passages are there.
        seed: of the draw of the half.
        show_progress: draw a progress bar.

    Raises:
        SettingsError: there are fewer than two queries, or the labels of all or of half of them determine no calibration.
        MissingExtraError: scipy is not installed.
        NonFiniteScoreError: the model produced NaN or infinite logits.
    """
    load_scipy("special")
    if len(judged) < 2:
        msg = f"a calibration needs two queries at least, one to fit to and one to measure on, but got {len(judged)}"
        raise SettingsError(msg)
    margins = []
    for query in tqdm(judged, "Scoring", unit="query", disable=not show_progress):
        ranked = reranker.rank(query.query, query.passages)
        margins.append([passage.margin for passage in sorted(ranked, key=lambda passage: passage.index)])
    order = random.Random(seed).sample(range(len(judged)), len(judged))
    parts = (order, order[: len(order) // 2], order[len(order) // 2 :])
    everything, fitted, held_out = (
        ([m for i in part for m in margins[i]], [label for i in part for label in judged[i].is_relevant]) for part in parts
    )
    half = fit_calibration(*fitted)
    return CalibrationReport(
        calibration=fit_calibration(*everything),
        half=half,
        n_queries=len(judged),
        n_pairs=len(everything[0]),
        share_relevant=sum(everything[1]) / len(everything[1]),
        seed=seed,
        before=measure_reliability(*held_out, UNCALIBRATED),
        after=measure_reliability(*held_out, half),
    )


def fit_calibration(margins: Sequence[float], is_relevant: Sequence[bool]) -> Calibration:
    """Return the calibration under which the labels are most likely (logistic regression on the margin, in float64).

    Args:
        margins: of the pairs.
        is_relevant: their labels.

    Raises:
        SettingsError: the labels are all the same, one margin parts them all, or relevant pairs have the lower margins: then
            no positive temperature is the most likely.
    """
    x, y = np.asarray(margins, dtype=np.float64), np.asarray(is_relevant, dtype=bool)
    if y.all() or not y.any():
        msg = f"a calibration needs relevant and other pairs, but {int(y.sum())} of {len(y)} are relevant"
        raise SettingsError(msg)
    if x[y].min() >= x[~y].max():
        msg = (
            "a calibration needs relevant and other pairs whose margins overlap, but one margin parts them, so that no "
            f"temperature is the most likely; label more than {len(y)} pairs, harder ones among them"
        )
        raise SettingsError(msg)
    # On margins of mean 0 and deviation 1, so that the steps are as good for margins of any size.
    mean, deviation = x.mean(), x.std()
    slope, offset = _newton((x - mean) / deviation, np.where(y, 1.0, -1.0))
    if slope <= 0:
        msg = (
            "a calibration needs relevant pairs with higher margins than others on the whole, but here they have lower ones; "
            "check the labels, and whether the model fits the task"
        )
        raise SettingsError(msg)
    return Calibration(temperature=float(deviation / slope), bias=float(offset - slope * mean / deviation))


def _newton(x: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Return slope and offset of a logistic regression. The loss is convex, so that damped steps reach its one minimum.

    Args:
        x: the variable. Shape: (pairs,).
        signs: +1 for relevant, -1 for others. Shape: (pairs,).
    """
    design = np.stack([x, np.ones_like(x)], axis=1)
    weights = np.zeros(2)
    expit = load_scipy("special").expit

    def loss(weights: np.ndarray) -> float:
        return float(np.logaddexp(0, -signs * (design @ weights)).mean())

    while True:
        wrong = expit(-signs * (design @ weights))
        gradient = -(design * (signs * wrong)[:, None]).mean(axis=0)
        hessian = (design * (wrong * (1 - wrong))[:, None]).T @ design / len(x)
        # The ridge keeps it solvable where every pair is certain.
        step = np.linalg.solve(hessian + 1e-12 * np.eye(2), gradient)
        decrease = float(gradient @ step)
        size = 1.0
        while loss(weights - size * step) > loss(weights) - 1e-4 * size * decrease:
            size /= 2
        if decrease < 1e-12:
            return weights - size * step
        weights = weights - size * step


def check_savable(model: str | os.PathLike[str]) -> Path:
    """Return the folder of a local checkpoint.

    Raises:
        SettingsError: an alias or a hub id, whose folders belong to the package and to the hub's cache, or no checkpoint.
    """
    name = os.fspath(model)
    if name in (*BUILT_IN_ALIASES, *ALIASES) or not (Path(name) / "config.json").is_file():
        msg = (
            f"a calibration is saved into the folder of a local checkpoint, but got {name!r}; write it to a file instead "
            "(--output), and pass what that holds as calibration"
        )
        raise SettingsError(msg)
    return Path(name)


def save_calibration(model: str | os.PathLike[str], calibration: Calibration) -> Path:
    """Write a calibration into a local checkpoint's `kalm_reranker.json`, whose other fields stay. Encodings stay valid.

    Args:
        model: the checkpoint's folder.
        calibration: replaces one that is there.

    Returns:
        The file.

    Raises:
        SettingsError: not a local folder, or its file holds something else than a JSON object.
        OSError: the file cannot be written.
    """
    path = check_savable(model) / DEFAULTS_FILE
    fields: Any = {}
    if path.is_file():
        try:
            fields = json.loads(path.read_bytes())
        except ValueError as error:
            msg = f"{path} must be JSON, but cannot be parsed ({error}); correct it or delete it"
            raise SettingsError(msg) from error
        if not isinstance(fields, dict):
            msg = f"{path} must be a JSON object, but has type {type(fields).__name__}; correct it or delete it"
            raise SettingsError(msg)
    with written_beside(path) as part:
        part.write_bytes(to_json(fields | {"calibration": calibration.model_dump()}, indent=2) + b"\n")
    return path
