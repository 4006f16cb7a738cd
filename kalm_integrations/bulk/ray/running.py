"""A run on Ray: rows are read, encoded by actors and written in parts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import ray
import ray.data

from kalm_integrations.bulk.arrow import with_encodings
from kalm_integrations.bulk.ray.cluster import connected, early_ends_explained, failures_told, fit_actors, leased
from kalm_integrations.bulk.ray.folders import Output, find_source
from kalm_integrations.bulk.ray.reading import check_rows, name_of, needed_columns, read_rows, select
from kalm_integrations.bulk.rows import RowCounts, RowEncoder
from kalm_integrations.bulk.state import encoder_settings
from kalm_integrations.core.reranker import KalmReranker
from kalm_integrations.core.settings import SETTING_NAMES, check_names
from kalm_integrations.core.types import ENCODING_KEY, shown
from kalm_integrations.corpora.jsonl import PassageFields, Row
from kalm_integrations.errors import EncodingTooLargeError, KalmError, SettingsError

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RayResult:
    """What a run has done."""

    n_rows: int
    """In the output: every row of the input, once."""
    n_kept: int
    """Of them were there before this run, which went on with what an earlier one had begun."""
    counts: RowCounts
    """Of the rows that this run has encoded; those that were with an actor that died are counted for each time."""
    seconds: float


def encode_with_ray(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] = "pico",
    fields: PassageFields | None = None,
    id_field: str = "id",
    address: str | None = None,
    actors: int | None = None,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    rows_per_batch: int = 256,
    rows_per_file: int = 1024,
    checkpoint_path: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> RayResult:
    """Encode a corpus on a Ray cluster into a folder of Parquet files: its fields, `kalm_encoding` and `kalm_fp`.

    Rows are in no particular order, and each is there once. What carries a valid encoding keeps it.

    Args:
        source: a file or folder of JSON lines (gzipped or not) or Parquet, or a folder that `datasets` has saved; a path that
            every node can read, or an address such as s3://bucket/folder.
        output: a folder that every node can write, new or empty; or one that the same run has begun, which then goes on.
        model: as `KalmReranker.from_pretrained` takes it; a local folder must be there on every node.
        fields: which fields of a row make its passage; None takes `text`, behind `title` if there is one.
        id_field: field with a row's id: a string or a whole number that no other row has.
        address: of a running cluster; None takes the one that this process is connected to, or `RAY_ADDRESS`, or starts one on
            this machine.
        actors: processes that hold the model; None takes as many as the cluster has room for. They must leave a core for
            reading and writing, and another one when a run goes on.
        num_cpus: cores of an actor; torch computes on as many threads.
        num_gpus: GPUs of an actor; with 0.5 two share one.
        rows_per_batch: rows that an actor encodes at a time.
        rows_per_file: rows of a file of the output, about, and what is done again if an actor dies.
        checkpoint_path: folder for what Ray keeps of the rows that are written, deleted at the end; None takes the output's
            name with .checkpoint behind it.
        **settings: of `KalmReranker.from_pretrained`.

    Raises:
        SettingsError: a setting breaks a rule; a row is bad, or its id is missing or another row's, which is found before
            anything is encoded; the cluster is not there; or the output is another run's.
        CheckpointError: the model cannot be used.
        EncodingTooLargeError: a passage does not fit `max_inline_bytes`; the message names the row's id.
        EngineError: the run ended early; started again, it goes on.
    """
    started = time.perf_counter()
    fields = fields or PassageFields()
    if not (num_cpus > 0 and num_gpus >= 0):
        msg = f"num_cpus must be positive and num_gpus not negative, but got {num_cpus!r} and {num_gpus!r}"
        raise SettingsError(msg)
    for setting, value in {
        "actors": 1 if actors is None else actors,
        "rows_per_batch": rows_per_batch,
        "rows_per_file": rows_per_file,
    }.items():
        if type(value) is not int or value < 1:
            msg = f"{setting} must be a positive whole number, but got {shown(value)}"
            raise SettingsError(msg)
    check_names(settings, SETTING_NAMES, "settings")
    # The driver need not have the actors' device, which an encoding does not depend on.
    reranker = KalmReranker.from_pretrained(model, **{**settings, "device": "cpu", "dtype": None})
    found = find_source(os.fspath(source))
    target = Output(os.fspath(output), None if checkpoint_path is None else os.fspath(checkpoint_path))
    plan = {
        "source": found.path,
        "fields": asdict(fields),
        "id_field": id_field,
        **encoder_settings(reranker),
        "compression_ratio": reranker.compression_ratio,
        "storage_codec": reranker.storage_codec,
        "max_inline_bytes": settings.get("max_inline_bytes"),
    }
    with connected(address), early_ends_explained(), leased(target.path) as run:
        n_rows = target.begin(plan)
        if n_rows is not None:
            return RayResult(n_rows, n_rows, RowCounts(), time.perf_counter() - started)
        n_kept = target.count_kept()
        # Leaving out the rows that are there takes an actor, too.
        n_actors = fit_actors(actors, num_cpus, num_gpus, spare_cpus=2 if n_kept else 1)
        n_rows, schema = check_rows(found, fields, id_field)
        rows = read_rows(found, fields, id_field, schema)
        rows.context.checkpoint_config = _make_checkpoint(id_field, target)
        encoded = rows.repartition(target_num_rows_per_block=rows_per_file).map_batches(
            _Encoder,
            fn_constructor_args=(os.fspath(model), settings, fields, id_field, run),
            batch_format="pyarrow",
            # Ray joins blocks that are shorter than a batch, and the files would be longer.
            batch_size=min(rows_per_batch, rows_per_file),
            compute=ray.data.ActorPoolStrategy(size=n_actors),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
        with failures_told(run):
            encoded.write_parquet(target.path)
        counts = cast("RowCounts", ray.get(run.total.remote()))
        target.finish(plan, n_rows)
    return RayResult(n_rows, n_kept, counts, time.perf_counter() - started)


class _Encoder:
    """An actor: it opens the model once, and encodes one batch of rows after another."""

    def __init__(self, model: str, settings: Mapping[str, Any], fields: PassageFields, id_field: str, run: Any) -> None:
        # Cores need no telling: Ray gives torch as many threads as an actor has cores.
        reranker = KalmReranker.from_pretrained(model, **settings)
        reranker.warm_up(decoder=False)
        self._encoder = RowEncoder(reranker, fields)
        self._columns = (*needed_columns(fields, id_field), ENCODING_KEY)
        self._id_field = id_field
        self._run = run

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return rows with `kalm_encoding` and `kalm_fp` as last columns.

        Raises:
            KalmError: a row cannot be encoded. The run is told, too.
        """
        rows = select(table, self._columns)
        self._encoder.counts = RowCounts()
        try:
            encoded = self._encoder.encode(rows)
        except KalmError as error:
            failure = _named(error, rows, self._id_field)
            ray.get(self._run.fail.remote(failure))
            raise failure from error
        self._run.add.remote(self._encoder.counts)
        return with_encodings(table, encoded)


