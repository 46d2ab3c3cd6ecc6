"""Every native test runs on poisoned scratch memory; those that ask for `isa` or `pool` run once on each."""

from collections.abc import Iterator

import pytest

from magicpig.kernels import native


@pytest.fixture(autouse=True)
def poisoned_scratch() -> Iterator[None]:
    """Scratch memory is filled with NaN before each use, so a kernel that reads what it did not write shows."""
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
