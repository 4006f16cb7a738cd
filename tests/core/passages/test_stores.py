"""LMDB folders: opened as they allow, whatever is wrong with one is a StoreError, and nothing ends the process."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
from tools.fuzzing import rounds
from tools.paths import ROOT

from kalm_integrations import KalmReranker
from kalm_integrations.core.passages.stores import LmdbPayloadStore
from kalm_integrations.errors import SettingsError, StoreError

PAGE = 4096
N_VALUES, VALUE = 60, b"x" * 3 * PAGE


def run(script: str, *arguments: object) -> str:
    """Run a script in a process of its own, which must end well, and return what it prints."""
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
    return done.stdout


PRELUDE = """
import gc, os, pathlib, random, resource, shutil, sys
from kalm_integrations.core.passages.stores import LmdbPayloadStore
from kalm_integrations.errors import StoreError

def refuses(do):
    try:
        do()
    except StoreError as error:
        return str(error)
    raise SystemExit("a StoreError was expected")
"""


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A folder with values 0 to 59, written by another process: none of it is open in this one."""
    folder = tmp_path / "filled"
    script = "LmdbPayloadStore(sys.argv[1]).update({str(i): b'x' * int(sys.argv[3]) for i in range(int(sys.argv[2]))})"
    run(script, folder, N_VALUES, len(VALUE))
    return folder


# --- what a folder allows

READ_ONLY = """
import os
folder = sys.argv[1]
from kalm_integrations import KalmReranker, Passage
texts = ["Otters live on fish.", "The Rhine rises in the Alps."]
settings = {"storage_mode": "reference", "cache_bytes": 0, "storage_codec": "fp32"}
writer = KalmReranker.from_pretrained("pico", payload_store=folder, **settings)
made = writer.encode_to_metadata(texts)
passages = [Passage(text, metadata["kalm_encoding"]) for text, metadata in zip(texts, made)]
expected = writer.score("otters", passages)
del writer
gc.collect()
for name in ("data.mdb", "lock.mdb"):
    os.chmod(pathlib.Path(folder, name), 0o444 if name == "data.mdb" or sys.argv[2] == "nothing" else 0o666)
os.chmod(folder, 0o555)
if os.getuid() == 0:
    os.setuid(65534)  # root may write anything
assert not os.access(folder, os.W_OK)
reader = KalmReranker.from_pretrained("pico", payload_store=folder, prefix_store=folder, **settings)
assert reader.score("otters", passages) == expected
assert (reader.stats.corrupt, reader.stats.metadata_hits) == (0, 2)
assert reader.stats.store_failures == 1, "the prefix states could not be kept"
assert "read-only" in refuses(lambda: reader.encode_to_metadata(["new"]))
assert len(LmdbPayloadStore(folder)) == 2
assert "read-only" in refuses(lambda: LmdbPayloadStore(folder).clear())
assert "cannot be used" in refuses(lambda: LmdbPayloadStore(sys.argv[3]))
"""


@pytest.mark.parametrize("writable", ["nothing", "lock file"])
def test_a_folder_that_may_not_be_written_is_read(writable: str):
    """Encode offline, mount read-only: references are read, and what would be written says why not."""
    parent = Path(tempfile.mkdtemp(prefix="kalm-read-only-"))  # not under pytest's, which others may not enter
    try:
        for name in ("full", "empty"):
            (parent / name).mkdir()
        parent.chmod(0o755)
        run(READ_ONLY, parent / "full", writable, parent / "empty")
    finally:
        (parent / "full").chmod(0o755)
        shutil.rmtree(parent)


