"""LMDB environments: one for each folder and process, opened as the folder allows, with no error but `StoreError`.

LMDB trusts its file. What it cannot bear is checked here, because it would end the process: a file that ends before its last
page (SIGBUS), meta pages that are none, and a handle that came over from another process by fork.

Growth needs no check: py-lmdb maps the file read-only and appends with pwrite, so that a full disk is an error and no SIGBUS,
and a transaction that could not be written leaves the last one valid.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from kalm_integrations.errors import KalmError, SettingsError, StoreError

logger = logging.getLogger(__name__)

MAX_READERS = 1024
"""Reads that may be under way at once, in all processes together."""

_SMALLEST_MAP = 2**20
_DATA, _LOCK = "data.mdb", "lock.mdb"

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_DAMAGED = (
    "it is damaged, or no LMDB environment: restore the folder from a backup or delete it; what is gone is encoded again"
)
_REMEDIES: tuple[tuple[type[Exception], str], ...] = (
    (lmdb.MapFullError, "it is full: open it with a larger max_bytes, or delete from it"),
    (lmdb.MapResizedError, "another process made it larger than this one's map: open it with a larger max_bytes"),
    (lmdb.ReadersFullError, f"{MAX_READERS} reads are under way: end processes that read it"),
    (lmdb.DiskError, "the disk is full: free some space"),
    (lmdb.MemoryError, "there is not enough address space or memory: raise the limit, or pass a smaller max_bytes"),
    (lmdb.BadValsizeError, "keys must be 1 to 511 bytes of UTF-8"),
    (lmdb.VersionMismatchError, _DAMAGED),
    (lmdb.InvalidError, _DAMAGED),
    (lmdb.CorruptedError, _DAMAGED),
    (lmdb.PageNotFoundError, _DAMAGED),
    (UnicodeDecodeError, "it has keys that are no payloads': use a folder of its own"),
)

# Of a meta page, behind its header of 16 bytes: magic, version, address, map size; of the tree of free pages: page size,
# flags, depth, four counts, root; of the tree of values the same, with padding as page size; last page, transaction.
_META = struct.Struct("=IIQQ" + 2 * "IHHQQQQQ" + "QQ")
_META_OFFSET = 16
_PAGE = struct.Struct("=QHH")
_BRANCH_OR_LEAF = 0x03
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_FREE_PAGES_FLAGS = 0x08
_NO_PAGE = 2**64 - 1
_PAGE_BYTES = [2**power for power in range(9, 17)]
_MAX_DEPTH = 32

_SECONDS_TO_MAKE = 0.05

STAMPS = b"\1kalm-stamps"
"""Database beside the values', for when they were last used; its name is a key among theirs."""


class SharedEnvironment:
    """An LMDB environment that all stores of its folder share in this process; closed with the last of them."""

    def __init__(self, folder: str, max_bytes: int) -> None:
        """Open or create it; where the folder cannot be written, open it for reading.

        Raises:
            StoreError: it cannot be opened, or is damaged.
        """
        self.folder = folder
        _check_file(folder)
        with _our_errors(folder):
            self._environment, self.is_read_only = _open_as_allowed(folder, max_bytes)
            # Slots of processes that died are freed; they would keep pages from being used again.
            self._environment.reader_check()
            self._page_bytes = self._environment.stat()["psize"]
            file = os.open(Path(folder, _DATA), os.O_RDONLY)
            weakref.finalize(self, os.close, file)
        self._file = file
        self._lock_path = Path(folder, _LOCK)
        self._lock_bytes = _length(self._lock_path) or 0

    def stamps(self, transaction: lmdb.Transaction) -> Any:
        """Return the database of when values were last used, made if there is none; for writing transactions."""
        return self._environment.open_db(STAMPS, transaction)

    @contextmanager
    def begin(self, *, write: bool = False) -> Iterator[lmdb.Transaction]:
        """Begin a transaction, which is committed at the end. A fork waits for it: what runs inside must be short.

        Raises:
            StoreError: LMDB refuses it, the file is shorter than what it should hold, or it may not be written.
        """
        if write and self.is_read_only:
            msg = (
                f"the store in {self.folder!r} is read-only: this process may not write there; write with a user and a mount "
                "that may"
            )
            raise StoreError(msg)
        with _our_errors(self.folder), _transactions:
            self._check_lengths()
            with self._environment.begin(write=write) as transaction:
                yield transaction

    def close(self) -> None:
        """Close it, for a child after a fork: what the parent has open is not touched."""
        self._environment.close()

    def _check_lengths(self) -> None:
        """Check that no file was cut while it is open; some microseconds, and all that stands before a SIGBUS."""
        lock_bytes = _length(self._lock_path)
        is_cut = lock_bytes is not None and lock_bytes < self._lock_bytes
        # The meta pages, which tell the last page, may be cut off, too. A file grows before they say so.
        is_cut = is_cut or os.fstat(self._file).st_size < 2 * self._page_bytes
        n_needed = 0 if is_cut else (self._environment.info()["last_pgno"] + 1) * self._page_bytes
        if is_cut or os.fstat(self._file).st_size < n_needed:
            msg = f"the store in {self.folder!r} was cut while it is open: restore it from a backup, and open it again"
            raise StoreError(msg)


