"""Whatever stands in metadata, payload store or prefix store: no foreign exception, and no wrong score but a forger's own.

A forger is who writes a right checksum: the score of that one passage is theirs. `KALM_FUZZ_ROUNDS` says how many inputs.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tools import plain_format
from tools.fuzzing import rounds

from kalm_integrations import EncodedPassage, KalmReranker, Passage
from kalm_integrations.core.model.prefix_states import PrefixStates
from kalm_integrations.core.passages import prefixes
from kalm_integrations.core.passages.codecs import CODECS, WRITERS, write_states
from kalm_integrations.core.sizes import n_pooled_states
from kalm_integrations.errors import CorruptEncodingError

QUERY = "who won the game"
WORDS = ["the", "rhine", "rises", "in", "swiss", "alps", "otter", "eats", "crab", "river", "won", "lost", "game", "2015"]
TOLERANCE = 1e-5


def make_texts() -> list[str]:
    rng = random.Random(0)
    # Every fourth is read in windows.
    lengths = [rng.randint(60, 150) if i % 4 == 3 else rng.randint(3, 25) for i in range(16)]
    return [f"Passage number {i}: {' '.join(rng.choices(WORDS, k=length))}" for i, length in enumerate(lengths)]


SETTINGS: dict[str, Any] = {"max_passage_tokens": 64}
TEXTS = make_texts()


@dataclass(frozen=True)
class Case:
    """An honest encoding, taken apart."""

    index: int
    codec: str
    value: str
    others: list[str]
    """The strings of all texts in the same codec."""

    @property
    def header(self) -> str:
        return self.value.split(".")[1]

    @property
    def json(self) -> str:
        return plain_format.read_base64(self.header).decode()

    @property
    def fields(self) -> dict[str, Any]:
        return {key: value for key, value in json.loads(self.json).items() if key != "x"}

    @property
    def body(self) -> str:
        return self.value.split(".")[2]

    @property
    def payload(self) -> bytes:
        return plain_format.read_base64(self.body)

    def with_header(self, text: str | bytes) -> str:
        """Return the string with another header, whose checksum nobody has adapted."""
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        return f"kalm1.{plain_format.write_base64(data)}.{self.body}"

    def forged(self, payload: bytes | None = None, **fields: Any) -> str:
        """Return the string with other fields or another payload, and a right checksum."""
        return plain_format.write_inline({**self.fields, **fields}, self.payload if payload is None else payload)

    def with_states(self, states: torch.Tensor, codec: str) -> str:
        codec, payload = write_states(states, codec)
        return self.forged(payload, c=codec, s=list(states.shape))

    def with_number(self, number: float) -> str:
        """Return the string with a number in the place of the first value, or of the first scale."""
        pattern = {"fp32": "<f", "bf16": "<f"}.get(self.codec, "<e")
        data = struct.pack(pattern, number)
        data = data[2:] if self.codec == "bf16" else data
        return self.forged(data + self.payload[len(data) :])


Mutation = Callable[[Case, random.Random], Any]


def at(change: Callable[[str, int, random.Random], str]) -> Mutation:
    """Return a mutation at a random place of the string."""
    return lambda case, rng: change(case.value, rng.randrange(len(case.value)), rng)


def header_field(case: Case, rng: random.Random) -> str:
    values = [0, -1, 1, 2**31, 2**63, 10**400, 7, None, [], {}, "", "x", True, 1.5, [1, 2], [-1, -1], [2**40, 2**40]]
    fields = json.loads(case.json)
    fields[rng.choice(list(fields))] = rng.choice(values)
    return case.with_header(json.dumps(fields, separators=(",", ":")))


def random_text(case: Case, rng: random.Random) -> str:
    characters = (chr(rng.randrange(0x110000)) if rng.random() < 0.1 else rng.choice("AZaz09-_.") for _ in range(300))
    return "".join(characters)[: rng.randint(0, 300)]


def swapped_characters(value: str, i: int, rng: random.Random) -> str:
    first, second = sorted((i, rng.randrange(len(value))))
    return (
        value[:first] + value[second] + value[first + 1 : second] + value[first] + value[second + 1 :]
        if first < second
        else ""
    )


def unicode_digit(value: str, i: int, rng: random.Random) -> str:
    return (
        value[:i] + (chr(0xFEE0 + ord(value[i])) if rng.random() < 0.5 else chr(0x0660 + rng.randrange(10))) + value[i + 1 :]
    )


DAMAGE: dict[str, Mutation] = {
    "bit": at(lambda v, i, rng: v[:i] + chr(ord(v[i]) ^ (1 << rng.randrange(7))) + v[i + 1 :]),
    "swapped characters": at(swapped_characters),
    "inserted": at(lambda v, i, rng: v[:i] + rng.choice("ABab09-_.+/= \n\0é\u0661\ud800") + v[i:]),
    "deleted": at(lambda v, i, rng: v[:i] + v[i + 1 :]),
    "truncated": at(lambda v, i, rng: v[:i]),
    "header field": header_field,
    "payload of another": lambda c, rng: f"kalm1.{c.header}.{rng.choice(c.others).split('.')[2]}",
    "whole of another": lambda c, rng: rng.choice(c.others),
    "padded": lambda c, rng: rng.choice(
        [c.value + "=" * rng.randint(1, 3), f"kalm1.{c.header}{'=' * rng.randint(1, 3)}.{c.body}"]
    ),
    "standard alphabet": lambda c, rng: c.value.replace("-", "+").replace("_", "/") + rng.choice(["", "/"]),
    "unicode": at(unicode_digit),
    "white space": lambda c, rng: rng.choice([" ", "\n", "\ufeff", "\0"]).join(rng.choice([("", c.value), (c.value, "")])),
    "white space inside": lambda c, rng: c.value.replace(".", rng.choice([" .", ".\n", ".\t"]), rng.randint(1, 2)),
    "repeated key": lambda c, rng: c.with_header(c.json.replace("{", '{"fp":"' + "0" * 32 + '",', 1)),
    "nested": lambda c, rng: c.with_header(rng.choice("[{") * rng.choice([10, 700, 100_000])),
    "long integer": lambda c, rng: c.with_header(c.json.replace('"n":', '"n":' + "9" * rng.choice([50, 500, 5000]))),
    "number": lambda c, rng: c.with_header(
        c.json.replace('"r":4', '"r":' + rng.choice(["4.0", "4e0", "04", "+4", "NaN", "true"]))
    ),
    "type": lambda c, rng: rng.choice(
        [5, 1.5, c.value.encode(), bytearray(b"x"), [c.value], {"a": c.value}, True, object(), str]
    ),
    "prefix": lambda c, rng: rng.choice(["kalm2", "KALM1", "kalm1r", "kalm1rr", "", "k" * 50]) + c.value[5:],
    "random": random_text,
    "long": lambda c, rng: rng.choice([f"kalm1.{'A' * 200_000}.{c.body}", f"kalm1.{c.header}.{'A' * 300_000}", "." * 100_000]),
    "case": lambda c, rng: c.value[:20] + c.value[20:].swapcase(),
    "twice": lambda c, rng: c.value * 2,
    "part more": lambda c, rng: c.value + ".",
    "key order": lambda c, rng: c.with_header(json.dumps(dict(reversed(json.loads(c.json).items())), separators=(",", ":"))),
    "header bytes": lambda c, rng: c.with_header(
        rng.choice([c.json.encode("utf-16"), c.json.encode("utf-8-sig"), rng.randbytes(90)])
    ),
}
"""What happens to strings, and what who knows no checksum may do to them."""


def forged_table(case: Case, rng: random.Random) -> str:
    """Return the string with windows of other places and lengths, or of a passage that has none."""
    n_windows = case.fields.get("w", 0)
    rows = [list(row) for row in struct.iter_unpack("<III", case.payload[4 : 4 + 12 * n_windows])] or [[0, 5, 1]]
    row = rng.choice(rows)
    row[rng.randrange(3)] = rng.choice([0, 1, 2**20, 2**32 - 1, row[0], row[1] + 1])
    if rng.random() < 0.3:
        rng.shuffle(rows)
    table = struct.pack("<I", rng.choice([len(rows), 0, 2**32 - 1])) + b"".join(struct.pack("<III", *row) for row in rows)
    n_tokens = sum(tokens for _, _, tokens in rows)
    states = case.payload[4 + 12 * n_windows :] if n_windows else case.payload
    return case.forged(table + states, n=rng.choice([n_tokens, case.fields["n"]]), w=len(rows))


SIZES = [-1, 0, 1, 2**17, 2**40]

FORGERIES: dict[str, Mutation] = {
    "shape": lambda c, rng: c.forged(s=[rng.choice([*SIZES, c.fields["s"][0]]), rng.choice([*SIZES, c.fields["s"][1]])]),
    "codec": lambda c, rng: c.forged(c=rng.choice([*CODECS, "fp8", "FP16", "", "pickle"])),
    "ratio": lambda c, rng: c.forged(r=rng.choice([1, 2, 3, 4, 8, 16, 10**6, 0, -4])),
    "tokens": lambda c, rng: c.forged(n=rng.choice([c.fields["n"] + 1, c.fields["n"] - 1, 1, 2**17, 2**17 + 1, 0, -5])),
    "width": lambda c, rng: c.with_states(torch.ones(c.fields["s"][0], rng.choice([1, 8, 47, 49, 96])), c.codec),
    "length": lambda c, rng: too_many_tokens(c, rng.choice([1025, 5000])),
    "windows": forged_table,
    "number of windows": lambda c, rng: c.forged(w=rng.choice([0, -1, 1, 2, 65, 2**17, 2**40, True, None, "2", 1.5, [2]])),
    "not finite": lambda c, rng: c.with_number(rng.choice([math.nan, math.inf, -math.inf])),
    "huge": lambda c, rng: c.with_states(
        torch.full(c.fields["s"], rng.choice([1e4, -1e9, 1e19, 3e38])), rng.choice(list(WRITERS))
    ),
    "first number": lambda c, rng: c.with_number(rng.choice([0.0, -0.0, 1e-7, 1.0, -5.0, 6e4])),
    "payload of another's length": lambda c, rng: c.forged(rng.randbytes(len(c.payload))),
    "noise": lambda c, rng: c.with_states(torch.randn(*c.fields["s"]), rng.choice(list(WRITERS))),
    "fingerprint": lambda c, rng: c.forged(rng.choice([None, b"", bytes(2**16)]), fp=rng.choice(["0" * 32, "", "Z" * 32])),
    "text": lambda c, rng: c.forged(th=rng.choice(["0" * 32, "", "Z" * 32])),
}
"""What comes with a right checksum."""


def too_many_tokens(case: Case, n_tokens: int) -> str:
    states = torch.zeros(n_pooled_states(n_tokens, 4), case.fields["s"][1])
    return case.forged(write_states(states, case.codec)[1], n=n_tokens, s=list(states.shape))


@dataclass(frozen=True)
class Truth:
    """Strings and scores of all texts."""

    strings: dict[str, list[str]]
    scores: dict[str, list[float]]
    """From the strings, by codec."""
    fresh: list[float]

    def is_right(self, score: float, index: int, codec: str) -> bool:
        return min(abs(score - self.fresh[index]), abs(score - self.scores[codec][index])) <= TOLERANCE


@pytest.fixture(scope="module")
def truth(tiny_checkpoint: Path) -> Truth:
    strings, scores = {}, {}
    for codec in WRITERS:
        reranker = KalmReranker.from_pretrained(tiny_checkpoint, **SETTINGS, storage_codec=codec, prefix_cache_bytes=0)
        strings[codec] = [metadata["kalm_encoding"] for metadata in reranker.encode_to_metadata(TEXTS)]
        scores[codec] = reranker.score(QUERY, list(map(Passage, TEXTS, strings[codec])))
    fresh = KalmReranker.from_pretrained(tiny_checkpoint, **SETTINGS, prefix_cache_bytes=0).score(QUERY, TEXTS)
    for index, score in enumerate(fresh):
        assert min(abs(score - other) for other in (*fresh[:index], *fresh[index + 1 :])) > TOLERANCE
    return Truth(strings, scores, fresh)


def mutations(table: dict[str, Mutation], truth: Truth, seed: int, n: int) -> Iterator[list[tuple[str, Case, Any]]]:
    """Yield mutated strings, one for each text at a time; kinds take turns."""
    rng = random.Random(seed)
    kinds = list(table)
    for start in range(0, n, len(TEXTS)):
        batch = []
        for index in range(len(TEXTS)):
            codec, kind = rng.choice(list(WRITERS)), kinds[(start + index) % len(kinds)]
            case = Case(index, codec, truth.strings[codec][index], truth.strings[codec])
            batch.append((kind, case, table[kind](case, rng)))
        yield batch


@pytest.mark.parametrize("table", [DAMAGE, FORGERIES], ids=["damage", "forgeries"])
def test_strings(truth: Truth, tiny_checkpoint: Path, table: dict[str, Mutation]) -> None:
    """One reranker serves them all, with its caches: what it was told by one string shows in no other's score."""
    server = KalmReranker.from_pretrained(tiny_checkpoint, **SETTINGS, prefix_store={})
    accepted, wrong = Counter[str](), Counter[str]()
    torch.manual_seed(0)
    for batch in mutations(table, truth, 1, rounds(1000)):
        for kind, _, value in batch:
            try:
                accepted[kind] += bool(EncodedPassage.from_metadata(value))
            except CorruptEncodingError:
                continue
        passages = [Passage(TEXTS[case.index], value) for _, case, value in batch]
        scores = server.score(QUERY, passages)
        for score, (kind, case, _) in zip(scores, batch, strict=True):
            wrong[kind] += not truth.is_right(score, case.index, case.codec)
    for codec, strings in truth.strings.items():
        honest = server.score(QUERY, list(map(Passage, TEXTS, strings)))
        assert honest == pytest.approx(truth.scores[codec], abs=TOLERANCE)
    stats = server.stats
    if table is DAMAGE:
        assert +wrong == {}
        # The same string, or another's whole, is no damage to the string.
        assert set(+accepted) <= {
            "whole of another",
            "payload of another",
            "standard alphabet",
            "swapped characters",
            "number",
        }
    else:
        assert set(+wrong) <= {"codec", "ratio", "tokens", "first number", "payload of another's length", "noise"}
        assert wrong["noise"] > 0, "forgeries that no reader can tell"
    assert min(stats.stale, stats.corrupt) > 0


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    i = rng.randrange(len(data))
    return data[:i] + bytes([data[i] ^ (1 << rng.randrange(8))]) + data[i + 1 :]