ADDRESS_SPACE = """
import logging
logging.basicConfig(stream=sys.stdout, format="%(message)s")
LmdbPayloadStore(sys.argv[1] + "/before")  # all that has to be imported and mapped once
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**32
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
store = LmdbPayloadStore(sys.argv[1] + "/after")
store.update({str(i): bytes(10_000) for i in range(100)})
assert len(store) == 100 and store["7"] == bytes(10_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc to tell what is in use")
def test_a_map_that_the_system_refuses_is_halved(tmp_path: Path):
    printed = run(ADDRESS_SPACE, tmp_path)
    assert f"may grow to {2**31} bytes only: a map of max_bytes={2**40} was refused" in printed


@pytest.mark.parametrize("max_bytes", [0, -1, 1.5, True, "1", 2**62])
def test_what_is_no_size_is_refused(tmp_path: Path, max_bytes: object):
    with pytest.raises(SettingsError, match="max_bytes must be a positive whole number"):
        LmdbPayloadStore(tmp_path, max_bytes=max_bytes)


def test_a_full_store_says_so_and_still_answers(tmp_path: Path):
    store = LmdbPayloadStore(tmp_path, max_bytes=2**18)
    store["a"] = VALUE
    with pytest.raises(StoreError, match="it is full: open it with a larger max_bytes"):
        store.update({str(i): VALUE for i in range(100)})
    assert dict(store) == {"a": VALUE}
    del store["a"]
    store["b"] = VALUE
    assert dict(store) == {"b": VALUE}


FULL_DISK = """
store = LmdbPayloadStore(sys.argv[1])
store["a"] = b"x" * 5000
resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, 2**18))
print(refuses(lambda: store.update({str(i): bytes(5000) for i in range(100)})))
assert dict(store) == {"a": b"x" * 5000}
store["b"] = b"y"
assert dict(store) == {"a": b"x" * 5000, "b": b"y"}
"""


def test_a_file_that_cannot_grow_keeps_what_it_has(tmp_path: Path):
    assert "cannot be used" in run(FULL_DISK, tmp_path)


@pytest.mark.parametrize("key", ["", "k" * 512])
def test_keys_have_a_length(tmp_path: Path, key: str):
    store = LmdbPayloadStore(tmp_path)
    with pytest.raises(StoreError, match="keys must be 1 to 511 bytes"):
        store[key] = b"x"


def test_what_cannot_be_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "below", tmp_path / "file", "nul\0l"):
        with pytest.raises(StoreError, match="must be a folder that is there or can be made"):
            LmdbPayloadStore(path)


def test_the_environment_of_another_program_is_no_foreign_error(tmp_path: Path):
    with lmdb.open(str(tmp_path), map_size=2**20) as other, other.begin(write=True) as transaction:
        transaction.put(b"\xff\xfe", b"x")
    with pytest.raises(StoreError, match="use a folder of its own"):
        list(LmdbPayloadStore(tmp_path))


# --- damage


def test_a_reranker_refuses_garbage_when_it_is_opened(make_reranker: Callable[..., KalmReranker], tmp_path: Path):
    (tmp_path / "data.mdb").write_bytes(b"garbage" * 1000)
    for setting in ("payload_store", "prefix_store"):
        with pytest.raises(StoreError, match=r"data.mdb does not begin with a page of LMDB.*restore the folder"):
            make_reranker(**{setting: tmp_path})


DAMAGED = """
folder, seed, n_rounds, kind = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4]
sound = (folder / "data.mdb").read_bytes()
chance = random.Random(seed)
counts = {"read": 0, "refused": 0}
for _ in range(n_rounds):
    data = bytearray(sound)
    if kind == "cut":
        n_pages = chance.randrange(1, len(data) // 4096)
        del data[chance.choice([chance.randrange(1, len(data)), chance.randrange(1, 9000), 4096 * n_pages]) :]
    elif kind == "garbage":
        data = chance.randbytes(chance.randrange(1, 20_000))
    elif kind == "first pages":
        for _ in range(chance.choice([1, 4])):
            data[chance.randrange(2) * 4096 + chance.randrange(160)] = chance.randrange(256)
    else:
        # Only what values consist of: LMDB does not check the pages that lead to them.
        for _ in range(4):
            start = chance.choice([at for at in range(0, len(data), 4096) if data[at : at + 4096] == b"x" * 4096])
            data[start + chance.randrange(4096)] = 0
    (folder / "data.mdb").write_bytes(data)
    (folder / "lock.mdb").unlink(missing_ok=True)
    store = None
    try:
        store = LmdbPayloadStore(folder)
        for key in store:
            store[key]
        store["new"] = b"x" * 5000
        counts["read"] += 1
    except StoreError:
        counts["refused"] += 1
    del store
    gc.collect()
print(counts["read"], counts["refused"])
"""


@pytest.mark.parametrize(("kind", "always"), [("cut", 1), ("garbage", 1), ("first pages", None), ("values", 0)])
def test_damage_is_an_error_of_ours_and_kills_nobody(filled: Path, kind: str, always: int | None):
    """Cut files would be a SIGBUS; `always` is which of read and refused every one must be."""
    n_rounds = rounds(60)
    counts = [int(count) for count in run(DAMAGED, filled, 7, n_rounds, kind).split()]
    assert sum(counts) == n_rounds
    assert always is None or counts[always] == n_rounds


CUT_WHILE_OPEN = """
folder, seed, n_rounds = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:4])
chance = random.Random(seed)
sound = (folder / "data.mdb").read_bytes()
store = LmdbPayloadStore(folder)
lock = (folder / "lock.mdb").stat().st_size
for _ in range(n_rounds):
    os.truncate(folder / "data.mdb", chance.choice([0, 100, 4096, 8192, chance.randrange(len(sound))]))
    assert "was cut while it is open" in refuses(lambda: store["5"])
    assert "was cut while it is open" in refuses(lambda: len(store))
    assert "was cut while it is open" in refuses(lambda: list(store))
    assert "was cut while it is open" in refuses(lambda: store.update({"new": b"x"}))
    with open(folder / "data.mdb", "r+b") as file:
        file.write(sound)
    assert len(store["5"]) == 3 * 4096
