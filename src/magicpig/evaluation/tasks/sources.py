"""Files of the user that tasks are made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sources:
    """Paths of the files that tasks read; None where there is none.

    filler: text to hide needles in, UTF-8 (default: sentences made by `filler`).
    squad: SQuAD 2.0 questions, dev-v2.0.json; qa_1 needs it.
    hotpotqa: HotpotQA questions, hotpot_dev_distractor_v1.json; qa_2 needs it.
    """

    filler: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None
