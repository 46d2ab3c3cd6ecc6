"""Facts about the machine and the software, as the operating system tells them. Knows nothing of attention."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

VARIABLES = (
    "MAGICPIG_ISA",
    "MAGICPIG_POOL",
    "MAGICPIG_THREADS",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60  # version 1 control groups write "no limit" as nearly 2**63, rounded to pages


def cpu_model() -> str:
    """What the processor calls itself."""
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model"):
            return value.strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The instruction sets the processor announces, in Linux's spelling; empty where Linux does not tell."""
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def usable_cpus() -> int:
    """Logical processors this process may run on."""
    return len(_affinity() | _AFFINITY_AT_START) or os.cpu_count() or 1


def physical_cores() -> int | None:
    """Cores of the machine, not counting hyper-threads; None if unknown."""
    count: int | None = psutil.cpu_count(logical=False)
    return count


def default_threads() -> int:
    """Threads that can run at once: as many as usable processors, or fewer where the container has a quota."""
    quota = cpu_quota()
    return usable_cpus() if quota is None else max(1, min(usable_cpus(), math.ceil(quota)))


def cpu_quota(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> float | None:
    """Processors' worth of time that the control group (container) of this process may use; None without a quota."""
    quotas = []
    for folder, generation in _control_groups("cpu", root, membership):
        if generation == 2:
            allowed, period = (*" ".join(_lines(folder / "cpu.max")).split(), "", "")[:2]
        else:
            allowed, period = ("".join(_lines(folder / f"cpu.cfs_{name}_us")).strip() for name in ("quota", "period"))
        if allowed.isdigit() and period.isdigit() and int(allowed) > 0 and int(period) > 0:  # else "max", or -1
            quotas.append(int(allowed) / int(period))
    return min(quotas, default=None)


def cgroup_limit(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int | None:
    """Bytes of memory the control group (container) of this process may use; None without a limit."""
    limits = []
    for folder, generation in _control_groups("memory", root, membership):
        text = "".join(_lines(folder / ("memory.max" if generation == 2 else "memory.limit_in_bytes"))).strip()
        if text.isdigit() and int(text) < _UNLIMITED:
            limits.append(int(text))
    return min(limits, default=None)


def _control_groups(controller: str, root: Path, membership: Path) -> Iterator[tuple[Path, int]]:
    """The folders of a controller from this process's own group up to the root, and the version of their files.

    All of them bind, so the tightest limit is the one that holds.
    """
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 1 mounts controllers apart; those that share a mount are linked to by each one's name.
        group = (root / controller if controllers else root) / path.strip().lstrip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            yield folder, 1 if controllers else 2


def waited_ns(tasks: Path = Path("/proc/self/task")) -> int | None:
    """Nanoseconds that threads of this process could have run and had no processor; None where Linux does not say."""
    waits = [line.split()[1] for each in tasks.glob("*/schedstat") for line in _lines(each)]
    return sum(map(int, waits)) if waits else None


def total_memory() -> int:
    """Bytes of memory in the machine."""
    return int(psutil.virtual_memory().total)


def available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    return int(psutil.virtual_memory().available)


def free_memory() -> int:
    """Bytes this process may still take: of the machine, and of its container if that is smaller."""
    free, limit = available_memory(), cgroup_limit()
    if limit is not None:
        free = min(free, max(0, limit - int(psutil.Process().memory_info().rss)))
    return free


def huge_pages(path: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> str | None:
    """The setting of transparent huge pages: always, madvise or never; None if the system has none."""
    words = " ".join(_lines(path)).split()
    return next((word.strip("[]") for word in words if word.startswith("[")), None)


def numa_nodes(path: Path = Path("/sys/devices/system/node")) -> int:
    """Memory nodes; a processor reads its own node's memory faster than another's."""
    return max(1, sum(1 for node in path.glob("node[0-9]*")))


def versions() -> dict[str, str]:
    """Versions of magicpig and of what it stands on."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("magicpig", "torch", "transformers", "tokenizers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """The git commit of the source tree this package runs from, "+changes" if edited; None when installed."""
    tree = Path(__file__).resolve().parents[2]
    if not (tree / ".git").exists():
        return None
    try:
        head = _git(tree, "rev-parse", "HEAD")
        edited = _git(tree, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if edited else "")


def environment() -> dict[str, str]:
    """Those of `VARIABLES` that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _affinity() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set()


# OMP_PROC_BIND narrows the main thread to one processor as soon as torch is imported.
_AFFINITY_AT_START = _affinity()


def _git(tree: Path, *arguments: str) -> str:
    command = ["git", "-C", str(tree), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
