"""Placements whose device is an accelerator: verbs in Triton, buffers that travel, the schedule of schedule.py.

Three ways of one trip. `host`: queries are rotated or hashed on the device; the host finds, draws and attends over the
sample. `gpu_index`: the device has the sketches of all keys, scores and draws; the host sends the candidates' rows.
`gpu`: the rows are there, too, and nothing travels but the new token. In each the device has the rows that are never
drawn, attends over them while the host answers, and merges. Every sequence of a step is a micro-batch of its own.

Queries, keys and values of new tokens are the device's; what the host keeps of them comes down with the question. What
a step drew and how large an error it predicts is counted when it has come down, too: see `flush`.

Stores with sketches, and on `host` with hash tables; of stores with other samplers steps run as on `Cpu`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Literal, NamedTuple, NoReturn, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from magicpig.errors import ArgumentError, ArgumentTypeError, InsufficientMemoryError, MagicPigError
from magicpig.kernels.algorithm import no_sample
from magicpig.kernels.attend.reference import row_logits
from magicpig.kernels.base import SampledHalf, padded
from magicpig.kernels.hash.reference import make_planes
from magicpig.kernels.sketch.reference import EXACT_SHARE, TwoPhases, is_enough, more_rows
from magicpig.placement.base import LayerStep, Stepped, append
from magicpig.placement.cpu import CPU
from magicpig.placement.device import Buffer, Device
from magicpig.placement.held import Held, send
from magicpig.placement.schedule import Slot, Turns, by_turns, one_way, round_trip
from magicpig.placement.two_places import TwoPlaces
from magicpig.samplers import Sampler
from magicpig.samplers.lsh import Lsh
from magicpig.samplers.sketch import Sketch, SketchIndex, candidates_for, first_rows_for
from magicpig.store import KVStore
from magicpig.types import AttentionState, Sample

Way = Literal["host", "gpu_index", "gpu"]
WAYS: tuple[Way, ...] = get_args(Way)
MOST_OWED = 256  # steps of layers whose counts have not been asked for


class Accelerated(TwoPlaces):
    """way: which parts run on the device. Raises ArgumentError where Triton is missing."""

    def __init__(self, device: Device, way: Way) -> None:
        try:
            from magicpig.kernels import triton as verbs
        except ModuleNotFoundError as error:
            raise ArgumentError(
                f"placement={way} needs Triton, which is not installed: pip install 'magicpig[gpu]'"
            ) from error
        self.device, self.way, self.verbs = device, way, verbs
        self.accelerator = device
        self._settling: list[Future[None]] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="magicpig-settle")
        self._held: WeakKeyDictionary[KVStore, Held] = WeakKeyDictionary()
        self._constants: WeakKeyDictionary[Sampler, Tensor] = WeakKeyDictionary()
        self._owed: list[_Owed] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Accelerated:
        return self  # as the device itself: copies of a model share it

    def __reduce__(self) -> NoReturn:
        raise ArgumentTypeError("a placement on a device cannot be pickled; attach the model again where it is loaded")

    def elsewhere(self, store: KVStore) -> bool:
        return not isinstance(store.sampler, (Sketch, Lsh) if self.way == "host" else Sketch)

    def on_processor(self, step: LayerStep) -> Stepped:
        here = step.query.device
        stepped = CPU.step(step.to(torch.device("cpu")))
        state = AttentionState(stepped.state.output.to(here), stepped.state.lse.to(here))
        return stepped._replace(state=state)

    def each(self, step: LayerStep) -> Stepped:
        B, H, _ = step.query.shape
        if len(self._owed) >= MOST_OWED:
            self.flush()
        parts = [_Part(self, step, b) for b in range(B)]
        by_turns([part.run() for part in parts], Turns.pass_on)
        errors = [part.error for part in parts]
        here, dtype = step.query.device, step.query.dtype
        output = torch.stack([part.whole.output.flatten(0, 1) for part in parts]).to(here, dtype)
        lse = torch.stack([part.whole.lse.flatten() for part in parts]).to(here)
        for b, error in enumerate(errors):
            if error is not None:
                output[b] = lse[b] = math.nan
        self._owe([part for part in parts if part.error is None])
        predicted = torch.full((B, H), math.nan, dtype=torch.float32, device="cpu")
        samples: list[list[Sample]] = [[] for _ in parts] if step.capture else []
        if step.capture:
            self.flush()
            for b, part in enumerate(parts):
                if part.error is None:
                    samples[b], predicted[b] = part.samples(), part.predicted.flatten().cpu()
        return Stepped(AttentionState(output, lse), samples, predicted, errors)

    def settle(self, store: KVStore) -> None:
        self._settling.append(self._worker.submit(store.settle))

    def rest(self) -> None:
        settling, self._settling = self._settling, []
        wait(settling)
        for each in settling:
            with contextlib.suppress(InsufficientMemoryError):  # the next step will say it
                each.result()

    def flush(self) -> None:
        """Counts what steps have drawn and predicted so far. Raises DeviceError where one of them failed."""
        owed, self._owed = self._owed, []
        for each in owed:
            each.take(self.device)

    def held(self, store: KVStore) -> Held:
        """What the device has of a store, brought up to what the store has."""
        own = self._held.get(store)
        if own is None:
            own = self._held[store] = Held(self.device)
        own.follow(store, rows=self.way == "gpu", index=self.way != "host")
        own.window.follow(store)
        return own

    def constant(self, sampler: Sketch | Lsh) -> Tensor:
        """What makes a question of queries: the rotation (D, D) of sketches, planes (D, L * K); float32."""
        found = self._constants.get(sampler)
        if found is None:
            if isinstance(sampler, Sketch):
                unit = torch.eye(sampler.head_dim, dtype=torch.float32, device="cpu")
                made = sampler.kernels.rotate(unit, sampler.sketcher)
            else:
                made = make_planes(sampler.head_dim, sampler.K, sampler.L, sampler.seed)
            found = self._constants[sampler] = send(self.device, "constant", made)
        return found

    def _owe(self, parts: Sequence[_Part]) -> None:
        """Sends down what is to be counted of a step: (P, 2, H), predicted errors and the sizes of samples."""
        if not parts:
            return
        H = parts[0].step.query.shape[1]
        report, came = (
            self.device.buffer("report", [len(parts), 2, H], torch.float32, pinned=pinned) for pinned in (False, True)
        )

        def write() -> None:
            for i, part in enumerate(parts):
                report.tensor[i, 0] = part.predicted.flatten()
                if part.drawn is not None:
                    report.tensor[i, 1] = part.drawn.counts.repeat_interleave(part.R)

        self.device.launch("compute", "report", write, writes=[report])
        self.device.wait("down", self.device.record("compute"))
        self.device.copy("down", report, came)
        steps = [(part.store, part.store.body, part.tried if part.half is None else None) for part in parts]
        self._owed.append(_Owed(steps, came, self.device.record("down")))


class _Owed(NamedTuple):
    """What is counted of the steps of stores once it has come down. The host's half has counted its samples itself.

    steps: each store, its body at that time, and, where the device drew, how many rows each kv head drew in vain.
    """

    steps: list[tuple[KVStore, int, list[int] | None]]
    report: Buffer
    event: Any

    def take(self, device: Device) -> None:
        device.finish(self.event)
        predicted, sizes = device.host("count", lambda: self.report.tensor, reads=[self.report]).unbind(1)
        for i, (store, body, tried) in enumerate(self.steps):
            if tried is not None:
                own, group = sizes[i].int().tolist(), sizes.shape[1] // len(tried)
                store.count_step(own, predicted[i], [tried[h // group] for h in range(len(own))], body)
            else:
                store.kernels.count_predicted(store.view, predicted[i])


class _Drawn(NamedTuple):
    """Of all kv heads of a sequence: ids and log_u (G, S), counts (G,), on the device. Behind a count: zeros."""

    ids: Tensor
    log_u: Tensor
    counts: Tensor

    @classmethod
    def of(cls, heads: list[tuple[Tensor, Tensor]]) -> _Drawn:
        """What each kv head drew, (S_g,) and (S_g,)."""
        ids, log_u = (
            torch.nn.utils.rnn.pad_sequence(list(each), batch_first=True) for each in zip(*heads, strict=True)
        )
        counts = torch.tensor([len(own) for own, _ in heads], dtype=torch.int32, device=ids.device)
        return cls(ids.to(torch.int32), log_u.float(), counts)

    def head(self, g: int) -> tuple[Tensor, Tensor]:
        n = int(self.counts[g])
        return self.ids[g, :n], self.log_u[g, :n]


class _Part:
    """A sequence in a step; a trip of schedule.py.

    What is asked is one row of int32: the new token's query, keys and values, as float32, and then what the host shall
    answer to: codes or rotated queries, or the ids of candidates.
    """

    ask_name = "select"

    def __init__(self, place: Accelerated, step: LayerStep, b: int) -> None:
        self.place, self.step, self.b, self.store = place, step, b, step.stores[b]
        sampler = self.store.sampler
        assert isinstance(sampler, (Sketch, Lsh))
        self.sampler = sampler
        self.device, self.verbs = place.device, place.verbs
        self.G, self.D = self.store.kv_heads, self.store.head_dim
        self.R = step.query.shape[1] // self.G
        self.answers = place.way != "gpu" and bool(self.store.body)
        self.answer_name = "store" if not self.answers else "sample" if place.way == "host" else "gather"
        self.held = place.held(self.store)
        query = self._here("query", step.query[b]).float()
        # What is not finite is an error that the host finds; until then nothing shall stumble over it.
        self.given, self.query = query, query.nan_to_num(0.0, 0.0, 0.0).view(self.G, self.R, self.D)
        self.new: tuple[Tensor, Tensor] | None = None
        if step.keys is not None and step.values is not None:
            self.new = self._here("keys", step.keys[b]), self._here("values", step.values[b])
        self.position = self.store.length + (self.new is not None)
        self.wanted = [self._first_rows()] * self.G
        self.larger: dict[int, Callable[[Tensor], int]] = {}
        self.tried = [0] * self.G  # rows of draws that were not good enough
        self.noise = self._noise()
        self.error: MagicPigError | None = None
        self.weights: Tensor | None = None
        self.window: AttentionState | None = None
        self.half: SampledHalf | None = None
        self.candidates: _Drawn | None = None
        self.drawn: _Drawn | None = None
        self.told = False

    def run(self) -> Iterator[None]:
        store = self.store
        while True:
            self.slot = self._slot()
            if self.answers:
                yield from round_trip(self.device, self.slot, self)
            else:
                yield from one_way(self.device, self.slot.asked, self.slot.question, self)
            epsilon = store.draw.epsilon
            if self.error is not None or not store.body or not epsilon or self.place.way == "host":
                return
            self.device.finish(self.device.record("compute"))
            worst = self.predicted.amax(1).tolist()
            short = [
                g
                for g, error in enumerate(worst)
                if not is_enough(error, epsilon, first=self._is_first(g)) and not self._everything(g)
            ]
            if not short:
                return
            for g in short:
                assert self.drawn is not None
                self.tried[g] += int(self.drawn.counts[g])
                self.wanted[g] = self.larger[g](self.predicted[g])

    # --- the trip -----------------------------------------------------------------------------------------------------

    def tell(self) -> None:
        """The new token, for the host."""
        told = self._token(self.slot.asked)
        H = self.G * self.R
        told[:H] = self.given
        if self.new is not None:
            for i, x in enumerate(self.new):
                told[H + i * self.G : H + (i + 1) * self.G] = x
            if not self.told:
                self.held.window.put(*self.new)

    def ask(self) -> None:
        self.tell()
        rest = self._rest(self.slot.asked)
        if self.place.way == "host":
            constant = self.place.constant(self.sampler)
            if isinstance(self.sampler, Sketch):
                rest.view(torch.float32).copy_((self.query @ constant).flatten())
            else:
                rest.copy_(self.verbs.hash_vectors(self.query.flatten(0, 1), constant, self.sampler.K).flatten())
            return
        self._select()
        assert self.candidates is not None
        asked = rest.view(self.G, -1)
        asked.fill_(self.store.indexed_to)
        for g in range(len(asked)):
            ids, _ = self.candidates.head(g)
            asked[g, : len(ids)].copy_(ids)

    def meanwhile(self) -> None:
        if self.window is not None:
            return
        window = self.held.window
        count = window.count + (self.new is not None and not self.told)
        counts = torch.full((self.G,), count, dtype=torch.int32, device=self.query.device)
        self.window, _ = self.verbs.attend(
            self.query, window.tensor, counts, scale=self.step.rule.scale, softcap=self.step.rule.softcap
        )

    def answer(self) -> None:
        store, question = self.store, self.slot.question
        token = self._token(question).to(self.step.query.dtype)
        H = self.G * self.R
        query, keys, values = token[None].split([H, self.G, self.G], 1)
        if not self.told:
            step = LayerStep(query, keys, values, [store], self.step.rule)
            self.error = append(step if self.new else step._replace(keys=None, values=None), 0)
            self.told = True
            if self.error is None:
                self.held.window.end = store.length
        if not self.answers:
            return
        answer, D = self.slot.answer.tensor, self.D
        if self.error is not None:
            answer.zero_()
        elif self.place.way == "host":
            self.half = half = self._sample(query.contiguous(), self._rest(question))
            answer[:, :D], answer[:, D] = half.state.output[0], half.state.lse[0]
            answer[:, D + 1 :] = half.spread[0]
        else:
            answer.zero_()
            for g, ids in enumerate(self._rest(question).view(self.G, -1).long()):
                chosen = ids[ids < store.indexed_to]
                keys, values = store.fetch(g, chosen)
                answer[g, : len(chosen), :D] = keys
                answer[g, : len(chosen), padded(D) : padded(D) + D] = values

    def finish(self) -> None:
        if not self.store.body:
            self._merge()
            return
        if self.place.way == "host":
            D = self.D
            came = self.slot.answered.tensor.view(self.G, self.R, 2 * D + 3)
            self._merge(AttentionState(came[..., :D], came[..., D]), came[..., D + 1 :])
            return
        if self.place.way == "gpu":
            self._select()
        assert self.candidates is not None
        fetched = self.place.way == "gpu_index"
        rows = self.slot.answered.tensor if fetched else self.held.rows
        numbers = [self._draw_again(g, rows[g], fetched=fetched) for g in range(len(self.wanted))]
        self.drawn = _Drawn.of([(self.candidates.ids[g, i], log_u) for g, (i, log_u) in enumerate(numbers)])
        at = _Drawn.of(numbers).ids if fetched else self.drawn.ids
        rule = {"scale": self.step.rule.scale, "softcap": self.step.rule.softcap}
        state, spread = self.verbs.attend(self.query, rows, self.drawn.counts, self.drawn.log_u, at, **rule)
        self._merge(state, spread)

    # --- on the host --------------------------------------------------------------------------------------------------

    def _sample(self, query: Tensor, prepared: Tensor) -> SampledHalf:
        """query: (1, H, D), in the model's dtype; prepared: what the device made of it, int32."""
        store, rule, H = self.store, self.step.rule, self.G * self.R
        exact = None
        if store.draw.epsilon:  # the draw waits for the window
            assert self.window is not None
            exact = AttentionState(self.window.output.reshape(1, H, self.D).cpu(), self.window.lse.reshape(1, H).cpu())
        rotated = prepared.view(torch.float32) if isinstance(self.sampler, Sketch) else prepared.to(torch.uint16)
        return store.kernels.sampled_half(
            [store.view],
            query,
            None,
            None,
            scale=rule.scale,
            softcap=rule.softcap,
            sink_logits=rule.sink_logits,
            prepared=[rotated.view(H, -1).contiguous()],
            exact=exact,
            capture=True,
        )

    # --- on the device ------------------------------------------------------------------------------------------------

    def _select(self) -> None:
        store, rule = self.store, self.step.rule
        if self.weights is None:
            assert isinstance(self.sampler, Sketch)
            words, scales, centres = self.held.index
            self.weights = self.verbs.weigh(
                self.query,
                self.query @ self.place.constant(self.sampler),
                words,
                scales,
                centres[..., : store.head_dim],
                store.indexed_to,
                bits=self.sampler.bits,
                stride=store.spec.stride,
                scale=rule.scale,
                softcap=rule.softcap,
                sinks=store.policy.sinks,
            ).weights
        self.candidates = _Drawn.of([self._draw_first(g) for g in range(store.kv_heads)])

    def _draw_first(self, g: int) -> tuple[Tensor, Tensor]:
        """The candidates of a kv head."""
        store = self.store
        if self._everything(g):
            ids = torch.arange(store.policy.sinks, store.indexed_to, dtype=torch.int32, device=self.query.device)
            return ids, torch.zeros(len(ids), dtype=torch.float32, device=self.query.device)
        assert self.weights is not None
        ids, log_u, _ = self._draw(g, self.weights[g : g + 1], self._first(g), 1, store.policy.sinks)
        return ids, log_u

    def _draw_again(self, g: int, rows: Tensor, *, fetched: bool) -> tuple[Tensor, Tensor]:
        """Which of the candidates of a kv head are attended to, by number, and log u. rows: those, or all."""
        assert self.candidates is not None
        ids, log_u = self.candidates.head(g)
        if self._everything(g):
            return torch.arange(len(ids), dtype=torch.int64, device=ids.device), log_u
        own = rows[: len(ids)] if fetched else rows[ids.long()]
        if self._first(g) == self.wanted[g]:
            self._look(g, own, TwoPhases(ids, log_u, ids, log_u, None, 1))
            return torch.arange(len(ids), dtype=torch.int64, device=ids.device), log_u
        rule = {"scale": self.step.rule.scale, "softcap": self.step.rule.softcap}
        weights = self.verbs.weigh_rows(self.query[g], own, log_u, **rule)
        numbers, again, step = self._draw(g, weights[None], self.wanted[g], 2, 0)
        self._look(g, own, TwoPhases(numbers, again, ids, log_u, weights, step))
        return numbers.long(), log_u[numbers.long()] + again

    def _look(self, g: int, rows: Tensor, drawn: TwoPhases) -> None:
        """Keeps what the candidates of a kv head, `rows`, say of how many to draw next, if there is an epsilon."""
        epsilon, wanted, rule = self.store.draw.epsilon, self.wanted[g], self.step.rule
        if not epsilon:
            return
        keys = rows[:, : self.store.head_dim].float()
        logits = row_logits(self.query[g], keys, scale=rule.scale, softcap=rule.softcap or None)
        self.larger[g] = lambda errors: more_rows(wanted, drawn, logits, errors.to(logits.device), epsilon)

    def _draw(self, g: int, weights: Tensor, rows: int, phase: int, sinks: int) -> tuple[Tensor, Tensor, int]:
        """ids, log u and the step of a draw."""
        store = self.store
        drawn = self.verbs.draw(
            weights,
            rows,
            seed=store.draw.seed,
            layer=store.layer,
            heads=[store.first_head + g],
            position=self.position,
            sinks=sinks,
            phase=phase,
        )
        n = int(drawn.counts[0])
        return drawn.ids[0, :n], drawn.log_u[0, :n], int(drawn.steps[0])

    def _merge(self, state: AttentionState | None = None, spread: Tensor | None = None) -> None:
        """Makes the whole of the window and what was drawn, with the sinks' logits, and predicts its error."""
        assert self.window is not None
        whole = self.window
        if state is not None:
            outputs, lses = torch.stack([whole.output, state.output]), torch.stack([whole.lse, state.lse])
            whole = self.verbs.merge(outputs, lses)
        sinks = self.step.rule.sink_logits
        if sinks is not None:
            sinks = sinks.to(whole.lse.device).view(whole.lse.shape)
        whole = self.step.rule._replace(sink_logits=sinks).finish(whole)
        self.whole, self.predicted = whole, torch.zeros_like(whole.lse)
        if state is not None and spread is not None:
            self.predicted = SampledHalf(state, spread, [], []).predicted_error(whole)
            self.predicted[state.lse == -math.inf] = math.nan

    # --- what came of it ----------------------------------------------------------------------------------------------

    def samples(self) -> list[Sample]:
        """The samples of all heads, on the host."""
        if not self.store.body:
            return [no_sample(torch.float32)] * (self.G * self.R)
        if self.half is not None:
            return [Sample(*each) for each in self.half.samples]
        assert self.drawn is not None
        ids, log_u, counts = (x.cpu() for x in self.drawn)
        heads = [Sample(own[:n].long(), u[:n]) for own, u, n in zip(ids, log_u, counts.tolist(), strict=True)]
        return [heads[h // self.R] for h in range(self.G * self.R)]

    # --- sizes and places ---------------------------------------------------------------------------------------------

    def _here(self, name: str, x: Tensor) -> Tensor:
        """A tensor of the model, where the device has it."""
        return x if x.device == self.device.torch_device else send(self.device, name, x)

    def _token(self, buffer: Buffer) -> Tensor:
        """The part (H + 2 G, D) float32 of a question that is the new token."""
        rows = self.G * (self.R + 2)
        return buffer.tensor[: rows * self.D].view(torch.float32).view(rows, self.D)

    def _rest(self, buffer: Buffer) -> Tensor:
        return buffer.tensor[self.G * (self.R + 2) * self.D :]

    def _everything(self, g: int) -> bool:
        """Whether what a kv head would draw next is so much that all is read."""
        wanted, body = self.wanted[g], self.store.body
        return not self._is_first(g) and wanted > EXACT_SHARE * body

    def _is_first(self, g: int) -> bool:
        """Whether a kv head draws the first sample of the step."""
        return self.wanted[g] == self._first_rows()

    def _first_rows(self) -> int:
        return first_rows_for(self.store.draw, self.store.body) if self.store.body else 0

    def _first(self, g: int) -> int:
        """How many candidates a kv head draws: at least the rows that are drawn of them."""
        return candidates_for(self.store.draw, self.store.body, self.wanted[g], self.noise[g])

    def _noise(self) -> list[float]:
        """Of the scores of each kv head, by which the host knows how many candidates there are to be."""
        store, index = self.store, self.store.index
        if self.place.way == "host" or not store.body or store.draw.candidates_for(store.body, 1) is not None:
            return [0.0] * self.G
        assert isinstance(index, SketchIndex)
        scale, sinks = self.step.rule.scale, store.policy.sinks
        return [index.noise(own, g, scale=scale, sinks=sinks) for g, own in enumerate(self.query.cpu())]

    def _slot(self) -> Slot:
        """New buffers: they are as large as this draw, and the allocator of the device has those of the last one."""
        store, (G, R, D), device = self.store, (self.G, self.R, self.D), self.device
        asked, answered = 0, [0]
        if self.answers and self.place.way == "host":
            each = D if isinstance(self.sampler, Sketch) else self.sampler.L
            asked, answered = G * R * each, [G * R, 2 * D + 3]
        elif self.answers:
            # A step is a whole number, rounded down: at worst by half, and then twice as many are drawn.
            room = max(store.body if self._everything(g) else min(store.body, 2 * self._first(g) + 1) for g in range(G))
            asked, answered = G * room, [G, room, 2 * padded(D)]
        question = [G * (R + 2) * D + asked]
        return Slot(
            device.buffer("asked", question, torch.int32),
            device.buffer("question", question, torch.int32, pinned=True),
            device.buffer("answer", answered, torch.float32, pinned=True),
            device.buffer("answered", answered, torch.float32),
        )
