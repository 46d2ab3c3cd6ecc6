"""Tokens per second of reading a prompt, at some depth of it, for models of real shapes.

The model, and what is in front of the tokens, which nobody has to read, are those of decode.py. A pass of `tokens` new
tokens behind `context` others is what reading a prompt in chunks is made of: the matrices of the model take the same
time in all of them, attention grows with the depth. How far it is from what the processor can do is told by its rate at
a plain product of matrices.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from magicpig.attention import step
from magicpig.config import EXACT
from magicpig.integrations.transformers.compat import cache_argument
from magicpig.integrations.transformers.shapes import layer_shapes
from magicpig.kernels import library
from magicpig.studies.bench.clocks import Clocks
from magicpig.studies.bench.decode import Decoder
from magicpig.studies.bench.quiet import Timing, count, quiet_ms, timed
from magicpig.studies.evaluation.matrix import Method

_PRODUCTS, _SIZE = 5, 2048


@dataclass(frozen=True)
class Result:
    """One depth. Milliseconds and rates are medians over passes that never waited for a processor (quiet.py).

    tokens_per_s: of a pass of `tokens` behind `context` others. attention_ms: of the pass, all layers.
    attention_gflops: of the two products of attention, what is masked left out; product_gflops: of a plain product of
    two matrices of the model's dtype, or of floats where that is faster, both in 10^9 operations a second. calls:
    passes that were timed; quiet_calls: those that count.
    """

    context: int
    tokens: int
    tokens_per_s: float
    pass_ms: float
    attention_ms: float
    attention_gflops: float
    product_gflops: float
    calls: int
    quiet_calls: int


@torch.inference_mode()
def measure(
    decoder: Decoder,
    context: int,
    tokens: int,
    *,
    repeats: int,
    on_round: Callable[[], None] = lambda: None,
) -> Result:
    """Reads ``tokens`` behind ``context`` others ``repeats`` times. on_round is called after every pass.

    Raises MemoryError for what does not fit, before anything is made.
    """
    decoder.check(context, [Method("full", EXACT)])
    model, cache = decoder.model(), decoder.filled(context, EXACT)
    ids = torch.arange(tokens, dtype=torch.int64, device="cpu")[None] % decoder.model_config.vocab_size
    clocks, timings, attention = Clocks(), [], []

    def read() -> None:
        with cache.prefilling():
            model(ids, logits_to_keep=1, **cache_argument(cache))

    with clocks.on(step, "prefill", "attention"):
        for turn in range(repeats + 1):
            spent = clocks.spent("attention")
            timing = timed(read)
            cache.crop(context - cache.get_seq_length())
            if turn > 0:  # the first warms up
                timings.append(timing)
                attention.append(Timing(1e3 * (clocks.spent("attention") - spent), timing.waited))
                on_round()
    pass_ms, attention_ms = statistics.median(quiet_ms(timings)), statistics.median(quiet_ms(attention))
    quiet = count(timings)
    # A query sees all that is in front of these tokens, and of them half on average.
    shape = layer_shapes(decoder.model_config, EXACT)[0]
    pairs = tokens * (context + (tokens + 1) / 2)
    operations = 4 * decoder.model_config.num_attention_heads * shape.head_dim * pairs * decoder.layers
    return Result(
        context=context,
        tokens=tokens,
        tokens_per_s=1e3 * tokens / pass_ms,
        pass_ms=pass_ms,
        attention_ms=attention_ms,
        attention_gflops=operations / attention_ms / 1e6,
        product_gflops=product_gflops(decoder.dtype),
        calls=quiet.calls,
        quiet_calls=quiet.quiet,
    )


def product_gflops(dtype: torch.dtype) -> float:
    """10^9 operations a second of a product of two matrices: the most that could be hoped for."""
    a, b = torch.randn(2, _SIZE, _SIZE, dtype=torch.float32, device="cpu")
    if library.torch_multiplies(dtype):
        a, b = a.to(dtype), b.to(dtype)
    torch.mm(a, b)
    times = quiet_ms(timed(lambda: torch.mm(a, b)) for _ in range(_PRODUCTS))
    return 2 * _SIZE**3 / statistics.median(times) / 1e6
