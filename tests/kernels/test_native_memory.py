import pathlib

import pytest
import torch

from magicpig.kernels import _native, library

HUGE = 2 << 20
POLICIES = pathlib.Path("/proc/self/numa_maps")


def policy_of(memory):
    """What the system says of the pages of a tensor, as "interleave:0"."""
    for line in POLICIES.read_text().splitlines():
        address, policy = line.split()[:2]
        if int(address, 16) == memory.data_ptr():
            return policy
    return "default"  # the mapping goes on from one before it, which has no policy either


@pytest.mark.parametrize("elements", [0, 1, 1000, HUGE // 4, HUGE // 4 + 1, HUGE])
def test_memory_is_zeroed_and_aligned(elements):
    memory = library.empty((elements,), torch.float32)
    assert memory.shape == (elements,)
    assert not memory.any()
    assert memory.data_ptr() % (HUGE if 4 * elements >= HUGE else 4096) == 0


@pytest.mark.skipif(not POLICIES.exists(), reason="a system without memory policies")
def test_large_memory_takes_turns_on_the_nodes():
    # On a machine of one node the same call, told that one is enough.
    memory = library.empty((2 * HUGE,), torch.int8)
    if "interleave" not in policy_of(memory):
        assert not _native.interleave(memory.data_ptr(), 2 * HUGE, 1 << 10)
        assert policy_of(memory) == "default"
        assert _native.interleave(memory.data_ptr(), 2 * HUGE, 1)
    assert policy_of(memory).startswith("interleave:0")
    assert not memory.any()
