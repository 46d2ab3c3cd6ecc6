"""What llama.cpp takes for the same work, where llama-cpp-python is installed: its tokens beside ours, on one machine.

The model has the sizes of ours and random weights, in a GGUF file that is made for it. What is in front of the tokens
is not read, as that takes llama.cpp half an hour for 32K tokens: a few hundred tokens are, their keys and values are
taken out as a saved sequence, repeated up to the length that is wanted, and put back. So the cache holds as much as
after a prompt, in llama.cpp's own layout and types (16-bit floats, flash attention), and its time does not depend on
what the numbers are.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedConfig

from magicpig.errors import ArgumentError, MagicPigError
from magicpig.machine import free_memory
from magicpig.studies.bench.quiet import Timing, count, quiet_ms, timed

KINDS = ("q8_0", "bf16")
_NOISE = 1 << 20  # random numbers that are made; matrices repeat them, as those of decode.py
_READ = 256  # tokens that are read to have some keys and values
_BATCH = 512  # tokens at a time, llama.cpp's own default
_CELL = np.dtype([("position", "<i4"), ("sequences", "<u4"), ("sequence", "<i4")])


class LlamaCppError(MagicPigError):
    """llama.cpp cannot be measured here."""

    code = "llama_cpp"


@dataclass(frozen=True)
class Result:
    """One context, weights and batch: the median of tokens that never waited for a processor (quiet.py).

    tokens_per_s: of all requests together. token_ms: of a step, which is a token of each of them.
    """

    context: int
    name: str
    batch: int
    version: str
    tokens_per_s: float
    token_ms: float
    token_min_ms: float
    calls: int
    quiet_calls: int


def missing() -> list[str]:
    """The packages that would have to be installed first."""
    return [name for name, module in (("llama-cpp-python", "llama_cpp"), ("gguf", "gguf")) if find_spec(module) is None]


def write_model(path: Path, config: PreTrainedConfig, kind: str) -> None:
    """A GGUF file of a Llama of these sizes with random matrices; ``kind`` of `KINDS`. Raises ArgumentError."""
    import gguf

    if config.model_type != "llama" or config.hidden_size % 32 or config.intermediate_size % 32:
        raise ArgumentError("llama.cpp is measured with shapes of Llama whose sizes are multiples of 32")
    form = gguf.GGMLQuantizationType[kind.upper()]
    noise = np.random.default_rng(0).uniform(-(3**0.5), 3**0.5, _NOISE).astype(np.float32).reshape(-1, 32)
    writer = gguf.GGUFWriter(path, "llama")
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(D)
    writer.add_value_length(D)
    writer.add_rope_dimension_count(D)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int) -> None:
        blocks = gguf.quants.quantize(noise * columns**-0.5, form).view(np.uint8).reshape(-1)
        bytes_of_row = columns // 32 * (len(blocks) // len(noise))
        writer.add_tensor(name, np.resize(blocks, (rows, bytes_of_row)), raw_dtype=form)

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, dtype=np.float32))

    matrix("token_embd.weight", vocabulary, hidden)
    if not config.tie_word_embeddings:
        matrix("output.weight", vocabulary, hidden)
    norm("output_norm.weight")
    for layer in range(config.num_hidden_layers):
        prefix = f"blk.{layer}."
        norm(f"{prefix}attn_norm.weight")
        norm(f"{prefix}ffn_norm.weight")
        matrix(f"{prefix}attn_q.weight", heads * D, hidden)
        matrix(f"{prefix}attn_k.weight", kv_heads * D, hidden)
        matrix(f"{prefix}attn_v.weight", kv_heads * D, hidden)
        matrix(f"{prefix}attn_output.weight", hidden, heads * D)
        matrix(f"{prefix}ffn_gate.weight", inner, hidden)
        matrix(f"{prefix}ffn_up.weight", inner, hidden)
        matrix(f"{prefix}ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stretched(state: NDArray[np.uint8], cells: int) -> NDArray[np.uint8]:
    """A saved sequence (llama_state_seq_get_data) with ``cells`` tokens: its rows of keys and values, repeated.

    The layout is that of llama_context::state_seq_get_data: two numbers that say what it is, the number of streams; of
    each its cells, and where there are any, position and sequence of each cell, whether values are transposed, the
    layers, and of each layer, first for all keys and then for all values, type, bytes of a row, rows. Raises
    LlamaCppError where it is another.
    """
    parts: list[NDArray[np.uint8]] = []
    at = 0

    def take(size: int) -> NDArray[np.uint8]:
        nonlocal at
        if at + size > len(state):
            raise LlamaCppError("a saved sequence of this version of llama.cpp is laid out in another way")
        at += size
        return state[at - size : at]

    def keep(form: str) -> int:
        parts.append(take(np.dtype(form).itemsize))
        return int(parts[-1].view(form)[0])

    parts.append(take(8))
    for _ in range(keep("<u4")):
        held = int(take(4).view("<u4")[0])
        parts.append(np.array([cells if held else 0], dtype="<u4").view(np.uint8))
        if held == 0:
            continue
        meta = np.resize(take(held * _CELL.itemsize).view(_CELL), cells)
        meta["position"] = np.arange(cells)
        parts.append(meta.view(np.uint8))
        if keep("<u4"):
            raise LlamaCppError("llama.cpp keeps values transposed here, as it does without flash attention")
        for _ in range(2 * keep("<u4")):
            keep("<i4")
            row = keep("<u8")
            parts.append(np.resize(take(held * row), cells * row))
    if at != len(state):
        raise LlamaCppError("a saved sequence of this version of llama.cpp is laid out in another way")
    return np.concatenate(parts)


class LlamaCpp:
    """A model of llama.cpp with random weights, behind contexts that are made up."""

    def __init__(
        self, config: PreTrainedConfig, kind: str, folder: Path, *, longest: int, batch: int, threads: int
    ) -> None:
        """Writes the model into ``folder`` and opens it, for ``batch`` sequences of up to ``longest`` tokens.

        Raises ArgumentError, LlamaCppError, and MemoryError where they do not fit.
        """
        if lacking := missing():
            raise LlamaCppError(f"llama.cpp is measured with packages that are not installed: {' '.join(lacking)}")
        import llama_cpp

        if kind not in KINDS:
            raise ArgumentError(f"weights {kind!r} of llama.cpp are not one of {', '.join(KINDS)}")
        path = folder / f"{kind}.gguf"
        write_model(path, config, kind)
        row = 4 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers  # float16, keys and values
        needed = path.stat().st_size + (batch + 1) * row * (longest + _BATCH)
        if needed > (free := free_memory()):
            raise MemoryError(
                f"llama.cpp needs about {needed / 2**30:.1f} GiB of memory for {batch} contexts of {longest}, "
                f"{free / 2**30:.1f} GiB are available"
            )
        self.kind, self.batch, self.version = kind, batch, llama_cpp.__version__
        self._api: Any = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise LlamaCppError("llama.cpp does not open the model that was made for it")
        settings = llama_cpp.llama_context_default_params()
        # Its caches are cut into pieces of 256 tokens.
        settings.n_ctx = batch * (-(-longest // 256) * 256)
        settings.n_seq_max = batch
        settings.n_batch, settings.n_ubatch = max(_BATCH, batch), _BATCH
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise LlamaCppError("llama.cpp makes no context of this size")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._words = config.vocab_size
        self.length = 0

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def fill(self, context: int) -> None:
        """Every sequence holds ``context`` tokens. Raises LlamaCppError."""
        api = self._api
        api.llama_memory_clear(self._memory, True)
        self.length = 0
        self._read(min(context, _READ))
        state = np.empty(api.llama_state_seq_get_size(self._context, 0), dtype=np.uint8)
        api.llama_state_seq_get_data(self._context, _bytes(state), state.nbytes, 0)
        state = stretched(state, context)
        for sequence in range(self.batch):
            read = api.llama_state_seq_set_data(self._context, _bytes(state), state.nbytes, sequence)
            if read != state.nbytes or api.llama_memory_seq_pos_max(self._memory, sequence) != context - 1:
                raise LlamaCppError("llama.cpp does not take back the sequence that was stretched")
        self.length = context

    def decode(self, steps: int) -> list[Timing]:
        """Answers with ``steps`` tokens in every sequence, the likeliest each time, and forgets them again."""
        words, timings = [1] * self.batch, []

        def step() -> None:
            rows = self._pass([(word, self.length, sequence) for sequence, word in enumerate(words)])
            words[:] = [int(row.argmax()) for row in rows]

        start = self.length
        for _ in range(steps):
            timings.append(timed(step))
            self.length += 1
        self._forget(start)
        return timings

    def read(self, tokens: int) -> Timing:
        """Reads so many tokens in the first sequence, and forgets them again."""
        start = self.length
        timing = timed(lambda: self._read(tokens))
        self._forget(start)
        return timing

    def _read(self, tokens: int) -> None:
        """Tokens of the first sequence, of which nothing is kept but keys and values."""
        for first in range(0, tokens, _BATCH):
            here = range(first, min(tokens, first + _BATCH))
            self._pass([(each % self._words, self.length + each, 0) for each in here], outputs=1)

    def _forget(self, length: int) -> None:
        for sequence in range(self.batch):
            self._api.llama_memory_seq_rm(self._memory, sequence, length, -1)
        self.length = length

    def _pass(self, tokens: Sequence[tuple[int, int, int]], *, outputs: int | None = None) -> list[NDArray[np.float32]]:
        """A forward pass over (word, position, sequence); the logits after the last ``outputs`` of them, or all."""
        api, number = self._api, len(tokens)
        first = 0 if outputs is None else number - outputs
        batch = api.llama_batch_init(number, 0, 1)
        try:
            batch.n_tokens = number
            for i, (word, position, sequence) in enumerate(tokens):
                batch.token[i], batch.pos[i] = word, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = i >= first
            if failed := api.llama_decode(self._context, batch):
                raise LlamaCppError(f"llama.cpp does not compute {number} tokens: it answers {failed}")
        finally:
            api.llama_batch_free(batch)
        rows = (api.llama_get_logits_ith(self._context, i) for i in range(first, number))
        return [np.ctypeslib.as_array(row, shape=(self._words,)) for row in rows]


class Turns:
    """llama.cpp at one context, to take turns with others: call it for an answer."""

    def __init__(self, llama: LlamaCpp, context: int, steps: int) -> None:
        llama.fill(context)
        self._llama, self._context, self._steps = llama, context, steps
        self._timings: list[Timing] | None = None

    def __call__(self) -> None:
        timings = self._llama.decode(self._steps + 1)[1:]  # the first finds the caches full of other things
        if self._timings is None:  # the first answer warms up
            self._timings = []
        else:
            self._timings += timings

    def result(self) -> Result:
        """What the answers after the first took."""
        llama, timings = self._llama, self._timings or []
        times, quiet = quiet_ms(timings), count(timings)
        token_ms = statistics.median(times)
        return Result(
            context=self._context,
            name=f"llama.cpp:{llama.kind}",
            batch=llama.batch,
            version=llama.version,
            tokens_per_s=1e3 * llama.batch / token_ms,
            token_ms=token_ms,
            token_min_ms=min(times),
            calls=quiet.calls,
            quiet_calls=quiet.quiet,
        )


@dataclass(frozen=True)
class ReadResult:
    """Reading ``tokens`` behind ``context`` others: medians of passes that never waited for a processor."""

    context: int
    tokens: int
    name: str
    version: str
    tokens_per_s: float
    pass_ms: float
    calls: int
    quiet_calls: int


def measure_reading(
    llama: LlamaCpp, context: int, tokens: int, *, repeats: int, on_round: Callable[[], None] = lambda: None
) -> ReadResult:
    """Reads ``tokens`` behind ``context`` others ``repeats`` times. on_round is called after each."""
    llama.fill(context)
    timings = []
    for turn in range(repeats + 1):
        timing = llama.read(tokens)
        if turn > 0:  # the first warms up
            timings.append(timing)
            on_round()
    pass_ms, quiet = statistics.median(quiet_ms(timings)), count(timings)
    return ReadResult(
        context=context,
        tokens=tokens,
        name=f"llama.cpp:{llama.kind}",
        version=llama.version,
        tokens_per_s=1e3 * tokens / pass_ms,
        pass_ms=pass_ms,
        calls=quiet.calls,
        quiet_calls=quiet.quiet,
    )


def _bytes(memory: NDArray[np.uint8]) -> Any:
    return memory.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
