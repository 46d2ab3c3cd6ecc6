"""Prompts that were read stay warm: the next one that begins alike reads only what is new.

An entry is the state of a prompt when its last token was read. Its blocks are shared with those who go on from it, and
its index with those whose settings make the same one; all others build their own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from magicpig.config import Config
from magicpig.engine.radix_tree import RadixTree
from magicpig.engine.runner import SequenceState, Window

SHORTEST = 64  # tokens; fewer are read anew as fast


class PrefixCache:
    """The states of prompts, the least recently used going first. limit: bytes of keys and values."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        # By what decides how rows are kept.
        self._trees: dict[tuple[object, ...], RadixTree[_Entry]] = {}
        self._entries: OrderedDict[_Entry, None] = OrderedDict()
        self._uses: dict[int, tuple[int, int]] = {}  # by address: bytes, and entries that hold them

    def __len__(self) -> int:
        return len(self._entries)

    def match(self, tokens: Sequence[int], most: int, config: Config) -> tuple[SequenceState, int] | None:
        """The longest known beginning of `tokens`, up to `most`: a state to go on from by `config`, and its length.

        None if it is shorter than `SHORTEST`.
        """
        entry, length = self._find(tokens, most, config)
        if entry is None:
            return None
        self._entries.move_to_end(entry)
        return entry.state.fork(config, length), length

    def touch(self, tokens: Sequence[int], config: Config) -> None:
        """Says that what matches these tokens will be used soon."""
        entry, _ = self._find(tokens, len(tokens), config)
        if entry is not None:
            self._entries.move_to_end(entry)

    def insert(self, tokens: Sequence[int], state: SequenceState) -> None:
        """Keeps a fork of the state of a prompt that was just read; forgets what the limit has no room for."""
        tokens = tuple(tokens)
        if len(tokens) < SHORTEST or self.limit <= 0:
            return
        tree = self._trees.setdefault(_kind(state.config), RadixTree())
        for length, known in list(tree.prefixes(tokens)):
            # The longer one can be cropped, but for windows, which know the newest tokens only.
            if length == len(tokens) or not state.has_windows:
                self._drop(known)
        entry = _Entry(tokens, state.fork())
        tree.insert(tokens, entry)
        self._entries[entry] = None
        for address, size in entry.memory:
            bytes_held, holders = self._uses.get(address, (size, 0))
            self._uses[address] = (bytes_held, holders + 1)
            self.nbytes += size if holders == 0 else 0
        self.reclaim(self.nbytes - self.limit)

    def reclaim(self, size: int) -> None:
        """Forgets entries until so many bytes are given back, or none is left."""
        target = self.nbytes - size
        while self._entries and self.nbytes > target:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Forgets all."""
        self.reclaim(self.nbytes)

    def _find(self, tokens: Sequence[int], most: int, config: Config) -> tuple[_Entry | None, int]:
        if config.kv_dtype == "int8":
            most = most // config.block * config.block  # rounded rows can be cropped to whole strides only
        tree = self._trees.get(_kind(config))
        found = None if tree is None else tree.longest(tokens[:most])
        if tree is None or found is None:
            return None, 0
        length, entry = found
        if entry.state.has_windows and length < len(entry.tokens):
            # Only what was read to its end is of use.
            whole = list(tree.prefixes(tokens[:most]))
            length, entry = whole[-1] if whole else (0, entry)
        elif config.kv_dtype == "int8":
            length = length // config.block * config.block
        return (entry, length) if length >= SHORTEST else (None, 0)

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry]
        self._trees[_kind(entry.state.config)].remove(entry.tokens)
        for address, _ in entry.memory:
            size, holders = self._uses.pop(address)
            if holders > 1:
                self._uses[address] = (size, holders - 1)
            else:
                self.nbytes -= size


class _Entry:
    def __init__(self, tokens: tuple[int, ...], state: SequenceState) -> None:
        self.tokens, self.state = tokens, state
        self.memory = tuple(_memory(state))


def _kind(config: Config) -> tuple[object, ...]:
    """Settings on which rows depend."""
    quantised = config.kv_dtype == "int8"
    return (config.kv_dtype, config.block, config.centre) if quantised else (config.kv_dtype,)


def _memory(state: SequenceState) -> Iterable[tuple[int, int]]:
    """Address and bytes of each piece of memory that a state holds; forks have pieces in common."""
    for layer in state.layers:
        if isinstance(layer, Window):
            yield id(layer), layer.nbytes
        elif layer is not None:
            rows, index = layer.memories()
            yield from ((id(memory), memory.nbytes) for memory in [*rows, *index])
