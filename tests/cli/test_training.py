"""`kalm train`: from a configuration to a checkpoint that can rerank."""

from __future__ import annotations

import json
from pathlib import Path

from tools.command_line import QUERY, Run


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
