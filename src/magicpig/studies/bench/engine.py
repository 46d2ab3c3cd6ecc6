"""What the engine adds to the model: its step beside the same work done by a bare forward pass over a batch.

Contexts are made up (normal numbers, put straight into stores), so there is no prompt to wait for. The engine's step is
all of `Engine.step`: schedule, packed forward pass, attention, drawing tokens, texts. The bare pass is the transformers
model over a `MagicPigCache` with the same contexts as one batch, and the likeliest token of each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from magicpig.config import EXACT, Config
from magicpig.engine.engine import Engine
from magicpig.engine.options import EngineOptions
from magicpig.engine.request import Delta, Request, SamplingParams
from magicpig.engine.runner import NAME as PACKED
from magicpig.engine.runner import SequenceState
from magicpig.integrations.transformers import NAME, MagicPigCache, attach, detach
from magicpig.integrations.transformers.compat import cache_argument
from magicpig.integrations.transformers.layer import MagicPigLayer
from magicpig.integrations.transformers.shapes import key_dtype, layer_shapes
from magicpig.store import KVStore
from magicpig.studies.bench.quiet import Timing, count, quiet_ms, timed

WARM_UP = 3  # steps


@dataclass(frozen=True)
class Result:
    """Medians in milliseconds of one step of `running` sequences behind `context` tokens each.

    step_ms: of the engine; packed_ms: of these, the forward pass with attention; bare_ms: of the bare forward pass.
    overhead: median of step / bare - 1 over steps and the bare passes right behind them. calls, quiet_calls: how many
    were timed, and how many never waited (quiet.py).
    """

    name: str
    running: int
    context: int
    step_ms: float
    packed_ms: float
    bare_ms: float
    overhead: float
    tokens_per_s: float
    calls: int
    quiet_calls: int


@torch.no_grad()
def measure(
    network: Any,
    tokenizer: Any,
    configs: Sequence[tuple[str, Config]],
    *,
    running: int,
    context: int,
    steps: int,
    rounds: int,
    on_round: Callable[[], None] = lambda: None,
) -> list[Result]:
    """A step of the engine, then a bare pass, and so on, `steps` of each a round, by each of the named settings."""
    contexts = [_made_up(network, context, seed) for seed in range(running)]
    return [
        _measure(network, tokenizer, name, config, contexts, steps=steps, rounds=rounds, on_round=on_round)
        for name, config in configs
    ]


def _measure(
    network: Any,
    tokenizer: Any,
    name: str,
    config: Config,
    contexts: Sequence[SequenceState],
    *,
    steps: int,
    rounds: int,
    on_round: Callable[[], None],
) -> Result:
    running, length = len(contexts), contexts[0].length
    attach(network, config)
    new = WARM_UP + steps * rounds + 2
    options = EngineOptions(
        memory=1 << 50, running=running, token_budget=max(512, running), max_length=length + new + 1
    )
    engine = Engine(network, tokenizer, config, options)
    try:
        said: list[Delta] = []
        for i, state in enumerate(contexts):
            # Other tokens for each, so that none finds the context of another; of the last one the answer begins.
            prompt = (i + 1,) * length + (2,)
            engine.prefixes.keep(prompt[:-1], state.fork(config))
            params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True)
            engine.submit(Request(prompt, params, config), said.append)
        while sum(len(delta.tokens) for delta in said) < 2 * running:
            if not engine.step():
                engine.wait()
        cache = _batch(network, config, contexts)
        tokens = torch.full((running, 1), 2, dtype=torch.int64, device="cpu")
        packed: list[float] = []
        _clock(engine, packed)

        def bare() -> None:
            logits = network(input_ids=tokens, **cache_argument(cache), use_cache=True).logits[:, -1]
            tokens[:, 0] = logits.argmax(-1)

        ours: list[Timing] = []
        bares: list[Timing] = []
        for turn in range(rounds + 1):
            for _ in range(WARM_UP if turn == 0 else steps):
                network.set_attn_implementation(PACKED)
                ours.append(timed(engine.step))
                network.set_attn_implementation(NAME)
                bares.append(timed(bare))
            if turn == 0:
                for warm in (ours, bares, packed):
                    warm.clear()
            else:
                on_round()
        network.set_attn_implementation(PACKED)
        step_ms, bare_ms = (statistics.median(quiet_ms(each)) for each in (ours, bares))
        quiet = count([*ours, *bares])
        passes = [Timing(ms, timing.waited) for ms, timing in zip(packed, ours, strict=True)]
        return Result(
            name=name,
            running=running,
            context=length,
            step_ms=step_ms,
            packed_ms=statistics.median(quiet_ms(passes)),
            bare_ms=bare_ms,
            overhead=ratio(ours, bares) - 1,
            tokens_per_s=1e3 * running / step_ms,
            calls=quiet.calls,
            quiet_calls=quiet.quiet,
        )
    finally:
        engine.close()
        detach(network)


def ratio(ours: Sequence[Timing], others: Sequence[Timing]) -> float:
    """Median of ours / others over pairs that were timed one behind the other; those that never waited, if any.

    What a busy machine does to both of a pair is gone.
    """
    pairs = list(zip(ours, others, strict=True))
    quiet = [pair for pair in pairs if not (pair[0].waited or pair[1].waited)]
    return statistics.median(a.ms / b.ms for a, b in quiet or pairs)


def _made_up(network: Any, context: int, seed: int) -> SequenceState:
    """A sequence of `context` tokens that no model has read, with keys of order one."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index, shape in enumerate(layer_shapes(network.config, EXACT)):
        store = KVStore(shape.kv_heads, shape.head_dim, key_dtype(network), EXACT, sampled=False, layer=index)
        for first in range(0, context, 4096):
            size = (2, shape.kv_heads, min(4096, context - first), shape.head_dim)
            store.append(*torch.randn(size, generator=generator, dtype=torch.float32, device="cpu"))
        layers.append(store)
    return SequenceState(EXACT, list(layers))


def _batch(network: Any, config: Config, contexts: Sequence[SequenceState]) -> MagicPigCache:
    """One cache with a fork of each sequence."""
    cache = MagicPigCache(network.config, config)
    states = [state.fork(config) for state in contexts]
    heads = int(network.config.num_attention_heads)
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, MagicPigLayer)
        stores = [state.stores[index] for state in states]
        layer.restore(stores, states[0].length, heads, None)
    cache.settle()
    return cache


def _clock(engine: Engine, spent: list[float]) -> None:
    run = engine.runner.run

    def clocked(*work: Any) -> Any:
        start = time.perf_counter()
        try:
            return run(*work)
        finally:
            spent.append(1e3 * (time.perf_counter() - start))

    engine.runner.run = clocked  # type: ignore[method-assign,assignment]
