"""What it takes to change the checkpoint of a collection while it is queried."""

from __future__ import annotations

from dataclasses import dataclass

from kalm_integrations.planning.plans import Plan, make_plan


@dataclass(frozen=True)
class Migration:
    """From one checkpoint to another, with the encodings of both side by side until queries have changed over."""

    model: str
    """What the collection was encoded with."""
    before: dict[str, int]
    """Bytes of its encodings in each store."""
    both: dict[str, int]
    """Bytes while both lie there."""
    after: dict[str, int]
    """Bytes when the old ones have been dropped."""
    seconds: float
    """Of encoding everything anew, if nothing else uses the processor."""
    documents_per_second: float
    """Of that."""


def plan_migration(model: str, new: Plan) -> Migration:
    """Plan for changing the checkpoint.

    Args:
        model: what the collection was encoded with: an alias or a local folder. Its encodings have ratio and codec of the
            new ones.
        new: the plan for the collection under the new checkpoint.

    Raises:
        InvalidCheckpointError: the folder holds no checkpoint.
        SettingsError: the model is unknown.
    """
    old = make_plan(
        model,
        new.passages,
        new.tokens,
        ratio=new.ratio,
        codec=new.codec,
        speed=new.seconds.scale,
        max_passage_tokens=new.reading.max_passage_tokens,
        long_passages=new.reading.long_passages,
        max_windows=new.reading.max_windows,
    )
    return Migration(
        model=model,
        before=old.stores,
        both={name: n_bytes + new.stores[name] for name, n_bytes in old.stores.items()},
        after=new.stores,
        seconds=new.seconds.encoding,
        documents_per_second=new.passages / new.seconds.encoding,
    )
