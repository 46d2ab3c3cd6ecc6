"""Every piece of text that the generators can emit, for a tokenizer of whole words."""

from __future__ import annotations

import string
from functools import cache

from magicpig.studies.evaluation.tasks import filler, lexicon, templates


@cache
def vocabulary() -> tuple[str, ...]:
    """The words and signs of all tasks but those of the user's own files, and but the letters of uuids; sorted."""
    fixed = {piece for text in (*templates.TEXTS, *filler.TEXTS) for piece in lexicon.pieces(text)}
    drawn = (*lexicon.english(), *lexicon.coded_words(), *lexicon.variables(), *lexicon.example_variables())
    return tuple(sorted({*fixed, *string.digits, *drawn, "-", "..."}))
