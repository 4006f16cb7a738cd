"""Layouts of training data: the columns by which a row's query, positives and negatives are known."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from kalm_integrations.core.settings import describe_problems
from kalm_integrations.corpora.jsonl import Row
from kalm_integrations.errors import SettingsError

LAYOUTS = (
    "query and positives",
    "query and pos (FlagEmbedding)",
    "anchor or query, and positive (sentence-transformers' pairs, and triplets with negative or negative_1, negative_2, …)",
    "query, passage or text, and label",
)
"""What messages call the layouts, in the order in which they are looked for."""

JUDGING = ("label", "labels", "score", "scores")
"""Columns that say what a passage is worth, and must not be left out of a pair or triplet unseen."""

OWN = {"query", "positives"}
"""What the layout that `kalm mine` writes is known by."""

FLAG_EMBEDDING = {
    "query": "query",
    "pos": "positives",
    "neg": "negatives",
    "pos_scores": "positive_scores",
    "neg_scores": "negative_scores",
    "prompt": "instruction",
}
"""Its names, and ours."""

LABELS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}

NEGATIVE = re.compile(r"negative(_\d+)?")


class Example(BaseModel):
    """What a row says of a query."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: str
    positives: list[str] = []
    """Passages that answer it."""
    negatives: list[str] = []
    """Passages that do not."""
    instruction: str | None = None
    positive_scores: list[FiniteFloat] | None = None
    """A teacher's margins, logit(yes) - logit(no), in the order of `positives`."""
    negative_scores: list[FiniteFloat] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Example:
        if (self.positive_scores is None) != (self.negative_scores is None):
            msg = "positive_scores and negative_scores come together, but only one of them is there"
            raise ValueError(msg)
        for name in ("positive", "negative"):
            scores, passages = getattr(self, f"{name}_scores"), getattr(self, f"{name}s")
            if scores is not None and len(scores) != len(passages):
                msg = f"{name}_scores must be one for each of {name}s, but are {len(scores)} for {len(passages)}"
                raise ValueError(msg)
        return self

    @property
    def margins(self) -> list[tuple[str, float]]:
        """The passages with the teacher's margins; nothing without a teacher."""
        texts, scores = [*self.positives, *self.negatives], [*(self.positive_scores or ()), *(self.negative_scores or ())]
        return list(zip(texts, scores, strict=False))


class _Line(Example):
    """A row of our own layout."""

    positives: list[str] = Field(min_length=1)


def read_example(row: Row, left_out: set[str], *, is_table: bool = False) -> Example:
    """Return what a row of any layout says. A text that is null is blank.

    Args:
        row: values by column.
        left_out: takes the names of columns that the row's layout has no use for.
        is_table: whether the row is of a table, which often has more columns, and nulls for what a row lacks. In JSON lines
            of our own layout, an unknown key is an error: it may be a known one, misspelt.

    Raises:
        SettingsError: the row has none of the layouts, or breaks a rule of its layout.
    """
    try:
        if row.keys() >= OWN and not is_table:
            return _Line.model_validate(row)
        values, used = _recognise(row)
        left_out.update(row.keys() - used)
        return Example.model_validate(values)
    except ValidationError as error:
        msg = describe_problems(error)
        # A problem with a whole passage quotes it.
        msg = f"not an example: {msg if len(msg) <= 400 else msg[:400] + ' …'}"
        raise SettingsError(msg) from error


def _recognise(row: Row) -> tuple[Row, set[str]]:
    """Return the values of an `Example`, and the columns that they are of."""
    query = "query" if "query" in row else "anchor"
    passage = "passage" if "passage" in row else "text"
    if row.keys() >= OWN:
        names = {name: name for name in Example.model_fields}
    elif {"query", "pos"} <= row.keys():
        names = FLAG_EMBEDDING
    elif {query, "positive"} <= row.keys():
        return _read_tuple(row, query)
    elif {query, passage, "label"} <= row.keys():
        return _read_labelled(row, query, passage)
    else:
        msg = (
            f"a row must have the columns of a known layout ({'; '.join(LAYOUTS)}), but has "
            f"{', '.join(map(repr, row)) or 'none'}; rename them"
        )
        raise SettingsError(msg)
    used = {name: ours for name, ours in names.items() if name in row}
    values = {ours: row[name] for name, ours in used.items() if row[name] is not None}
    return {"query": "", **values}, set(used)


def _read_tuple(row: Row, query: str) -> tuple[Row, set[str]]:
    judging = [name for name in JUDGING if name in row]
    if judging:
        msg = (
            f"a row with 'positive' says that it is one, but has {judging[0]!r}, too; drop that column, or call the passage "
            "'passage' if it is labelled 0 or 1"
        )
        raise SettingsError(msg)
    negatives = [name for name in row if NEGATIVE.fullmatch(name)]
    values = {
        **_read_query(row, query),
        "positives": [_text(row["positive"])],
        "negatives": [row[name] for name in negatives if row[name] is not None],
    }
    return values, {query, "positive", "instruction", *negatives}


def _read_labelled(row: Row, query: str, passage: str) -> tuple[Row, set[str]]:
    is_positive = LABELS.get(str(row["label"]).lower())
    if is_positive is None:
        msg = f"a label must be 0 or 1, but is {row['label']!r}; a score belongs into positive_scores and negative_scores"
        raise SettingsError(msg)
    values = {**_read_query(row, query), "positives" if is_positive else "negatives": [_text(row[passage])]}
    return values, {query, passage, "label", "instruction"}


def _read_query(row: Row, query: str) -> Row:
    return {"query": _text(row[query]), "instruction": row.get("instruction")}


def _text(value: Any) -> Any:
    return "" if value is None else value
