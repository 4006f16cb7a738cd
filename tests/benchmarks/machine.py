"""What the figures depend on besides the code, and the environment that a run is started in."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

MALLOC = {
    "tuned": {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)},
    "glibc": {},
}
"""Tuned: freed memory is kept instead of going back to the system and being zeroed again, which helps the reference most."""

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8")
PACKAGES = ("kalm-integrations", "torch", "transformers", "mteb")


def start_again(malloc: str) -> None:
    """Replace this process by one with the environment of a run, unless it has it: malloc reads it at the start."""
    wanted = MALLOC[malloc]
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


def describe(device: str) -> dict[str, Any]:
    """Return the facts of the machine; none of them names it."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in _cpu_info("flags").split()],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": None if device == "cpu" else torch.cuda.get_device_name(device),
        "system": f"{platform.system()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("OMP_", "MALLOC_", "MKL_"))
        },
        "load_before": round(os.getloadavg()[0], 2),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
