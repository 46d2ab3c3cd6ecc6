"""The compiled library itself: its instruction sets, its threads, and the memory it gives; and what torch's lacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from magicpig.errors import ArgumentError
from magicpig.kernels import _native

MAX_THREADS: int = _native.MAX_THREADS

isa = _native.isa
isa_levels = _native.isa_levels
use_isa = _native.use_isa
pool = _native.pool
use_pool = _native.use_pool
threads = _native.threads
poison_scratch = _native.poison_scratch


def levels_to_test() -> list[str]:
    """The instruction sets of this machine, best first, and emulations of those that it lacks."""
    own = isa_levels(True)
    return [level for level in own if level.removesuffix("-emulated") not in set(own) - {level}]


@cache
def torch_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this dtype at the speed of the processor.

    Without the instructions that its library wants, AVX-512 for bfloat16 and AVX512-FP16 for float16, it does so at a
    fifth of the speed of float32 and less (docs/log.md). Then it is faster to multiply floats.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    asked = getattr(torch.ops.mkldnn, name, None)  # not public
    return True if asked is None else bool(asked())


def check_threads() -> None:
    """Raises ArgumentError where torch was told to use more threads than it can start: it ends the process then."""
    wanted = torch.get_num_threads()
    if wanted > MAX_THREADS:
        raise ArgumentError(f"torch.get_num_threads() is {wanted}; allowed: 1 to {MAX_THREADS}")


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeroed memory straight from the system: touched lazily, in huge pages where it is large. Raises MemoryError."""
    elements = 1
    for size in shape:
        elements *= size
    memory = torch.from_numpy(_native.allocate(max(1, elements) * dtype.itemsize))
    return memory[: elements * dtype.itemsize].view(dtype).view(*shape)


def stream_read(memory: Tensor) -> None:
    """Reads a contiguous tensor once on all threads: the floor of any computation over as many bytes."""
    _native.stream_read(memory.data_ptr(), memory.numel() * memory.element_size())
