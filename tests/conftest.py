"""Every test starts from one random state, in an empty folder, on poisoned scratch; with `isa` or `pool`, on each."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.testing

from magicpig.kernels import library

# Kernels in Triton run interpreted where there is no accelerator. Triton looks once, when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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
    "test_weights.py",
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


@pytest.fixture(scope="session")
def save_tiny_llama() -> Callable[..., Path]:
    """Writes a Llama with random weights and a tokenizer of words; `settings` are those of its configuration."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def save(
        path: Path,
        words: list[str],
        *,
        split: Any = None,
        special: dict[str, str] | None = None,
        template: str | None = None,
        **settings: Any,
    ) -> Path:
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = split or pre_tokenizers.Whitespace()
        special = {"eos_token": "<eos>"} if special is None else special
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)
        fast.chat_template = template
        fast.save_pretrained(path)
        torch.manual_seed(0)
        shape = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape | settings)).save_pretrained(path)
        return path

    return save


@pytest.fixture(params=library.levels_to_test())
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


@pytest.fixture(scope="session")
def byte_model() -> Callable[[], tuple[Any, Any]]:
    """`byte_model()`: a tiny network, new each time, and a tokenizer whose tokens are bytes, which grammars need."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<eos>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["the city of rome and the city of oslo"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, eos_token_id=0, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip

    def make() -> tuple[Any, Any]:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), tokenizer

    return make
