"""The machine: device, precision, cores and threads."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kalm_integrations.cli.checks.findings import Finding, broken, describe, note, ok
from kalm_integrations.cli.terminal import format_bytes

if TYPE_CHECKING:
    import torch

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "MKL_NUM_THREADS")

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

CGROUPS = Path("/sys/fs/cgroup")


def check_machine(device: str | None, dtype: str | None) -> Iterator[Finding]:
    """Look at what passages are computed on.

    Args:
        device: a torch device; None is the default.
        dtype: a name; None is the default of the device.
    """
    try:
        import torch
    except Exception as error:  # a library that does not load raises what it likes
        yield broken(
            "torch", f"cannot be imported: {describe(error)}", "install PyTorch anew: https://pytorch.org/get-started"
        )
        return
    from kalm_integrations.core.runtime import choose_device, choose_dtype

    chosen = choose_device(device)
    yield _device(chosen)
    precision = choose_dtype(dtype, chosen)
    name = str(precision).removeprefix("torch.")
    if chosen.type == "cuda" and precision == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield note("dtype", f"{name}, which this GPU only emulates", 'dtype="float32" may be faster')
    else:
        yield ok("dtype", name)
    yield from check_threads(torch.get_num_threads(), usable_cores(), cpu_quota(CGROUPS))


def _device(chosen: torch.device) -> Finding:
    import torch

    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        free, total = torch.cuda.mem_get_info(chosen)
        return ok("device", f"{chosen}, {properties.name}, {format_bytes(free)} of {format_bytes(total)} free")
    if chosen.type == "cpu" and NVIDIA_DRIVER.exists() and not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else f"(for CUDA {torch.version.cuda}) cannot use it"
        return note(
            "device",
            f"cpu; there is an NVIDIA GPU, but torch {torch.__version__} {built}",
            "to use the GPU install PyTorch for it: https://pytorch.org/get-started",
        )
    return ok("device", str(chosen))


def check_threads(threads: int, cores: int, quota: float | None) -> Iterator[Finding]:
    """Compare torch's threads with the cores that they may use.

    Args:
        threads: of torch, for one operator.
        cores: that this process may run on.
        quota: cores' worth of time that the container gets, or None.
    """
    limit = cores if quota is None else min(cores, math.ceil(quota))
    yield ok("cores", f"{cores}" + ("" if quota is None else f"; the container gets the time of {quota:g}"))
    variables = ", ".join(f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if name in os.environ)
    found = f"{threads} of torch ({variables or 'no OMP_ or MKL_ variable is set'})"
    remedy = f"set OMP_NUM_THREADS={limit} before Python starts"
    if threads > limit:
        yield note("threads", f"{found}: more than run at a time, so that they wait for each other", remedy)
    elif threads < limit and threads == 1:
        yield note("threads", f"{found}: {limit - 1} of the cores are not used", remedy)
    else:
        yield ok("threads", found)


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(root: Path) -> float | None:
    """Return the cores' worth of CPU time that the container may take, by its control group, or None.

    Args:
        root: where control groups are mounted.
    """
    for file, pattern in (
        (root / _own_group() / "cpu.max", r"(\d+) (\d+)"),
        (root / "cpu.max", r"(\d+) (\d+)"),
        (root / "cpu" / "cpu.cfs_quota_us", r"(\d+)"),
        (root / "cpu,cpuacct" / "cpu.cfs_quota_us", r"(\d+)"),
    ):
        try:
            found = re.fullmatch(pattern, file.read_text().strip())
            if found is not None:
                period = found[2] if found.lastindex == 2 else file.with_name("cpu.cfs_period_us").read_text()
                return int(found[1]) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


def _own_group() -> str:
    """Return the path of this process's control group (version 2) below the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
