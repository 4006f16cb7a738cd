"""Reading ahead and writing behind, in threads of their own, so that the model waits for neither."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")

DEPTH = 1
"""Items that wait between two threads, beside those in work: what bounds memory."""
_END = object()


class ReadAhead(Generic[Item]):
    """An iterator whose next items are made in another thread; what that raises is raised here."""

    def __init__(self, items: Iterable[Item]) -> None:
        """Begin to read."""
        self._items = items
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(DEPTH)
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kalm-bulk-reader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                self._queue.put((item, None))
                if self._is_stopped.is_set():
                    return
        except BaseException as error:
            self._queue.put((_END, error))
        else:
            self._queue.put((_END, None))

    def __enter__(self) -> Iterator[Item]:
        """Return the items."""
        return self._given()

    def _given(self) -> Iterator[Item]:
        while True:
            item, error = self._queue.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Stop reading."""
        self._is_stopped.set()
        while self._thread.is_alive():
            # A reader that waits for room must see that it is over.
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)


class WriteBehind(Generic[Item]):
    """Calls a function with items, in order, in another thread; its first error is raised here and ends the work."""

    def __init__(self, write: Callable[[Item], object]) -> None:
        """Begin to wait for items."""
        self._write = write
        self._queue: queue.Queue[Any] = queue.Queue(DEPTH)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kalm-bulk-writer", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not _END:
            if self._error is None:
                try:
                    self._write(item)
                except BaseException as error:
                    self._error = error

    def put(self, item: Item) -> None:
        """Have an item written after those before it.

        Raises:
            BaseException: an earlier one failed.
        """
        if self._error is None:
            self._queue.put(item)
        if self._error is not None:
            raise self._error

    def __enter__(self) -> WriteBehind[Item]:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Wait until all is written.

        Raises:
            BaseException: the writing failed, and nothing else has.
        """
        self._queue.put(_END)
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error
