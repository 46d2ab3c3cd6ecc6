"""How long one decode step of one layer takes: sampled, exact, torch's own attention, and reading the bytes at all.

All variants run interleaved in one process, on the same synthetic context, with cold caches: what drifts on a
machine drifts for all of them. Medians. Nothing is timed before the outputs have been compared with float64.

Variants
  step    `decode_step` on an indexed store: appends the token, hashes the query, looks up, attends
  exact   `decode_step` on a store without index: our kernel reading every row
  sdpa    torch's scaled_dot_product_attention with the R query heads of a group as R query rows, its fastest form
          here (with enable_gqa it is ten times slower and would be no baseline)
  stream  reading the bytes of keys and values once on all threads: no exact kernel can be faster
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from magicpig import machine
from magicpig.bench.synthetic import synthetic_context
from magicpig.capture import AttentionSet
from magicpig.config import Config
from magicpig.decode import attend_stores, decode_step
from magicpig.doctor import self_check
from magicpig.kernels import native
from magicpig.provenance import provenance
from magicpig.store import KVStore

EVICTION_BYTES = 128 << 20  # more than any last-level cache we know of holds for one process
# Relative error of the outputs, as a mean over steps and heads. Exact kernels owe only the rounding of the dtype;
# a sample of this size owes an estimate that is recognisably the answer.
EXACT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SAMPLED_TOLERANCE = 0.5


class WrongResultError(RuntimeError):
    """A variant computes the wrong thing, so its speed means nothing."""


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
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        native.padded(self.head_dim)
        native.dtype_code(self.dtype)

    def row_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of ``tokens`` tokens, without padding."""
        return 2 * self.batch * self.kv_heads * tokens * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class Result:
    """One context and setting. Times are medians of one layer's step.

    ratio_exact, ratio_sdpa: exact_ms / step_ms and sdpa_ms / step_ms.
    index_ms: what indexing new tokens adds to a step, spread over the `block` tokens it is done for at once.
    sampled_share: rows a query head read of those it might have; sampled_rows: distinct rows read per kv head.
    error, exact_error, sdpa_error: relative L2 error of the output against float64, mean over steps and heads.
    build_s: building the index after prefill. Bytes: rows and index of the store.
    """

    context: int
    K: int
    L: int
    step_ms: float
    exact_ms: float
    sdpa_ms: float
    stream_ms: float
    ratio_exact: float
    ratio_sdpa: float
    step_min_ms: float
    exact_min_ms: float
    sdpa_min_ms: float
    stream_min_ms: float
    index_ms: float
    sampled_share: float
    sampled_rows: float
    error: float
    exact_error: float
    sdpa_error: float
    build_s: float
    row_bytes: int
    index_bytes: int


def describe(shape: Shape, config: Config, repeats: int, steps: int) -> dict[str, object]:
    """Machine, software and settings: what somebody else needs to repeat the measurement."""
    return {
        **provenance(),
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "batch": shape.batch,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "config": config.model_dump(mode="json", exclude={"K", "L"}),
        "repeats": repeats,
        "steps": steps,
        "eviction_bytes": EVICTION_BYTES,
    }


