"""Facts about the machine and the software, as the operating system tells them. Knows nothing of attention."""

from __future__ import annotations

import os
import platform
import subprocess
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


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes of memory the control group (container) of this process may use; None without a limit.

    Every group from this process's own up to the root counts; the tightest wins.
    """
    limits = []
    for line in _lines(membership):
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        base, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        group = base / path.strip().lstrip("/")
        for folder in (group, *group.parents):
            if folder == root.parent:
                break
            text = "".join(_lines(folder / name)).strip()
            if text.isdigit() and int(text) < _UNLIMITED:
                limits.append(int(text))
    return min(limits, default=None)


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
