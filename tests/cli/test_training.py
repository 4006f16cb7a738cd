"""`kalm train`: from a configuration to a checkpoint that can rerank, or to what that would take."""

from __future__ import annotations

import json
from pathlib import Path

from tools.command_line import QUERY, Run
from tools.training_data import PASSAGES, QUERIES, examples, write_collection, write_lines


def test_train_runs_a_configuration(run: Run, beir_folder: Path) -> None:
    """The checkpoint that it names can rerank, and paths count from the configuration's folder."""
    (beir_folder.parent / "train.toml").write_text(
        """
        output = "out"
        [architecture]
        vocabulary_size = 300
        hidden_width = 16
        mlp_width = 16
        n_layers = 1
        head_width = 8
        [[collections]]
        path = "beir"
        split = "test"
        [[phases]]
        steps = 1
        clusters_per_step = 1
        passages_per_cluster = 2
        queries_per_passage = 1
        """
    )
    result = run("train", beir_folder.parent / "train.toml")
    assert result.exit_code == 0
    folder = result.stdout.splitlines()[-1]
    assert Path(folder) == beir_folder.parent / "out" / "model"
    assert len(json.loads(run("rerank", QUERY, "--model", folder, "--json", stdin="a\nb").stdout)["results"]) == 2


def test_a_dry_run_prints_what_it_found_and_leaves_nothing(run: Run, tmp_path: Path):
    folder = write_collection(tmp_path / "held-out")
    write_lines(tmp_path / "lines.jsonl", [*examples(), {"query": QUERIES[0], "positives": [PASSAGES[1]]}])
    (tmp_path / "train.toml").write_text(
        """
        output = "out"
        model = "pico"
        [[collections]]
        path = "lines.jsonl"
        [[phases]]
        steps = 2
        max_passage_tokens = 6
        """
    )
    result = run("train", tmp_path / "train.toml", "--dry-run", "--held-out", folder, "--split", "train")
    assert result.exit_code == 0
    assert not (tmp_path / "out").exists()
    assert "time        about" in result.stdout
    assert "parameters  6,693,120, of which 6,692,864 are trained" in result.stdout
    assert "cut: phase 1: 4 of 4 passages of lines are cut to max_passage_tokens = 6; in use" in result.stdout
    assert f"overlap with {folder}: 2 of 2 queries and 4 of 4 passages are in the training data" in result.stdout
    refused = run("train", tmp_path / "train.toml", "--held-out", folder)
    assert refused.exit_code == 2
    assert "--held-out is compared by --dry-run" in refused.stderr
