"""What fits where, and how fast a step would be, said before there is a machine: memory by the planner, time by running
the schedule of schedule.py on a device that is simulated.

Knows sizes and speeds, no tensors and no model. Times are those of bytes and operations at the speeds given, plus a
fixed time for each piece of work: what a good implementation can come near to, not what has been measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from magicpig.config import Config
from magicpig.errors import ArgumentError
from magicpig.kernels.base import padded
from magicpig.placement.schedule import Slot, by_turns, round_trip
from magicpig.placement.simulated import Simulated
from magicpig.samplers import sampler_of
from magicpig.samplers.sketch import Sketch, candidates_for
from magicpig.settings import DrawPolicy, IndexSpec, Policy
from magicpig.store.planner import LayerShape, plan
from magicpig.types import MemoryUse

PlaceName = Literal["exact", "gpu", "gpu_index", "host"]
"""exact: attention over everything, in the memory of the GPU, to compare with."""
PLACES: tuple[PlaceName, ...] = get_args(PlaceName)
USUAL_NOISE = 0.8  # of the scores of a sketch, in nats: as of most heads of a trained model with two bits
SPARE = 0.05  # of the GPU's memory, for activations and what libraries keep


@dataclass(frozen=True)
class Speeds:
    """Bytes a second that a GPU reads from its memory, the link carries each way, and the host reads in order and in
    single rows; operations a second of products on the GPU; seconds that any piece of work takes besides.
    """

    gpu: float = 2e12
    flops: float = 4e14
    link: float = 5e10
    host: float = 1e11
    rows: float = 4e10
    overhead: float = 8e-6


@dataclass(frozen=True)
class Sizes:
    """Of a model: its layers, the bytes and the number of the weights of a layer, and those beside the layers."""

    layers: Sequence[LayerShape]
    layer_bytes: int
    layer_weights: int
    other_bytes: int

    @property
    def nbytes(self) -> int:
        return self.layer_bytes * len(self.layers) + self.other_bytes


@dataclass(frozen=True)
class Foretold:
    """A placement of `batch` sequences. vram, ram: bytes needed there. most: the largest batch that fits, 0 for none.

    step_s: of one token of each sequence, at that batch; device: whose timeline that is.
    """

    place: PlaceName
    batch: int
    vram: int
    ram: int
    most: int
    step_s: float
    device: Simulated

    @property
    def fits(self) -> bool:
        return self.most >= self.batch

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.step_s


def foretell(
    sizes: Sizes,
    config: Config,
    *,
    context: int,
    batch: int,
    vram: int,
    ram: int,
    dtype: torch.dtype = torch.bfloat16,
    speeds: Speeds | None = None,
) -> list[Foretold]:
    """All placements, for `batch` sequences of `context` tokens on a GPU of `vram` bytes beside `ram` bytes of memory.

    Raises ArgumentError for sizes below 1, and for samplers that have no steps on an accelerator.
    """
    head_dim = sizes.layers[0].head_dim
    if not isinstance(sampler_of(IndexSpec.of(config, sampled=True), head_dim), Sketch):
        raise ArgumentError(f"sampler={config.sampler!r} has no steps on an accelerator; allowed: 'sketch'")
    if context < 1 or batch < 1 or vram < 1 or ram < 1:
        raise ArgumentError(f"context={context}, batch={batch}, vram={vram} and ram={ram} must be at least 1")
    one = plan(sizes.layers, config, sequences=1, tokens=context, dtype=dtype).kept
    own = speeds or Speeds()
    found = []
    for place in PLACES:
        on_gpu, on_host = _kept(place, one)
        free = vram * (1 - SPARE) - sizes.nbytes
        limits = [int(room // each) for room, each in ((free, on_gpu), (ram, on_host)) if each]
        most = max(0, min(limits)) if free > 0 else 0
        # With a second micro-batch the weights are read twice: that has to be made up for.
        halves = [[batch - batch // 2, batch // 2]] if batch > 1 and on_host else []
        ways = [_simulated(place, sizes, config, context, parts, one, dtype, own) for parts in ([batch], *halves)]
        device = min(ways, key=lambda each: each.elapsed)
        need = sizes.nbytes + round(vram * SPARE) + batch * on_gpu
        found.append(Foretold(place, batch, need, batch * on_host, most, device.elapsed, device))
    return found


def choose(found: Sequence[Foretold]) -> tuple[Foretold, str]:
    """The fastest placement that fits, and why in a sentence. Raises ArgumentError where none fits."""
    able = [each for each in found if each.place != "exact" and each.fits]
    if not able:
        most = max(found, key=lambda each: each.most)
        raise ArgumentError(
            f"batch={found[0].batch} fits nowhere: {most.place} would hold {most.most} sequences at most; "
            "less would do with a shorter context, a smaller batch, or kv_dtype='int8'"
        )
    best = min(able, key=lambda each: each.step_s)
    others = [each for each in found if each.place not in ("exact", best.place)]
    said = ", ".join(
        f"{each.place} would take {each.step_s / best.step_s:.1f} times as long"
        if each.fits
        else f"{each.place} holds {each.most} of {each.batch}"
        for each in others
    )
    return best, f"{best.place}: {best.tokens_per_s:.0f} tokens a second; {said}"


def _kept(place: PlaceName, one: MemoryUse) -> tuple[int, int]:
    """Bytes of a sequence on the GPU and on the host."""
    return {
        "exact": (one.rows, 0),
        "gpu": (one.rows + one.index, 0),
        "gpu_index": (one.index, one.rows),
        "host": (0, one.rows + one.index),
    }[place]


class _Nothing(NamedTuple):
    """A trip of known cost that computes nothing."""

    ask_name: str
    answer_name: str

    def tell(self) -> None: ...
    def ask(self) -> None: ...
    def meanwhile(self) -> None: ...
    def answer(self) -> None: ...
    def finish(self) -> None: ...


@dataclass(frozen=True)
class _Traffic:
    """Of a layer and a sequence: bytes of the sketches, of what is read of rows (keys of candidates, values of what is
    drawn of them), and of the rows that always are read; the sizes of what is asked and answered.
    """

    index: float
    rows: float
    window: float
    asked: int
    answered: int


def _traffic(
    place: PlaceName, layer: LayerShape, config: Config, context: int, index_bytes: int, itemsize: int
) -> _Traffic:
    policy = Policy.of(config, sampled=layer.sampled)
    end = policy.index_end(context, config.block) if layer.sampled and place != "exact" else 0
    row = 2 * padded(layer.head_dim) * itemsize
    seen = min(context, layer.window or context)
    if end <= policy.sinks:
        return _Traffic(0, 0, seen * layer.kv_heads * row, 0, 0)
    draws, body = DrawPolicy.of(config), end - policy.sinks
    drawn = layer.kv_heads * draws.budget_for(body)
    candidates = layer.kv_heads * candidates_for(draws, body, draws.budget_for(body), USUAL_NOISE)
    read = (candidates + drawn) * row / 2
    window = (policy.sinks + context - end) * layer.kv_heads * row
    heads = layer.query_heads or layer.kv_heads
    if place == "host":
        return _Traffic(index_bytes, read, window, heads * layer.head_dim * 4, heads * (layer.head_dim + 1) * 4)
    return _Traffic(index_bytes, read, window, candidates * 4, candidates * row)


def _simulated(
    place: PlaceName,
    sizes: Sizes,
    config: Config,
    context: int,
    parts: Sequence[int],
    one: MemoryUse,
    dtype: torch.dtype,
    speeds: Speeds,
) -> Simulated:
    """The timeline of a step of micro-batches of so many sequences."""
    sampled = sum(layer.sampled for layer in sizes.layers)
    index_bytes = one.index // max(1, sampled)
    travels = place in ("host", "gpu_index")
    costs: dict[str, float] = {}
    device = Simulated(costs, down=speeds.link, up=speeds.link, overhead=speeds.overhead, tensors="meta")

    def layers(own: int, name: str) -> Iterator[None]:
        read = max(sizes.layer_bytes / speeds.gpu, 2 * own * sizes.layer_weights / speeds.flops)
        for layer in sizes.layers:
            traffic = _traffic(place, layer, config, context, index_bytes, dtype.itemsize)
            costs["dense"], costs["window"] = read, own * traffic.window / speeds.gpu
            device.launch("compute", f"dense{name}", _nothing)
            if not traffic.rows:
                device.launch("compute", f"window{name}", _nothing)
                continue
            if not travels:
                costs["select"], costs["merge"] = (own * x / speeds.gpu for x in (traffic.index, traffic.rows))
                for what in ("select", "window", "merge"):
                    device.launch("compute", f"{what}{name}", _nothing)
                continue
            if place == "host":
                sample = own * (traffic.index / speeds.host + traffic.rows / speeds.rows)
                costs["select"], costs["sample"], costs["merge"] = 0.0, sample, 0.0
            else:
                costs["select"], costs["gather"] = (
                    own * traffic.index / speeds.gpu,
                    own * traffic.answered / speeds.rows,
                )
                costs["merge"] = own * traffic.rows / speeds.gpu
            slot = Slot(*(
                device.buffer(f"{what}{name}", [own * size], torch.uint8, pinned=pinned)
                for what, size, pinned in (
                    ("asked", traffic.asked, False),
                    ("question", traffic.asked, True),
                    ("answer", traffic.answered, True),
                    ("answered", traffic.answered, False),
                )
            ))  # fmt: skip
            trip = _Nothing("select", "sample" if place == "host" else "gather")
            yield from _with_costs(costs, round_trip(device, slot, trip, name))
        costs["head"] = sizes.other_bytes / 2 / speeds.gpu
        device.launch("compute", f"head{name}", _nothing)

    by_turns([layers(own, f" {i}") for i, own in enumerate(parts)])
    return device


def _with_costs(costs: dict[str, float], trip: Iterator[None]) -> Iterator[None]:
    """Puts the costs of this micro-batch back when its turn comes again."""
    own = dict(costs)
    for pause in trip:
        yield pause
        costs.update(own)


def _nothing() -> None:
    return
