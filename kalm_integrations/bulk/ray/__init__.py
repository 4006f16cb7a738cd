"""Bulk encoding on a Ray cluster, by Ray Data: actors hold the model, Parquet comes out in parts.

```python
from kalm_integrations.bulk.ray import encode_with_ray

encode_with_ray("s3://bucket/corpus.jsonl.gz", "s3://bucket/encoded", model="nano", actors=8, num_gpus=1)
```

Ray starts actors that die anew, and does again what they had in hand. A run that ends early goes on when it is started again:
Ray Data's checkpoints know by their ids the rows that are written.

* `running`: a run, and the actors that encode.
* `reading`: rows of JSON lines, Parquet and `datasets`' folders, checked before anything is encoded.
* `folders`: what lies in the input's folder and the output's.
* `cluster`: the cluster, and the one run that a folder may have on it.
"""

from kalm_integrations.errors import MissingExtraError

try:
    import ray.data  # noqa: F401
except ImportError as error:
    msg = 'kalm_integrations.bulk.ray needs Ray Data; run: pip install "kalm-integrations[ray]"'
    raise MissingExtraError(msg) from error

from kalm_integrations.bulk.ray.running import RayResult, encode_with_ray

__all__ = ["RayResult", "encode_with_ray"]
