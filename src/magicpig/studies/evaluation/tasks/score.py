"""RULER's scores: does the prediction contain the answers, upper and lower case alike."""

from __future__ import annotations

import re
from collections.abc import Sequence


def match_all(prediction: str, answers: Sequence[str]) -> float:
    """The share of the answers that the prediction contains, 0 to 1."""
    text = _clean(prediction)
    return sum(answer.lower() in text for answer in answers) / len(answers)


def match_any(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction contains one of the answers, else 0."""
    text = _clean(prediction)
    return float(any(answer.lower() in text for answer in answers))


def _clean(prediction: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
