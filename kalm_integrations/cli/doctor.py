"""`kalm doctor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from kalm_integrations.cli import options
from kalm_integrations.cli.checks.checkpoint import check_checkpoint
from kalm_integrations.cli.checks.findings import Finding, guarded, note
from kalm_integrations.cli.checks.folders import check_folders
from kalm_integrations.cli.checks.machine import check_machine
from kalm_integrations.cli.checks.packages import check_packages
from kalm_integrations.cli.checks.stores import check_stores
from kalm_integrations.cli.terminal import make_table, print_json, print_table, printable

SHOWN = {"ok": ("ok", "green"), "note": ("note", "yellow"), "must be fixed": ("FIX", "bold red")}
"""Word and style of a status in the terminal."""

NAME_WIDTH = 24


def doctor(
    model: options.ModelOrService = "pico",
    tokens: Annotated[int, typer.Option(min=1, max=131_072, help="Tokens of a passage whose encoding is to fit.")] = 256,
    ratio: options.Ratio = None,
    codec: options.Codec = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    as_json: options.Json = False,
) -> None:
    """Check the installation, and say what to fix.

    Packages, device and threads, the hub and its cache, the checkpoint (two passages are ranked with it), and whether its
    encodings fit into stores that have a limit. Nothing is fetched. The exit code is 1 if something must be fixed, else 0.
    """
    settings = {"revision": revision, "device": device, "dtype": dtype, "compression_ratio": ratio, "storage_codec": codec}
    groups: dict[str, Iterable[Finding]] = {
        "Packages": check_packages(),
        "Machine": check_machine(device, dtype),
        "Checkpoint": check_checkpoint(model, settings),
        "Folders": check_folders(),
        "Stores": check_stores(model, revision, tokens, ratio, codec),
    }
    counts: Counter[str] = Counter()
    listed: list[dict[str, str]] = []
    for group, findings in groups.items():
        news = _news(guarded(group.lower(), findings), listed)
        for finding in news if as_json else _printed(group, news):
            counts[finding.status] += 1
            listed.append({"group": group.lower(), **asdict(finding)})
    n_broken = counts["must be fixed"]
    if as_json:
        print_json({"must_be_fixed": n_broken, "notes": counts["note"], "findings": listed})
    else:
        summary = f"{n_broken} of these must be fixed" if n_broken else "Nothing must be fixed"
        print(f"\n{summary}; {counts['note']} to note.")
    if n_broken:
        raise typer.Exit(1)


def _news(findings: Iterable[Finding], listed: Sequence[Mapping[str, str]]) -> Iterator[Finding]:
    """Yield findings; what must be fixed is said once, although several checks may stumble over it."""
    for finding in findings:
        is_known = finding.status == "must be fixed" and any(finding.found == other["found"] for other in listed)
        yield note(finding.name, "is not checked, because of what must be fixed above") if is_known else finding


def _printed(group: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Print a group, and yield its findings; the title comes before the first check has been made."""
    from rich.text import Text

    print(f"\n{group}" if group != "Packages" else group, flush=True)
    table = make_table()
    table.show_header = False
    for width in (len(SHOWN["note"][0]), NAME_WIDTH, None):
        table.add_column(width=width, overflow="fold")
    for finding in findings:
        word, style = SHOWN[finding.status]
        table.add_row(Text(word, style=style), Text(finding.name), Text(printable(finding.found)))
        if finding.remedy:
            table.add_row("", "", Text(f"> {printable(finding.remedy)}", style="bold" if word == "FIX" else ""))
        yield finding
    print_table(table)
