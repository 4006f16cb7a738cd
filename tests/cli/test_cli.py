"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from tools import cli_help
from typer.testing import CliRunner, Result

from kalm_integrations import EncodedPassage, KalmReranker, __version__
from kalm_integrations.cli import ROWS_PER_BATCH, app
from kalm_integrations.core.passages.codecs import CODECS
from kalm_integrations.core.settings import DEFAULT_CODEC, StorageSettings
from kalm_integrations.hosting.models import _notice_pico

QUERY = "which team won?"
TEXTS = [
    "The Panthers defense gave up 308 points.",
    "Lift and drag of a wing.",
    "Denver won Super Bowl 50 in 2016.",
    "naïve 東京",
]
KALM = [sys.executable, "-m", "kalm_integrations.cli"]

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, catch_exceptions=False)

    return run


@pytest.fixture
def model(tiny_checkpoint: Path) -> tuple[str, Path]:
    """The option that names the tiny checkpoint."""
    return ("--model", tiny_checkpoint)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def assert_fails(result: Result, message: str) -> None:
    """One line on standard error, with the message, and exit code 2."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("kalm: error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def commands(group: Any = None, path: str = "") -> dict[str, Any]:
    """Every command by its name, those of a group behind the group's."""
    group = group or typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():
        found[path + name] = command
        if hasattr(command, "commands"):
            found |= commands(command, f"{path}{name} ")
    return found


def test_every_command_and_option_has_help() -> None:
    assert {"rerank", "encode", "inspect", "eval", "eval beir", "demo", "train", "info"} <= set(commands())
    for name, command in commands().items():
        assert command.help, name
        assert all(parameter.help for parameter in command.params), name
        assert "..." not in command.get_short_help_str(), f"the first line of {name}'s help must fit the list of commands"


def test_documented_help_is_up_to_date() -> None:
    assert cli_help.PAGE.read_text(encoding="utf-8") == cli_help.updated_page(), "run: python tests/cli_help.py"