def share_environment(path: str | os.PathLike[str], max_bytes: int) -> SharedEnvironment:
    """Return the environment of a folder, which is made if there is none.

    Raises:
        SettingsError: `max_bytes` is not positive.
        StoreError: see `SharedEnvironment`.
    """
    if type(max_bytes) is not int or not 1 <= max_bytes < 2**62:
        msg = f"max_bytes must be a positive whole number below 2**62, but got {max_bytes!r}"
        raise SettingsError(msg)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        folder = os.path.realpath(path)
    except (OSError, ValueError) as error:
        msg = f"a store must be a folder that is there or can be made, but {os.fspath(path)!r} is not: {error}"
        raise StoreError(msg) from error
    # LMDB allows one environment per folder and process, but every reranker opens a store of its own.
    with _opening:
        environment = _environments.get(folder)
        if environment is None:
            environment = SharedEnvironment(folder, max_bytes)
            _environments[folder] = environment
    return environment


_environments: weakref.WeakValueDictionary[str, SharedEnvironment] = weakref.WeakValueDictionary()
_opening = threading.Lock()


class _Transactions:
    """Those under way in this process. A fork waits until there are none, and new ones wait for the fork.

    A child that closed an environment amid a transaction would wait for it for ever, or end it for the parent, too.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget those under way, and the lock: in a child the threads that had them are not there."""
        self._changed = threading.Condition()
        self._n = 0
        self._is_forking = False

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_forking)
            self._n += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._n -= 1
            if self._is_forking:
                self._changed.notify_all()

    def stop(self) -> None:
        """Wait for those under way."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_forking)
            self._is_forking = True
            self._changed.wait_for(lambda: not self._n)

    def go_on(self) -> None:
        """Let new ones begin."""
        with self._changed:
            self._is_forking = False
            self._changed.notify_all()


_transactions = _Transactions()


def _before_fork() -> None:
    _opening.acquire()
    _transactions.stop()


def _after_fork_in_parent() -> None:
    _transactions.go_on()
    _opening.release()


def _after_fork_in_child() -> None:
    """Drop what came over: LMDB's handles belong to the process that opened them. Stores open the folder again when used."""
    _transactions.reset()
    for environment in list(_environments.values()):
        environment.close()
    _environments.clear()
    _opening.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def _open_as_allowed(folder: str, max_bytes: int) -> tuple[lmdb.Environment, bool]:
    """Return the environment, and whether it can be read only."""
    try:
        return _open_with_map(folder, max_bytes), False
    except (lmdb.Error, OSError) as error:
        if not _is_not_writable(error):
            raise
    try:
        # Registered as a reader if the lock file can be written though the data cannot.
        return _open_with_map(folder, max_bytes, readonly=True), True
    except (lmdb.Error, OSError) as error:
        if not _is_not_writable(error):
            raise
    return _open_with_map(folder, max_bytes, readonly=True, lock=False), True