Change = Callable[[bytes, list[bytes], random.Random], object]

DAMAGED_BYTES: dict[str, Change] = {
    "bit": lambda data, others, rng: flip_bit(data, rng),
    "truncated": lambda data, others, rng: data[: rng.randrange(len(data))],
    "extended": lambda data, others, rng: data + rng.randbytes(rng.randint(1, 9)),
    "random": lambda data, others, rng: rng.randbytes(len(data)),
    "zeros": lambda data, others, rng: bytes(len(data)),
    "another's": lambda data, others, rng: rng.choice(others),
    "another's, cut to length": lambda data, others, rng: (rng.choice(others) * 9)[: len(data)],
    "no bytes": lambda data, others, rng: rng.choice(["", data.hex(), 5, [data], bytearray(data), memoryview(data), object()]),
}
"""What may lie in a byte store under a key; `others` are values of other passages."""


def test_payload_entries(truth: Truth, tiny_checkpoint: Path) -> None:
    store: dict[str, Any] = {}
    server = KalmReranker.from_pretrained(tiny_checkpoint, **SETTINGS, payload_store=store)
    references, entries = {}, {}
    for codec, strings in truth.strings.items():
        for index, string in enumerate(strings):
            put: dict[str, bytes] = {}
            references[codec, index] = EncodedPassage.from_metadata(string).to_metadata(put)
            entries[codec, index] = next(iter(put.items()))
    rng, n_tried = random.Random(2), 0
    while n_tried < rounds(500):
        store.clear()
        passages = []
        for index, text in enumerate(TEXTS):
            codec = rng.choice(list(WRITERS))
            key, entry = entries[codec, index]
            others = [other for (_, owner), (_, other) in entries.items() if owner != index]
            store[key] = DAMAGED_BYTES[rng.choice(list(DAMAGED_BYTES))](entry, others, rng)
            passages.append(Passage(text, references[codec, index]))
        assert server.score(QUERY, passages) == pytest.approx(truth.fresh, abs=TOLERANCE)
        n_tried += len(TEXTS)
    assert (server.stats.corrupt, server.stats.metadata_hits) == (n_tried, 0)


