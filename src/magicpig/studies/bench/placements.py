"""How long a decode step of one layer takes in each placement, beside what a GPU does without sampling.

Variants
  cpu, host, gpu_index, gpu   the sketch's step, wherever its parts run
  exact_gpu                   torch's scaled_dot_product_attention over keys and values in the memory of the GPU
  exact_copied                the same after keys and values have been copied there from pinned memory
  exact_cpu                   this library's exact kernel, in host memory

On synthetic contexts. Before a placement is timed its output and its samples are compared with those of `cpu`. On a
simulated device everything is computed on the processor, and times say nothing: that is to see that all of it runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from magicpig.attention.step import attend_stores
from magicpig.config import EXACT, Config
from magicpig.placement import CPU, Accelerated, Placement
from magicpig.placement.accelerator import WAYS
from magicpig.placement.device import Cuda, Device, check_cuda
from magicpig.placement.simulated import Simulated
from magicpig.studies.bench.layer import Layer, Shape, WrongResultError
from magicpig.studies.provenance import provenance as provenance
from magicpig.types import StepInfo

SIMULATED = "simulated"
TOLERANCE = 2**-7  # of outputs: two ways of rounding rows to bfloat16 and back, in another order


@dataclass(frozen=True)
class Result:
    """Of one context, batch and variant: step_ms, the median of `calls` steps of one layer; device_bytes held on the
    GPU for the layer, of keys, values and sketches; error: relative L2 error of the output against float64, a mean over
    heads; same_samples: whether each draw is that of `cpu`, None where nothing is drawn.
    """

    device: str
    context: int
    batch: int
    variant: str
    step_ms: float
    calls: int
    device_bytes: int
    error: float
    same_samples: bool | None


def open_device(name: str) -> Device:
    """A GPU, as cuda or cuda:1, or a simulated device. Raises ArgumentError where there is no such GPU."""
    if name == SIMULATED:
        return Simulated()
    check_cuda(name, "--device")
    return Cuda(int(name.partition(":")[2] or 0))


def run(
    device: Device, contexts: Sequence[int], batches: Sequence[int], shape: Shape, config: Config, *, repeats: int
) -> Iterator[Result]:
    """All variants, context by context and batch by batch, each result when it is there.

    Raises WrongResultError where a placement computes something else than `cpu` does.
    """
    for context in contexts:
        data = [shape.context(context, 1, seed=sequence) for sequence in range(max(batches))]
        for batch in batches:
            yield from _compare(device, Layer(data[:batch]), config, repeats)


def _compare(device: Device, layer: Layer, config: Config, repeats: int) -> Iterator[Result]:
    query, scale = layer.queries[0], layer.data[0].scale
    stores = layer.stores(config)
    for store in stores:
        store.settle()

    def result(
        variant: str, call: Callable[[], Tensor], device_bytes: int, same: bool | None, info: Tensor | None = None
    ) -> Result:
        output = call() if info is None else info
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            device.finish(device.record("compute"))
            times.append(1000 * (time.perf_counter() - begin))
        truth = _exact(layer)
        error = ((output.double().cpu() - truth).norm(dim=-1) / truth.norm(dim=-1)).mean().item()
        batch = len(layer.data)
        return Result(
            device.name, layer.context, batch, variant, statistics.median(times), repeats, device_bytes, error, same
        )

    usual, right = attend_stores(query, stores, scale=scale)
    rows = sum(store.nbytes().rows for store in stores)
    index = sum(store.nbytes().index for store in stores)
    held = {"host": 0, "gpu_index": index, "gpu": index + 2 * rows}
    yield result("cpu", lambda: attend_stores(query, stores, scale=scale)[0].output, 0, True, usual.output)
    for way in WAYS:
        place = Accelerated(device, way)
        state, info = attend_stores(query, stores, scale=scale, placement=place)
        away = float((state.output.double() - usual.output.double()).norm() / usual.output.double().norm())
        same = _same(info, right)
        if same and not away <= TOLERANCE:
            raise WrongResultError(f"{way} at {layer.context} tokens differs from cpu by {away:.1e} on the same sample")

        def step(place: Placement = place) -> Tensor:
            return attend_stores(query, stores, scale=scale, placement=place)[0].output

        yield result(way, step, held[way], same, state.output)
    exact = layer.stores(EXACT)
    yield result("exact_cpu", lambda: attend_stores(query, exact, scale=scale, placement=CPU)[0].output, 0, None)
    yield from _baselines(device, layer, result)


def _baselines(device: Device, layer: Layer, result: Callable[..., Result]) -> Iterator[Result]:
    """Attention over everything on the GPU."""
    data = layer.data
    B, H, D = layer.queries[0].shape
    G, end = data[0].kv_heads, layer.context
    shape = [2, B, G, end, D]
    above = device.buffer("all rows", shape, data[0].keys.dtype, pinned=True)
    below = device.buffer("all rows on the device", shape, data[0].keys.dtype)

    def fill() -> None:
        for b, each in enumerate(data):
            above.tensor[0, b], above.tensor[1, b] = each.keys[:, :end], each.values[:, :end]

    device.host("fill", fill, writes=[above])
    query = layer.queries[0].view(B, G, H // G, D).to(below.tensor.device, below.tensor.dtype)

    def attend() -> Tensor:
        keys, values = below.tensor
        work = device.launch(
            "compute",
            "exact",
            lambda: scaled_dot_product_attention(query, keys, values, scale=data[0].scale),
            reads=[below],
        )
        return work.reshape(B, H, D)

    def copy() -> Tensor:
        device.wait("up", device.record("compute"))
        device.copy("up", above, below)
        device.wait("compute", device.record("up"))
        return attend()

    copy()
    nbytes = below.tensor.nbytes
    yield result("exact_gpu", attend, nbytes, None)
    yield result("exact_copied", copy, 0, None)


def _exact(layer: Layer) -> Tensor:
    """(B, H, D) float64: over the tokens before the first step, which is what stores hold here."""
    outputs = []
    for b, each in enumerate(layer.data):
        H, G = each.queries.shape[1], each.kv_heads
        query = layer.queries[0, b].double().view(G, H // G, -1)
        keys, values = (x[:, : layer.context].double() for x in (each.keys, each.values))
        outputs.append((each.scale * query @ keys.mT).softmax(-1).matmul(values).flatten(0, 1))
    return torch.stack(outputs)


def _same(one: StepInfo, other: StepInfo) -> bool:
    return all(
        torch.equal(a, b)
        for mine, yours in zip(one.ids, other.ids, strict=True)
        for a, b in zip(mine, yours, strict=True)
    )
