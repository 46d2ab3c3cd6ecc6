"""One answer to a request, while it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from magicpig.engine.glance import Glance, Watch
from magicpig.engine.intake import Intake
from magicpig.engine.request import Delta, FinishReason, Report, Request, TokenLogprob
from magicpig.engine.runner import SequenceState, Work
from magicpig.engine.sampling import TokenSampler, logprobs
from magicpig.engine.scheduler import Phase, Piece, Task
from magicpig.report import PredictedErrors
from magicpig.store import KVStore
from magicpig.text_stream import Detokenizer, StopStrings

LOGPROB_CHUNK = 128  # tokens of a prompt whose logits are there at once

Deliver = Callable[[Delta], None]


class Answer(Task):
    """What the scheduler sees of an answer, and its tokens, text, and stored keys and values.

    index: which answer to the request; most: the tokens that it may have. deliver: is called with what is new.
    now: when the request came, in seconds of the scheduler's clock.
    """

    def __init__(self, intake: Intake, request: Request, index: int, most: int, deliver: Deliver, now: float) -> None:
        sampling, options, config = request.sampling, intake.options, intake.config_of(request)
        timeout = options.timeout if request.timeout is None else request.timeout
        queue_timeout = options.queue_timeout if request.queue_timeout is None else request.queue_timeout
        super().__init__(
            prompt=len(request.prompt),
            most=most,
            size=lambda tokens: intake.size(config, tokens),
            priority=request.priority,
            deadline=None if timeout is None else now + timeout,
            start_by=None if queue_timeout is None else now + queue_timeout,
            chunk=None if sampling.prompt_logprobs is None else LOGPROB_CHUNK,
        )
        self.request, self.index, self.config, self.deliver = request, index, config, deliver
        self.known = list(request.prompt)  # and what was drawn
        grammar = intake.grammar(sampling)
        self.sampler = TokenSampler(
            sampling,
            request.prompt,
            ends=intake.ends,
            vocabulary=intake.vocabulary,
            index=index,
            guide=None if grammar is None else grammar.guide(),
        )
        self.last_tokens = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else intake.ends)
        self.text = Detokenizer(intake.tokenizer, skip_special_tokens=sampling.skip_special_tokens)
        self.stops = StopStrings(sampling.stop, include=sampling.include_stop)
        self.state: SequenceState | None = None
        self.cached = 0
        self.cancelled = False
        self.arrived = now
        self.first_token: float | None = None
        self.last_token = now
        self.prompt_logprobs: list[TokenLogprob] = []
        self.watch = Watch(intake.query_heads) if request.watch else None

    def state_now(self) -> SequenceState:
        assert self.state is not None
        return self.state

    def work(self, piece: Piece) -> Work:
        tokens = self.known[piece.begin : piece.begin + piece.count]
        asked = 1 if piece.reaches_end else 0
        if self._wants_prompt_logprobs(piece):
            asked = piece.count
        return Work(self.state_now(), tokens, piece.begin, piece.phase, asked)

    def say(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that can be shown after a token that was just drawn, and whether it was the last one."""
        self.known.append(token)
        sampling, text = self.request.sampling, ""
        finish: FinishReason | None = None
        if token in self.last_tokens:
            finish = "stop"
            if sampling.include_stop:
                text = self.text.push(token)
        else:
            text = self.text.push(token)
        if self.produced == self.most and finish is None:
            finish = "length"
        if finish is not None:
            text += self.text.flush()
        if self.produced >= sampling.min_tokens:
            text = self.stops.push(text)
            if self.stops.found:
                finish = "stop"
            elif finish is not None:
                text += self.stops.flush()
        return text, finish

    def add_prompt_logprobs(self, piece: Piece, logits: Tensor) -> None:
        if not self._wants_prompt_logprobs(piece):
            return
        top, have = self.request.sampling.prompt_logprobs, self.prompt_logprobs
        assert top is not None
        if not have:
            have.append(TokenLogprob(self.known[0], None))
        # The logits at a position speak of the next one. A piece may come twice, after a preemption.
        first = max(piece.begin, len(have) - 1)
        targets = list(self.known[first + 1 : min(piece.begin + piece.count + 1, self.prompt)])
        rows = logits[first - piece.begin : first - piece.begin + len(targets)]
        have.extend(logprobs(rows, targets, top))

    def take_prompt_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """Once, with the first delta of the first answer."""
        if self.request.sampling.prompt_logprobs is None or self.index != 0 or self.produced > 1:
            return None
        return tuple(self.prompt_logprobs)

    def glance(self) -> Glance | None:
        """What attention read for the newest token, if somebody watches."""
        return None if self.watch is None or self.state is None else self.watch.glance(self.state)

    def report(self, now: float) -> Report:
        measured = {} if self.state is None else measure(self.state)
        return Report(
            prompt_tokens=self.prompt,
            cached_tokens=self.cached,
            new_tokens=self.produced,
            preemptions=self.preemptions,
            queue_s=(now if self.admitted is None else self.admitted) - self.arrived,
            first_token_s=None if self.first_token is None else self.first_token - self.arrived,
            total_s=now - self.arrived,
            **measured,
        )

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether what the model says of the prompt's own tokens is still to be computed."""
        wanted = self.request.sampling.prompt_logprobs is not None and self.index == 0
        return wanted and len(self.prompt_logprobs) < self.prompt

    def _wants_prompt_logprobs(self, piece: Piece) -> bool:
        return self.needs_prompt_logits and piece.phase is Phase.PREFILL


