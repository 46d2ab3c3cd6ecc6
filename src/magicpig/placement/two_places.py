"""What placements have in common that take a step together with a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from magicpig.placement.base import LayerStep, OnHost, RepeatedStep, Stepped, by_kind, chooses_in_python
from magicpig.placement.cpu import CPU
from magicpig.store import KVStore


class TwoPlaces(OnHost, ABC):
    """Steps of stores that the device knows how to serve go by `each`, the others as on `Cpu`."""

    def step(self, step: LayerStep) -> Stepped:
        return by_kind(step, [self.elsewhere(store) for store in step.stores], self.each, self.on_processor)

    def repeated(self, stores: Sequence[KVStore], heads: int, scale: float, softcap: float) -> RepeatedStep | None:
        return None

    def elsewhere(self, store: KVStore) -> bool:
        """Whether the step of a store is the processor's alone: by default of samplers for comparison."""
        return chooses_in_python(store)

    def on_processor(self, step: LayerStep) -> Stepped:
        """A step that the processor takes alone."""
        return CPU.step(step)

    @abstractmethod
    def each(self, step: LayerStep) -> Stepped:
        """A step of the other stores."""
