"""A tiny model with random weights that reads the words of the tasks; it knows nothing, but it always answers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from magicpig.studies.evaluation.tasks.vocabulary import vocabulary

LIMIT = 8192


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, save_tiny_llama: Callable[..., Path]) -> Path:
    """Three layers."""
    return save_tiny_llama(
        tmp_path_factory.mktemp("models") / "tiny",
        ["<unk>", "<eos>", *vocabulary()],
        split=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)]),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        max_position_embeddings=LIMIT,
    )