def _open_with_map(folder: str, max_bytes: int, **settings: Any) -> lmdb.Environment:
    """Open an environment with the largest map up to `max_bytes` that the system grants; what is there is mapped anyway."""
    n_bytes = max_bytes
    # A query's values lie far apart: what the system would read ahead of them is read for nothing.
    fixed: dict[str, Any] = {"max_readers": MAX_READERS, "max_dbs": 1, "create": False, "readahead": False}
    while True:
        try:
            environment = lmdb.open(folder, map_size=n_bytes, **fixed, **settings)
        except lmdb.MemoryError:
            if n_bytes <= _SMALLEST_MAP:
                raise
            n_bytes = max(n_bytes // 2, _SMALLEST_MAP)
            continue
        if n_bytes < max_bytes:
            rule = "the store in %r may grow to %d bytes only: a map of max_bytes=%d was refused (address space is limited)"
            logger.warning(rule, folder, n_bytes, max_bytes)
        return environment


def _is_not_writable(error: Exception) -> bool:
    code = error.errno if isinstance(error, OSError) else getattr(error, "code", 0)
    return code in _NOT_WRITABLE or isinstance(error, lmdb.ReadonlyError)


def _check_file(folder: str) -> None:
    """Check the meta pages and the length of a file before LMDB maps it; one that is not there or empty is made by LMDB.

    Raises:
        StoreError: LMDB would crash on it.
    """
    try:
        fault = _find_fault(Path(folder, _DATA))
        if fault is not None:
            # Another process may be making it right now.
            time.sleep(_SECONDS_TO_MAKE)
            fault = _find_fault(Path(folder, _DATA))
    except OSError as error:
        msg = f"the store in {folder!r} cannot be read: {error}; check who may read it"
        raise StoreError(msg) from error
    if fault is not None:
        msg = f"the store in {folder!r} cannot be used ({fault}); {_DAMAGED}"
        raise StoreError(msg)


def _find_fault(path: Path) -> str | None:
    """Return what is wrong with a file, if anything."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        first = file.read(_META_OFFSET + _META.size)
        if not first:
            return None
        if len(first) < _META_OFFSET + _META.size:
            return f"{_DATA} ends in its first page"
        page_bytes = _META.unpack_from(first, _META_OFFSET)[4]
        if page_bytes not in _PAGE_BYTES:
            return f"{_DATA} does not begin with a page of LMDB"
        file.seek(page_bytes)
        second = file.read(_META_OFFSET + _META.size)
        # Taken after the meta pages: a file grows before they say so.
        n_bytes = os.fstat(file.fileno()).st_size
        if n_bytes < 2 * page_bytes:
            return f"{_DATA} ends in its first pages"
        metas = [_META.unpack_from(page, _META_OFFSET) for page in (first, second)]
        if metas[0][:2] == metas[1][:2] and metas[0][1] != _VERSION:
            return None  # Of a version that is not known here only LMDB itself can tell.
        if not all(_is_sound(meta) for meta in metas):
            return f"the first pages of {_DATA} are damaged"
        committed = max(metas, key=lambda meta: meta[21])
        n_needed = (committed[20] + 1) * page_bytes
        if n_bytes < n_needed:
            return f"{_DATA} has {n_bytes} bytes instead of {n_needed}"
        for root in (committed[11], committed[19]):
            if root != _NO_PAGE:
                file.seek(root * page_bytes)
                number, _, flags = _PAGE.unpack(file.read(_PAGE.size))
                if number != root or not flags & _BRANCH_OR_LEAF:
                    return f"the trees of {_DATA} do not begin where they should"
    return None


def _is_sound(meta: tuple[int, ...]) -> bool:
    """Return whether what a meta page says can be true of a store of ours."""
    free_flags, free_depth, flags, depth = *meta[5:7], *meta[13:15]
    free_root, root, last_page = meta[11], meta[19], meta[20]
    n_pages, n_entries = sum(meta[15:18]), meta[18]
    return (
        meta[:2] == (_MAGIC, _VERSION)
        and free_flags == _FREE_PAGES_FLAGS
        and flags == 0
        and max(free_depth, depth) <= _MAX_DEPTH
        and n_pages <= last_page
        and n_entries <= last_page * meta[4]
        and all(page == _NO_PAGE or 1 < page <= last_page for page in (free_root, root))
    )


def _length(path: Path) -> int | None:
    """Return the bytes of a file, or None if it is gone."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


@contextmanager
def _our_errors(folder: str) -> Iterator[None]:
    """Turn what LMDB and the system raise into a `StoreError`."""
    try:
        yield
    except KalmError:
        raise
    except (lmdb.Error, OSError, UnicodeDecodeError) as error:
        default = "check the folder, who may use it, and that its disk is sound and not full"
        remedy = next((text for kind, text in _REMEDIES if isinstance(error, kind)), default)
        msg = f"the store in {folder!r} cannot be used ({error}); {remedy}"
        raise StoreError(msg) from error
