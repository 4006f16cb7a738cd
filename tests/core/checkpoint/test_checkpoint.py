"""Checkpoints: found, checked, identified by content, read without running code, and loaded late."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tools.checkpoints import make_checkpoint

from kalm_integrations import KalmReranker, Passage
from kalm_integrations.core.checkpoint.locate import ALIASES
from kalm_integrations.errors import CheckpointError, CheckpointNotFoundError, InvalidCheckpointError, SettingsError

WEIGHTS = "model.safetensors"
ENCODER_TENSOR = "model.encoder.layers.1.mlp.up_proj.weight"
DECODER_TENSOR = "model.decoder.layers.3.self_attn.k_norm.weight"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint to spoil."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The tiny checkpoint in several files."""
    folder = make_checkpoint(tmp_path / "shards", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    contents = json.loads(path.read_text())
    change(contents)
    path.write_text(json.dumps(contents))


def change_both_sides(folder: Path, **fields: object) -> None:
    change_json(
        folder / "config.json",
        lambda config: [side.update(fields) for side in (config["encoder"]["text_config"], config["decoder"])],
    )


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def use(folder: Path) -> list[float]:
    return KalmReranker.from_pretrained(folder, storage_codec="fp32").score("query", ["passage"])


# Finding a checkpoint.


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("nanno", "nano"),
        ("Small", "small"),
        ("nano-R2", "nano-r2"),
        ("KaLM-Reranker-V1-Nano", "KaLM-Embedding/KaLM-Reranker-V1-Nano"),
        ("bert", None),
    ],
)
def test_unknown_alias(name: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hint = "" if meant is None else rf"; did you mean '{meant}'\?"
    with pytest.raises(SettingsError, match=rf"one of pico, nano, .* hub id .* local folder, but got '{name}'{hint}$"):
        KalmReranker.from_pretrained(name)


def test_the_address_of_a_service_is_no_checkpoint() -> None:
    with pytest.raises(SettingsError, match="got the address of a service, which RemoteReranker") as caught:
        KalmReranker.from_pretrained("http://me:hunter2@host")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("model", ["owner/na--me", "-owner/name", f"owner/{'x' * 200}"])
def test_names_that_can_be_no_hub_id(model: str) -> None:
    with pytest.raises(SettingsError, match="hub id"):
        KalmReranker.from_pretrained(model)


@pytest.mark.parametrize("model", ["", "/no/such/folder", "no/such/folder", Path("owner/name"), "~/folder", "~/a/b"])
def test_folders_that_are_not_there(model: str | Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"must be an existing folder, but got .* check the path"):
        KalmReranker.from_pretrained(model)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="must be an existing folder"):
        KalmReranker.from_pretrained(folder / WEIGHTS)


@pytest.mark.parametrize("model", ["owner/name", *ALIASES])
def test_hub_out_of_reach(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline and not in the cache: the message names the repository and the ways out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = ALIASES[model].hub_id if model in ALIASES else model
    with pytest.raises(
        CheckpointNotFoundError, match=f"'{name}'.*must be in the local cache, because HF_HUB_OFFLINE is set.*folder.*'pico'"
    ):
        KalmReranker.from_pretrained(model)


def test_hub_that_does_not_answer(tmp_path: Path) -> None:
    """Nobody listens there: the message has the ways out, and the name that was meant."""
    code = (
        "from kalm_integrations import KalmReranker\n"
        "from kalm_integrations.errors import CheckpointNotFoundError\n"
        "try: KalmReranker.from_pretrained('KaLM-Embedding/KaLM-Reranker-V1-Nanno')\n"
        "except CheckpointNotFoundError as error: print(error)"
    )
    nowhere = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **nowhere}, capture_output=True, text=True, check=True, timeout=120
    )
    assert re.search(
        r"in the local cache or on the hub, .*did you mean 'KaLM-Embedding/KaLM-Reranker-V1-Nano'\?.*network.*folder.*'pico'",
        done.stdout,
    )


def test_revision_of_a_folder(folder: Path) -> None:
    with pytest.raises(SettingsError, match="revision applies to hub repositories only, but got revision='main'"):
        KalmReranker.from_pretrained(folder, revision="main")