def verify_kernels(shape: Shape) -> None:
    """Refuse to go on when the kernels of the level in use are wrong. Raises WrongResultError."""
    for check in self_check([native.isa()], head_dim=shape.head_dim, group=shape.heads // shape.kv_heads):
        if not check.passed:
            raise WrongResultError(
                f"self-check failed: {check.isa}, {check.dtype}, {check.what}: relative error {check.error:.1e}"
            )


def check_context(context: int, configs: list[Config], shape: Shape) -> None:
    """Raise ValueError if the context is too short for a setting, MemoryError if it is too long for the machine."""
    for config in configs:
        if context <= config.sinks + config.recent:
            raise ValueError(f"context={context} has nothing to sample; it must exceed {config.sinks + config.recent}")
    needed = 5 * shape.row_bytes(context)  # torch's copy, two stores, an index, and room to make them
    if needed > machine.available_memory():
        raise MemoryError(
            f"context={context} needs about {needed / 2**30:.1f} GiB of memory, "
            f"{machine.available_memory() / 2**30:.1f} GiB are available"
        )


def run(
    context: int,
    configs: list[Config],
    shape: Shape,
    *,
    repeats: int = 24,
    steps: int = 8,
    on_round: Callable[[], None] = lambda: None,
) -> list[Result]:
    """Measure every setting on one context of ``context`` tokens; on_round is called ``repeats`` times per setting.

    Each variant is called repeats * steps times: every round takes ``steps`` different queries and then forgets the
    tokens it appended. Raises WrongResultError before any timing if an output is wrong, and what
    `check_context` raises.
    """
    check_context(context, configs, shape)
    data = [
        synthetic_context(
            context,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            steps=steps,
            dtype=shape.dtype,
            seed=sequence,
        )
        for sequence in range(shape.batch)
    ]
    layer = _Layer(data, context, shape)
    return [layer.measure(config, repeats, on_round) for config in configs]


class _Layer:
    """The contexts of B sequences, and the four ways to attend to them."""

    def __init__(self, data: list[AttentionSet], context: int, shape: Shape) -> None:
        self.data, self.context, self.shape = data, context, shape
        self.steps = len(data[0].queries)
        self.queries = torch.stack([each.queries for each in data], 1)  # (T, B, H, D)
        new_rows = range(context, context + self.steps)
        self.new_keys = [torch.stack([each.keys[:, row] for each in data]) for row in new_rows]  # T of (B, G, D)
        self.new_values = [torch.stack([each.values[:, row] for each in data]) for row in new_rows]
        self.scale = data[0].scale
        self.dense = self._stores(Config(sampler="full"))
        self.evictor = torch.ones(EVICTION_BYTES // 4)
        self.truth = torch.stack([self._truth(step) for step in range(self.steps)])

    def measure(self, config: Config, repeats: int, on_round: Callable[[], None]) -> Result:
        sampled = self._stores(config)
        start = time.perf_counter()
        for store in sampled:
            store.settle()
        build_s = time.perf_counter() - start

        attention: dict[str, Callable[[int], Tensor]] = {
            "step": lambda step: self._step(sampled, step),
            "exact": lambda step: self._step(self.dense, step),
            "sdpa": self._sdpa,
        }
        errors = {name: self._error(call) for name, call in attention.items()}
        self._forget(sampled)
        self._judge(errors)
        index_ms = self._index_ms(sampled, config)

        calls: dict[str, Callable[[int], object]] = {**attention, "stream": self._stream}
        times: dict[str, list[float]] = {name: [] for name in calls}
        before = [store.stats for store in sampled]
        for _ in range(repeats):
            for step in range(self.steps):
                for name, call in calls.items():
                    native.stream_read(self.evictor)
                    start = time.perf_counter()
                    call(step)
                    times[name].append((time.perf_counter() - start) * 1e3)
            self._forget(sampled)
            on_round()
        after = [store.stats for store in sampled]
        read = sum(b.sampled_rows - a.sampled_rows for a, b in zip(before, after, strict=True))
        there = sum(b.body_rows - a.body_rows for a, b in zip(before, after, strict=True))
        _, info = attend_stores(self.queries[0], sampled, scale=self.scale)

        median = {name: statistics.median(measured) for name, measured in times.items()}
        memory = [store.nbytes() for store in sampled]
        return Result(
            context=self.context,
            K=config.K,
            L=config.L,
            step_ms=median["step"],
            exact_ms=median["exact"],
            sdpa_ms=median["sdpa"],
            stream_ms=median["stream"],
            ratio_exact=median["exact"] / median["step"],
            ratio_sdpa=median["sdpa"] / median["step"],
            step_min_ms=min(times["step"]),
            exact_min_ms=min(times["exact"]),
            sdpa_min_ms=min(times["sdpa"]),
            stream_min_ms=min(times["stream"]),
            index_ms=index_ms,
            sampled_share=read / there,
            sampled_rows=float(info.rows.double().mean()),
            error=errors["step"],
            exact_error=errors["exact"],
            sdpa_error=errors["sdpa"],
            build_s=build_s,
            row_bytes=sum(each.rows for each in memory),
            index_bytes=sum(each.index for each in memory),
        )

    def _stores(self, config: Config) -> list[KVStore]:
        stores = []
        for each in self.data:
            store = KVStore(self.shape.kv_heads, self.shape.head_dim, self.shape.dtype, config, sampled=True)
            store.append(each.keys[:, : self.context], each.values[:, : self.context])
            stores.append(store)
        return stores

    def _step(self, stores: list[KVStore], step: int) -> Tensor:
        keys, values = self.new_keys[step], self.new_values[step]
        return decode_step(self.queries[step], keys, values, stores, scale=self.scale).output

    def _sdpa(self, step: int) -> Tensor:
        shape, length = self.shape, self.context + step + 1
        grouped = self.queries[step].unflatten(1, (shape.kv_heads, -1))  # (B, G, R, D)
        outputs = [
            scaled_dot_product_attention(
                query[None], each.keys[None, :, :length], each.values[None, :, :length], scale=self.scale
            )
            for query, each in zip(grouped, self.data, strict=True)
        ]
        return torch.cat(outputs).flatten(1, 2)

    def _stream(self, step: int) -> None:
        del step  # every step reads all there is
        for each in self.data:
            native.stream_read(each.keys)
            native.stream_read(each.values)

    def _forget(self, sampled: list[KVStore]) -> None:
        for store in (*sampled, *self.dense):
            store.crop(self.context)

    def _truth(self, step: int) -> Tensor:
        """Exact attention in float64: (B, H, D)."""
        return torch.stack([each.exact(step).output for each in self.data])

    def _error(self, call: Callable[[int], Tensor]) -> float:
        outputs = torch.stack([call(step) for step in range(self.steps)]).double()
        return float(((outputs - self.truth).norm(dim=-1) / self.truth.norm(dim=-1)).mean())

    def _judge(self, errors: dict[str, float]) -> None:
        exact = EXACT_TOLERANCE[self.shape.dtype]
        for name, allowed in (("exact", exact), ("sdpa", exact), ("step", SAMPLED_TOLERANCE)):
            if not errors[name] <= allowed:  # NaN included
                raise WrongResultError(f"{name} has a relative error of {errors[name]:.1e}, allowed {allowed:.0e}")

    def _index_ms(self, stores: list[KVStore], config: Config) -> float:
        """Milliseconds per token to index one block of tokens that leaves the recent window, median of three."""
        times, tokens = [], min(config.block, self.context)
        for _ in range(3):
            forks = [store.fork() for store in stores]
            for fork, each in zip(forks, self.data, strict=True):
                fork.append(each.keys[:, :tokens], each.values[:, :tokens])
            start = time.perf_counter()
            for fork in forks:
                fork.index_due()
            times.append((time.perf_counter() - start) * 1e3 / tokens)
        return statistics.median(times)
