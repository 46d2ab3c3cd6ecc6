"""Loops on every pool: after a fork, and with any number of threads."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from magicpig import Config
from magicpig.attention.step import decode_step
from magicpig.errors import ArgumentError, EnvironmentVariableError, NotFiniteError
from magicpig.kernels import library
from magicpig.store import KVStore

STEP = """
    import os, signal, torch
    from magicpig import Config
    from magicpig.attention.step import decode_step
    from magicpig.kernels import cpu, library
    from magicpig.store import KVStore

    # So few that torch's own operations need one thread: they wait for ever in a forked child, where none are left.
    keys = torch.randn(4, 200, 16, generator=torch.Generator().manual_seed(0))

    def step():
        store = KVStore(4, 16, torch.float32, Config(exact_below=0, budget=50), sampled=True)
        store.append(keys, keys)
        return decode_step(keys[None, :, 0], *(2 * [keys[None, :, 1]]), [store], scale=0.2).output
"""


def run(code: str, **variables: str) -> str:
    """What a fresh process prints. It is given a minute, of which it needs seconds: what hangs, hangs for ever."""
    environment = os.environ | {"MAGICPIG_POOL": ""} | variables
    command = [sys.executable, "-c", textwrap.dedent(STEP) + textwrap.dedent(code)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize("pool", ["torch", "std", "serial"])
def test_a_forked_child_computes_the_same(pool):
    # Neither torch's threads nor ours come along; the child of a child has none either.
    code = """
        torch.set_num_threads(2)
        right = step()
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            ok = torch.equal(step(), right)
            grandchild = os.fork()
            if grandchild == 0:
                signal.alarm(30)
                os._exit(0 if torch.equal(step(), right) and torch.equal(step(), right) else 1)
            _, status = os.waitpid(grandchild, 0)
            os._exit(0 if ok and status == 0 else 1)
        _, status = os.waitpid(child, 0)
        print(status, library.pool(), library.threads(), torch.equal(step(), right))
    """
    expected = {"torch": 2, "std": 3, "serial": 1}[pool]
    assert run(code, MAGICPIG_POOL=pool, MAGICPIG_THREADS="3") == f"0 {pool} {expected} True"


def test_loops_take_threads_of_their_own_where_torch_is_told_to_start_too_many():
    # From some thousands on torch itself ends the process at its next parallel operation.
    code = """
        store = KVStore(4, 16, torch.float32, Config(exact_below=0, budget=50), sampled=True)
        store.append(keys, keys)
        large = torch.ones(1 << 20)
        torch.set_num_threads(library.MAX_THREADS + 1)
        library.stream_read(large)
        state = cpu.decode_step([store.view], keys[None, :, 0].contiguous(), None, None, scale=0.2)
        print(library.threads(), bool(state.output.isfinite().all()))
    """
    assert run(code, MAGICPIG_THREADS="2") == "2 True"


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
def test_a_pool_has_as_many_threads_as_the_system_allows():
    code = """
        import resource
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), resource.RLIM_INFINITY))
        threads = library.threads()
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(1 < threads < 1000, bool(step().isfinite().all()))
    """
    assert run(code, MAGICPIG_POOL="std", MAGICPIG_THREADS="1000") == "True True"


def test_what_the_kernels_refuse_can_be_told_apart():
    store = KVStore(1, 8, torch.float32, Config(), sampled=True)
    x = torch.ones(1, 1, 8)
    with pytest.raises(NotFiniteError, match=r"^keys has entries that are not finite, or too large for the store$"):
        decode_step(x, x / 0, x, [store], scale=1.0)
    with pytest.raises(NotFiniteError, match=r"^values has entries that are not finite, or too large for the store"):
        store.append(x, x / 0)
    assert store.length == 0
    for refused, message in (
        (library.use_isa, "level 'sse9' cannot run here"),
        (library.use_pool, "pool 'sse9' is not"),
    ):
        with pytest.raises(ArgumentError, match=rf"^{message}") as caught:
            refused("sse9")
        assert not isinstance(caught.value, (NotFiniteError, EnvironmentVariableError))
