"""Bulk encoding of a corpus: resumable, streaming, on one machine or on Ray.

* `encoding`: a run over a corpus. `rows`: the rows that are in hand, encoded. `reading`: an output, read back.
* `sources`, `outputs`: what is read and written; `places`: where. `arrow`: tables and their schemas.
* `scanning`, `repeats`: the corpus read once beforehand, and the texts that it has several times.
* `state`: what is kept of a run. `threads`: reading and writing beside the model.
* `ray`: the same on a cluster.
"""

from kalm_integrations.bulk.encoding import BulkReport, Start, encode_corpus
from kalm_integrations.bulk.reading import read_encoded
from kalm_integrations.bulk.rows import RowCounts, RowEncoder
from kalm_integrations.bulk.state import Progress

__all__ = ["BulkReport", "Progress", "RowCounts", "RowEncoder", "Start", "encode_corpus", "read_encoded"]
