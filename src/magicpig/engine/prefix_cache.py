"""Prompts that were read stay warm: the next one that begins alike reads only what is new.

An entry is the state of a prompt when its last token was read. Its blocks are shared with those who go on from it, and
its index with those whose settings make the same one; all others build their own. Files (prompt_files.py) are the
second tier: they outlive the process, and what they have and memory has not is fetched before a request starts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from magicpig.config import Config
from magicpig.engine.prompt_files import PromptFile, PromptFiles
from magicpig.engine.prompts import SHORTEST, Prompts
from magicpig.engine.runner import SequenceState, Window


class PrefixCache:
    """The states of prompts, the least recently used going first. limit: bytes of keys and values. files: or None."""

    def __init__(self, limit: int, files: PromptFiles | None = None) -> None:
        self.limit = limit
        self.files = files
        self.nbytes = 0
        self._prompts: Prompts[_Entry] = Prompts()
        self._entries: OrderedDict[_Entry, None] = OrderedDict()
        self._uses: dict[int, tuple[int, int]] = {}  # by address: bytes, and entries that hold them

    def __len__(self) -> int:
        return len(self._entries)

    def match(self, tokens: Sequence[int], most: int, config: Config) -> tuple[SequenceState, int] | None:
        """The longest known beginning of `tokens`, up to `most`: a state to go on from by `config`, and its length.

        None if it is shorter than `SHORTEST`.
        """
        entry, length = self._prompts.find(tokens, most, config)
        if entry is None:
            return None
        self._entries.move_to_end(entry)
        return entry.state.fork(config, length), length

    def touch(self, tokens: Sequence[int], config: Config) -> None:
        """Says that what matches these tokens will be used soon."""
        entry, _ = self._prompts.find(tokens, len(tokens), config)
        if entry is not None:
            self._entries.move_to_end(entry)

    def in_files(self, tokens: Sequence[int], config: Config) -> PromptFile | None:
        """The file that has more of the beginning of `tokens` than is in memory, if there is one: `fetch` it."""
        if self.files is None or self.limit <= 0:
            return None
        file, length = self.files.find(tokens, len(tokens), config)
        _, known = self._prompts.find(tokens, len(tokens), config)
        return file if file is not None and length >= known + SHORTEST else None

    def insert(self, tokens: Sequence[int], state: SequenceState) -> None:
        """Keeps a fork of the state of a prompt that was just read; forgets what the limit has no room for."""
        tokens = tuple(tokens)
        if len(tokens) < SHORTEST:
            return
        if self.files is not None:
            self.files.offer(tokens, state)
        if self.limit > 0:
            self.keep(tokens, state.fork())

    def keep(self, tokens: tuple[int, ...], state: SequenceState) -> None:
        """As `insert`, in memory alone, and of the state itself."""
        for known in list(self._prompts.needless(tokens, state.config, has_windows=state.has_windows)):
            self._drop(known)
        entry = _Entry(tokens, state)
        self._prompts.add(entry)
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
            entry = next(iter(self._entries))
            self._drop(entry)
            if self.files is not None:
                self.files.withdraw(entry.tokens)

    def clear(self) -> None:
        """Forgets all that is in memory; what is being written is written."""
        while self._entries:
            self._drop(next(iter(self._entries)))

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry]
        self._prompts.remove(entry)
        for address, _ in entry.memory:
            size, holders = self._uses.pop(address)
            if holders > 1:
                self._uses[address] = (size, holders - 1)
            else:
                self.nbytes -= size


class _Entry:
    def __init__(self, tokens: tuple[int, ...], state: SequenceState) -> None:
        self.tokens, self.state = tokens, state
        self.config, self.has_windows = state.config, state.has_windows
        self.memory = tuple(_memory(state))


def _memory(state: SequenceState) -> Iterable[tuple[int, int]]:
    """Address and bytes of each piece of memory that a state holds; forks have pieces in common."""
    for layer in state.layers:
        if isinstance(layer, Window):
            yield id(layer), layer.nbytes
        elif layer is not None:
            rows, index = layer.memories()
            yield from ((id(memory), memory.nbytes) for memory in [*rows, *index])
