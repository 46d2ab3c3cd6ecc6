"""From what users write, a device and a placement, to a placement that is there; `auto` is decided here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import cast

import torch

from magicpig.config import Config
from magicpig.errors import ArgumentError
from magicpig.kernels import library
from magicpig.machine import free_memory
from magicpig.placement.accelerator import WAYS, Accelerated, Way
from magicpig.placement.base import Placement
from magicpig.placement.cpu import CPU
from magicpig.placement.device import Cuda, Device, check_cuda
from magicpig.placement.foretell import Foretold, Sizes, Speeds, choose, foretell
from magicpig.samplers import sampler_of
from magicpig.samplers.lsh import Lsh
from magicpig.samplers.sketch import Sketch
from magicpig.settings import IndexSpec
from magicpig.where import check_where

logger = logging.getLogger("magicpig.placement")
TRIED = 1 << 26  # bytes that are copied to see how fast that is
TIMES = 3
ANY_DIM = 16  # of a head, to ask what kind of sampler a config has


def open_device(device: str | Device) -> Device | None:
    """The device of that name, None for the CPU. Raises ArgumentError where there is none such."""
    if not isinstance(device, str):
        return device
    if device == "cpu":
        return None
    check_cuda(device, "device")
    return Cuda(int(device.partition(":")[2] or 0))


def place_of(
    device: str | Device,
    placement: str | Placement,
    config: Config,
    sizes: Callable[[], Sizes],
    *,
    context: int = 131072,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Placement:
    """The placement of that name on that device; one that is there is taken as it is.

    sizes: of the model, whose weights are on the device, asked for where `auto` has to choose for `batch` sequences of
    up to `context` tokens. Why it chose is logged, once.
    Raises ArgumentError as `check_where`, where CUDA is asked for and absent, for samplers without steps on an
    accelerator, and where nothing fits.
    """
    if not isinstance(placement, str):
        return placement
    check_where(device if isinstance(device, str) else "cuda", placement)
    opened = open_device(device)
    if opened is None:
        return CPU
    able = ways_of(config)
    if placement != "auto" and placement not in able:
        raise ArgumentError(
            f"placement={placement} has no steps for sampler={config.sampler!r}; it takes 'sketch', "
            "and placement=host takes 'lsh' as well"
        )
    if placement != "auto":
        return Accelerated(opened, cast(Way, placement))
    if len(able) == 1:
        way, why = able[0], f"{able[0]}: no other takes sampler={config.sampler!r}"
    else:
        way, why = _chosen(opened, config, sizes(), context, batch, dtype)
    logger.warning("placement=auto takes %s", why)
    return Accelerated(opened, way)


def ways_of(config: Config) -> tuple[Way, ...]:
    """The placements on an accelerator that have steps for a sampler. Raises ArgumentError where none has."""
    sampler = sampler_of(IndexSpec.of(config), ANY_DIM)
    if isinstance(sampler, Sketch):
        return WAYS
    if isinstance(sampler, Lsh):
        return ("host",)
    raise ArgumentError(
        f"sampler={config.sampler!r} has no steps on an accelerator; allowed: 'sketch', and with placement=host 'lsh'"
    )


def _chosen(
    device: Device, config: Config, sizes: Sizes, context: int, batch: int, dtype: torch.dtype
) -> tuple[Way, str]:
    """The fastest of those that fit, for as many of `batch` sequences as fit at all, and why."""
    vram, speeds = device.free_memory() + sizes.nbytes, measured(device)

    def told(sequences: int) -> list[Foretold]:
        return foretell(
            sizes, config, context=context, batch=sequences, vram=vram, ram=free_memory(), dtype=dtype, speeds=speeds
        )

    most = max(each.most for each in told(1) if each.place != "exact")
    found, why = choose(told(max(1, min(batch, most))))
    return cast(Way, found.place), why


def measured(device: Device) -> Speeds:
    """How fast this machine moves bytes. What is not measured, products and single rows, is in proportion as usual."""
    above = device.buffer("tried", [TRIED], torch.uint8, pinned=True)
    below = device.buffer("tried on the device", [TRIED], torch.uint8)
    device.host("fill", lambda: above.tensor.zero_(), writes=[above])

    def up() -> None:
        device.copy("up", above, below)
        device.wait("compute", device.record("up"))
        device.finish(device.record("up"))
        device.launch("compute", "look", lambda: None, reads=[below])
        device.finish(device.record("compute"))

    def copy() -> None:
        device.launch("compute", "double", lambda: below.tensor.clone(), reads=[below])
        device.finish(device.record("compute"))

    usual = Speeds()
    host = TRIED / _seconds(lambda: library.stream_read(above.tensor))
    return Speeds(
        gpu=2 * TRIED / _seconds(copy, after=up),
        flops=usual.flops,
        link=TRIED / _seconds(up),
        host=host,
        rows=host * usual.rows / usual.host,
        overhead=usual.overhead,
    )


def _seconds(work: Callable[[], object], after: Callable[[], object] = lambda: None) -> float:
    """The least of a few times, the first of which warms up."""
    after()
    times = []
    for _ in range(TIMES + 1):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return max(min(times[1:]), 1e-9)
