"""Work in batches: the batch is halved where memory runs out, and a bar shows how far it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import torch
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


def progress_bar(what: str, n_items: int, is_shown: bool) -> tqdm[NoReturn]:
    """Return a bar over passages."""
    return tqdm(total=n_items, desc=what, unit="passage", disable=not is_shown)


def run_in_batches(
    items: Sequence[Item],
    run: Callable[[list[Item]], list[Result]],
    batch_size: int,
    report: Callable[[int], object] | None = None,
) -> list[Result]:
    """Run over batches and return all results; when memory runs out the batch is halved, for the rest of the call too."""
    results: list[Result] = []
    while len(results) < len(items):
        batch = list(items[len(results) : len(results) + batch_size])
        done = None
        try:
            done = run(batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error) or len(batch) == 1:
                raise
        if done is None:
            # Out here, because inside `except` the traceback would still hold the tensors of the failed batch.
            batch_size = len(batch) // 2
            logger.warning("out of memory with %d passages at a time; going on with %d", len(batch), batch_size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        results += done
        if report is not None:
            report(len(batch))
    return results


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
