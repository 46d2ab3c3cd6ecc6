"""Every test starts from one random state and on poisoned scratch; those that ask for `isa` or `pool` run on each."""

from collections.abc import Iterator

import pytest
import torch

from magicpig.kernels import native


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state; a test that wants another one seeds its own generator."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_scratch() -> Iterator[None]:
    """Fill the kernels' scratch memory with NaN before each use: reading what was not written shows at once."""
    native.poison_scratch(True)
    yield
    native.poison_scratch(False)


@pytest.fixture(params=native.isa_levels(True))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine can run, in use for the test."""
    before = native.isa()
    native.use_isa(request.param)
    assert native.isa() == request.param
    yield request.param
    native.use_isa(before)


@pytest.fixture(params=["torch", "std", "serial"])
def pool(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each thread pool, in use for the test."""
    before = native.pool()
    native.use_pool(request.param)
    assert native.pool() == request.param
    yield request.param
    native.use_pool(before)
