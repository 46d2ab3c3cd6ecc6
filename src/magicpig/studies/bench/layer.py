"""One layer of attention that can be measured: contexts, stores, and the exact output they are judged by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from magicpig.attention.step import decode_step
from magicpig.config import EXACT, Config
from magicpig.doctor import self_check
from magicpig.errors import ArgumentError, InsufficientMemoryError, MagicPigError
from magicpig.kernels import base, library
from magicpig.machine import free_memory
from magicpig.samplers import sampler_of
from magicpig.settings import DrawPolicy, IndexSpec
from magicpig.store import KVStore
from magicpig.store.planner import LayerShape, plan
from magicpig.studies.bench.quiet import Timing, timed
from magicpig.studies.bench.synthetic import synthetic_context
from magicpig.studies.capture import AttentionSet

EVICTION_BYTES = 128 << 20  # more than any last-level cache we know of holds for one process


class WrongResultError(MagicPigError, RuntimeError):
    """A variant computes the wrong thing, so its speed means nothing."""

    code = "wrong_result"


@dataclass(frozen=True)
class Shape:
    """One layer. heads: H query heads; kv_heads: G; batch: B sequences."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "batch"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}={getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise ArgumentError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        base.padded(self.head_dim)
        base.check_dtype(self.dtype)

    def row_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of ``tokens`` tokens, without padding."""
        return 2 * self.batch * self.kv_heads * tokens * self.head_dim * self.dtype.itemsize

    def contexts(self, tokens: int, steps: int) -> list[AttentionSet]:
        """A synthetic context of ``tokens`` tokens and ``steps`` more for each sequence."""
        return [self.context(tokens, steps, seed=sequence) for sequence in range(self.batch)]

    def context(self, tokens: int, steps: int, seed: int) -> AttentionSet:
        """One of these."""
        return synthetic_context(
            tokens,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            steps=steps,
            dtype=self.dtype,
            seed=seed,
        )


def verify_kernels(shape: Shape) -> None:
    """Refuse to go on when the kernels of the level in use are wrong. Raises WrongResultError."""
    for check in self_check([library.isa()], head_dim=shape.head_dim, group=shape.heads // shape.kv_heads):
        if not check.passed:
            raise WrongResultError(
                f"self-check failed: {check.isa}, {check.dtype}, {check.what}: relative error {check.error:.1e}"
            )


def check_context(context: int, configs: Sequence[Config], shape: Shape) -> None:
    """Raise ValueError if the context is too short for a setting, MemoryError if it is too long for the machine.

    At a time there are the context itself, an exact store, one of a setting, and what is computed in float64.
    """
    for config in configs:
        if context <= config.sinks + config.recent:
            raise ArgumentError(
                f"context={context} has nothing to sample; it must exceed {config.sinks + config.recent}"
            )
    layer = [LayerShape(shape.kv_heads, shape.head_dim, sampled=True)]
    stores = [
        plan(layer, config, sequences=shape.batch, tokens=context, dtype=shape.dtype).total
        for config in (EXACT, *configs)
    ]
    needed = shape.row_bytes(context) + stores[0] + max(stores[1:], default=0) + 2 * 8 * context * shape.head_dim
    if needed > free_memory():
        raise InsufficientMemoryError(
            f"context={context} needs about {needed / 2**30:.1f} GiB of memory, {free_memory() / 2**30:.1f} GiB are "
            f"available; fewer kv heads than {shape.kv_heads} need less"
        )


def indexing_s(store: KVStore, keys: Tensor, values: Tensor) -> float:
    """Seconds per token of indexing more tokens, stride by stride, as decoding does. The store keeps them.

    keys, values: (G, N, D), of which as many are taken as a block of rows has: tables are joined once in so many
    tokens, which takes longer than the strides before.
    """
    stride = store.spec.stride
    count = min(base.BLOCK_ROWS, keys.shape[1])
    spent = 0.0
    for begin in range(0, count, stride):
        store.append(keys[:, begin : begin + stride], values[:, begin : begin + stride])
        start = time.perf_counter()
        store.index_due()
        spent += time.perf_counter() - start
    return spent / count


class Layer:
    """The contexts of B sequences, whose last T tokens are the steps, and what exact attention makes of them."""

    def __init__(self, data: list[AttentionSet]) -> None:
        first = data[0]
        self.data = data
        self.steps = first.steps
        self.context = first.tokens - first.steps  # tokens before the first step
        self.queries = torch.stack([each.queries for each in data], 1)  # (T, B, H, D)
        rows = range(self.context, first.tokens)
        self._new_keys = [torch.stack([each.keys[:, row] for each in data]) for row in rows]  # T of (B, G, D)
        self._new_values = [torch.stack([each.values[:, row] for each in data]) for row in rows]
        self.truth = torch.stack(  # (T, B, H, D) float64
            [torch.stack([each.exact(step).output for each in data]) for step in range(self.steps)]
        )
        self._evictor = torch.ones(EVICTION_BYTES // 4, dtype=torch.float32, device="cpu")

    def stores(self, config: Config) -> list[KVStore]:
        """The contexts without the steps in new stores, not settled."""
        made = []
        for each in self.data:
            store = KVStore(each.kv_heads, each.keys.shape[2], each.keys.dtype, config, sampled=True)
            store.append(each.keys[:, : self.context], each.values[:, : self.context])
            made.append(store)
        return made

    def body(self, config: Config) -> int:
        """How many keys may be left out: whole strides that leave the recent window, but for the sinks."""
        return max(0, (self.context - config.recent) // config.block * config.block - config.sinks)

    def leaves_out(self, config: Config) -> bool:
        """Whether a setting reads less than everything: no budget is as large as the body, nor is there none."""
        body, policy = self.body(config), DrawPolicy.of(config)
        head_dim = self.data[0].keys.shape[2]
        return body > 0 and sampler_of(IndexSpec.of(config), head_dim).leaves_out(policy, body)

    def step(self, stores: list[KVStore], step: int) -> Tensor:
        """One decode step: appends its token and attends. Returns (B, H, D)."""
        each = self.data[0]
        return decode_step(
            self.queries[step],
            self._new_keys[step],
            self._new_values[step],
            stores,
            scale=each.scale,
            softcap=each.softcap,
            sink_logits=each.sink_logits,
        ).output

    def read(self, step: int) -> None:
        """Reads all keys and values once on all threads: the floor of exact attention in any step."""
        del step  # every step reads all there is
        for each in self.data:
            library.stream_read(each.keys)
            library.stream_read(each.values)

    def indexing_ms(self, stores: list[KVStore]) -> float:
        """Milliseconds per token of indexing tokens that leave the recent window, a stride at a time."""
        grown, T = [store.fork() for store in stores], self.steps
        pairs = zip(grown, self.data, strict=True)
        return 1e3 * sum(indexing_s(store, each.keys[:, :-T], each.values[:, :-T]) for store, each in pairs)

    def forget(self, stores: list[KVStore]) -> None:
        """Take the steps back."""
        for store in stores:
            store.crop(self.context)

    def errors(self, call: Callable[[int], Tensor]) -> Tensor:
        """Relative L2 errors (T, B, H) of the outputs of ``call``, against float64."""
        outputs = torch.stack([call(step) for step in range(self.steps)]).double()
        relative: Tensor = (outputs - self.truth).norm(dim=-1) / self.truth.norm(dim=-1)
        return relative

    def timed(self, calls: dict[str, Callable[[int], object]], repeats: int) -> Iterator[dict[str, list[Timing]]]:
        """How long each call took in each step, round by round: interleaved, each on cold caches."""
        for _ in range(repeats):
            times: dict[str, list[Timing]] = {name: [] for name in calls}
            for step in range(self.steps):
                for name, call in calls.items():
                    library.stream_read(self._evictor)
                    times[name].append(timed(partial(call, step)))
            yield times
