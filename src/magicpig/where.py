"""Where a model computes, described once. Flags, files and environment variables are made from it."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from magicpig.errors import ArgumentError

PlacementName = Literal["auto", "cpu", "host", "gpu_index", "gpu"]
PLACEMENTS: tuple[str, ...] = get_args(PlacementName)


class Where(BaseModel):
    """A device and a placement. Immutable; `check_where` says whether they go together."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    device: str = Field(
        "cpu",
        description="Where the model computes: cpu, or with a GPU cuda, cuda:1 and so on. Keys and values are kept in "
        "host memory either way.",
    )
    placement: PlacementName = Field(
        "auto",
        description="With a GPU, what it does for a sampled step: host hashes queries there and samples on the CPU, "
        "gpu_index selects there and fetches the rows it chose, gpu has the rows as well; auto takes the fastest that "
        "fits, and says why. Without one: cpu.",
    )


def check_where(device: str, placement: str) -> None:
    """Raises ArgumentError for what is no device, no placement, or does not go together; does not look for a GPU."""
    name, colon, number = device.partition(":")
    if device != "cpu" and (name != "cuda" or (colon and not (number.isdecimal() and number.isascii()))):
        raise ArgumentError(f"device={device!r} is not a device; allowed: cpu, cuda, cuda:0, cuda:1 and so on")
    if placement not in PLACEMENTS:
        raise ArgumentError(f"placement={placement!r} is not a placement; allowed: {', '.join(PLACEMENTS)}")
    if device == "cpu" and placement not in ("auto", "cpu"):
        raise ArgumentError(f"placement={placement} needs a GPU to run on; give device=cuda, or leave placement out")
    if device != "cpu" and placement == "cpu":
        raise ArgumentError(
            f"placement=cpu leaves device={device} nothing to do; allowed with it: auto, host, gpu_index, gpu"
        )
