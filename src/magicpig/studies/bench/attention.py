"""How long one decode step of one layer takes: sampled, exact, torch's own attention, and reading the bytes at all.

All variants run interleaved in one process, on the same synthetic context, with cold caches: what drifts on a
machine drifts for all of them. Medians. Nothing is timed before the outputs have been compared with float64.

Variants
  step    `decode_step` on an indexed store: appends the token, hashes or turns the query, samples, attends
  exact   `decode_step` on a store without index: our kernel reading every row
  sdpa    torch's scaled_dot_product_attention with the R query heads of a group as R query rows, its fastest form
          here (with enable_gqa it is ten times slower and would be no baseline)
  stream  reading the bytes of keys and values once on all threads: no exact kernel can be faster
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from magicpig.attention.step import attend_stores
from magicpig.config import EXACT, Config
from magicpig.store import KVStore
from magicpig.studies.bench import layer
from magicpig.studies.bench.layer import Layer, Shape, WrongResultError, check_context
from magicpig.studies.bench.quiet import Timing, count, quiet_ms
from magicpig.studies.capture import AttentionSet
from magicpig.studies.provenance import provenance

# Relative error of the outputs, as a mean over steps and heads. Exact kernels owe only the rounding of the dtype;
# a sample of this size owes an estimate that is recognisably the answer.
EXACT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SAMPLED_TOLERANCE = 0.5


@dataclass(frozen=True)
class Result:
    """One context and setting. Times are medians of one layer's step.

    K, L or budget, bits: the setting; those of another sampler are None. kv_dtype: of its rows; the exact kernel's are
    the model's.
    ratio_exact, ratio_sdpa: exact_ms / step_ms and sdpa_ms / step_ms.
    index_ms: what indexing new tokens adds to a step, spread over the `block` tokens it is done for at once.
    sampled_share: rows a query head read of those it might have; sampled_rows: distinct rows read per kv head.
    error, exact_error, sdpa_error: relative L2 error of the output against float64, mean over steps and heads;
    error_p95: its 95th percentile.
    calls: that were timed; quiet_calls: those that never waited for a processor, by which times are told (quiet.py).
    build_s: building the index after prefill. Bytes: rows and index of the store; index_bytes_per_key: of a kv head.
    """

    context: int
    sampler: str
    K: int | None
    L: int | None
    budget: float | None
    bits: int | None
    kv_dtype: str
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
    error_p95: float
    exact_error: float
    sdpa_error: float
    build_s: float
    calls: int
    quiet_calls: int
    row_bytes: int
    index_bytes: int
    index_bytes_per_key: float


def describe(shape: Shape, config: Config, repeats: int, steps: int) -> dict[str, object]:
    """Machine, software and settings: what somebody else needs to repeat the measurement."""
    return {
        **provenance(),
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "batch": shape.batch,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "config": config.model_dump(mode="json", exclude={"sampler", "K", "L", "budget", "bits", "kv_dtype"}),
        "repeats": repeats,
        "steps": steps,
        "eviction_bytes": layer.EVICTION_BYTES,
    }


def run(
    context: int,
    configs: Sequence[Config],
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
    bench = _Bench(shape.contexts(context, steps), shape)
    return [bench.measure(config, repeats, on_round) for config in configs]


class _Bench(Layer):
    """A layer, and the other ways to attend in it."""

    def __init__(self, data: list[AttentionSet], shape: Shape) -> None:
        super().__init__(data)
        self.shape = shape
        self.dense = self.stores(EXACT)

    def measure(self, config: Config, repeats: int, on_round: Callable[[], None]) -> Result:
        sampled = self.stores(config)
        start = time.perf_counter()
        for store in sampled:
            store.settle()
        build_s = time.perf_counter() - start

        attention: dict[str, Callable[[int], Tensor]] = {
            "step": lambda step: self.step(sampled, step),
            "exact": lambda step: self.step(self.dense, step),
            "sdpa": self._sdpa,
        }
        errors = {name: self.errors(call) for name, call in attention.items()}
        self._forget(sampled)
        self._judge(errors)
        index_ms = statistics.median(self.indexing_ms(sampled) for _ in range(3))

        calls: dict[str, Callable[[int], object]] = {**attention, "stream": self.read}
        timings: dict[str, list[Timing]] = {name: [] for name in calls}
        before = [store.stats for store in sampled]
        for measured in self.timed(calls, repeats):
            for name, each in measured.items():
                timings[name] += each
            self._forget(sampled)
            on_round()
        after = [store.stats for store in sampled]
        read = sum(b.sampled_rows - a.sampled_rows for a, b in zip(before, after, strict=True))
        there = sum(b.body_rows - a.body_rows for a, b in zip(before, after, strict=True))
        _, info = attend_stores(self.queries[0], sampled, scale=self.data[0].scale)

        times = {name: quiet_ms(each) for name, each in timings.items()}
        median = {name: statistics.median(measured) for name, measured in times.items()}
        quiet = count(timing for each in timings.values() for timing in each)
        memory = [store.nbytes() for store in sampled]
        index_bytes = sum(each.index for each in memory)
        indexed = sum(store.indexed_to - config.sinks for store in sampled)
        lsh, sketch = config.hashes, config.sketches
        return Result(
            context=self.context,
            sampler=config.sampler,
            K=config.K if lsh else None,
            L=config.L if lsh else None,
            budget=config.budget if sketch else None,
            bits=config.bits if sketch else None,
            kv_dtype=config.kv_dtype,
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
            error=float(errors["step"].mean()),
            error_p95=float(errors["step"].quantile(0.95)),
            exact_error=float(errors["exact"].mean()),
            sdpa_error=float(errors["sdpa"].mean()),
            build_s=build_s,
            calls=quiet.calls,
            quiet_calls=quiet.quiet,
            row_bytes=sum(each.rows for each in memory),
            index_bytes=index_bytes,
            index_bytes_per_key=index_bytes / (indexed * self.shape.kv_heads),
        )

    def _sdpa(self, step: int) -> Tensor:
        shape, length = self.shape, self.context + step + 1
        grouped = self.queries[step].unflatten(1, (shape.kv_heads, -1))  # (B, G, R, D)
        outputs = [
            scaled_dot_product_attention(
                query[None], each.keys[None, :, :length], each.values[None, :, :length], scale=each.scale
            )
            for query, each in zip(grouped, self.data, strict=True)
        ]
        return torch.cat(outputs).flatten(1, 2)

    def _forget(self, sampled: list[KVStore]) -> None:
        self.forget(sampled)
        self.forget(self.dense)

    def _judge(self, errors: dict[str, Tensor]) -> None:
        exact = EXACT_TOLERANCE[self.shape.dtype]
        for name, allowed in (("exact", exact), ("sdpa", exact), ("step", SAMPLED_TOLERANCE)):
            error = float(errors[name].mean())
            if not error <= allowed:  # NaN included
                raise WrongResultError(f"{name} has a relative error of {error:.1e}, allowed {allowed:.0e}")