locked = (folder / "lock.mdb").read_bytes()
os.truncate(folder / "lock.mdb", 0)
assert "was cut while it is open" in refuses(lambda: store["5"])
with open(folder / "lock.mdb", "r+b") as file:
    file.write(locked)
assert len(store["5"]) == 3 * 4096
"""


def test_a_file_that_is_cut_while_it_is_open_is_not_read(filled: Path):
    run(CUT_WHILE_OPEN, filled, 3, rounds(60))


def test_deletions_leave_no_file_that_looks_cut(tmp_path: Path):
    """LMDB may leave the last pages of a transaction unwritten; those of this store, which only puts or deletes, never."""
    store = LmdbPayloadStore(tmp_path)
    chance = random.Random(5)
    keys = [f"{i:0400}" for i in range(60)]
    for _ in range(rounds(3)):
        for start in range(0, len(keys), 20):
            store.update({key: bytes(chance.choice([0, 500, 1500, 5000])) for key in keys[start : start + 20]})
        for key in chance.sample(keys, len(keys)):
            del store[key]
    assert len(store) == 0


# --- forks

FORK = """
import threading
folder, n_children = sys.argv[1], int(sys.argv[2])
store, other = LmdbPayloadStore(folder), LmdbPayloadStore(folder)
iterator = iter(store)
next(iterator)
stop = threading.Event()

def use(do):
    while not stop.is_set():
        do()

uses = [lambda: other.update(parent=os.urandom(5000)), lambda: store["7"], lambda: list(store)]
threads = [threading.Thread(target=use, args=(do,)) for do in uses]
for thread in threads:
    thread.start()
children = []
for number in range(n_children):
    child = os.fork()
    if child == 0:
        try:
            assert len(store["5"]) == 3 * 4096 and "6" in set(iterator)
            store[f"child {number}"] = b"was here"
            assert other[f"child {number}"] == b"was here" and store._environment is other._environment
        except BaseException as error:
            os.write(2, f"{error!r}\\n".encode())
            os._exit(1)
        os._exit(0)
    children.append(child)
failed = [child for child in children if os.waitpid(child, 0)[1]]
stop.set()
for thread in threads:
    thread.join()
assert not failed
assert len(set(iterator) - {"parent"}) == 59 + n_children, "the parent goes on where it was"
assert sorted(key for key in store if key.startswith("child")) == sorted(f"child {number}" for number in range(n_children))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_store_that_came_over_by_fork_is_opened_again(filled: Path):
    """Also while other threads of the parent read and write, whose transactions nobody would end in the child."""
    run(FORK, filled, 12)


def test_a_thread_that_reads_never_takes_a_growing_file_for_a_cut_one(tmp_path: Path):
    store = LmdbPayloadStore(tmp_path)
    store["0"] = VALUE
    errors: list[Exception] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                assert store["0"] == VALUE
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(60):
        store[str(i + 1)] = VALUE
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
