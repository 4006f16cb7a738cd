"""The pages on evaluation show what the committed figures say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tools import evaluation_pages

from kalm_integrations.evaluation import compression
from kalm_integrations.evaluation.compression import CollectionCosts, Cost
from kalm_integrations.evaluation.differences import Difference
from kalm_integrations.evaluation.plots import digest


@pytest.mark.parametrize("page", evaluation_pages.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_figures(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == evaluation_pages.updated(page), (
        "run, from tests/: python -m tools.evaluation_pages"
    )


def test_plot_is_of_the_table_s_figures() -> None:
    svg = (evaluation_pages.FIGURES / "compression.svg").read_text(encoding="utf-8")
    assert digest(evaluation_pages.read("compression.json")) in svg, "copy the plot that belongs to compression.json"


def test_stored_recommendation_is_the_rule_s() -> None:
    report = evaluation_pages.read("compression.json")
    collections = []
    for row in report["collections"]:
        figures = ({name: value for name, value in cost.items() if name != "is_pareto"} for cost in row["costs"])
        costs = [Cost(**{**cost, "difference": Difference(**cost["difference"])}) for cost in figures]
        collections.append(CollectionCosts(**{**row, "costs": tuple(costs)}))
    found = compression.recommend(collections)
    stored = {use: (setting["ratio"], setting["codec"]) for use, setting in report["recommended"].items() if use != "reason"}
    assert stored == {"order": found.order, "scores": found.scores}
    assert report["recommended"]["reason"] == found.reason == ""


def test_stated_rule_has_the_constants() -> None:
    text = (evaluation_pages.DOCS / "compression.md").read_text(encoding="utf-8")
    rule = text[text.index("## The rule") :]
    stated = [float(number) for number in re.findall(r"(?<!\d)\.(?:\d+)", rule)[:3]]
    assert stated == [compression.MAX_LOSS, compression.MAX_PLAUSIBLE_LOSS, compression.MAX_CODEC_CHANGE]
    assert f"fewer than {compression.MIN_QUERIES} queries" in rule


def test_measured_results_stand_beside_the_published_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A summary fills the cell of its model and table; the rest stays blank."""
    (tmp_path / "mteb").mkdir()
    (tmp_path / "mteb" / "x.json").write_text('{"model": "nano-r2", "label": "LMEB", "mean": 0.61234}')
    (tmp_path / "published.json").write_bytes((evaluation_pages.FIGURES / "published.json").read_bytes())
    monkeypatch.setattr(evaluation_pages, "FIGURES", tmp_path)
    table = evaluation_pages.results()
    assert "| Nano R2 | this package |  |  | 61.23 |" in table
    assert "| Nano | this package |  |  |  |" in table
    assert "| Nano | v1 | 57.41 | 62.08 | 61.39 |" in table
