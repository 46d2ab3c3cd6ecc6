"""Tokens per second of a whole model with an accelerator: all requests of a batch, a step at a time, through `Runner`.

Variants
  host, gpu_index, gpu   sketches, wherever the parts of a step run; host_lsh: hash tables on `host`, as the paper
  exact_gpu              torch's scaled_dot_product_attention, all keys and values in the memory of the GPU
  exact_copied           the same after keys and values of each layer were copied there from pinned memory
  exact_cpu              this library's exact kernel, in host memory

Weights are random, keys and values made up (synthetic.py), the same in every layer; the requests of a batch have one
context, each an answer of its own, so that a large batch needs no more host memory. On a simulated device all of it is
computed on the processor, and times say nothing: that is to see that it runs.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from magicpig.config import EXACT, Config
from magicpig.engine.runner import Runner, SequenceState, Work
from magicpig.engine.scheduler import Phase
from magicpig.errors import ArgumentError, InsufficientMemoryError
from magicpig.integrations.transformers.shapes import layer_shapes, sizes_of
from magicpig.machine import free_memory
from magicpig.placement import CPU, Accelerated, Placement
from magicpig.placement.accelerator import WAYS, Way
from magicpig.placement.base import LayerStep, OnHost, RepeatedStep, Stepped
from magicpig.placement.device import Buffer, Cuda, Device
from magicpig.placement.foretell import foretell
from magicpig.store import KVStore
from magicpig.store.planner import plan
from magicpig.studies.bench.decode import model_config, random_model
from magicpig.studies.bench.synthetic import synthetic_context
from magicpig.types import AttentionState

BY_SAMPLER: dict[str, tuple[str, ...]] = {
    "sketch": WAYS,
    "full": ("exact_gpu", "exact_copied", "exact_cpu"),
    "lsh": ("host_lsh",),
}
WARM_UP = 2  # steps that are not timed: the first sends what the device has to hold


@dataclass(frozen=True)
class Result:
    """Of one context, batch and variant. fits: whether it does within the limit; step_ms: median of `steps` steps, None
    where it was not run; device_bytes: most that was allocated on a GPU, weights included.
    """

    device: str
    context: int
    batch: int
    variant: str
    fits: bool
    step_ms: float | None
    tokens_per_s: float | None
    steps: int
    device_bytes: int | None


class DeviceDecoder:
    """A model of random weights on a device. vram: bytes that may be used there."""

    def __init__(
        self,
        name: str,
        device: Device,
        *,
        layers: int | None,
        dtype: torch.dtype,
        contexts: Sequence[int],
        steps: int,
        vram: int | None = None,
    ) -> None:
        self.device, self.dtype, self.steps = device, dtype, steps
        self.model_config = model_config(name, layers, max(contexts) + steps + WARM_UP + 1)
        self.sizes = sizes_of(self.model_config, EXACT)
        self.vram = device.free_memory() if vram is None else vram
        shapes = layer_shapes(self.model_config, EXACT)
        kept = plan(shapes, EXACT, sequences=1, tokens=max(contexts), dtype=dtype).total
        if (need := self.sizes.nbytes + 2 * kept) > (free := free_memory()):
            raise InsufficientMemoryError(
                f"context={max(contexts)} needs about {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
            )
        network: Any = random_model(self.model_config, dtype)
        self.network = network.to(device.torch_device)

    def measure(self, context: int, batches: Sequence[int], configs: Mapping[str, Config]) -> Iterator[Result]:
        """All variants of these samplers, in the order of `BY_SAMPLER`, each result when it is there."""
        exact = self._filled(context)
        for sampler in BY_SAMPLER:
            if (own := configs.get(sampler)) is None:
                continue
            first = exact.fork(own)
            for store in first.stores:
                store.settle()
            for batch in batches:
                for variant in BY_SAMPLER[sampler]:
                    yield self._variant(variant, first, own, context, batch)

    def _filled(self, context: int) -> SequenceState:
        shapes = layer_shapes(self.model_config, EXACT)
        heads, D = shapes[0].kv_heads, shapes[0].head_dim
        data = synthetic_context(context - 1, heads=heads, kv_heads=heads, head_dim=D, dtype=self.dtype)
        stores = [KVStore(heads, D, self.dtype, EXACT, sampled=False, layer=i) for i in range(len(shapes))]
        for store in stores:
            store.append(data.keys, data.values)
        self._rows = torch.stack([data.keys, data.values])
        return SequenceState(EXACT, list(stores))

    def _variant(self, variant: str, first: SequenceState, config: Config, context: int, batch: int) -> Result:
        fits = self._fits(variant, config, context, batch)
        times: list[float] = []
        if fits or (variant == "exact_gpu" and self._room(context, batch)):
            times = self._timed(variant, first, config, context, batch)
        step = statistics.median(times) if times else None
        return Result(
            self.device.name,
            context,
            batch,
            variant,
            fits,
            None if step is None else 1000 * step,
            None if step is None else batch / step,
            len(times),
            torch.cuda.max_memory_allocated(self.device.torch_device) if isinstance(self.device, Cuda) else None,
        )

    def _fits(self, variant: str, config: Config, context: int, batch: int) -> bool:
        """Whether the device's memory holds it, by the plan. The host's is one context's, see above."""
        if variant in ("host_lsh", "exact_cpu"):
            return self.vram > self.sizes.nbytes
        rows = plan(self.sizes.layers, EXACT, sequences=1, tokens=context, dtype=self.dtype).kept.rows
        if variant == "exact_copied":
            return self.vram > self.sizes.nbytes + rows // len(self.sizes.layers) * batch
        place = variant.removesuffix("_gpu")
        sketch = config if config.samples else Config()
        told = foretell(self.sizes, sketch, context=context, batch=batch, vram=self.vram, ram=1 << 60, dtype=self.dtype)
        return next(each.fits for each in told if each.place == place)

    def _room(self, context: int, batch: int) -> bool:
        """Whether full attention fits the whole device, though not the limit: to compare with, all the same."""
        rows = plan(self.sizes.layers, EXACT, sequences=batch, tokens=context, dtype=self.dtype).kept.rows
        return 1.1 * rows < self.device.free_memory()

    def _timed(self, variant: str, first: SequenceState, config: Config, context: int, batch: int) -> list[float]:
        if isinstance(self.device, Cuda):
            torch.cuda.reset_peak_memory_stats(self.device.torch_device)
        states = [first.fork() for _ in range(batch)]
        runner = Runner(self.network, config, max_length=context + 1000, place=self._place(variant))
        times = []
        try:
            for t in range(WARM_UP + self.steps):
                pieces = [
                    Work(state, [1 + (t + b) % 7], context + t, Phase.DECODE, logits=1)
                    for b, state in enumerate(states)
                ]
                begin = time.perf_counter()
                outcomes = runner.run(pieces)
                times.append(time.perf_counter() - begin)
                for outcome in outcomes:
                    if outcome.error is not None:
                        raise outcome.error
        finally:
            runner.close()
            del states, runner
            gc.collect()
            if isinstance(self.device, Cuda):
                torch.cuda.empty_cache()
        return times[WARM_UP:]

    def _place(self, variant: str) -> Placement:
        if variant == "exact_cpu":
            return CPU
        if variant in ("exact_gpu", "exact_copied"):
            return _Dense(self.device, self._rows, copied=variant == "exact_copied", room=WARM_UP + self.steps)
        way: Way = "host" if variant == "host_lsh" else variant  # type: ignore[assignment]
        return Accelerated(self.device, way)


