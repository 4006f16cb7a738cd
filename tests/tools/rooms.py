"""The map of docs/contributing.md: rooms, what they hold, and their size. `python -m tools.rooms`, in tests/, writes it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tools.paths import DOCS, ROOT

PAGE = DOCS / "contributing.md"
BEGIN, END = "<!-- rooms: begin -->\n", "<!-- rooms: end -->"


def rooms() -> dict[str, list[Path]]:
    """Return the files of each room, a folder or a module that stands alone, by its path from the root."""
    found: dict[str, list[Path]] = {}
    for top in ("kalm_integrations", "haystack_integrations"):
        for path in sorted((ROOT / top).rglob("*.py")):
            folder = path.parent.relative_to(ROOT)
            is_alone = folder == Path("kalm_integrations") and path.name not in ("__init__.py", "__main__.py")
            found.setdefault(str(path.relative_to(ROOT)) if is_alone else f"{folder}/", []).append(path)
    return dict(sorted(found.items(), key=lambda room: (room[0].startswith("haystack"), room[0])))


def describe(files: list[Path]) -> str:
    """Return the first sentence of a room's docstring."""
    [head] = [path for path in files if path.name == "__init__.py"] or files
    docstring = ast.get_docstring(ast.parse(head.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=\.)\s|\n\n|\n(?=\*)", " ".join(docstring.split("\n\n")[0].split()))[0]


def n_lines(files: list[Path]) -> int:
    """Return the lines of a room's files."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def table() -> str:
    """Return the map as Markdown; sizes are rounded, so that not every change changes it."""
    rows = ["| room | files | lines, about | |", "|---|---|---|---|"]
    for room, files in rooms().items():
        rows.append(f"| `{room}` | {len(files)} | {max(round(n_lines(files), -1), 10):,} | {describe(files)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
