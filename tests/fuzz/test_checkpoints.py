"""Spoiled checkpoints score, with finite scores, or end with an error of ours. `KALM_FUZZ_ROUNDS` sets how many are tried."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tools.checkpoints import make_checkpoint
from tools.fuzzing import rounds

from kalm_integrations import KalmReranker
from kalm_integrations.errors import CheckpointError, InvalidCheckpointError, KalmError, NonFiniteScoreError, SettingsError

WEIGHTS = "model.safetensors"
ENCODER, DECODER = "model.encoder.layers.0.self_attn.q_proj.weight", "model.decoder.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.encoder.embed_tokens.weight"
DEEP = "[" * 200_000

Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("source"), num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
    (folder / "kalm_reranker.json").write_text(
        '{"instruction": "Find.", "max_passage_tokens": 64, "calibration": {"temperature": 2.0, "bias": -0.5}}'
    )
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(source, tmp_path / "checkpoint")


def outcome(folder: Path, **settings: object) -> list[float] | KalmError:
    """Use a checkpoint; whatever is neither finite scores nor an error of ours is raised."""
    try:
        scores = KalmReranker.from_pretrained(folder, **settings).score("what do otters eat?", ["Otters eat fish.", "No."])
    except KalmError as error:
        return error
    assert all(math.isfinite(score) for score in scores)
    return scores


# --- each kind of damage


def write(name: str, contents: str | bytes) -> Spoil:
    contents = contents if isinstance(contents, bytes) else contents.encode()
    return lambda folder: (folder / name).write_bytes(contents)


def cut(name: str, n_bytes: int) -> Spoil:
    return lambda folder: os.truncate(folder / name, n_bytes)


def configure(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return spoil


def field(name: str, value: object) -> Spoil:
    return configure(
        lambda config: [side.update({name: value}) for side in (config["encoder"]["text_config"], config["decoder"])]
    )


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return spoil


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return tensors(lambda found: found.update({name: change(found[name]).contiguous()}))


def first_number(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(values: torch.Tensor) -> torch.Tensor:
        values.view(-1)[0] = value
        return values

    return change


def first_column(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(values: torch.Tensor) -> torch.Tensor:
        values[:, 0] = value
        return values

    return change


def patch(name: str, place: int, contents: bytes) -> Spoil:
    def spoil(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.seek(place)
            file.write(contents)

    return spoil


def replaced(name: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def index(contents: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(contents)

    return spoil


FIELDS: dict[str, list[object]] = {
    "hidden_size": ["a", -1, 0, None, 1.5, True, 10**9, 10**400],
    "intermediate_size": [0, -1, 10**12],
    "num_hidden_layers": ["x", 0, -1, 10**7],
    "head_dim": [0, "8", None, 7, 10**12],
    "num_attention_heads": [0, 3, None],
    "num_key_value_heads": [0, 3, None],
    "rms_norm_eps": ["x", -1, None],
    "vocab_size": [0, -1, "9", 10, 2**63],
    "sliding_window": [0, -1, None, "x", 1.5],
    "layer_types": [[], ["full_attention"], ["x"] * 2, "full", [1, 2], [[]]],
    "query_pre_attn_scalar": [0, -1, "x", float("nan"), float("inf")],
    "hidden_activation": ["nope", None, 5],
    "rope_parameters": [
        [],
        {"sliding_attention": {"rope_type": "default"}},
        {"sliding_attention": {"rope_type": "default", "rope_theta": "x"}},
        {"sliding_attention": {"rope_type": "default", "rope_theta": 0}},
        {"sliding_attention": {"rope_type": "default", "rope_theta": -1}},
        {"sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}},
        {"sliding_attention": {"rope_type": ["default"], "rope_theta": 1e4}},
    ],
}
DAMAGE: dict[str, Spoil] = {
    **{f"weights cut to {n}": cut(WEIGHTS, n) for n in (0, 4, 8, 100, 10_000)},
    "a header of 2**60 bytes": patch(WEIGHTS, 0, struct.pack("<Q", 2**60)),
    "a header of brackets": patch(WEIGHTS, 8, b"[" * 400),
    "an infinite decoder weight": tensor(DECODER, first_number(math.inf)),
    "a NaN in the encoder": tensor(ENCODER, first_number(math.nan)),
    # In every row: that of a token which no text has does no harm.
    "NaN in the embeddings": tensor(EMBEDDING, first_column(math.nan)),
    "a row too few": tensor(ENCODER, lambda values: values[:-1]),
    "a transposed tensor": tensor(DECODER, lambda values: values.t()),
    "int8": tensor(ENCODER, lambda values: values.to(torch.int8)),
    "fp8": tensor(ENCODER, lambda values: values.to(torch.float8_e4m3fn)),
    "complex numbers": tensor(ENCODER, lambda values: values.to(torch.complex64)),
    "a tensor too few": tensors(lambda found: found.pop(DECODER)),
    "no tensor of ours": tensors(lambda found: [found.pop(name) for name in list(found)[1:]]),
    "embeddings for fewer tokens": tensor(EMBEDDING, lambda values: values[:100]),
    **{f"{name}={value!r}"[:60]: field(name, value) for name, values in FIELDS.items() for value in values},
    "config: a list": write("config.json", "[]"),
    "config: deep": write("config.json", DEEP),
    "config: empty": write("config.json", ""),
    "config: no UTF-8": write("config.json", b'{"model_type":"t5gemma2\xff"}'),
    "config: only a type": write("config.json", '{"model_type":"t5gemma2"}'),
    "config: a list of types": write("config.json", '{"model_type":["t5gemma2"]}'),
    "config: no encoder": configure(lambda config: config.update(encoder=None)),
    "config: a text for an encoder": configure(lambda config: config.update(encoder="x")),
    "config: no decoder": configure(lambda config: config.pop("decoder")),
    "config: untied": configure(lambda config: config.update(tie_word_embeddings=False)),
    "config: a text for a token": configure(lambda config: config["encoder"].update(eoi_token_index="x")),
    "config: a token of many bits": configure(lambda config: config["encoder"].update(eoi_token_index=2**70)),
    "no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    **{f"tokenizer.json cut to {n}": cut("tokenizer.json", n) for n in (0, 5_000)},
    **{f"tokenizer.json {text[:9]}": write("tokenizer.json", text) for text in ("{}", "[]", DEEP)},
    **{
        f"tokenizer_config.json {text[:22]}": write("tokenizer_config.json", text)
        for text in ("{", "[]", '{"tokenizer_class":5}', '{"tokenizer_class":"Evil","auto_map":{"AutoTokenizer":5}}', DEEP)
    },
    **{
        f"kalm_reranker.json {text[:48]}": write("kalm_reranker.json", text.encode("latin-1"))
        for text in (
            *("{", "[]", "null", "", DEEP, "\xff", '{"instruction":5}', '{"calibration":[1,2]}'),
            *(f'{{"max_passage_tokens":{value}}}' for value in ("-1", '"12"', "1.5", "1e9", "1000000000", "true")),
            '{"instruction":"\\ud800 x"}',
            '{"instruction":"' + "a " * 200_000 + '"}',
            '{"system_instruction":"' + "\\ufdfa" * 16_000 + '"}',
            '{"calibration":{"temperature":0,"bias":0}}',
            '{"calibration":{"temperature":NaN,"bias":0}}',
            '{"calibration":{"temperature":1,"bias":1e999}}',
            '{"calibration":{"temperature":"1","bias":true}}',
        )
    },
    "weights: a folder": replaced(WEIGHTS, Path.mkdir),
    "weights: a link to nothing": replaced(WEIGHTS, lambda path: path.symlink_to("/no/such/file")),
    "weights: a link to itself": replaced(WEIGHTS, lambda path: path.symlink_to(path.name)),
    "weights: a pickle": lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
    "config: a folder": replaced("config.json", Path.mkdir),
    "config: a link to itself": replaced("config.json", lambda path: path.symlink_to(path.name)),
    "tokenizer.json: a folder": replaced("tokenizer.json", Path.mkdir),
    "tokenizer.json: a link to nothing": replaced("tokenizer.json", lambda path: path.symlink_to("/no/such/file")),
    **{
        f"{name}: a pipe": replaced(name, os.mkfifo)
        for name in (WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json", "kalm_reranker.json")
    },
    "a chat template that is a pipe": lambda folder: os.mkfifo(folder / "chat_template.jinja"),
    "tokenizer.json: an endless device": replaced("tokenizer.json", lambda path: path.symlink_to("/dev/zero")),
    **{
        f"index {text[:40]}": index(text)
        for text in (
            *('{"weight_map":{"x":"../../../../etc/passwd"}}', '{"weight_map":{}}', '{"weight_map":["a.safetensors"]}'),
            *('{"weight_map":{"x":5}}', '{"weight_map":{"x":".."}}', '{"weight_map":{"x":"a\\u0000.safetensors"}}', DEEP),
            '{"weight_map":{"x":"' + "a" * 5_000 + '"}}',
        )
    },
}
if sys.platform == "win32":
    pytest.skip("pipes and links of another kind", allow_module_level=True)


@pytest.mark.parametrize("spoil", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_refused(folder: Path, spoil: Spoil) -> None:
    """With the error that says what is wrong with the checkpoint, or with its numbers."""
    spoil(folder)
    assert isinstance(outcome(folder, calibration=True), (InvalidCheckpointError, NonFiniteScoreError, SettingsError))


def test_what_does_no_harm_scores_the_same(folder: Path, source: Path) -> None:
    expected = outcome(source)
    assert isinstance(expected, list)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(source / WEIGHTS)
    assert outcome(folder) == expected
    (folder / WEIGHTS).unlink()
    shutil.copy(source / WEIGHTS, folder / WEIGHTS)
    index('{"weight_map":{"x":"a.safetensors"}}')(folder)
    assert outcome(folder) == expected
    (folder / "tokenizer_config.json").unlink()
    assert outcome(folder) == expected
    field("layer_types", None)(folder)
    field("rope_parameters", {"full_attention": {}})(folder)
    assert outcome(folder) == expected


NAMES = [
    *("", "\0", "a\0b", "/a\0b", "../x", "/etc/passwd", "x/y/z", "~", "./nope", "hf://a/b", "a b", "é/é", "pico ", "\ud800"),
    *("a/" + "b" * 500, "b" * 5_000, "/" + "b" * 5_000, "/b" * 5_000, "owner/\0", Path("b" * 5_000), Path("/dev/zero")),
    *(b"pico", 5, None, ["pico"]),
]


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"pico"


@pytest.mark.parametrize("model", [*NAMES, BytesPath()], ids=lambda model: ascii(model)[:30])
def test_names_of_nothing_are_refused(model: Any) -> None:
    assert isinstance(outcome(model), (CheckpointError, SettingsError))


# --- random damage


def spoil_at_random(folder: Path, random_: random.Random) -> None:
    """Change a few bytes of a file: flip, cut, double or put in what JSON and safetensors give a meaning to."""
    path = folder / random_.choice(["config.json", "tokenizer.json", "tokenizer_config.json", "kalm_reranker.json", WEIGHTS])
    contents = bytearray(path.read_bytes())
    # Weights begin with a header, which is the part that can be misread.
    header = 8 + struct.unpack("<Q", contents[:8])[0] if path.name == WEIGHTS else len(contents)
    for _ in range(random_.choice([1, 1, 1, 2, 5])):
        place = random_.randrange(min(random_.choice([header, len(contents)]), len(contents)))
        length = random_.choice([1, 1, 4, 20])
        kind = random_.randrange(5)
        if kind == 0:
            contents[place : place + length] = random_.randbytes(length)
        elif kind == 1:
            del contents[place : place + length]
        elif kind == 2:
            contents[place:place] = contents[place : place + length]
        elif kind == 3:
            words = [b"null", b"-1", b"1e999", b"[]", b"{}", b'""', b"true", b"NaN", b"9" * 30, b"\\u0000", b'"', b"0", b","]
            contents[place : place + length] = random_.choice(words)
        else:
            # A number is where the most happens.
            digits = [at for at in range(header) if contents[at : at + 1].isdigit()]
            at = random_.choice(digits or [0])
            contents[at : at + 1] = random_.choice([b"0", b"9", b"-7", b"99999", b"1.5", b"null", b'"7"'])
        contents = contents or bytearray(b"\0")
        header = min(header, len(contents))
    path.write_bytes(contents)


def test_random_damage(source: Path, tmp_path: Path) -> None:
    for number in range(rounds(60)):
        folder = shutil.copytree(source, tmp_path / str(number))
        spoil_at_random(folder, random.Random(number))
        try:
            outcome(folder, calibration=number % 2 == 0)
        except BaseException as error:
            error.add_note(f"random damage number {number}") if hasattr(error, "add_note") else None
            raise
        shutil.rmtree(folder)