class _Dense(OnHost):
    """Full attention on a device over a context and what follows it, `room` tokens at most; stores stay as they are.

    rows: (2, G, N, D). copied: they come up from pinned memory in each layer of each step.
    """

    def __init__(self, device: Device, rows: Tensor, *, copied: bool, room: int) -> None:
        self.accelerator = device
        self._device, self._copied, self._room = device, copied, room
        shape = [2, rows.shape[1], rows.shape[2] + room, rows.shape[3]]
        above = self._above = device.buffer("all rows", shape, rows.dtype, pinned=True)

        def fill() -> None:
            above.tensor.zero_()
            above.tensor[:, :, : rows.shape[2]] = rows

        device.host("fill", fill, writes=[above])
        self._context = rows.shape[2]
        self._held: WeakKeyDictionary[KVStore, Buffer] = WeakKeyDictionary()
        self._taken: WeakKeyDictionary[KVStore, int] = WeakKeyDictionary()
        self._scratch = self._new() if copied else None

    def repeated(self, stores: Sequence[KVStore], heads: int, scale: float, softcap: float) -> RepeatedStep | None:
        return None

    def step(self, step: LayerStep) -> Stepped:
        B, H, _ = step.query.shape
        if step.rule.softcap or step.rule.sink_logits is not None:
            raise ArgumentError("full attention on the device has no softcap and no sinks; no shape here needs them")
        outputs = []
        for b, store in enumerate(step.stores):
            n = self._taken.get(store, self._context)
            self._taken[store] = n + 1
            if self._scratch is None:
                own = self._held.get(store)
                if own is None:
                    own = self._held[store] = self._new()
                    self._copy(own)
            else:
                own = self._scratch
                self._copy(own)
            work = partial(_dense, step, b, own.tensor, n)
            outputs.append(self._device.launch("compute", "exact", work, reads=[own]))
        lse = torch.zeros(B, H, dtype=torch.float32, device=step.query.device)
        nothing = torch.full((B, H), torch.nan, dtype=torch.float32, device="cpu")
        return Stepped(AttentionState(torch.stack(outputs), lse), [], nothing, [None] * B)

    def _new(self) -> Buffer:
        return self._device.buffer("all rows on the device", self._above.tensor.shape, self._above.tensor.dtype)

    def _copy(self, to: Buffer) -> None:
        self._device.wait("up", self._device.record("compute"))
        self._device.copy("up", self._above, to)
        self._device.wait("compute", self._device.record("up"))


def _dense(step: LayerStep, b: int, rows: Tensor, n: int) -> Tensor:
    """(H, D) of the query of sequence b over `rows` (2, G, N, D), of which the first n count, and the new one."""
    assert step.keys is not None
    assert step.values is not None
    rows[:, :, n] = torch.stack([step.keys[b], step.values[b]])
    keys, values = rows[:, None, :, : n + 1]
    query = step.query[b][None, :, None]
    out = scaled_dot_product_attention(query, keys, values, scale=step.rule.scale, enable_gqa=True)
    return out[0, :, 0]
