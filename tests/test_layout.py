"""The tree is the diagram: small files, tests that mirror it, and a map that is true."""

from __future__ import annotations

import re

import pytest
from tools import rooms
from tools.paths import ROOT, TESTS

MAX_LINES = 400


def mapped() -> dict[str, tuple[int, int]]:
    """Return files and lines of each room on the map."""
    text = rooms.PAGE.read_text(encoding="utf-8").partition(rooms.BEGIN)[2].partition(rooms.END)[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([\d,]+) \| ([\d,]+) \|", text, re.MULTILINE)
    return {room: (int(files.replace(",", "")), int(lines.replace(",", ""))) for room, files, lines in rows}


def test_the_map_has_every_room_and_its_size():
    """Run `python -m tools.rooms` in tests/ if this fails."""
    found = rooms.rooms()
    assert list(mapped()) == list(found)
    for room, (n_files, n_lines) in mapped().items():
        assert n_files == len(found[room]), room
        assert n_lines == pytest.approx(rooms.n_lines(found[room]), rel=0.15, abs=20), room


def test_every_room_says_what_it_holds():
    for room, files in rooms.rooms().items():
        assert rooms.describe(files), room


def test_files_are_small():
    files = [path for room in rooms.rooms().values() for path in room]
    long = {str(path.relative_to(ROOT)): rooms.n_lines([path]) for path in files if rooms.n_lines([path]) > MAX_LINES}
    assert long == {}


def test_tests_mirror_the_folders_of_the_package():
    """Hosts share one contract, so theirs stand together; what is fuzzed, soaked or browsed is all; helpers lie in tools."""
    own = {"adapters", "benchmarks", "browser", "data", "fuzz", "soak", "tools", "typing"}
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py") if path.parent != TESTS}
    mirrored = {folder for folder in folders if folder.parts[0] not in own}
    assert all((ROOT / "kalm_integrations" / folder).is_dir() for folder in mirrored)
    names = {path.name for path in TESTS.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    assert names - own == {folder.parts[0] for folder in mirrored}