def forged_pairs(data: bytes, name: str, rng: random.Random) -> bytes:
    """Return other keys and values, with a right checksum, under the name of the honest ones."""
    n_numbers = (len(data) - len(prefixes._head(b"", name))) // 4
    number = rng.choice([math.nan, math.inf, -math.inf, 3e38, 1e20, 1e12, 1.0, 0.0, -1e-40])
    pairs = torch.randn(n_numbers)
    pairs[rng.randrange(n_numbers) :] = number
    return prefixes._dump(PrefixStates(0, pairs), name)


def test_prefix_values(truth: Truth, tiny_checkpoint: Path) -> None:
    """Each query reads them from the store; what is refused is replaced there."""
    store: dict[str, Any] = {}
    server = KalmReranker.from_pretrained(tiny_checkpoint, **SETTINGS, prefix_store=store, prefix_cache_bytes=0)
    honest: dict[str, bytes] = {}
    owners: dict[str, int] = {}
    for index, text in enumerate(TEXTS):
        server.prepare([text])
        owners |= {name: index for name in store if name not in honest}
        honest = dict(store)
    torch.manual_seed(0)
    rng, n_tried, n_damaged, n_wrong = random.Random(3), 0, 0, 0
    while n_tried < rounds(500):
        is_forged = [rng.random() < 0.2 for _ in TEXTS]
        for name, value in honest.items():
            others = [other for owner, other in honest.items() if owner != name]
            forge = is_forged[owners[name]]
            change = DAMAGED_BYTES[rng.choice(list(DAMAGED_BYTES))]
            store[name] = forged_pairs(value, name, rng) if forge else change(value, others, rng)
        for score, right, forge in zip(server.score(QUERY, TEXTS), truth.fresh, is_forged, strict=True):
            is_right = abs(score - right) <= TOLERANCE
            assert is_right or forge
            n_wrong += not is_right
        n_tried += len(honest)
        n_damaged += sum(not is_forged[owner] for owner in owners.values())
    assert n_wrong > 0, "forgeries that no reader can tell"
    assert n_damaged <= server.stats.prefix_corrupt <= n_tried - n_wrong
