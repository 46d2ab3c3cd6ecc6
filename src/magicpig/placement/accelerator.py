"""Placements whose device is an accelerator: verbs in Triton, buffers that travel, the schedule of schedule.py.

Three ways of one trip. `host`: queries are rotated on the device; the host scores, draws and attends over the sample.
`gpu_index`: the device has the sketches of all keys, scores and draws; the host sends the candidates' rows. `gpu`:
the rows are there, too, and nothing travels. In each the device has the rows that are never drawn, attends over them
while the host answers, and merges. Every sequence of a step is a micro-batch of its own.

What is on the device follows from what the stores hold: blocks are never rewritten, so what was sent once stays true.
Sketches only; of stores with other samplers steps run as on `Cpu`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from magicpig.errors import ArgumentError
from magicpig.kernels.algorithm import no_sample
from magicpig.kernels.attend.reference import row_logits
from magicpig.kernels.base import BLOCK_ROWS, SKETCH_KEYS, SampledHalf, padded
from magicpig.kernels.sketch.reference import EXACT_SHARE, TwoPhases, is_enough, more_rows
from magicpig.placement.base import LayerStep, Stepped, append, exact_pieces
from magicpig.placement.device import Device
from magicpig.placement.schedule import Slot, by_turns, round_trip
from magicpig.placement.two_places import TwoPlaces
from magicpig.samplers.sketch import Sketch, SketchIndex, candidates_for, first_rows_for
from magicpig.store import KVStore
from magicpig.types import AttentionState, Sample

Way = Literal["host", "gpu_index", "gpu"]
WAYS: tuple[Way, ...] = get_args(Way)


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
        self._held: WeakKeyDictionary[KVStore, _Held] = WeakKeyDictionary()

    def elsewhere(self, store: KVStore) -> bool:
        return not isinstance(store.sampler, Sketch)

    def each(self, step: LayerStep) -> Stepped:
        B, H, _ = step.query.shape
        output = torch.full_like(step.query, math.nan)
        lse, predicted = torch.full((2, B, H), math.nan, dtype=torch.float32, device="cpu")
        windows = [exact_pieces(step, b) for b in range(B)]
        errors = [append(step, b) for b in range(B)]
        parts = [_Part(self, step, b, windows[b]) for b in range(B) if errors[b] is None]
        by_turns([part.run() for part in parts])
        samples: list[list[Sample]] = [[] for _ in range(B)]
        for part in parts:
            state, samples[part.b], predicted[part.b] = part.result()
            output[part.b], lse[part.b] = state.output.to(output.dtype), state.lse
            part.count([len(sample.ids) for sample in samples[part.b]], predicted[part.b])
        return Stepped(AttentionState(output, lse), samples if step.capture else [], predicted, errors)

    def held(self, store: KVStore) -> _Held:
        """What the device has of a store's body, brought up to what the store has."""
        own = self._held.get(store)
        if own is None:
            own = self._held[store] = _Held(self.device)
        own.follow(store, rows=self.way == "gpu", index=self.way != "host")
        return own


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
    """A sequence in a step; a trip of schedule.py."""

    ask_name = "select"

    def __init__(self, place: Accelerated, step: LayerStep, b: int, window: list[tuple[Tensor, Tensor]]) -> None:
        self.place, self.step, self.b, self.store = place, step, b, step.stores[b]
        assert isinstance(self.store.sampler, Sketch)
        self.sampler = self.store.sampler
        self.answer_name = "sample" if place.way == "host" else "gather"
        device, (G, D) = place.device, (self.store.kv_heads, self.store.head_dim)
        self.R = step.query.shape[1] // G
        self.held = place.held(self.store)
        self.query = send(device, "query", step.query[b].float().reshape(G, self.R, D))
        self.rows, self.row_count = send_rows(device, self.store, window), sum(keys.shape[1] for keys, _ in window)
        self.wanted = [self._first_rows()] * G
        self.larger: dict[int, Callable[[Tensor], int]] = {}
        self.tried = [0] * G  # rows of draws that were not good enough
        self.noise = self._noise(step.query[b].float().reshape(G, self.R, D))
        self.weights: Tensor | None = None
        self.window: AttentionState | None = None
        self.half: SampledHalf | None = None
        self.candidates: _Drawn | None = None
        self.drawn: _Drawn | None = None
        self.device = device

    def run(self) -> Iterator[None]:
        store = self.store
        if not store.body:
            self.device.launch("compute", "window", self.meanwhile)
            self.device.launch("compute", "merge", self._merge)
            return
        while True:
            if self.place.way == "gpu":
                self.device.launch("compute", "select", self._select)
                if self.window is None:
                    self.device.launch("compute", "window", self.meanwhile)
                self.device.launch("compute", "merge", self.finish)
                yield
            else:
                self.slot = self._slot()
                yield from round_trip(self.device, self.slot, self)
            epsilon = store.draw.epsilon
            if not epsilon or self.place.way == "host":
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

    def ask(self) -> None:
        if self.place.way == "host":
            self.slot.asked.tensor.copy_((self.query @ self.held.rotation(self.sampler)).flatten(0, 1))
            return
        self._select()
        assert self.candidates is not None
        asked = self.slot.asked.tensor
        asked.fill_(self.store.indexed_to)
        for g in range(len(asked)):
            ids, _ = self.candidates.head(g)
            asked[g, : len(ids)].copy_(ids)

    def meanwhile(self) -> None:
        counts = torch.full((len(self.rows),), self.row_count, dtype=torch.int32, device=self.rows.device)
        self.window, _ = self.place.verbs.attend(
            self.query, self.rows, counts, scale=self.step.rule.scale, softcap=self.step.rule.softcap
        )

    def answer(self) -> None:
        store, (G, D), answer = self.store, (self.store.kv_heads, self.store.head_dim), self.slot.answer.tensor
        if self.place.way == "host":
            exact = None
            if store.draw.epsilon:  # the draw waits for the window
                assert self.window is not None
                exact = AttentionState(
                    self.window.output.reshape(1, G * self.R, D).cpu(), self.window.lse.reshape(1, G * self.R).cpu()
                )
            half = store.kernels.sampled_half(
                [store.view],
                self.step.query[self.b : self.b + 1].contiguous(),
                None,
                None,
                scale=self.step.rule.scale,
                softcap=self.step.rule.softcap,
                sink_logits=self.step.rule.sink_logits,
                prepared=[self.slot.question.tensor],
                exact=exact,
                capture=True,
            )
            self.half = half
            answer[:, :D], answer[:, D] = half.state.output[0], half.state.lse[0]
            answer[:, D + 1 :] = half.spread[0]
            return
        answer.zero_()
        for g, ids in enumerate(self.slot.question.tensor.long()):
            chosen = ids[ids < store.indexed_to]
            keys, values = store.fetch(g, chosen)
            answer[g, : len(chosen), :D] = keys
            answer[g, : len(chosen), padded(D) : padded(D) + D] = values

    def finish(self) -> None:
        if self.place.way == "host":
            D, (G, R) = self.store.head_dim, self.query.shape[:2]
            came = self.slot.answered.tensor.view(G, R, 2 * D + 3)
            self._merge(AttentionState(came[..., :D], came[..., D]), came[..., D + 1 :])
            return
        assert self.candidates is not None
        fetched = self.place.way == "gpu_index"
        rows = self.slot.answered.tensor if fetched else self.held.rows
        numbers = [self._draw_again(g, rows[g], fetched=fetched) for g in range(len(self.wanted))]
        self.drawn = _Drawn.of([(self.candidates.ids[g, i], log_u) for g, (i, log_u) in enumerate(numbers)])
        at = _Drawn.of(numbers).ids if fetched else self.drawn.ids
        rule = {"scale": self.step.rule.scale, "softcap": self.step.rule.softcap}
        state, spread = self.place.verbs.attend(self.query, rows, self.drawn.counts, self.drawn.log_u, at, **rule)
        self._merge(state, spread)

    # --- on the device ------------------------------------------------------------------------------------------------

    def _select(self) -> None:
        store, rule = self.store, self.step.rule
        if self.weights is None:
            words, scales, centres = self.held.index
            self.weights = self.place.verbs.weigh(
                self.query,
                self.query @ self.held.rotation(self.sampler),
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
        weights = self.place.verbs.weigh_rows(self.query[g], own, log_u, **rule)
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
        drawn = self.place.verbs.draw(
            weights,
            rows,
            seed=store.draw.seed,
            layer=store.layer,
            heads=[store.first_head + g],
            position=store.length,
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
            whole = self.place.verbs.merge(outputs, lses)
        sinks = self.step.rule.sink_logits
        if sinks is not None:
            sinks = sinks.to(whole.lse.device).view(whole.lse.shape)
        whole = self.step.rule._replace(sink_logits=sinks).finish(whole)
        self.whole, self.predicted = whole, torch.zeros_like(whole.lse)
        if state is not None and spread is not None:
            self.predicted = SampledHalf(state, spread, [], []).predicted_error(whole)
            self.predicted[state.lse == -math.inf] = math.nan

    def result(self) -> tuple[AttentionState, list[Sample], Tensor]:
        """State (H, D) and (H,), the samples of all heads, and predicted errors (H,), on the host."""
        self.device.finish(self.device.record("compute"))
        state = AttentionState(self.whole.output.flatten(0, 1).cpu(), self.whole.lse.flatten().cpu())
        H = len(state.lse)
        if not self.store.body:
            samples = [no_sample(torch.float32)] * H
        elif self.half is not None:
            samples = [Sample(*each) for each in self.half.samples]
        else:
            assert self.drawn is not None
            ids, log_u, counts = (x.cpu() for x in self.drawn)
            heads = [Sample(own[:n].long(), u[:n]) for own, u, n in zip(ids, log_u, counts.tolist(), strict=True)]
            samples = [heads[h // self.R] for h in range(H)]
        return state, samples, self.predicted.flatten().cpu()

    def count(self, sizes: list[int], predicted: Tensor) -> None:
        """Adds the step to what the store counts: the host's half has counted all but the errors."""
        if self.half is None:
            self.store.count_step(sizes, predicted, [self.tried[h // self.R] for h in range(len(sizes))])
        else:
            self.store.kernels.count_predicted(self.store.view, predicted)

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

    def _noise(self, query: Tensor) -> list[float]:
        """Of the scores of each kv head, which the host knows as well; query: (G, R, D)."""
        index, rule = self.store.index, self.step.rule
        if self.place.way == "host" or not self.store.body:
            return []
        assert isinstance(index, SketchIndex)
        sinks = self.store.policy.sinks
        return [index.noise(own, g, scale=rule.scale, sinks=sinks) for g, own in enumerate(query)]

    def _slot(self) -> Slot:
        """New buffers: they are as large as this draw, and the allocator of the device has those of the last one."""
        store, (G, D), device = self.store, (self.store.kv_heads, self.store.head_dim), self.place.device
        if self.place.way == "host":
            asked, answered, kinds = [G * self.R, D], [G * self.R, 2 * D + 3], (torch.float32, torch.float32)
        else:
            # A step is a whole number, rounded down: at worst by half, and then twice as many are drawn.
            room = max(store.body if self._everything(g) else min(store.body, 2 * self._first(g) + 1) for g in range(G))
            asked, answered, kinds = [G, room], [G, room, 2 * padded(D)], (torch.int32, torch.float32)
        return Slot(
            device.buffer("asked", asked, kinds[0]),
            device.buffer("question", asked, kinds[0], pinned=True),
            device.buffer("answer", answered, kinds[1], pinned=True),
            device.buffer("answered", answered, kinds[1]),
        )


def send(device: Device, name: str, content: Tensor) -> Tensor:
    """A tensor of the host, copied to the device: for what the device does from then on."""
    above = device.buffer(name, content.shape, content.dtype, pinned=True)
    below = device.buffer(f"{name} on the device", content.shape, content.dtype)
    device.host("fill", lambda: above.tensor.copy_(content), writes=[above])
    device.copy("up", above, below)
    device.wait("compute", device.record("up"))
    return device.launch("compute", "receive", lambda: below.tensor, reads=[below])


def send_rows(device: Device, store: KVStore, pieces: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Rows (G, n, 2 * Dp) float32 on the device, one at least, of keys and values (G, n_i, D)."""
    D, dim, at = store.head_dim, padded(store.head_dim), 0
    count = sum(keys.shape[1] for keys, _ in pieces)
    rows = torch.zeros(store.kv_heads, max(count, 1), 2 * dim, dtype=torch.float32, device="cpu")
    for keys, values in pieces:
        rows[:, at : at + keys.shape[1], :D] = keys
        rows[:, at : at + keys.shape[1], dim : dim + D] = values
        at += keys.shape[1]
    return send(device, "rows", rows)


class _Held:
    """What a device has of the body of one store: the sketches, or all rows, where they are wanted.

    Only what has come is sent. Blocks are known by identity, and by how much of each has been sent.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.rows = torch.empty(0, dtype=torch.float32, device="cpu")
        self.index: tuple[Tensor, Tensor, Tensor] = (self.rows, self.rows, self.rows)
        self._sent: list[tuple[Any, int]] = []
        self._rows_sent: list[tuple[Any, int]] = []
        self._rotation: Tensor | None = None
        self._sketcher: object = None

    def rotation(self, sampler: Sketch) -> Tensor:
        """(D, D) float32."""
        if self._rotation is None or self._sketcher is not sampler:
            unit = torch.eye(sampler.head_dim, dtype=torch.float32, device="cpu")
            self._rotation = send(self._device, "rotation", sampler.kernels.rotate(unit, sampler.sketcher))
            self._sketcher = sampler
        return self._rotation

    def follow(self, store: KVStore, *, rows: bool, index: bool) -> None:
        """Sends what the store has and the device lacks."""
        if index and store.body and isinstance(store.index, SketchIndex):
            self._follow_index(store.index)
            if rows:
                self._follow_rows(store, store.index)

    def _follow_index(self, index: SketchIndex) -> None:
        segments, counts = index.segments(), index.counts()
        first = segments[0]
        per_block, stride = BLOCK_ROWS // SKETCH_KEYS, first.scales.shape[1] // first.centres.shape[1]
        if len(self.index[0].shape) != 4 or self.index[0].shape[1] < len(segments) * per_block:
            room = 1 << (len(segments) - 1).bit_length()
            shapes = (
                ((first.words.shape[0], room * per_block, *first.words.shape[2:]), torch.int32),
                ((first.words.shape[0], room * BLOCK_ROWS), torch.float16),
                ((first.words.shape[0], -(-room * BLOCK_ROWS // stride), first.centres.shape[2]), torch.bfloat16),
            )
            words, scales, centres = (self._device.buffer("index", s, dtype).tensor for s, dtype in shapes)
            self.index, self._sent = (words, scales, centres), []
        words, scales, centres = self.index
        for i, (block, segment, count) in enumerate(zip(index.blocks, segments, counts, strict=True)):
            known = self._sent[i] if i < len(self._sent) else (None, 0)
            before = known[1] if known[0] is block else 0
            if before < count:
                begin, end = before // SKETCH_KEYS, -(-count // SKETCH_KEYS)
                least, most = before // stride, -(-count // stride)
                parts = [
                    (words, i * per_block + begin, segment.words[:, begin:end]),
                    (
                        scales,
                        i * BLOCK_ROWS + begin * SKETCH_KEYS,
                        segment.scales[:, begin * SKETCH_KEYS : end * SKETCH_KEYS],
                    ),
                    (centres, i * BLOCK_ROWS // stride + least, segment.centres[:, least:most]),
                ]
                for to, at, content in parts:
                    to[:, at : at + content.shape[1]] = send(self._device, "sketches", content.contiguous())
            self._sent[i : i + 1] = [(block, count)]
        del self._sent[len(segments) :]

    def _follow_rows(self, store: KVStore, index: SketchIndex) -> None:
        # Rows are as final as their sketches: after a crop both come anew, and the sketches in another block.
        end = store.indexed_to
        if self.rows.ndim != 3 or self.rows.shape[1] < end:
            room = max(BLOCK_ROWS, 1 << (end - 1).bit_length())
            shape = (store.kv_heads, room, 2 * padded(store.head_dim))
            self.rows, self._rows_sent = self._device.buffer("rows", shape, torch.float32).tensor, []
        for i, (block, count) in enumerate(zip(index.blocks, index.counts(), strict=True)):
            known = self._rows_sent[i] if i < len(self._rows_sent) else (None, 0)
            begin, stop = i * BLOCK_ROWS + (known[1] if known[0] is block else 0), i * BLOCK_ROWS + count
            if begin < stop:
                pieces = list(store.blocks(begin, stop, torch.float32))
                self.rows[:, begin:stop] = send_rows(self._device, store, pieces)
            self._rows_sent[i : i + 1] = [(block, count)]
        del self._rows_sent[len(index.blocks) :]
