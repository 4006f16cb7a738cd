"""A stand-in for an embedding model, so that the demo downloads none."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter

N_DIMENSIONS = 512


def embed(text: str) -> list[float]:
    """Return how often the text's longer words occur, each word hashed to a dimension; of length 1."""
    vector = [0.0] * N_DIMENSIONS
    for word, count in Counter(re.findall(r"\w{4,}", text.lower())).items():
        vector[zlib.crc32(word.encode()) % N_DIMENSIONS] += 1 + math.log(count)
    length = math.hypot(*vector) or 1.0
    return [value / length for value in vector]
