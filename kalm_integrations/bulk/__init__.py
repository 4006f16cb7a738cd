"""Bulk encoding of a corpus: resumable, streaming, on one machine or on Ray.

* `rows`: the rows that are in hand, encoded.
"""

from kalm_integrations.bulk.rows import RowCounts, RowEncoder

__all__ = ["RowCounts", "RowEncoder"]
