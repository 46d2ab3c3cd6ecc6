"""What this machine offers, what is used of it, what would be faster, and whether the kernels compute right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from magicpig import machine
from magicpig.functional import attend
from magicpig.kernels import library
from magicpig.wording import counted

INTERESTING_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the relative error; bfloat16 keeps 8 bits of the output


@dataclass(frozen=True)
class Check:
    """One computation on one instruction-set level, compared with torch in float64."""

    isa: str
    dtype: str
    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # also False for NaN


@dataclass(frozen=True)
class Report:
    """Everything `magicpig doctor` says. Memory in bytes; None where the system does not tell or has no such thing."""

    isa: str
    isa_usable: list[str]
    isa_built: list[str]
    cpu: str
    cpu_flags: list[str]
    usable_cpus: int
    cpu_quota: float | None
    physical_cores: int | None
    threads: int
    torch_threads: int
    pool: str
    memory_total: int
    memory_available: int
    memory_limit: int | None
    huge_pages: str | None
    numa_nodes: int
    gpu: str | None
    versions: dict[str, str]
    environment: dict[str, str]
    checks: list[Check]
    advice: list[str]

    @property
    def healthy(self) -> bool:
        return all(check.passed for check in self.checks)


def examine() -> Report:
    """Look at the machine and check every level it can run. Takes about a second."""
    facts = Report(
        isa=library.isa(),
        isa_usable=library.isa_levels(True),
        isa_built=library.isa_levels(False),
        cpu=machine.cpu_model(),
        cpu_flags=[flag for flag in INTERESTING_FLAGS if flag in machine.cpu_flags()],
        usable_cpus=machine.usable_cpus(),
        cpu_quota=machine.cpu_quota(),
        physical_cores=machine.physical_cores(),
        threads=library.threads(),
        torch_threads=torch.get_num_threads(),
        pool=library.pool(),
        memory_total=machine.total_memory(),
        memory_available=machine.available_memory(),
        memory_limit=machine.cgroup_limit(),
        huge_pages=machine.huge_pages(),
        numa_nodes=machine.numa_nodes(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        versions=machine.versions(),
        environment=machine.environment(),
        checks=self_check(),
        advice=[],
    )
    facts.advice.extend(advise(facts))
    return facts


def self_check(levels: list[str] | None = None, head_dim: int = 80, group: int = 3) -> list[Check]:
    """Attention over a few hundred random tokens, all of them read or all of them sampled, against torch in float64.

    levels: the instruction-set levels to try, all usable ones by default; the one in use is in use again afterwards.
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2 * group, 1, head_dim, generator=generator, dtype=torch.float32, device="cpu")
    keys, values = torch.randn(2, 1, 2, 333, head_dim, generator=generator, dtype=torch.float32, device="cpu")
    # One bit, and one hit in 64 tables is enough: a key stays out with a probability below 1e-9.
    settings: dict[str, dict[str, Any]] = {
        "reads every key": {"sampler": "full"},
        "samples every key": {"K": 1, "L": 64, "min_hits": 1},
        "sketches every key": {"sampler": "sketch", "budget": 10**6},
    }
    used, checks = library.isa(), []
    try:
        for level in library.isa_levels(True) if levels is None else levels:
            library.use_isa(level)
            for dtype, tolerance in TOLERANCE.items():
                inputs = [x.to(dtype) for x in (query, keys, values)]
                wide_query, wide_keys, wide_values = (x.double() for x in inputs)
                exact = scaled_dot_product_attention(wide_query, wide_keys, wide_values, enable_gqa=True)
                for what, setting in settings.items():
                    output, _, _ = attend(*inputs, **setting)
                    error = float((output.double() - exact).norm() / exact.norm())
                    checks.append(Check(level, str(dtype).removeprefix("torch."), what, error, tolerance))
    finally:
        library.use_isa(used)
    return checks


def advise(facts: Report) -> list[str]:
    """What the user could do to make this machine faster, one line each."""
    advice = []
    if facts.isa != facts.isa_usable[0]:
        advice.append(f"unset MAGICPIG_ISA: it forces {facts.isa}, this machine can run {facts.isa_usable[0]}")
    elif facts.isa != facts.isa_built[0]:
        advice.append(f"nothing to set: a processor with {facts.isa_built[0]} would be faster with bfloat16 models")
    quota = facts.usable_cpus if facts.cpu_quota is None else max(1, math.ceil(facts.cpu_quota))
    usable = min(facts.usable_cpus, quota)
    cores = min(facts.physical_cores or usable, usable)
    if facts.torch_threads < cores:
        advice.append(f"set OMP_NUM_THREADS={cores}: torch uses {facts.torch_threads} of {counted(cores, 'core')}")
    if facts.torch_threads > usable:
        sharing = f"{counted(facts.torch_threads, 'thread')} share {counted(usable, 'processor')}"
        limited = ", which is all that the container may use" if usable < facts.usable_cpus else ""
        advice.append(f"set OMP_NUM_THREADS={cores}: {sharing}{limited}")
    if facts.pool != "torch":
        advice.append(f"unset MAGICPIG_POOL: the {facts.pool} pool competes with torch's spinning threads")
    if facts.huge_pages == "never":
        advice.append("set /sys/kernel/mm/transparent_hugepage/enabled to madvise: rows are gathered faster")
    if facts.memory_limit is not None and facts.memory_limit < facts.memory_total:
        advice.append(f"raise the container's limit of {facts.memory_limit / 2**30:.1f} GiB for longer contexts")
    return advice
