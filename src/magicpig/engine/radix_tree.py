"""Values filed under sequences of tokens, found by what they begin with. No torch, no models.

A radix tree: every edge has a run of tokens, no two edges of a node begin alike, and every leaf has a value. So what
shares the longest prefix with a sequence lies below where the descent by that sequence ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

V = TypeVar("V")


class _Node(Generic[V]):
    __slots__ = ("children", "tokens", "value")

    def __init__(self, tokens: tuple[int, ...]) -> None:
        self.tokens = tokens  # of the edge that leads here
        self.children: dict[int, _Node[V]] = {}
        self.value: V | None = None


class RadixTree(Generic[V]):
    """A mapping from non-empty sequences of tokens to values that are not None."""

    def __init__(self) -> None:
        self._root: _Node[V] = _Node(())

    def insert(self, tokens: Sequence[int], value: V) -> None:
        """Files a value, in place of one that was there."""
        node, rest = self._root, tuple(tokens)
        while rest:
            child = node.children.get(rest[0])
            if child is None:
                child = node.children[rest[0]] = _Node(rest)
            same = common(child.tokens, rest)
            if same < len(child.tokens):
                child = self._split(node, child, same)
            node, rest = child, rest[same:]
        node.value = value

    def longest(self, tokens: Sequence[int]) -> tuple[int, V] | None:
        """How many tokens of the beginning are shared with some filed sequence, most of all; and that one's value.

        Of several that share as many, one that ends there, if there is one. None if nothing shares the first token.
        """
        node, depth, tokens = self._root, 0, tuple(tokens)
        while depth < len(tokens):
            child = node.children.get(tokens[depth])
            if child is None:
                break
            same = common(child.tokens, tokens[depth:])
            node, depth = child, depth + same
            if same < len(child.tokens):
                break
        if depth == 0:
            return None
        while node.value is None:
            node = next(iter(node.children.values()))
        return depth, node.value

    def prefixes(self, tokens: Sequence[int]) -> Iterator[tuple[int, V]]:
        """Length and value of every filed sequence that the tokens begin with, the shortest first."""
        node, depth, tokens = self._root, 0, tuple(tokens)
        while depth < len(tokens):
            child = node.children.get(tokens[depth])
            if child is None or common(child.tokens, tokens[depth:]) < len(child.tokens):
                return
            node, depth = child, depth + len(child.tokens)
            if node.value is not None:
                yield depth, node.value

    def remove(self, tokens: Sequence[int]) -> None:
        """Takes out what is filed under exactly these tokens. Raises KeyError if nothing is."""
        path, node, rest = [], self._root, tuple(tokens)
        while rest:
            child = node.children.get(rest[0])
            if child is None or child.tokens != rest[: len(child.tokens)]:
                raise KeyError(f"nothing is filed under {len(tokens)} tokens like these")
            path.append((node, child))
            node, rest = child, rest[len(child.tokens) :]
        if node.value is None:
            raise KeyError(f"nothing is filed under {len(tokens)} tokens like these")
        node.value = None
        # Leaves without a value go, and nodes with one child become one with it.
        for parent, child in reversed(path):
            if child.value is None and not child.children:
                del parent.children[child.tokens[0]]
            elif child.value is None and len(child.children) == 1:
                (only,) = child.children.values()
                only.tokens = child.tokens + only.tokens
                parent.children[child.tokens[0]] = only

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], V]]:
        """All sequences and their values."""
        stack: list[tuple[tuple[int, ...], _Node[V]]] = [((), self._root)]
        while stack:
            before, node = stack.pop()
            here = before + node.tokens
            if node.value is not None:
                yield here, node.value
            stack.extend((here, child) for child in node.children.values())

    def _split(self, parent: _Node[V], child: _Node[V], at: int) -> _Node[V]:
        """Puts a node in the middle of an edge."""
        middle: _Node[V] = _Node(child.tokens[:at])
        child.tokens = child.tokens[at:]
        middle.children[child.tokens[0]] = child
        parent.children[middle.tokens[0]] = middle
        return middle


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    low, high = 0, most  # the first `low` are the same, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
