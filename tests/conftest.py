import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state; a test that wants another one seeds its own generator."""
    torch.manual_seed(0)