def test_an_alias_is_not_shadowed_by_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name is reached as a path."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder.rename("nano")
    with pytest.raises(CheckpointNotFoundError, match="KaLM-Reranker-V1-Nano"):
        KalmReranker.from_pretrained("nano")
    assert KalmReranker.from_pretrained("./nano").score("query", ["passage"])


def fill_hub_cache(folder: Path, cache: Path, repository: str, commit: str, weights_blob: str | None = None) -> None:
    """Lay a checkpoint out as the hub's cache does: links into blobs, which name large files by SHA-256, others by SHA-1."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot, blobs = root / "snapshots" / commit, root / "blobs"
    for path in (snapshot, blobs, root / "refs"):
        path.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for path in folder.iterdir():
        is_large = path.suffix == ".safetensors"
        digest = hashlib.sha256 if is_large else hashlib.sha1
        blob = weights_blob if is_large and weights_blob else digest(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob)


def test_hub_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot is found offline, by branch and by commit, and has the identity of a plain copy."""
    commit = "a" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    fill_hub_cache(folder, tmp_path / "cache", "owner/name", commit)
    by_branch = KalmReranker.from_pretrained("owner/name", storage_codec="fp32")
    by_commit = KalmReranker.from_pretrained("owner/name", revision=commit)
    assert by_branch.fingerprint == by_commit.fingerprint == KalmReranker.from_pretrained(folder).fingerprint
    assert by_branch.score("query", ["passage"]) == use(folder)
    with pytest.raises(CheckpointNotFoundError, match="at revision other"):
        KalmReranker.from_pretrained("owner/name", revision="other")