def test_documented_defaults_are_the_settings_ones() -> None:
    """Defaults of the core are repeated in the help, because it must not load the core."""
    options = {parameter.name: parameter for parameter in commands()["encode"].params}
    assert options["codec"].show_default == DEFAULT_CODEC
    assert options["ratio"].show_default == str(StorageSettings().compression_ratio)
    assert all(codec in options["codec"].help for codec in CODECS)


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from kalm_integrations.cli import app\n"
        "try: app(['rerank', '--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "loaded = {'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_version_and_bare_command(run: Run) -> None:
    assert run("--version").stdout == f"kalm-integrations {__version__}\n"
    bare = run()
    assert bare.exit_code == 0
    assert "rerank" in bare.stdout


def test_rerank_prints_what_the_reranker_says(run: Run, model: Any, make_reranker: Callable[..., KalmReranker]) -> None:
    Path("passages.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    result = run("rerank", QUERY, "passages.txt", "--json", *model)
    expected = make_reranker().rank(QUERY, TEXTS)
    printed = json.loads(result.stdout)
    assert [(r["index"], r["score"], r["margin"]) for r in printed["results"]] == [
        (p.index, p.score, p.margin) for p in expected
    ]
    assert [r["row"]["text"] for r in printed["results"]] == [TEXTS[p.index] for p in expected]
    assert [r["line"] for r in printed["results"]] == [2 * p.index + 1 for p in expected]
    table = run("rerank", QUERY, "passages.txt", "--top-k", 2, *model).stdout.splitlines()
    assert len(table) == 3
    assert all(TEXTS[p.index] in line for p, line in zip(expected, table[1:], strict=False))


def test_rerank_passes_its_options_on(run: Run, model: Any, make_reranker: Callable[..., KalmReranker]) -> None:
    Path("p.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    expected = make_reranker(compression_ratio=8).rank(QUERY, TEXTS, instruction="Find a place.")
    threshold = expected[1].score
    options = ("--instruction", "Find a place.", "--ratio", 8, "--score-threshold", threshold)
    results = json.loads(run("rerank", QUERY, "p.txt", "--json", *options, *model).stdout)["results"]
    assert [(r["index"], r["score"]) for r in results] == [(p.index, p.score) for p in expected[:2]]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("-", '\n{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ("-", "a\r\n \nb", ["a", "b"]),
        ("-", "\ufeffa\n{b", ["a", "{b"]),
        ("p.txt", '{"text": "a"}\n', ['{"text": "a"}']),
        ("p.ndjson", '{"text": "a"}\n', ["a"]),
        ("p", '\ufeff{"text": "a"}\n', ["a"]),
    ],
)
def test_rerank_knows_json_lines_from_text(run: Run, model: Any, name: str, content: str, texts: list[str]) -> None:
    """By the name of the file, else by the first character."""
    if name != "-":
        Path(name).write_text(content, encoding="utf-8")
    results = json.loads(run("rerank", QUERY, name, "--json", *model, stdin=content).stdout)["results"]
    assert sorted(r["row"]["text"] for r in results) == sorted(texts)


def test_rerank_of_nothing_is_nothing(run: Run, model: Any) -> None:
    result = run("rerank", QUERY, "--json", *model)
    assert (result.exit_code, json.loads(result.stdout)["results"]) == (0, [])
    assert run("rerank", QUERY, *model).stdout == ""


def test_rerank_uses_stored_encodings(
    run: Run, model: Any, make_reranker: Callable[..., KalmReranker], other_checkpoint: Path
) -> None:
    """Sound ones of this model and text are scored as they are; others are made anew; none is printed."""
    good, _, _, _ = make_reranker(storage_codec="int4").encode_to_metadata(TEXTS)
    foreign = make_reranker(other_checkpoint).encode_to_metadata(TEXTS)[1]
    stored = [good, foreign, {"kalm_encoding": "kalm1.x.y"}, {"kalm_encoding": None}]
    rows = [{"_id": f"p{i}", "text": text, **metadata} for i, (text, metadata) in enumerate(zip(TEXTS, stored, strict=True))]
    write_jsonl(Path("p.jsonl"), rows)
    printed = json.loads(run("rerank", QUERY, "p.jsonl", "--json", *model).stdout)
    counts = {name: printed["stats"][name] for name in ("metadata_hits", "stale", "corrupt", "passages_encoded")}
    assert counts == {"metadata_hits": 1, "stale": 1, "corrupt": 1, "passages_encoded": 3}
    assert [set(r["row"]) for r in printed["results"]] == [{"_id", "text"}] * 4
    scores = {r["row"]["_id"]: r["score"] for r in printed["results"]}
    exact = make_reranker().score(QUERY, TEXTS)
    assert scores["p1"] == pytest.approx(exact[1], abs=1e-6)
    [coarse] = make_reranker().score(QUERY, [EncodedPassage.from_metadata(good["kalm_encoding"])])
    assert scores["p0"] == pytest.approx(coarse, abs=1e-6)
    assert coarse != pytest.approx(exact[0], abs=1e-5), "int4 must show, or this test does not"
    result = run("rerank", QUERY, "p.jsonl", *model)
    assert "p0" in result.stdout
    assert "encodings: 1 stored ones used, 3 made now, 1 stale, 1 corrupt" in result.stderr


def test_table_has_no_control_characters(run: Run, model: Any) -> None:
    """A passage cannot send commands to the terminal."""
    result = run("rerank", QUERY, *model, stdin="a \x1b[2J \x07 b\n")
    assert "a  [2J   b" in result.stdout
    assert not set(result.stdout) & set("\x1b\x07")


def test_encode_adds_encodings_and_nothing_else(run: Run, model: Any, make_reranker: Callable[..., KalmReranker]) -> None:
    """Rows keep their order, fields and characters, half surrogate pairs included; the passage is BEIR's title and text."""
    rows = [
        {"_id": i, "title": "Ünïcödé", "text": text, "n": [1, {"x": 1.5}], "kalm_fp": "old"} for i, text in enumerate(TEXTS)
    ]
    rows[1]["title"] = ""
    del rows[2]["title"]
    rows[3]["text"] += "\ud800"
    result = run("encode", write_jsonl(Path("p.jsonl"), rows), "--ratio", 8, "--codec", "int8", *model)
    passages = [f"Ünïcödé {TEXTS[0]}", TEXTS[1], TEXTS[2], f"Ünïcödé {TEXTS[3]}\ud800"]
    expected = make_reranker(compression_ratio=8, storage_codec="int8").encode_to_metadata(passages)
    assert read_jsonl(result.stdout) == [{**row, **metadata} for row, metadata in zip(rows, expected, strict=True)]
    assert "Ünïcödé" in result.stdout
    assert "4 rows written" in result.stderr


def test_encode_reads_the_fields_it_is_told(run: Run, model: Any, make_reranker: Callable[..., KalmReranker]) -> None:
    rows = [{"title": "t", "body": " spaces stay "}]
    result = run("encode", *model, "--text-field", "body", "--title-field", "", stdin=json.dumps(rows[0]))
    assert read_jsonl(result.stdout) == [{**rows[0], **make_reranker().encode_to_metadata([" spaces stay "])[0]}]


def test_encode_keeps_to_the_length_limit(run: Run, model: Any, tmp_path: Path) -> None:
    """The finest ratio that fits; a payload store takes what does not fit at any, and rerank and inspect read it."""
    rows = [{"text": " ".join(TEXTS * n)} for n in (1, 4, 12)]
    write_jsonl(Path("p.jsonl"), rows)
    encodings = [
        row["kalm_encoding"] for row in read_jsonl(run("encode", "p.jsonl", "--max-inline-bytes", 1400, *model).stdout)
    ]
    assert all(len(encoding) <= 1400 for encoding in encodings)
    ratios = [EncodedPassage.from_metadata(encoding).compression_ratio for encoding in encodings]
    assert ratios == sorted(set(ratios))
    options = ("--max-inline-bytes", 250, "--payload-store", tmp_path / "store", *model)
    assert run("encode", "p.jsonl", "-o", "r.jsonl", *options).exit_code == 0
    references = [row["kalm_encoding"] for row in read_jsonl(Path("r.jsonl").read_text())]
    assert all(reference.startswith("kalm1r.") for reference in references)
    store = ("--payload-store", tmp_path / "store")
    assert json.loads(run("rerank", QUERY, "r.jsonl", "--json", *store, *model).stdout)["stats"]["metadata_hits"] == 3
    assert json.loads(run("inspect", "r.jsonl", "--json", *store).stdout)["encodings"] == 3
    assert_fails(run("inspect", "r.jsonl"), "no payload_store was given")


def test_encode_replaces_a_file_only_when_all_is_written(run: Run, model: Any) -> None:
    """The output may be the input; a failure leaves it as it was and nothing beside it."""
    path = write_jsonl(Path("p.jsonl"), [{"text": text} for text in TEXTS])
    before = path.read_bytes()
    assert_fails(run("encode", path, "-o", path, "--max-inline-bytes", 5, *model), "max_inline_bytes=5")
    assert [p.name for p in Path().iterdir()] == ["p.jsonl"]
    assert path.read_bytes() == before
    result = run("encode", path, "-o", path, *model)
    assert (result.exit_code, result.stdout) == (0, "")
    assert [p.name for p in Path().iterdir()] == ["p.jsonl"]
    assert all("kalm_encoding" in row for row in read_jsonl(path.read_text()))


BAD_LINES = [
    b"{no",
    b"[1]",
    b'{"x": 1}',
    b'{"text": 5}',
    b'{"text": "a", "title": 3}',
    b'{"text": "\xff"}',
]


@pytest.mark.parametrize("line", BAD_LINES)
@pytest.mark.parametrize("source", ["-", "p.jsonl"])
@pytest.mark.parametrize("command", [("encode",), ("rerank", QUERY)])
def test_bad_line_is_named_and_ends_the_command(run: Run, model: Any, command: tuple[str], source: str, line: bytes) -> None:
    content = b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n'
    Path("p.jsonl").write_bytes(content)
    name = "standard input" if source == "-" else source
    assert_fails(run(*command, source, *model, stdin=content), f"{name}:3: ")


@pytest.mark.parametrize("source", ["-", "p.jsonl"])
def test_skip_bad_reports_each_bad_line_once(run: Run, model: Any, source: str) -> None:
    content = b"\n".join([b'{"text": "a"}', *BAD_LINES, b'{"text": "b"}'])
    Path("p.jsonl").write_bytes(content)
    result = run("encode", source, "--skip-bad", *model, stdin=content)
    assert result.exit_code == 0
    assert [row["text"] for row in read_jsonl(result.stdout)] == ["a", "b"]
    reported = [line.split(":")[2] for line in result.stderr.splitlines() if "left out" in line]
    assert reported == [str(number) for number in range(2, 2 + len(BAD_LINES))]


def test_inspect_tells_what_an_encoding_holds(run: Run, make_reranker: Callable[..., KalmReranker]) -> None:
    """Lengths at other ratios and codecs are those that encoding at them gives."""
    reranker = make_reranker(compression_ratio=8, storage_codec="int8")
    [encoding] = reranker.encode_passages([" ".join(TEXTS * 5)])
    printed = json.loads(run("inspect", encoding.to_metadata(), "--json").stdout)
    lengths = printed.pop("lengths")
    assert printed == {
        "encodings": 1,
        "fingerprint": reranker.fingerprint,
        "ratio": 8,
        "codec": "int8",
        "width": 48,
        "tokens": encoding.n_tokens,
        "characters": len(encoding.to_metadata()),
    }
    assert list(lengths) == ["8", "16", "32", "64", "128"]
    for ratio, codec in (("8", "int8"), ("16", "int4"), ("128", "fp32")):
        other = make_reranker(compression_ratio=int(ratio), storage_codec=codec)
        assert lengths[ratio][codec] == len(other.encode_to_metadata([" ".join(TEXTS * 5)])[0]["kalm_encoding"])
    table = run("inspect", encoding.to_metadata()).stdout
    assert reranker.fingerprint in table
    assert f"{lengths['16']['int4']:,.0f}" in table


def test_inspect_adds_up_files_and_streams(run: Run, make_reranker: Callable[..., KalmReranker]) -> None:
    """Lines may be encodings or rows; only ratios that all can be pooled to are listed."""
    values = [
        make_reranker(compression_ratio=ratio).encode_to_metadata([text])[0]["kalm_encoding"]
        for text, ratio in zip(TEXTS, (1, 4, 4, 16), strict=True)
    ]
    lines = "\n".join([values[0], values[1], json.dumps({"kalm_encoding": values[2]}), values[3]])
    Path("encodings").write_text(lines)
    for result in (run("inspect", "encodings", "--json"), run("inspect", "--json", stdin=lines)):
        printed = json.loads(result.stdout)
        assert printed["encodings"] == 4
        assert printed["ratio"] == "4 (2), 1 (1), 16 (1)"
        assert printed["characters"] == sum(map(len, values))
        assert list(printed["lengths"]) == ["16", "32", "64", "128"]
        at_32 = [len(EncodedPassage.from_metadata(value).pool(32).to_metadata()) for value in values]
        assert printed["lengths"]["32"]["fp16"] == sum(at_32) / 4
    odd = make_reranker(compression_ratio=3).encode_to_metadata(["a"])[0]["kalm_encoding"]
    without_table = run("inspect", stdin=f"{lines}\n{odd}")
    assert (without_table.exit_code, "fp32" in without_table.stdout) == (0, False)
    cut = lines.replace(values[1], values[1][:-1])
    assert_fails(run("inspect", stdin=cut), "standard input:2: a passage encoding must")
    assert json.loads(run("inspect", "--skip-bad", "--json", stdin=cut).stdout)["encodings"] == 3


def test_info_tells_what_runs_where(run: Run, model: Any, make_reranker: Callable[..., KalmReranker]) -> None:
    printed = json.loads(run("info", "--json", "--device", "cpu", "--dtype", "bfloat16", *model).stdout)
    full = json.loads(run("info", "--json", "--device", "cpu", "--dtype", "float32", *model).stdout)
    reranker = make_reranker()
    reranker.warm_up()
    assert (full["fingerprint"], full["weight_bytes"]) == (reranker.fingerprint, reranker.runtime.nbytes)
    assert (full["device"], full["dtype"], printed["dtype"]) == ("cpu", "float32", "bfloat16")
    assert (full["encoder_layers"], full["decoder_layers"], full["width"]) == (4, 4, 48)
    assert printed["weight_bytes"] < full["weight_bytes"]
    assert reranker.fingerprint in run("info", *model).stdout


@pytest.fixture
def beir_folder(tmp_path: Path) -> Path:
    """Four passages, two queries."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"p{i}", "text": text} for i, text in enumerate(TEXTS)])
    write_jsonl(folder / "queries.jsonl", [{"_id": "q0", "text": "super bowl"}, {"_id": "q1", "text": "drag of a wing"}])
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\tp2\t1\nq1\tp1\t1\n")
    return folder


def test_eval_beir_prints_its_report(run: Run, model: Any, beir_folder: Path) -> None:
    """A line for BM25 and two for each ratio and codec, within 80 columns; the same figures as JSON."""
    options = ("--ratios", "2,8", "--codecs", "fp16,int4", "--top-k", 3, "--seed", 1, "--measure", "RR", *model)
    lines = run("eval", "beir", beir_folder, *options).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    [printed] = json.loads(run("eval", "beir", beir_folder, "--json", *options).stdout)["collections"]
    assert (printed["n_queries"], printed["top_k"], printed["seed"]) == (2, 3, 1)
    _, _, *rows = lines
    expected = [
        "bm25",
        *(f"{name} {s}" for s in ("r2 fp16", "r2 int4", "r8 fp16", "r8 int4") for name in ("reranked", "+ bm25")),
    ]
    assert [system["name"] for system in printed["systems"]] == expected
    for row, system in zip(rows, printed["systems"], strict=True):
        assert row.startswith(f"{system['name']} ")
        assert f" {system['means']['RR']:.3f}" in row


def test_eval_compression_and_screen_write_their_figures(run: Run, model: Any, beir_folder: Path) -> None:
    """As JSON, and the same as tables; compression also as a plot."""
    options = ("--ratios", "1,8", "--codecs", "int8", "--top-k", 3, "--rounds", 1, *model)
    printed = run("eval", "compression", beir_folder, "-o", "report", *options).stdout
    report = json.loads(Path("report/compression.json").read_text())
    [collection] = report["collections"]
    settings = [(cost["ratio"], cost["codec"]) for cost in collection["costs"]]
    assert settings == [(1, "fp32"), (1, "int8"), (8, "fp32"), (8, "int8")]
    assert all(f"| {ratio} | `{codec}` |" in printed for ratio, codec in settings)
    assert Path("report/compression.svg").read_text().startswith("<?xml")
    options = ("--top-k", 3, "--keep", 1, "--lengths", "16,64", "--rounds", 1, *model)
    printed = run("eval", "screen", beir_folder, "-o", "screen.json", *options).stdout
    times = json.loads(Path("screen.json").read_text())["times"]
    assert [time["n_tokens"] for time in times] == [16, 64]
    assert "recall@1" in printed


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["rerank"], "Missing argument 'QUERY' (see 'kalm rerank --help')"),
        (["rerank", " "], "the query must hold a word at least"),
        (["rerank", "q", "missing.txt"], "missing.txt: No such file or directory"),
        (["rerank", "q", "."], ".: Is a directory"),
        (["rerank", "q", "--top-k", "0"], "Invalid value for '--top-k'"),
        (["rerank", "q", "--score-threshold", "2"], "Invalid value for '--score-threshold'"),
        (["rerank", "q", "--model", "nope"], "model must be one of pico, nano"),
        (["rerank", "q", "--model", "/no/where"], "a local checkpoint must be an existing folder"),
        (["rerank", "q", "--model", "."], "a checkpoint folder must hold config.json"),
        (["rerank", "q", "--dtype", "float16"], "T5Gemma2 overflows in float16"),
        (["rerank", "q", "--ratio", "0"], "compression_ratio"),
        (["rerank", "q", "--payload-store", "none"], "must be an existing folder, but got 'none'"),
        (["encode", "--codec", "int3"], "storage_codec must be one of"),
        (["encode", "-o", "no/where.jsonl"], "No such file or directory"),
        (["inspect"], "but standard input holds none"),
        (["inspect", "missing"], "missing: No such file or directory"),
        (["inspect", "kalm1.abc.def"], "a passage encoding must"),
        (["inspect", "{}"], "a row must have an encoding under 'kalm_encoding'"),
        (["eval", "beir", "."], "a BEIR folder must hold corpus.jsonl"),
        (["eval", "beir", ".", "--ratios", "1,x"], "must be positive whole numbers such as 1,2,4, but got 'x'"),
        (["eval", "beir", ".", "--ratios", ","], "Invalid value for --ratios"),
        (["eval", "mteb", "-o", "x", "--benchmark", "BIER"], "benchmark and tasks must be names that mteb knows"),
        (["eval", "mteb", "-o", "x"], "there must be tasks to run"),
        (["train", "missing.toml"], "missing.toml: No such file or directory"),
        (["train", "bad.toml"], "a training configuration must be TOML, but bad.toml is not"),
        (["demo", "--model", "./nothing"], "nothing"),
        (["train", "wrong.toml"], "wrong.toml is not a valid training configuration"),
        (["info", "--nope"], "No such option: --nope"),
    ],
)
def test_errors_are_one_line(run: Run, model: Any, arguments: list[str], message: str) -> None:
    Path("bad.toml").write_text("x = [")
    Path("wrong.toml").write_text("seed = 'x'\n")
    takes_model = arguments[0] in ("rerank", "encode") and "--model" not in arguments
    assert_fails(run(*arguments, *(model if takes_model else ())), message)


@pytest.mark.parametrize(
    ("module", "message"), [("bm25s", "BM25 needs bm25s"), ("ir_measures", "evaluation needs ir-measures")]
)
def test_eval_names_the_missing_extra(
    run: Run, model: Any, beir_folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    result = run("eval", "beir", beir_folder, *model)
    assert_fails(result, f'{message}; install it with: pip install "kalm-integrations[eval]"')


def test_pico_says_once_what_production_takes(run: Run, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As a warning, which Python prints on standard error; other checkpoints say nothing of the kind."""
    _notice_pico.cache_clear()
    run("rerank", QUERY, *model, stdin="a")
    assert not caplog.records
    for _ in range(2):
        run("rerank", QUERY, stdin="a")
    [record] = caplog.records
    assert (record.levelname, "for production pass model='nano' or larger" in record.message) == ("WARNING", True)


def test_commands_work_in_a_pipe(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In real processes: encode writes while its input is still open, and rerank reads what it wrote."""
    command = [*KALM, "encode", "--model", str(tiny_checkpoint)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as encoder:
        rows = [{"_id": str(i), "text": f"{TEXTS[i % 4]} {i}"} for i in range(ROWS_PER_BATCH)]
        encoder.stdin.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        encoder.stdin.flush()
        ready, _, _ = select.select([encoder.stdout], [], [], 120)
        assert ready, "a full batch must be written before the input ends"
        output, _ = encoder.communicate(timeout=120)
    assert encoder.returncode == 0
    command = [*KALM, "rerank", QUERY, "--top-k", "5", "--json", "--model", str(tiny_checkpoint)]
    done = subprocess.run(command, input=output, capture_output=True, check=True, cwd=tmp_path)
    printed = json.loads(done.stdout)
    assert len(printed["results"]) == 5
    assert (printed["stats"]["passages_encoded"], printed["stats"]["metadata_hits"]) == (0, ROWS_PER_BATCH)


def test_payload_store_is_not_made_by_reading(run: Run, tmp_path: Path) -> None:
    assert run("inspect", "kalm1.a.b", "--payload-store", tmp_path / "s").exit_code == 2
    assert not (tmp_path / "s").exists()
