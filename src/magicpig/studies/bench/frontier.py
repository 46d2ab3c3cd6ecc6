"""What a step costs and what it gets wrong, for every sampler and setting: error against time, index and rows read.

Error is the relative L2 distance of the output from exact attention in float64, over all heads and steps. Samplers that
look at every key to choose their rows have an error, but no time that would mean anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from magicpig.config import EXACT
from magicpig.store import KVStore
from magicpig.studies.bench.layer import Layer
from magicpig.studies.bench.quiet import Quiet, Timing, count, quiet_ms
from magicpig.studies.capture import AttentionSet
from magicpig.studies.evaluation.matrix import Method


@dataclass(frozen=True)
class Point:
    """A sampler's setting on one context.

    source: where the context is from; layer: of a captured one; tokens: before the first step.
    error, error_p95: over heads and steps. sampled_share: of the body, read by a query head. step_ms: median, with cold
    caches; exact_ms: of the exact kernel, and read_ms: of a plain read of keys and values, in turns with it; all three
    None for samplers that look at every key. calls: that were timed; quiet_calls: those that never waited for a
    processor, by which times are told (quiet.py).
    index_bytes_per_key: of a kv head.
    """

    source: str
    layer: int | None
    tokens: int
    name: str
    sampler: str
    K: int | None
    L: int | None
    bits: int | None
    head_dim: int
    budget: float | None
    error: float
    error_p95: float
    sampled_share: float
    step_ms: float | None
    exact_ms: float | None
    read_ms: float | None
    calls: int
    quiet_calls: int
    index_bytes_per_key: float


def measure(
    source: str,
    data: AttentionSet,
    methods: Iterable[Method],
    *,
    layer: int | None = None,
    repeats: int = 3,
    on_point: Callable[[], None] = lambda: None,
) -> Iterator[Point]:
    """A `Point` per method that leaves something out on this context; on_point is called for every method.

    Nothing is left out where a budget is as large as the body, or a context all sinks and recent window.
    """
    measured = Layer([data])
    dense = measured.stores(EXACT)
    for method in methods:
        if measured.leaves_out(method.config):
            yield _point(source, layer, measured, method, dense, repeats)
        on_point()


def over_layers(points: Sequence[Point]) -> list[Point]:
    """One point per source and setting: means over the layers of a capture. layer: None where there were several."""
    named: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        named.setdefault((point.source, point.name), []).append(point)
    numbers = ("error", "error_p95", "sampled_share", "step_ms", "exact_ms", "read_ms", "index_bytes_per_key")
    found = []
    for same in named.values():
        changed: dict[str, Any] = {"layer": same[0].layer if len(same) == 1 else None}
        for name in numbers:
            values = [getattr(point, name) for point in same]
            changed[name] = None if None in values else statistics.fmean(values)
        for name in ("calls", "quiet_calls"):
            changed[name] = sum(getattr(point, name) for point in same)
        found.append(replace(same[0], **changed))
    return found


def best(points: Sequence[Point]) -> list[Point]:
    """Those of the timed points that no other one beats in both time and error, fastest first."""
    timed = sorted((point for point in points if point.step_ms is not None), key=lambda point: point.step_ms or 0.0)
    found: list[Point] = []
    for point in timed:
        if not found or point.error < found[-1].error:
            found.append(point)
    return found


def _point(source: str, number: int | None, layer: Layer, method: Method, dense: list[KVStore], repeats: int) -> Point:
    config, stores = method.config, layer.stores(method.config)
    (store,) = stores
    store.settle()
    errors = layer.errors(lambda step: layer.step(stores, step))
    layer.forget(stores)
    step_ms = exact_ms = read_ms = None
    quiet = Quiet(0, 0)
    if config.native:

        def step(step: int) -> Tensor:
            return layer.step(stores, step)

        def exact(step: int) -> Tensor:
            return layer.step(dense, step)

        times: dict[str, list[Timing]] = {"exact": [], "step": [], "read": []}
        for measured in layer.timed({"exact": exact, "step": step, "read": layer.read}, repeats):
            for name, each in measured.items():
                times[name] += each
            layer.forget([*stores, *dense])
        step_ms, exact_ms, read_ms = (statistics.median(quiet_ms(times[name])) for name in ("step", "exact", "read"))
        quiet = count(timing for each in times.values() for timing in each)
    return Point(
        source=source,
        layer=number,
        tokens=layer.context,
        name=method.name,
        sampler=config.sampler,
        K=config.K if config.hashes else None,
        L=config.L if config.hashes else None,
        bits=config.bits if config.sketches else None,
        head_dim=layer.data[0].keys.shape[2],
        budget=None if config.hashes else config.budget,
        error=float(errors.mean()),
        error_p95=float(errors.flatten().quantile(0.95)),
        sampled_share=store.stats.mean_share,
        step_ms=step_ms,
        exact_ms=exact_ms,
        read_ms=read_ms,
        calls=quiet.calls,
        quiet_calls=quiet.quiet,
        index_bytes_per_key=store.nbytes().index / (store.kv_heads * (store.indexed_to - config.sinks)),
    )