def test_aliases_are_pinned(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An alias reads its pinned commit, whatever the branch has moved to."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, commit, _ = ALIASES["nano"]
    assert commit is not None
    fill_hub_cache(folder, tmp_path / "cache", repository, commit)
    refs = tmp_path / "cache" / "models--KaLM-Embedding--KaLM-Reranker-V1-Nano" / "refs"
    (refs / "main").write_text("b" * 40)
    assert KalmReranker.from_pretrained("nano", storage_codec="fp32").score("query", ["passage"]) == use(folder)


def test_a_blob_under_the_hash_of_another_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's names are hashes that it checked when it wrote them; what lies there now may be something else."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    fill_hub_cache(folder, tmp_path / "cache", "owner/name", "a" * 40, weights_blob="1" * 64)
    with pytest.raises(InvalidCheckpointError, match=r"blobs/1+ must hold the bytes whose SHA-256 is its name"):
        _ = KalmReranker.from_pretrained("owner/name").fingerprint


def test_a_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all runtimes of a folder, and again when it is another file."""
    read: list[str] = []
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **kwargs: read.append(path.name) or opened(path, *args, **kwargs))
    prints = {KalmReranker.from_pretrained(folder, dtype=dtype).fingerprint for dtype in ("float32", "bfloat16")}
    assert (len(prints), read.count(WEIGHTS), read.count("tokenizer.json")) == (1, 1, 1)
    change_tensors(folder, lambda tensors: tensors[ENCODER_TENSOR].mul_(2))
    assert KalmReranker.from_pretrained(folder).fingerprint not in prints
    assert (read.count(WEIGHTS), read.count("tokenizer.json")) == (2, 1)


# Refusing what is not a reranker. All but missing and misshapen tensors is found when the checkpoint is opened.


def replace_weights(contents: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(contents)


def write_config(contents: str | bytes) -> Callable[[Path], object]:
    contents = contents if isinstance(contents, bytes) else contents.encode()
    return lambda folder: (folder / "config.json").write_bytes(contents)


ON_OPENING = {
    "an empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], r"must hold config\.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"must hold config\.json"),
    "broken JSON": (write_config('{"model_type": '), r"must be a JSON object.*; fetch the checkpoint again"),
    "a list": (write_config("[]"), "must be a JSON object"),
    "no text": (write_config(b"\xff\xfe\x00"), "must be a JSON object"),
    "another model": (write_config('{"model_type": "bert"}'), "'t5gemma2' checkpoint, but .* says model_type='bert'"),
    "no model type": (write_config("{}"), "says model_type=None"),
    "half a configuration": (
        write_config('{"model_type": "t5gemma2", "decoder": {"hidden_size": 3}}'),
        "not a valid T5Gemma2",
    ),
    "a field of the wrong type": (lambda folder: change_both_sides(folder, hidden_size="48"), "not a valid T5Gemma2"),
    "an unknown layer type": (
        lambda folder: change_both_sides(folder, layer_types=["sliding_attention", "chunked_attention"] * 2),
        "layer_types must be full_attention or sliding_attention",
    ),
    "an unknown activation": (lambda folder: change_both_sides(folder, hidden_activation="relu"), "but is 'relu'"),
    "attention biases": (
        lambda folder: change_both_sides(folder, attention_bias=True),
        "attention_bias=true is not supported",
    ),
    "RoPE that depends on the length": (
        lambda folder: change_both_sides(
            folder,
            rope_parameters={
                "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        "rope_type must be one of .* but is 'dynamic' for full_attention",
    ),
    "pickled weights only": (
        lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        r"must hold model\.safetensors .* other formats are not read: convert",
    ),
    "an empty file": (replace_weights(b""), "cannot be read as safetensors"),
    "a pointer instead of weights": (replace_weights(b"version https://git-lfs.github.com/spec/v1\n"), "cannot be read"),
    "weights cut short": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000]),
        "cannot be read as safetensors .* fetch the checkpoint again",
    ),
    "broken defaults": (lambda folder: (folder / "kalm_reranker.json").write_text("{"), r"kalm_reranker\.json is not valid"),
    "defaults of the wrong type": (
        lambda folder: (folder / "kalm_reranker.json").write_text('{"max_query_tokens": "many"}'),
        r"kalm_reranker\.json is not valid: .*max_query_tokens",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), ON_OPENING.values(), ids=ON_OPENING.keys())
def test_refused_when_opened(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(InvalidCheckpointError, match=f"(?s){message}"):
        KalmReranker.from_pretrained(folder)


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def change_index(contents: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(contents)


IN_SHARDS = {
    "a missing shard": (lambda folder: shard(folder).unlink(), "names shards that are not in .*: model-00002-of-"),
    "a corrupt shard": (lambda folder: shard(folder).write_bytes(b"no"), "model-00002-of-.* cannot be read as safetensors"),
    "a broken index": (change_index("{"), "must be a JSON object with a 'weight_map'"),
    "an index without a map": (change_index("{}"), "must be a JSON object with a 'weight_map'"),
    "an index of another kind": (change_index('{"weight_map": []}'), "must be a JSON object with a 'weight_map'"),
    "an index that leads outside": (
        change_index('{"weight_map": {"model.decoder.norm.weight": "../../secret.safetensors"}}'),
        r"names shards that are not in .*: secret\.safetensors",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), IN_SHARDS.values(), ids=IN_SHARDS.keys())
def test_shards_refused_when_opened(shards: Path, spoil: Callable[[Path], object], message: str) -> None:
    (shards.parent / "secret.safetensors").write_bytes(b"")
    spoil(shards)
    with pytest.raises(InvalidCheckpointError, match=message):
        KalmReranker.from_pretrained(shards)


@pytest.mark.parametrize(
    "name",
    [
        "model.encoder.embed_tokens.weight",
        "model.encoder.embed_tokens.eoi_embedding",
        "model.encoder.norm.weight",
        ENCODER_TENSOR,
        DECODER_TENSOR,
        "model.decoder.norm.weight",
    ],
)
def test_missing_tensor(folder: Path, name: str) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(InvalidCheckpointError, match=f"tensor .*{name} is missing"):
        use(folder)


def test_missing_tensor_in_shards(shards: Path) -> None:
    """A shard in the place of another does not pass for it."""
    paths = sorted(shards.glob("*.safetensors"))
    shutil.copy(paths[0], paths[1])
    with pytest.raises(InvalidCheckpointError, match="is missing from the checkpoint"):
        use(shards)


@pytest.mark.parametrize("name", [ENCODER_TENSOR, DECODER_TENSOR, "model.encoder.embed_tokens.weight"])
def test_wrong_shape(folder: Path, name: str) -> None:
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises(InvalidCheckpointError, match=r"must have shape \(.*\) by config\.json, but has \("):
        use(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors(folder: Path, dtype: torch.dtype) -> None:
    """Read without their scales they would score, and wrongly."""
    change_tensors(folder, lambda tensors: tensors.update({ENCODER_TENSOR: tensors[ENCODER_TENSOR].to(dtype)}))
    with pytest.raises(InvalidCheckpointError, match="quantised checkpoints are not supported"):
        use(folder)


def test_untied_embeddings(folder: Path) -> None:
    change_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    with pytest.raises(InvalidCheckpointError, match="tie_word_embeddings=false"):
        use(folder)


@pytest.mark.parametrize("contents", [None, "{"])
def test_no_tokenizer(folder: Path, contents: str | None) -> None:
    (folder / "tokenizer.json").unlink()
    if contents is not None:
        (folder / "tokenizer.json").write_text(contents)
    with pytest.raises(InvalidCheckpointError, match=r"must hold a fast tokenizer \(tokenizer\.json\)"):
        use(folder)


@pytest.mark.parametrize("change", ["rewrite", "delete"])
def test_weights_that_change_while_open(folder: Path, other_checkpoint: Path, change: str) -> None:
    """Weights load late: an encoder of one checkpoint and a decoder of another must not meet."""
    reranker = KalmReranker.from_pretrained(folder)
    reranker.encode_passages(["passage"])
    if change == "delete":
        (folder / WEIGHTS).unlink()
    else:
        shutil.copy(other_checkpoint / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(InvalidCheckpointError, match="deleted or written anew; open it again"):
        reranker.score("query", ["passage"])
    if change == "rewrite":
        assert use(folder) == use(other_checkpoint)


def replace_keeping_time(path: Path, contents: bytes) -> None:
    """Put another file in the place of one, with the same size and the same time."""
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(contents.ljust(before.st_size))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def spoil_merges(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
    replace_keeping_time(folder / "tokenizer.json", json.dumps(tokenizer).encode())


CHANGES_WHILE_OPEN: dict[str, Callable[[Path], object]] = {
    "tokenizer.json": spoil_merges,
    "tokenizer_config.json": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "added_tokens.json": lambda folder: (folder / "added_tokens.json").write_text('{"panthers": 300}'),
    "config.json": lambda folder: replace_keeping_time(folder / "config.json", (folder / "config.json").read_bytes()),
}


@pytest.mark.parametrize("change", CHANGES_WHILE_OPEN.values(), ids=CHANGES_WHILE_OPEN.keys())
@pytest.mark.parametrize("first", ["fingerprint", "tokenizer", "neither"])
def test_tokenizers_that_change_while_open(folder: Path, change: Callable[[Path], object], first: str) -> None:
    """What is loaded is what was hashed, in either order; else tokens of one tokenizer are stored under another's name."""
    reranker = KalmReranker.from_pretrained(folder)
    if first == "fingerprint":
        _ = reranker.fingerprint
    elif first == "tokenizer":
        reranker.runtime.tokenizer(allow_special_tokens=False)
    change(folder)
    with pytest.raises(InvalidCheckpointError, match=r"json must stay as it is while its checkpoint is open"):
        reranker.encode_to_metadata(["The Panthers"])


def test_a_folder_changed_within_one_tick_is_another_runtime(folder: Path, other_checkpoint: Path) -> None:
    before = KalmReranker.from_pretrained(folder)
    replace_keeping_time(folder / WEIGHTS, (other_checkpoint / WEIGHTS).read_bytes())
    after = KalmReranker.from_pretrained(folder, storage_codec="fp32")
    assert after.runtime is not before.runtime
    assert after.score("query", ["passage"]) == use(other_checkpoint)
    with pytest.raises(InvalidCheckpointError, match="deleted or written anew"):
        _ = before.fingerprint


def test_no_code_is_executed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that brings code is read without it; one that cannot do without is refused, and nobody is asked."""
    trace = tmp_path / "executed"
    code = f"open({str(trace)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    (folder / "modeling_own.py").write_text(code)
    auto_map = {
        "AutoConfig": "modeling_own.Config",
        "AutoModelForSeq2SeqLM": "modeling_own.Model",
        "AutoTokenizer": ["modeling_own.Tokenizer", "modeling_own.Tokenizer"],
    }
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    change_json(folder / "config.json", lambda config: config.update(auto_map=auto_map))
    change_json(folder / "tokenizer_config.json", lambda config: config.update(auto_map=auto_map))
    assert use(folder)
    change_json(folder / "tokenizer_config.json", lambda config: config.update(tokenizer_class="Tokenizer"))
    with pytest.raises(CheckpointError):
        use(folder)
    assert not trace.exists()


def test_a_single_file_goes_before_an_index(folder: Path, shards: Path, tiny_checkpoint: Path) -> None:
    """As in transformers."""
    for path in [*shards.glob("*.safetensors"), shards / "model.safetensors.index.json"]:
        shutil.copy(path, folder)
    change_tensors(folder, lambda tensors: tensors[ENCODER_TENSOR].mul_(2))
    alone = shutil.copytree(tiny_checkpoint, folder.parent / "alone")
    shutil.copy(folder / WEIGHTS, alone)
    assert use(folder) == use(alone) != use(tiny_checkpoint)


# Identity: what a stored encoding depends on, and nothing else.


def test_place_and_time_do_not_matter(folder: Path, tmp_path: Path) -> None:
    before = KalmReranker.from_pretrained(folder).fingerprint
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "renamed")
    for path in moved.iterdir():
        os.utime(path, (0, 0))
    (moved / "README.md").write_text("card")
    (moved / "generation_config.json").unlink()
    assert KalmReranker.from_pretrained(moved).fingerprint == before


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["decoder"].update(final_logit_softcapping=3.0),
        lambda config: config["decoder"].update(sliding_window=5),
        lambda config: config["encoder"]["vision_config"].update(layer_norm_eps=1e-3),
        lambda config: config.update(transformers_version="5.0.0"),
    ],
    ids=["decoder's soft cap", "decoder's window", "vision", "version"],
)
def test_what_the_encoder_does_not_read_does_not_matter(
    folder: Path, tiny_checkpoint: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    change_json(folder / "config.json", change)
    assert KalmReranker.from_pretrained(folder).fingerprint == KalmReranker.from_pretrained(tiny_checkpoint).fingerprint


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 401},
        {"hidden_size": 64},
        {"intermediate_size": 96},
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
        {"num_attention_heads": 8},
        {"num_key_value_heads": 1},
        {"head_dim": 32},
        {"hidden_activation": "gelu"},
        {"rms_norm_eps": 1e-5},
        {"query_pre_attn_scalar": 25},
        {"sliding_window": 10},
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_encoder_configuration_matters(folder: Path, tiny_checkpoint: Path, fields: dict[str, object]) -> None:
    change_both_sides(folder, **fields)
    assert KalmReranker.from_pretrained(folder).fingerprint != KalmReranker.from_pretrained(tiny_checkpoint).fingerprint


def test_end_of_image_token_matters(folder: Path, tiny_checkpoint: Path) -> None:
    change_json(folder / "config.json", lambda config: config["encoder"].update(eoi_token_index=3))
    assert KalmReranker.from_pretrained(folder).fingerprint != KalmReranker.from_pretrained(tiny_checkpoint).fingerprint


@pytest.mark.parametrize("name", [ENCODER_TENSOR, DECODER_TENSOR, "model.encoder.embed_tokens.eoi_embedding"])
def test_every_weight_matters(folder: Path, tiny_checkpoint: Path, name: str) -> None:
    """A single number is enough."""
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[-1:].add_(1e-3))
    assert KalmReranker.from_pretrained(folder).fingerprint != KalmReranker.from_pretrained(tiny_checkpoint).fingerprint


def test_every_shard_matters(shards: Path) -> None:
    prints = [KalmReranker.from_pretrained(shards).fingerprint]
    for path in sorted(shards.glob("*.safetensors")):
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[:1].add_(1e-3)
        save_file(tensors, path, {"format": "pt"})
        prints.append(KalmReranker.from_pretrained(shards).fingerprint)
    assert len(set(prints)) == len(prints)


def add_word(folder: Path) -> None:
    """Make a word a token in the tokenizer's configuration only."""
    added = {"300": {"content": "panthers", "special": False, "normalized": True}}
    change_json(folder / "tokenizer_config.json", lambda config: config.update(added_tokens_decoder=added))


TOKENIZER_CHANGES = {
    "tokenizer.json": lambda folder: change_json(
        folder / "tokenizer.json", lambda tokenizer: tokenizer["normalizer"]["normalizers"].pop()
    ),
    "tokenizer_config.json": add_word,
    "added_tokens.json": lambda folder: (folder / "added_tokens.json").write_text('{"panthers": 300}'),
}


@pytest.mark.parametrize("change", TOKENIZER_CHANGES.values(), ids=TOKENIZER_CHANGES.keys())
def test_every_file_of_the_tokenizer_matters(folder: Path, tiny_checkpoint: Path, change: Callable[[Path], object]) -> None:
    """Each can change the tokens of a passage, so each changes the fingerprint, and old encodings are stale."""
    passage = "The Panthers"
    old = KalmReranker.from_pretrained(tiny_checkpoint)
    (metadata,) = old.encode_to_metadata([passage])
    change(folder)
    new = KalmReranker.from_pretrained(folder)
    assert new.encode_passages([passage])[0].n_tokens != old.encode_passages([passage])[0].n_tokens
    assert new.find_unencoded([Passage(passage, metadata["kalm_encoding"])]) == [0]


# Loading: late, and the text weights only.


def test_weights_load_when_they_are_needed(folder: Path) -> None:
    reranker = KalmReranker.from_pretrained(folder)
    runtime = reranker.runtime
    assert reranker.encode_passages([]) == reranker.score("query", []) == reranker.rank("query", []) == []
    assert reranker.find_unencoded([Passage("passage", "kalm1.x.y"), Passage("passage")]) == [0, 1]
    assert reranker.fingerprint
    assert runtime.loaded == ()
    assert runtime.nbytes == 0

    reranker.encode_to_metadata(["passage"])
    assert runtime.loaded == ("encoder",)


def test_a_query_over_stored_encodings_needs_no_encoder(folder: Path, tiny_checkpoint: Path) -> None:
    metadata = KalmReranker.from_pretrained(tiny_checkpoint).encode_to_metadata(["one", "two"])
    reranker = KalmReranker.from_pretrained(folder)
    stored = [Passage(text, entry["kalm_encoding"]) for text, entry in zip(("one", "two"), metadata, strict=True)]
    reranker.rank("query", stored)
    assert reranker.runtime.loaded == ("decoder",)
    reranker.rank("query", [*stored, Passage("three")])
    assert reranker.runtime.loaded == ("decoder", "encoder")


def test_warm_up_loads_both_sides(folder: Path) -> None:
    reranker = KalmReranker.from_pretrained(folder)
    reranker.warm_up()
    assert set(reranker.runtime.loaded) == {"encoder", "decoder"}


def test_text_weights_only(folder: Path) -> None:
    """In memory: the text tensors, each once. The vision tower can be missing from the file."""
    expected = use(folder)
    vision = ("model.encoder.vision_tower.", "model.encoder.multi_modal_projector.")
    tensors = load_file(folder / WEIGHTS)
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith(vision)}
    assert len(text) < len(tensors)
    save_file(text, folder / WEIGHTS, {"format": "pt"})
    reranker = KalmReranker.from_pretrained(folder, storage_codec="fp32")
    assert reranker.score("query", ["passage"]) == expected
    assert reranker.runtime.nbytes == sum(tensor.nbytes for tensor in text.values())


def test_defaults_of_a_checkpoint(folder: Path) -> None:
    """`kalm_reranker.json` changes what is not given; fields of later versions are ignored."""
    own = {"instruction": "Find.", "system_instruction": "Judge.", "max_passage_tokens": 20, "max_query_tokens": 5}
    given = KalmReranker.from_pretrained(folder, **own)
    passages, query = ["word " * 40, "one"], "which of these words is the one"
    expected = given.score(query, passages)
    published = KalmReranker.from_pretrained(folder)
    (folder / "kalm_reranker.json").write_text(json.dumps({**own, "calibration": None, "of_a_later_version": 1}))
    by_file = KalmReranker.from_pretrained(folder)
    assert by_file.score(query, passages) == expected
    assert by_file.fingerprint == given.fingerprint != published.fingerprint
    overridden = KalmReranker.from_pretrained(folder, max_passage_tokens=1024)
    assert overridden.fingerprint == published.fingerprint


def test_a_bad_limit_in_kalm_reranker_json_names_the_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "bad")
    (folder / "kalm_reranker.json").write_text('{"max_query_tokens": -1}')
    with pytest.raises(InvalidCheckpointError, match=r"kalm_reranker\.json is not valid"):
        KalmReranker.from_pretrained(folder)
