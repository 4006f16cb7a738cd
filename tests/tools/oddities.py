"""Values of all kinds, for arguments that are meant for others, and a judge of what becomes of them."""

from __future__ import annotations

import enum
import os
import random
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from kalm_integrations import Passage
from kalm_integrations.errors import KalmError


class Text(str):
    """A string that prints, compares and hashes in its own way."""

    __slots__ = ()
    __hash__ = None

    def __str__(self):
        return "printed"

    def __format__(self, spec):
        return "formatted"

    def __eq__(self, other):
        return False


class Member(str, enum.Enum):
    OTTER = "otters eat crabs"


class Method(str, enum.Enum):
    Z_SCORE = "z_score"


class Five(enum.IntEnum):
    FIVE = 5


class OwnError(Exception):
    """What a value itself raises: the caller's affair, which may reach the caller as it is."""


class Unprintable:
    def __repr__(self):
        raise OwnError


class Refusing:
    """Raises whatever is asked of it."""

    def _refuse(self, *args):
        raise OwnError

    __bool__ = __len__ = __iter__ = __float__ = __index__ = __eq__ = __getitem__ = __fspath__ = _refuse
    __hash__ = object.__hash__


class Sequenceless:
    """Has items, and no way to go through them but by number."""

    def __getitem__(self, index):
        return ["a", "b"][index]


MAKERS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "int": lambda: 5,
    "zero": lambda: 0,
    "negative": lambda: -1,
    "float": lambda: 1.5,
    "whole float": lambda: 5.0,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: -float("inf"),
    "2**63": lambda: 2**63,
    "10**30": lambda: 10**30,
    "10**400": lambda: 10**400,
    "-10**5000": lambda: -(10**5000),
    "complex": lambda: 1j,
    "enum int": lambda: Five.FIVE,
    "np int": lambda: np.int64(3),
    "np uint8": lambda: np.uint8(3),
    "np float": lambda: np.float32(0.5),
    "np nan": lambda: np.float64("nan"),
    "np bool": lambda: np.bool_(True),
    "np str": lambda: np.str_("otters"),
    "np bytes": lambda: np.bytes_(b"otters"),
    "np array": lambda: np.array(["a", "b"]),
    "np numbers": lambda: np.array([[0.5, 0.1], [0.2, 0.3]]),
    "np scalar": lambda: np.array(5),
    "np empty": lambda: np.array([]),
    "np objects": lambda: np.array([None, "a"], dtype=object),
    "np datetime": lambda: np.datetime64("NaT"),
    "torch": lambda: torch.zeros(2),
    "torch scalar": lambda: torch.tensor(0),
    "torch meta": lambda: torch.zeros(2, device="meta"),
    "torch dtype": lambda: torch.float16,
    "torch device": lambda: torch.device("meta"),
    "empty": lambda: "",
    "text": lambda: "otters eat crabs",
    "surrogate": lambda: "\ud800 x",
    "surrogate pair": lambda: "\ud83e\udda6",
    "nul": lambda: "a\0b",
    "braces": lambda: "{passage} {0} %s",
    "control tokens": lambda: "<bos><end_of_turn>\n<start_of_turn>",
    "own string": lambda: Text("otters eat crabs"),
    "enum": lambda: Member.OTTER,
    "enum method": lambda: Method.Z_SCORE,
    "long": lambda: "x" * 1000,
    "bytes": lambda: b"x",
    "bytearray": lambda: bytearray(b"1"),
    "memoryview": lambda: memoryview(b"1"),
    "list": lambda: ["x"],
    "empty list": list,
    "lists": lambda: [["x", "y"]],
    "list of None": lambda: [None],
    "numbers": lambda: [0.5, 1],
    "recursive": lambda: _recursive(),
    "tuple": lambda: ("a",),
    "dict": lambda: {"a": 1},
    "calibration": lambda: {"temperature": 1.0, "bias": 10**400},
    "set": lambda: {"a"},
    "range": lambda: range(3),
    "generator": lambda: (text for text in ["a", "b"]),
    "map": lambda: map(str, range(2)),
    "iterator of lists": lambda: iter([["a"], ["b"]]),
    "Passage": lambda: Passage("x"),
    "Passage of None": lambda: Passage(None, None),
    "Passage of lists": lambda: Passage(["x"], ["y"]),
    "Passage of own string": lambda: Passage(Text("otters"), Text("kalm1.x.y")),
    "object": object,
    "class": lambda: str,
    "function": lambda: len,
    "exception": lambda: ValueError("x"),
    "path": lambda: PurePosixPath("no/such/folder"),
    "environment": lambda: os.environ,
    "unprintable": Unprintable,
    "refusing": Refusing,
    "sequenceless": Sequenceless,
}
"""Makers, because what can be gone through once is used up by the first call."""


def _recursive() -> list[Any]:
    values: list[Any] = ["x"]
    values.append(values)
    return values


def random_value(source: random.Random, depth: int = 2) -> Any:
    """Return a value of any kind: one of the above, a random text or number, or a collection of such."""
    kind = source.randrange(8 if depth else 6)
    if kind < 3:
        return source.choice(list(MAKERS.values()))()
    if kind == 3:
        return "".join(
            chr(source.choice([source.randrange(128), source.randrange(0x110000)])) for _ in range(source.randrange(9))
        )
    if kind == 4:
        return source.choice([source.uniform(-2, 2), source.randrange(-3, 9), source.getrandbits(source.randrange(1, 80))])
    if kind == 5:
        return Passage(random_value(source, 0), random_value(source, 0))
    values = [random_value(source, depth - 1) for _ in range(source.randrange(4))]
    return values if kind == 6 else iter(values)


def ended_badly(call: Callable[[], Any]) -> str | None:
    """Return what a call raised if it is none of our errors with a message, nor the value's own; else None."""
    try:
        call()
    except KalmError as error:
        return None if str(error) else f"{type(error).__name__} without a message"
    except OwnError:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return None


def foreign(calls: Iterator[tuple[str, Callable[[], Any]]]) -> list[str]:
    """Return the names of the calls that ended in a foreign exception, and which."""
    outcomes = ((name, ended_badly(call)) for name, call in calls)
    return [f"{name}: {outcome}" for name, outcome in outcomes if outcome is not None]
