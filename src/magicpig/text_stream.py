"""Tokens become text while they come: whole characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what decoders put where bytes are no character, or not yet one
WINDOW = 16  # tokens that are decoded anew with each new one, at most about twice as many
OVERLAP = 8  # of these, kept when the window moves on


class Detokenizer:
    """The text of one answer. The pieces that `push` and `flush` return are, joined, what decoding all tokens gives.

    Decoding token by token gives other text than decoding all at once: characters may have several tokens, and spaces
    depend on the neighbours. So a window of tokens is decoded anew with each new one (as vLLM does), and what is new
    about its text is returned.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._rewrites = rewrites(tokenizer)
        self._window: list[int] = []
        self._text = ""  # of the window
        self._shown = 0  # characters of it that were returned

    def push(self, token: int) -> str:
        """The text that is certain after one more token."""
        before = self._text
        self._window.append(token)
        self._text = self._decode(self._window)
        certain = self._text.rstrip(REPLACEMENT)
        if self._rewrites:
            certain = _common(before, certain)
        new = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if len(self._window) >= 2 * WINDOW:
            self._move()
        return new

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        rest = self._text[self._shown :]
        self._shown = len(self._text)
        return rest

    def _move(self) -> None:
        """Forgets the front of the window where the text of its end, decoded alone, is the same."""
        kept = self._window[-OVERLAP:]
        text = self._decode(kept)
        shown = len(text) - (len(self._text) - self._shown)
        if shown >= 0 and self._text.endswith(text) and not text.startswith(REPLACEMENT):
            self._window, self._text, self._shown = kept, text, shown

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)
        return text


def rewrites(tokenizer: Any) -> bool:
    """Whether a new token may change the text of those before it; then text has to wait for one more token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return True
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    return any(step.get("type") in ("WordPiece", "CTC", "BPEDecoder") or _is_long(step) for step in steps)


def _is_long(step: dict[str, Any]) -> bool:
    """A replacement of more than one character may reach over two tokens."""
    if step.get("type") != "Replace":
        return False
    pattern = step["pattern"].get("String")
    return pattern is None or len(pattern) > 1


class StopStrings:
    """Finds the first of some strings in text that comes in pieces."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops, self._include = tuple(stops), include
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that can be shown: up to a stop string, or to where one may have begun."""
        if not self._stops:
            return text
        self._held += text
        ends = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            at, stop = min(ends, key=lambda end: (end[0] + len(end[1]), end[0]))  # the first one to be whole
            self.found = True
            shown, self._held = self._held[: at + len(stop) if self._include else at], ""
            return shown
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        rest, self._held = self._held, ""
        return rest


def _common(a: str, b: str) -> str:
    """The longest beginning that two texts share."""
    if b.startswith(a):  # nearly always, and a hundred times as fast
        return a
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:size]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that a stop string begins with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
