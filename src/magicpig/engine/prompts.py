"""Which of the prompts that are there a new one can go on from. Knows tokens and settings; no torch, no files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from magicpig.config import Config
from magicpig.engine.radix_tree import RadixTree

SHORTEST = 64  # tokens; fewer are read anew as fast


class Prompt(Protocol):
    """tokens: that were read. config: by what settings. has_windows: whether only all of it can be gone on from."""

    @property
    def tokens(self) -> tuple[int, ...]: ...
    @property
    def config(self) -> Config: ...
    @property
    def has_windows(self) -> bool: ...


P = TypeVar("P", bound=Prompt)


class Prompts(Generic[P]):
    """Prompts by what decides how their rows are kept, and by their tokens; of two with the same tokens the later."""

    def __init__(self) -> None:
        self._trees: dict[tuple[object, ...], RadixTree[P]] = {}

    def add(self, prompt: P) -> None:
        self._trees.setdefault(rows_of(prompt.config), RadixTree()).insert(prompt.tokens, prompt)

    def remove(self, prompt: P) -> None:
        """Raises KeyError if it is not there."""
        self._trees[rows_of(prompt.config)].remove(prompt.tokens)

    def __iter__(self) -> Iterator[P]:
        for tree in self._trees.values():
            yield from (prompt for _, prompt in tree)

    def find(self, tokens: Sequence[int], most: int, config: Config) -> tuple[P | None, int]:
        """The prompt that shares the longest beginning with `tokens`, up to `most` of them, and how many it shares.

        None and 0 if these are fewer than `SHORTEST`.
        """
        if config.kv_dtype == "int8":
            most = most // config.block * config.block  # rounded rows can be cropped to whole strides only
        tree = self._trees.get(rows_of(config))
        found = None if tree is None else tree.longest(tokens[:most])
        if tree is None or found is None:
            return None, 0
        length, prompt = found
        if prompt.has_windows and length < len(prompt.tokens):
            # Only what was read to its end is of use.
            whole = list(tree.prefixes(tokens[:most]))
            length, prompt = whole[-1] if whole else (0, prompt)
        elif config.kv_dtype == "int8":
            length = length // config.block * config.block
        return (prompt, length) if length >= SHORTEST else (None, 0)

    def needless(self, tokens: Sequence[int], config: Config, *, has_windows: bool) -> Iterator[P]:
        """Those that nobody needs beside a prompt of these tokens."""
        tree = self._trees.get(rows_of(config))
        for length, known in list(tree.prefixes(tokens)) if tree is not None else ():
            # The longer one can be cropped, but for windows, which know the newest tokens only.
            if length == len(tokens) or not has_windows:
                yield known


def rows_of(config: Config) -> tuple[object, ...]:
    """Settings on which rows depend."""
    quantised = config.kv_dtype == "int8"
    return (config.kv_dtype, config.block, config.centre) if quantised else (config.kv_dtype,)