@dataclass(frozen=True)
class StoreSample:
    """What the steps of one layer say of themselves, as `advice` asks it."""

    layer: int
    indexed: int
    sampled_share_mean: float | None
    predicted_error_mean: float | None
    predicted_error_unknown: float | None


def samples(state: SequenceState) -> list[StoreSample]:
    """Of each layer that has drawn something."""
    found = []
    for index, store in enumerate(state.layers):
        if not isinstance(store, KVStore) or not store.stats.body_rows:
            continue
        errors = store.stats.predicted
        known = errors.count + errors.unknown
        unknown = errors.unknown / known if known and store.sampler.predicts else None
        error = errors.mean if errors.count and store.sampler.predicts else None
        found.append(StoreSample(index, store.body, store.stats.mean_share, error, unknown))
    return found


def measure(state: SequenceState) -> dict[str, Any]:
    """The part of a `Report` that its stores know."""
    shares, largest, kv_bytes, index_bytes = [], [], 0, 0
    predicted: PredictedErrors | None = None
    for store in state.stores:
        use, stats = store.nbytes(), store.stats
        kv_bytes, index_bytes = kv_bytes + use.rows, index_bytes + use.index
        if stats.body_rows:
            shares.append(stats.mean_share)
            largest.append(stats.max_share)
        if stats.predicted.count + stats.predicted.unknown and store.sampler.predicts:
            predicted = stats.predicted if predicted is None else predicted + stats.predicted
    kv_bytes += sum(layer.nbytes for layer in state.layers if layer is not None and not hasattr(layer, "view"))
    measured: dict[str, Any] = {"kv_bytes": kv_bytes, "index_bytes": index_bytes}
    if shares:
        measured |= {"rows_share_mean": sum(shares) / len(shares), "rows_share_max": max(largest)}
    if predicted is not None and predicted.count:
        measured |= {
            "predicted_error_mean": predicted.sum / predicted.count,
            "predicted_error_p95": predicted.quantile(0.95),
            "predicted_error_max": predicted.largest,
        }
    if predicted is not None:
        measured["predicted_error_unknown"] = predicted.unknown / (predicted.count + predicted.unknown)
    return measured


def answer_of(task: Task) -> Answer:
    """The answer that a task of the engine is."""
    assert isinstance(task, Answer)
    return task
