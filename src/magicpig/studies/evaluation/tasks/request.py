"""Which sample is wanted, and what it may be made from."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from magicpig.errors import ArgumentError


class TaskError(ArgumentError):
    """A sample that cannot be had. One line, naming the cause."""

    code = "invalid_task"


@dataclass(frozen=True)
class Sources:
    """Paths of the files that tasks read; None where there is none.

    filler: text to hide needles in, UTF-8 (default: generated sentences).
    squad: SQuAD 2.0 (arXiv 1806.03822), dev-v2.0.json; qa_1 needs it.
    hotpotqa: HotpotQA (arXiv 1809.09600), hotpot_dev_distractor_v1.json; qa_2 needs it.
    """

    filler: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None


@dataclass(frozen=True)
class Request:
    """Sample ``index`` of a task at a length in tokens."""

    task: str
    length: int
    index: int
    seed: int = 0
    sources: Sources = field(default_factory=Sources)

    def draw(self, name: str) -> random.Random:
        """The random numbers called ``name``: from the start at each call, and no others for no other request."""
        return random.Random(f"{self.seed} {self.task} {self.length} {self.index} {name}")
