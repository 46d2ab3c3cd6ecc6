"""Several processes compute one model, each with some of its heads: rank 0 decides, the others do as it does.

torchrun starts them. transformers splits the weights by the model's own plan, and adds up what each rank computes. Each
keeps keys, values and indexes of its own kv heads. Rank 0 has the engine. What is done to its states goes into a
ledger, which travels with the next step; by it the other ranks do the same to theirs. Which rows a head draws depends
on where it stands in the model, so that the tokens are those of one process.

A rank that is gone takes the group along: what the others have is of no use without it. torchrun starts it again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from magicpig.config import Config
from magicpig.engine.runner import Outcome, Runner, SequenceState, Work
from magicpig.engine.scheduler import Phase
from magicpig.errors import MagicPigError, NotFiniteError

PATIENCE = 600.0  # seconds until a rank that says nothing counts as gone
HEARTBEAT = 60.0  # seconds between orders while there is nothing to do


class GroupError(MagicPigError, RuntimeError):
    """A rank has ended, or does not answer: the group cannot go on."""

    code = "group_ended"


class Group:
    """The processes of one model. rank: which one this is; size: how many there are; here: how many on this machine."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self.here = int(os.environ["LOCAL_WORLD_SIZE"])
        gpus = torch.cuda.is_available()
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        limit = timedelta(seconds=patience)
        store, self.rank, self.size = next(rendezvous("env://", timeout=limit))
        # torchrun keeps its store when it starts a group again; without names of their own the new ranks would find
        # there where the old ones listened, and wait for these.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = distributed.PrefixStore(f"start-{start}", store)  # type: ignore[attr-defined]
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=limit)
        # Orders are no work for a GPU.
        self._orders: Any = distributed.new_group(backend="gloo", timeout=limit)

    @classmethod
    def of_environment(cls) -> Group | None:
        """The group that torchrun has started this process in; None if it has started none, or one alone."""
        return cls() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None

    def send(self, order: Order) -> None:
        """From rank 0 to all others."""
        distributed.broadcast_object_list([order], src=0, group=self._orders)

    def receive(self) -> Order:
        """What rank 0 sends next."""
        found: list[Any] = [None]
        distributed.broadcast_object_list(found, src=0, group=self._orders)
        order = found[0]
        assert isinstance(order, Order)
        return order

    def any(self, flags: list[bool]) -> list[bool]:
        """What is true on any rank. All call it at the same point of a step."""
        raised = torch.tensor(flags, dtype=torch.int32, device="cpu")
        distributed.all_reduce(raised, distributed.ReduceOp.MAX, group=self._orders)
        return [bool(flag) for flag in raised.tolist()]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Turns whatever goes wrong into GroupError: the ranks are out of step, and nothing mends that."""
        try:
            yield
        except GroupError:
            raise
        except Exception as error:
            raise GroupError(
                f"rank {self.rank} of {self.size} ends, since another one has ended, does not answer, or failed: "
                f"{type(error).__name__}: {error}"
            ) from error


@dataclass(frozen=True)
class New:
    """State `number` begins, empty."""

    number: int
    config: Config


@dataclass(frozen=True)
class Fork:
    """State `number` goes on from `origin`, as `SequenceState.fork` says."""

    number: int
    origin: int
    config: Config | None
    length: int | None


@dataclass(frozen=True)
class Index:
    """The index of state `number` is built beside the steps."""

    number: int


@dataclass(frozen=True)
class Drop:
    """Nobody needs state `number` any more."""

    number: int


@dataclass(frozen=True)
class NumberedWork:
    """`Work` on state `number`."""

    number: int
    tokens: Sequence[int]
    begin: int
    phase: Phase
    logits: int


@dataclass(frozen=True)
class Order:
    """What the other ranks do next: all that the ledger has, in its order, and then one step, if there is `work`.

    last: there will be no more.
    """

    entries: tuple[New | Fork | Index | Drop, ...]
    work: tuple[NumberedWork, ...] = ()
    last: bool = False


class Ledger:
    """What was done to the states of rank 0 and no other rank knows yet. Any thread may write."""

    def __init__(self) -> None:
        self._entries: deque[New | Fork | Index | Drop] = deque()
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def enter(self, state: SequenceState) -> LedState:
        """Numbers a state; when it is let go, that is an entry, too."""
        return LedState(state.config, state.layers, self, next(self._numbers))

    def add(self, entry: New | Fork | Index | Drop) -> None:
        self._entries.append(entry)

    def take(self) -> tuple[New | Fork | Index | Drop, ...]:
        """All entries so far, which are forgotten here."""
        return tuple(self._entries.popleft() for _ in range(len(self._entries)))


class LedState(SequenceState):
    """A state of rank 0, which the other ranks know by its number."""

    def __init__(self, config: Config, layers: list[Any], ledger: Ledger, number: int) -> None:
        super().__init__(config, layers)
        self._ledger, self.number = ledger, number
        weakref.finalize(self, ledger.add, Drop(number)).atexit = False

    def fork(self, config: Config | None = None, length: int | None = None) -> SequenceState:
        other = self._ledger.enter(super().fork(config, length))
        self._ledger.add(Fork(other.number, self.number, config, length))
        return other


class RankRunner(Runner):
    """A runner whose network has some of the heads. Raises GroupError, and then it cannot go on."""

    def __init__(self, group: Group, network: Any, config: Config, *, max_length: int) -> None:
        super().__init__(network, config, max_length=max_length)
        self.group = group
        self._kv_heads = [shape.kv_heads for shape in self.shapes]

    def first_head(self, index: int, kv_heads: int) -> int:
        # Some plans do not split attention; then every rank has all heads.
        return self.group.rank * kv_heads if kv_heads < self._kv_heads[index] else 0

    def agree(self, failed: dict[int, MagicPigError], pieces: int) -> None:
        """A piece that failed on one rank has failed."""
        for i, there in enumerate(self.group.any([i in failed for i in range(pieces)])):
            if there and i not in failed:
                failed[i] = NotFiniteError("queries, keys or values of another rank are not finite")


class Leader(RankRunner):
    """The runner of rank 0, whose steps all ranks compute."""

    def __init__(self, group: Group, network: Any, config: Config, *, max_length: int) -> None:
        super().__init__(group, network, config, max_length=max_length)
        self._ledger, self._sent, self._ended = Ledger(), time.monotonic(), False

    def new_state(self, config: Config) -> SequenceState:
        state = self._ledger.enter(super().new_state(config))
        self._ledger.add(New(state.number, config))
        return state

    def will_index(self, state: SequenceState) -> None:
        assert isinstance(state, LedState)
        self._ledger.add(Index(state.number))

    def run(self, work: Sequence[Work]) -> list[Outcome]:
        with self.group.together():
            self._send(tuple(_numbered(piece) for piece in work))
            return super().run(work)

    def idle(self) -> None:
        if len(self._ledger) or time.monotonic() > self._sent + HEARTBEAT:
            with self.group.together():
                self._send()

    def close(self) -> None:
        super().close()
        if not self._ended:
            with contextlib.suppress(Exception):  # of a group that has ended before
                self._send(last=True)

    def _send(self, work: tuple[NumberedWork, ...] = (), *, last: bool = False) -> None:
        self._ended = self._ended or last
        self.group.send(Order(self._ledger.take(), work, last))
        self._sent = time.monotonic()


def follow(group: Group, network: Any, config: Config, *, max_length: int) -> None:
    """What every rank but the first does, until that one ends. Raises GroupError when it is gone."""
    if threading.current_thread() is threading.main_thread():
        # torchrun and terminals send signals to all ranks; when it is time to end, rank 0 says so.
        for ends in (signal.SIGTERM, signal.SIGINT):
            signal.signal(ends, signal.SIG_IGN)
    runner = RankRunner(group, network, config, max_length=max_length)
    follower = _Follower(runner)
    with group.together():
        while not (order := group.receive()).last:
            follower.do(order)
    runner.close()


class _Follower:
    def __init__(self, runner: RankRunner) -> None:
        self._runner = runner
        self._states: dict[int, SequenceState] = {}
        self._indexing: dict[int, Future[None]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="magicpig-index")

    def do(self, order: Order) -> None:
        for entry in order.entries:
            if isinstance(entry, New):
                self._states[entry.number] = self._runner.new_state(entry.config)
            elif isinstance(entry, Fork):
                self._states[entry.number] = self._state(entry.origin).fork(entry.config, entry.length)
            elif isinstance(entry, Index):
                self._indexing[entry.number] = self._worker.submit(_settle, self._states[entry.number])
            else:
                self._runner.forget()
                self._indexing.pop(entry.number, None)
                self._states.pop(entry.number, None)
        if order.work:
            self._runner.run(
                [
                    Work(self._state(piece.number), piece.tokens, piece.begin, piece.phase, piece.logits)
                    for piece in order.work
                ]
            )

    def _state(self, number: int) -> SequenceState:
        """A state whose index is built, if it is being built."""
        if number in self._indexing:
            self._indexing.pop(number).result()
        return self._states[number]


def _settle(state: SequenceState) -> None:
    for store in state.stores:
        store.settle()


def _numbered(piece: Work) -> NumberedWork:
    assert isinstance(piece.state, LedState)
    return NumberedWork(piece.state.number, tuple(piece.tokens), piece.begin, piece.phase, piece.logits)


def splits_attention(network: Any) -> bool:
    """Whether the plan by which transformers splits a model splits its kv heads."""
    plan = network.config.get_text_config(decoder=True).base_model_tp_plan or {}
    return any(name.endswith("k_proj") for name in plan)
