"""Every test starts from one random state, in an empty folder, on poisoned scratch; with `isa` or `pool`, on each."""

import os
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import typer.testing

from magicpig.kernels import library

# Commands are called thousands of times, and typer makes all of them anew for each call: 45 ms, most of what it takes.
typer.testing._get_command = lru_cache(typer.testing._get_command)

# Modules whose results depend on the numbers of the kernels.
NUMBERS = {
    "test_decode.py",
    "test_functional.py",
    "test_fuzzed_steps.py",
    "test_int8.py",
    "test_known_defects.py",
    "test_native_attend.py",
    "test_native_hash.py",
    "test_native_rows.py",
    "test_native_sketch.py",
    "test_native_tables.py",
    "test_predicted_error.py",
    "test_prefill.py",
    "test_samplers.py",
    "test_sampling.py",
    "test_sketch.py",
    "test_store.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `numbers`: what `make test-levels` runs on each level. What asks for `isa` runs on all of them anyway."""
    for item in items:
        if item.path.name in NUMBERS and "isa" not in getattr(item, "fixturenames", ()):
            item.add_marker("numbers")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state; a test that wants another one seeds its own generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def nowhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder."""
    return tmp_path_factory.mktemp("nowhere")


@pytest.fixture(autouse=True)
def working_directory(nowhere: Path) -> Iterator[None]:
    """Run every test in an empty folder and leave it empty: whatever dies half-way leaves nothing in the checkout."""
    before = Path.cwd()
    os.chdir(nowhere)
    yield
    os.chdir(before)
    left = sorted(nowhere.iterdir())
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert left == [], "the test left these in its working directory; use tmp_path"


@pytest.fixture(autouse=True)
def poisoned_scratch() -> Iterator[None]:
    """Fill the kernels' scratch memory with NaN before each use: reading what was not written shows at once."""
    library.poison_scratch(True)
    yield
    library.poison_scratch(False)


def _levels() -> list[str]:
    """Each level that this machine can run; emulated are only those that it cannot run itself."""
    own = library.isa_levels(True)
    return [level for level in own if level.removesuffix("-emulated") not in set(own) - {level}]


@pytest.fixture(params=_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine can run, in use for the test."""
    before = library.isa()
    library.use_isa(request.param)
    assert library.isa() == request.param
    yield request.param
    library.use_isa(before)


@pytest.fixture(params=["torch", "std", "serial"])
def pool(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each thread pool, in use for the test; torch's has two threads."""
    before = library.pool(), torch.get_num_threads()
    library.use_pool(request.param)
    torch.set_num_threads(2)
    assert library.pool() == request.param
    yield request.param
    library.use_pool(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of thousands of tiny operations: threads that wait for one another only get in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, whatever the machine has and whatever `one_thread` said."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
