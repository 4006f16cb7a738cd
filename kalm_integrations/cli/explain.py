"""`kalm explain`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from kalm_integrations.cli import options, ranking
from kalm_integrations.cli.explanation import Explained, Explanation
from kalm_integrations.cli.streams import open_output
from kalm_integrations.cli.terminal import print_json, print_table
from kalm_integrations.corpora.candidates import Candidate
from kalm_integrations.corpora.text import STREAM
from kalm_integrations.errors import SettingsError


def explain(
    query: ranking.Query,
    passages: ranking.Passages = STREAM,
    model: options.ModelOrService = "pico",
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a page here instead, - for standard output: one file that loads nothing.", show_default="none"
        ),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many of the best to explain; all are ranked.")] = 5,
    instruction: ranking.Instruction = None,
    ratio: options.Ratio = None,
    long_passages: options.LongPassages = None,
    max_windows: options.MaxWindows = None,
    text_field: options.TextField = "text",
    title_field: options.TitleField = "title",
    payload_store: options.PayloadStore = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    api_key_env: options.ApiKeyEnv = None,
    skip_bad: options.SkipBad = False,
    as_json: options.Json = False,
) -> None:
    """Show which sentences speak for a passage.

    Passages are ranked as `kalm rerank` does it, and shown in the order in which they came beside the order in which they are
    ranked. Each sentence of the best ones is shown with its score: P(yes) of the passage if it said no more than this.
    """
    ranking.check_query(query)
    if html is not None and as_json:
        msg = "the output must be a page or JSON, but got both --html and --json; leave one out"
        raise SettingsError(msg)
    # The page's place is looked at before any work.
    with nullcontext() if html is None else open_output(html) as page:
        candidates = ranking.read_passages(passages, text_field, title_field, skip_bad=skip_bad)
        reranker = ranking.open_model(
            model,
            api_key_env,
            payload_store,
            revision=revision,
            device=device,
            dtype=dtype,
            compression_ratio=ratio,
            long_passages=long_passages,
            max_windows=max_windows,
        )
        given = [candidate.passage for candidate in candidates]
        ranked = reranker.rank(query, given, instruction=instruction, spans=top_k)
        _, names = ranking.names_of(candidates)
        texts = [candidate.text for candidate in candidates]
        explanation = Explanation.of(query, reranker.model_name, ranked, names, texts, top_k)
        if page is not None:
            from kalm_integrations.cli.explain_html import to_html

            page.write(to_html(explanation).encode())
    if as_json:
        print_json({**_to_dict(explanation, candidates), "stats": reranker.stats.to_dict()})
        return
    if html is None and ranked:
        from kalm_integrations.cli import explain_terminal

        print_table(explain_terminal.overview(explanation))
        for one in explanation.after:
            print()
            print_table(explain_terminal.details(one))
    ranking.note_encodings(explanation.n_detailed, len(candidates), reranker.stats)


def _to_dict(explanation: Explanation, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Return an explanation for JSON."""
    results = [{**ranking.to_dict(one.passage, candidates[one.passage.index]), **_places(one)} for one in explanation.after]
    return {"query": explanation.query, "results": results, "before": [_places(one) for one in explanation.before]}


def _places(one: Explained) -> dict[str, Any]:
    """Return a passage's places and its encoding's status, for JSON."""
    return {"name": one.name, "place": one.place, "rank": one.rank, "score": one.passage.score, "encoding": one.status}