def _named(error: KalmError, rows: Sequence[Row], id_field: str) -> KalmError:
    """Return an error of a batch as one that names the row by its id."""
    if not isinstance(error, EncodingTooLargeError) or error.index is None:
        return error
    return EncodingTooLargeError(f"{name_of(rows[error.index], id_field)}: {error.reason}")


def _make_checkpoint(id_field: str, output: Output) -> Any:
    """Return Ray's setting by which a run can go on, or None where Ray is too old to keep the parts and their ids in step.

    Raises:
        SettingsError: an earlier run has left parts that nothing is known of.
    """
    try:
        from ray.data.checkpoint import CheckpointConfig, checkpoint_writer

        is_able = hasattr(checkpoint_writer, "PendingCheckpoint")
    except ImportError:
        is_able = False
    if not is_able:
        if output.has_parts():
            msg = f"{output.path!r} cannot go on, for Ray {ray.__version__} keeps no checkpoints: delete it, or upgrade Ray"
            raise SettingsError(msg)
        logger.warning("Ray %s keeps no checkpoints: if this run ends early, it must begin anew", ray.__version__)
        return None
    if output.has_parts() and not output.has_checkpoint():
        msg = f"{output.path!r} cannot go on without its checkpoint at {output.checkpoint!r}: restore that, or delete both"
        raise SettingsError(msg)
    return CheckpointConfig(id_field, output.checkpoint, delete_checkpoint_on_success=False)
