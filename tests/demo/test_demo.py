"""The demo runs without a network, fits a terminal, and tells the truth."""

import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import fmean

import pytest
from tools.corpora import write_collection
from tools.paths import ROOT

from kalm_integrations import demo, samples
from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.corpora.beir import Collection
from kalm_integrations.corpora.bm25 import BM25
from kalm_integrations.corpora.measures import ndcg_at_10
from kalm_integrations.demo import next_steps, reranking, stage
from kalm_integrations.testing import FakeReranker

N_PASSAGES, N_QUESTIONS = 24, 40


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    """The beginnings of some of the sample's paragraphs, with their questions, for a tokenizer that knows few words."""
    whole = Collection.read(samples.XQUAD_EN)
    passages = {i: text[:120] for i, text in list(whole.passages.items())[:N_PASSAGES]}
    fitting = [q for q, judged in whole.qrels.items() if set(judged) <= set(passages) and len(whole.queries[q]) <= 80]
    qrels = {q: whole.qrels[q] for q in fitting[:N_QUESTIONS]}
    collection = Collection("sample", passages, {q: whole.queries[q] for q in qrels}, qrels)
    return write_collection(collection, tmp_path_factory.mktemp("sample"))


def run_demo(part: str, checkpoint: Path, sample: Path) -> str:
    """Run a part on the small sample, and return what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(samples, "XQUAD_EN", sample)
        patch.setattr(reranking, "N_RANDOM", 10)
        demo.main(checkpoint, part)
    assert err.getvalue() == ""
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "\x1b" not in out.getvalue(), "colours and progress bars are for terminals"
    return out.getvalue()


@pytest.fixture(scope="module")
def output(tiny_checkpoint, sample) -> str:
    """What the first part prints."""
    return run_demo("reranking", tiny_checkpoint, sample)


def numbers(output: str, row: str) -> list[str]:
    """Return the numbers in the first line that starts so."""
    [line, *_] = [line for line in output.splitlines() if line.startswith(row)]
    return re.findall(r"\d+(?:[.,]\d+)*", line.removeprefix(row))


def test_reranking_reports_encodings_and_quality(output, sample):
    assert numbers(output, "first query")[:2] == ["20", "0"]
    assert numbers(output, "the same query again")[:2] == ["0", "20"]
    assert numbers(output, "encodings made")[0] == str(N_PASSAGES)
    collection = Collection.read(sample)
    ids = list(collection.passages)
    found = BM25(list(collection.passages.values())).search(list(collection.queries.values()), 20)
    orders = {q: [ids[i] for i in order] for q, (order, _) in zip(collection.queries, found, strict=True)}
    missed = {q: order for q, order in orders.items() if order[0] not in collection.qrels[q]}
    assert numbers(output, "BM25")[2:] == [f"{fmean(ndcg_at_10(collection.qrels, missed).values()):.3f}", "0"]
    assert f"the {len(missed)} of {len(orders)} whose answer BM25 does not put" in output
    assert "Three things to try" in output


def test_answers_move_as_the_demo_says(output, sample, tiny_checkpoint):
    collection = Collection.read(sample)
    shown = re.findall(r"\n(.+)\nAnswer (rises|falls) from place (\d+) to (\d+)\.", output)
    assert {way for _, way, *_ in shown} == {"rises", "falls"}
    reranker = KalmReranker.from_pretrained(tiny_checkpoint)
    ids = list(collection.passages)
    first_stage = BM25(list(collection.passages.values()))
    for question, _, before, after in shown:
        [question_id] = [q for q, text in collection.queries.items() if text == question]
        [answer] = collection.qrels[question_id]
        [(candidates, _)] = first_stage.search([question], 20)
        ranked = [candidates[p.index] for p in reranker.rank(question, [collection.passages[ids[i]] for i in candidates])]
        assert (candidates.index(ids.index(answer)) + 1, ranked.index(ids.index(answer)) + 1) == (int(before), int(after))


def test_frameworks_keep_encodings_over_a_restart(tiny_checkpoint, sample):
    """Each framework encodes every passage at ingest and none afterwards, not even in a new process."""
    output = run_demo("frameworks", tiny_checkpoint, sample)
    for framework in stage.FRAMEWORKS.values():
        steps = re.findall(rf"^{framework} +(ingest|ask|ask again)  +(\d+) +(\d+) ", output, re.MULTILINE)
        assert [(name, int(encoded)) for name, encoded, _ in steps] == [("ingest", N_PASSAGES), ("ask", 0), ("ask again", 0)]
        assert steps[1][2] == steps[2][2] != "0"


def test_applications_need_no_process_of_their_own(sample, tmp_path):
    """What `ingest` left answers with stored encodings in the order of the reranker."""
    passages = list(Collection.read(sample).passages.values())
    for name in stage.FRAMEWORKS:
        application = __import__(f"kalm_integrations.demo.on_{name}", fromlist=["ask"])
        application.ingest(tmp_path, passages, FakeReranker())
        later = FakeReranker()
        best = application.ask(tmp_path, "Super Bowl quarterback", len(passages), later)
        expected = [passages[p.index] for p in FakeReranker().rank("Super Bowl quarterback", passages)]
        assert best[0] == expected[0]
        assert later.stats.passages_encoded == 0


def test_missing_framework_is_named_and_left_out(sample, tiny_checkpoint, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("langchain_core", "kalm_integrations.langchain"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langchain_core", None)
    steps = list(stage.run("ingest", tmp_path, Collection.read(sample), str(tiny_checkpoint)))
    assert 'pip install "kalm-integrations[langchain]"' in steps[0].problem
    assert [step.name for step in steps if not step.problem] == ["ingest", "ask"] * 2


def test_importing_the_demo_is_cheap():
    code = "import sys, kalm_integrations.demo; assert not {'torch', 'rich', 'haystack'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sample_is_whole_and_names_its_licence():
    collection = Collection.read(samples.XQUAD_EN)
    assert (len(collection.passages), len(collection.queries)) == (240, 1190)
    readme = (samples.XQUAD_EN / "README.md").read_text(encoding="utf-8")
    assert "XQuAD" in readme
    assert "Attribution-ShareAlike 4.0" in readme


def test_three_things_to_try_work_as_typed(tmp_path, monkeypatch):
    """In the form in which the demo was started: by a path, as make does, by its name, or as a module."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "bin"
    folder.mkdir()
    kalm = folder / "kalm"
    kalm.write_text(f'#!/bin/sh\nexec {sys.executable} -m kalm_integrations "$@"\n')
    kalm.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.defpath)
    for started, expected in (("bin/kalm", "bin/kalm"), (f"{ROOT}/kalm_integrations/__main__.py", sys.executable)):
        monkeypatch.setattr(sys, "argv", [started, "demo"])
        steps = list(next_steps.next_steps())
        assert len(steps) == 3
        assert all(step.lines[-1].strip().startswith(expected) for step in steps)
    ranked, planned, looked = [
        "\n".join(step.lines).replace(sys.executable + " -m kalm_integrations", "bin/kalm") for step in steps
    ]
    for command, words in ((ranked, "Otters live on fish."), (f"{planned} --speed 1", "1,000,000 passages of 256 tokens")):
        done = subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, check=True)
        assert words in done.stdout
    assert looked == "bin/kalm ui"
    monkeypatch.setenv("PATH", f"{folder}:{os.defpath}")
    monkeypatch.setattr(sys, "argv", [str(kalm), "demo"])
    assert next_steps.started_as() == "kalm"


def test_what_kalm_ui_needs_is_installed_first(tmp_path, monkeypatch):
    monkeypatch.setattr(next_steps, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", [".venv/bin/kalm", "demo"])
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.chdir(ROOT)
    in_clone = list(next_steps.next_steps())[-1].lines
    assert in_clone == (
        ".venv/bin/python -m pip install -c constraints.txt -e '.[serve]'",
        ".venv/bin/kalm ui",
    )
    monkeypatch.chdir(tmp_path)
    assert "pip install 'kalm-integrations[serve]'" in list(next_steps.next_steps())[-1].lines[0]
