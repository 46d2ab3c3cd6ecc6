"""Many requests, one model: `Engine.step` is the story. Schedule, run, sample, finish.

Requests come from any thread (`submit`) and are answered through a function that is called with each `Delta`. Steps are
run by the thread that `start` makes, or by whoever calls `step`. What takes long and is no step is done beside them:
building the index of a prompt, fetching one from a file. Its answer waits, and no other does. The engine knows tokens
and texts, nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from magicpig.config import Config
from magicpig.engine.errors import ContextLengthError, RequestTimeoutError, ShuttingDownError, StepError
from magicpig.engine.glance import Glance, Watch
from magicpig.engine.grammar import Grammar
from magicpig.engine.observer import Observer, StepRecord
from magicpig.engine.prefix_cache import PrefixCache
from magicpig.engine.prompt_files import PromptFile, PromptFiles
from magicpig.engine.request import Delta, FinishReason, Report, Request, SamplingParams, TokenLogprob
from magicpig.engine.runner import Outcome, Runner, SequenceState, Work
from magicpig.engine.sampling import TokenSampler, check_tokens, logprobs
from magicpig.engine.scheduler import Batch, Limits, Phase, Piece, Scheduler, Status, Task
from magicpig.errors import ArgumentError, MagicPigError
from magicpig.generation import end_tokens
from magicpig.integrations.transformers.shapes import key_dtype, layer_shapes, token_limit
from magicpig.machine import free_memory
from magicpig.report import PredictedErrors
from magicpig.store.planner import plan
from magicpig.text_stream import Detokenizer, StopStrings

SAFE_SHARE = 0.8  # of the memory that is free when the engine starts
UNLIMITED = 131072  # tokens, for models that name no limit
LOGPROB_CHUNK = 128  # tokens of a prompt whose logits are there at once

Deliver = Callable[[Delta], None]
logger = logging.getLogger("magicpig.engine")


@dataclass(frozen=True)
class EngineOptions:
    """memory: bytes for keys, values and indexes of all requests; None for a safe share of what is free.

    cache_share: of this memory, what prompts that were read may keep while nobody needs it; 0 keeps none.
    cache_dir: a folder for them as well, so that they outlive the process; cache_limit: bytes of its files, None for
    half of what is free there.
    max_length: the most tokens of prompt and answer; None for the model's own limit.
    timeout, queue_timeout: seconds, for requests that name none. The others are those of `scheduler.Limits`.
    """

    memory: int | None = None
    cache_share: float = 0.5
    cache_dir: Path | None = None
    cache_limit: int | None = None
    max_length: int | None = None
    token_budget: int = 512
    running: int = 32
    waiting: int = 256
    headroom: int = 1024
    aging: float = 60.0
    timeout: float | None = None
    queue_timeout: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.cache_share <= 1:
            raise ArgumentError(f"cache_share={self.cache_share} must be at least 0 and at most 1")
        for name in ("cache_limit", "max_length", "timeout", "queue_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ArgumentError(f"{name}={value} must be positive")

    def limits(self) -> Limits:
        memory = int(SAFE_SHARE * free_memory()) if self.memory is None else self.memory
        return Limits(memory, self.token_budget, self.running, self.waiting, self.headroom, self.aging)


class Engine:
    """Answers requests with one network, which belongs to it until `close`.

    network: a transformers model in evaluation mode. tokenizer: its own. config: how answers attend, unless a request
    says otherwise. observer: is told what happens. clock: seconds, for the scheduler.
    Raises UnsupportedModelError for models whose attention cannot be sampled or packed.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        config: Config | None = None,
        options: EngineOptions | None = None,
        *,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.network, self.tokenizer = network, tokenizer
        self.config = Config() if config is None else config
        self.options = EngineOptions() if options is None else options
        self.observer = Observer() if observer is None else observer
        self.ends = end_tokens(tokenizer, network)
        self.max_length = self.options.max_length or token_limit(network.config) or UNLIMITED
        limits = self.options.limits()
        folder, files = self.options.cache_dir, None
        if folder is not None:
            files = PromptFiles(folder, self.options.cache_limit, network, tokenizer)
        self.prefixes = PrefixCache(int(self.options.cache_share * limits.memory), files)
        self.scheduler = Scheduler(
            limits,
            on_admit=self._admitted,
            on_preempt=self._preempted,
            held=lambda: self.prefixes.nbytes,
            reclaim=self.prefixes.reclaim,
        )
        self.runner = Runner(network, self.config, max_length=self.max_length)
        self._clock = clock
        # Held whenever the scheduler or an answer changes; not while the model computes.
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        # Beside the steps, and neither behind the other.
        self._indexing = ThreadPoolExecutor(1, thread_name_prefix="magicpig-index")
        self._fetching = ThreadPoolExecutor(1, thread_name_prefix="magicpig-fetch")
        self._requests: dict[str, list[_Answer]] = {}
        self._thread: threading.Thread | None = None
        self._accepting, self._stopping = True, False
        self._size = lru_cache(maxsize=4096)(self._size_of)
        self._grammar = lru_cache(maxsize=64)(self._grammar_of)

    # --- what callers do, from any thread -----------------------------------------------------------------------------

    def check(self, request: Request) -> int:
        """The most tokens each answer may have. Raises what `submit` raises, but for a full queue."""
        prompt, vocabulary = request.prompt, self.runner.vocabulary
        if not prompt:
            raise ArgumentError("the prompt is empty")
        if not (min(prompt) >= 0 and max(prompt) < vocabulary):
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise ArgumentError(f"the prompt has token {wrong}; the model knows the tokens 0 to {vocabulary - 1}")
        check_tokens(request.sampling, vocabulary)
        self.grammar(request.sampling)
        config = self._config(request)
        try:
            self.runner.new_state(config)
        except ValueError as error:
            raise ArgumentError(str(error)) from None
        asked = request.sampling.max_tokens
        room = self.max_length - len(prompt)
        if room < (1 if asked is None else asked):
            wanted = "" if asked is None else f" and {asked} of answer"
            raise ContextLengthError(
                f"This model's maximum context length is {self.max_length} tokens, and the request has "
                f"{len(prompt)} tokens of prompt{wanted}"
            )
        return self._fitting(config, len(prompt), room) if asked is None else asked

    def grammar(self, sampling: SamplingParams) -> Grammar | None:
        """What an answer has to follow, if anything. The first one takes a second. Raises GrammarError."""
        if sampling.json_schema is None:
            return None
        return self._grammar(json.dumps(sampling.json_schema, sort_keys=True))

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Takes a request in. `deliver` is called, from the thread of the steps, with each delta until all answers end.

        Raises ArgumentError and those below it (ContextLengthError, RequestTooLargeError) for requests that cannot be
        served, QueueFullError for one too many, ShuttingDownError after `close` has begun.
        """
        most = self.check(request)
        sampling, config = request.sampling, self._config(request)
        answers = [_Answer(self, request, index, most, config, deliver) for index in range(sampling.n)]
        with self._lock:
            if not self._accepting:
                raise ShuttingDownError("the engine is shutting down and takes no more requests")
            if request.id in self._requests:
                raise ArgumentError(f"a request with id {request.id!r} is running already")
            now = self._clock()
            for answer in answers:
                answer.arrived = now
            # The others begin where the first has read the prompt.
            self.prefixes.touch(request.prompt, config)
            self.scheduler.add(answers[0], now)
            self._requests[request.id] = answers
            file = None if answers[0].needs_prompt_logits else self.prefixes.in_files(request.prompt, config)
            if file is not None:
                answers[0].held = True
                self._fetching.submit(self._guard, self._fetch, answers[0], file)
            self._wake.notify()

    def stream(self, requests: Sequence[Request]) -> Stream:
        """As `submit`, for asyncio: iterate over it, and close it to cancel what is still running."""
        return Stream(self, requests)

    def cancel(self, request_id: str) -> None:
        """Ends a request with finish reason "abort", before the next step. Does nothing once it has ended."""
        with self._lock:
            for answer in self._requests.get(request_id, ()):
                answer.cancelled = True
            self._wake.notify()

    @property
    def alive(self) -> bool:
        """Whether the thread of `start` runs."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def accepting(self) -> bool:
        return self._accepting

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def start(self) -> None:
        """Runs steps in a thread of its own from now on."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run_forever, name="magicpig-engine", daemon=True)
        self._thread.start()

    def rest(self) -> None:
        """Waits until all that is done beside the steps is done, and prompts that were read are in their files."""
        for worker in (self._fetching, self._indexing):
            worker.submit(lambda: None).result()
        if self.prefixes.files is not None:
            self.prefixes.files.flush()

    def close(self, *, drain: float = 0.0) -> int:
        """Takes no more requests, lets those that run go on for `drain` seconds, and ends the others with an error.

        Gives the network back. Returns how many requests did not come to their end.
        """
        with self._lock:
            self._accepting = False
            self._wake.notify()
        end = time.monotonic() + drain
        while self.alive and self.unfinished and time.monotonic() < end:
            time.sleep(0.01)
        with self._lock:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        for worker in (self._fetching, self._indexing):
            worker.shutdown(wait=True, cancel_futures=True)
        if self.prefixes.files is not None:
            self.prefixes.files.close()
        with self._lock:
            left = len(self._requests)
            for answers in list(self._requests.values()):
                self._end_all(answers, "error", ShuttingDownError("the engine shut down before the answer was done"))
            self.prefixes.clear()
            self.runner.close()
        return left

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One step: schedule, run, sample, finish. Returns whether there was anything to compute."""
        start = time.perf_counter()
        with self._lock:
            self._end_what_is_over()
            batch = self.scheduler.schedule(self._clock())
        if not batch.pieces:
            return False
        outcomes = self._run(batch)
        with self._lock:
            self.scheduler.commit(batch)
            for piece, outcome in zip(batch.pieces, outcomes, strict=True):
                self._advance(piece, outcome)
            self._observe(batch, time.perf_counter() - start)
        return True

    def _run(self, batch: Batch) -> list[Outcome]:
        work = [_answer(piece.task).work(piece) for piece in batch.pieces]
        try:
            return self.runner.run(work)
        except Exception as error:
            # Nobody knows what of it was stored, so these requests are lost; the next ones need not be.
            logger.exception("a step of %d sequences failed", len(work))
            failed = StepError(f"a step of the model failed: {type(error).__name__}")
            return [Outcome(_nothing(), failed) for _ in work]

    def _advance(self, piece: Piece, outcome: Outcome) -> None:
        """What a piece brings its answer: maybe a token, maybe its end."""
        answer = _answer(piece.task)
        if answer.status is not Status.RUNNING or answer.cancelled:
            return
        if outcome.error is not None:
            self._end_all(self._family(answer), "error", outcome.error)
            return
        answer.add_prompt_logprobs(piece, outcome.logits)
        if not piece.reaches_end:
            return
        if answer.produced == 0 and answer.index == 0:
            self._prompt_is_read(answer, outcome.logits)
        else:
            self._accept(answer, outcome.logits[-1])

    def _prompt_is_read(self, leader: _Answer, logits: Tensor) -> None:
        """All answers draw their first token, and go on from what the first one has stored, when it is indexed."""
        state = leader.state_now()
        answers = list(self._family(leader))
        for answer in answers:
            self._accept(answer, logits[-1])
        going = [answer for answer in answers if answer.status is not Status.DONE]
        wanted = bool(going) or self.prefixes.files is not None
        if wanted and any(store.length >= store.due for store in state.stores):
            leader.held = True
            self._indexing.submit(self._guard, self._index, leader, state, going)
        else:
            self._share(leader, state, going)

    def _share(self, leader: _Answer, state: SequenceState, going: Iterable[_Answer]) -> None:
        """The answers that go on from a prompt take over what the first one has stored; so may later requests."""
        now = self._clock()
        leader.held = False
        self.prefixes.insert(leader.request.prompt, state)
        for answer in going:
            if answer is not leader and answer.status is not Status.DONE:
                answer.state, answer.cached = state.fork(), leader.cached
                self.scheduler.enter(answer, now)
                if not self.scheduler.admit(answer, now):
                    answer.state = None  # no memory for it now; it reads the prompt again when there is

    def _accept(self, answer: _Answer, logits: Tensor) -> None:
        """Draws the next token and hands on what it means; ends the answer where it is the last."""
        now = self._clock()
        if answer.most == 0:
            self._deliver(answer, Delta(answer.index, prompt_logprobs=answer.take_prompt_logprobs()))
            self._end(answer, "length")
            return
        token = answer.sampler.draw(logits)
        if answer.first_token is None:
            answer.first_token = now
            self.observer.on_first_token(now - answer.arrived)
        else:
            self.observer.on_next_token(now - answer.last_token)
        answer.last_token = now
        self.scheduler.produced(answer)
        text, finish = answer.say(token)
        top = answer.request.sampling.logprobs
        self._deliver(
            answer,
            Delta(
                answer.index,
                text,
                (token,),
                () if top is None else tuple(logprobs(logits[None], [token], top)),
                answer.take_prompt_logprobs(),
                glance=answer.glance(),
            ),
        )
        if finish is not None:
            self._end(answer, finish)

    # --- beside the steps, in threads of their own --------------------------------------------------------------------

    def _index(self, leader: _Answer, state: SequenceState, going: Sequence[_Answer]) -> None:
        """Builds the index of a prompt, once for all who go on from here: it is what the next step would do."""
        start = time.perf_counter()
        for store in state.stores:
            if going and all(answer.cancelled or answer.status is Status.DONE for answer in going):
                return  # nobody waits for it any more
            store.settle()
        with self._lock:
            self._share(leader, state, going)
            self.observer.on_indexed(time.perf_counter() - start)
            self._wake.notify()

    def _fetch(self, answer: _Answer, file: PromptFile) -> None:
        """Brings a prompt from a file to memory, where the answer finds it when it starts."""
        files = self.prefixes.files
        assert files is not None
        with self._lock:
            wanted = answer.status is Status.WAITING and not answer.cancelled
            # Another request may have fetched it meanwhile.
            wanted = wanted and self.prefixes.in_files(answer.request.prompt, answer.config) is file
        state = files.read(file) if wanted else None
        with self._lock:
            if state is not None:
                self.prefixes.keep(file.tokens, state)
            answer.held = False
            self._wake.notify()

    def _guard(self, work: Callable[..., None], answer: _Answer, *arguments: Any) -> None:
        """Does work for an answer; should it fail, its request does."""
        try:
            work(answer, *arguments)
        except Exception as error:
            logger.exception("work for request %s failed", answer.request.id)
            with self._lock:
                if answer.request.id in self._requests:
                    failed = StepError(f"a prompt could not be made ready: {type(error).__name__}")
                    self._end_all(self._family(answer), "error", failed)
                self._wake.notify()

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _end_what_is_over(self) -> None:
        for answers in [answers for answers in self._requests.values() if answers[0].cancelled]:
            self._end_all(answers, "abort", None)
        for task in self.scheduler.expired(self._clock()):
            answer = _answer(task)
            if answer.status is Status.DONE:  # with another answer to the same request
                continue
            seconds = self._clock() - answer.arrived
            begun = "done" if answer.admitted is not None else "begun"
            error = RequestTimeoutError(f"the request was not {begun} after {seconds:.1f} s")
            self._end_all(self._family(answer), "error", error)

    def _end_all(self, answers: Iterable[_Answer], finish: FinishReason, error: MagicPigError | None) -> None:
        for answer in list(answers):
            if answer.status is not Status.DONE:
                self._end(answer, finish, error)

    def _end(self, answer: _Answer, finish: FinishReason, error: MagicPigError | None = None) -> None:
        self.scheduler.finish(answer)
        report = answer.report(self._clock())
        answer.state = None
        self.runner.forget()
        self._deliver(answer, Delta(answer.index, finish=finish, report=report, error=error))
        self.observer.on_end(answer.request, answer.index, finish, report)
        if all(other.status is Status.DONE for other in self._family(answer)):
            del self._requests[answer.request.id]

    def _deliver(self, answer: _Answer, delta: Delta) -> None:
        try:
            answer.deliver(delta)
        except Exception:
            # Whoever asked is gone, an event loop that was closed for example.
            logger.warning("request %s: nobody takes its answer", answer.request.id, exc_info=True)
            self.cancel(answer.request.id)

    def _family(self, answer: _Answer) -> list[_Answer]:
        return self._requests[answer.request.id]

    # --- what the scheduler asks --------------------------------------------------------------------------------------

    def _admitted(self, task: Task) -> int:
        answer = _answer(task)
        if answer.state is not None:  # forked from another answer
            return len(answer.request.prompt)
        # Of a prompt whose answer has not begun, the last token is computed in any case.
        most = answer.prompt - (answer.produced == 0)
        found = None if answer.needs_prompt_logits else self.prefixes.match(answer.request.prompt, most, answer.config)
        answer.state, known = (self.runner.new_state(answer.config), 0) if found is None else found
        if answer.preemptions == 0:
            answer.cached = known
        return known

    def _preempted(self, task: Task) -> None:
        answer = _answer(task)
        answer.state = None
        self.runner.forget()
        self.observer.on_preempted(answer.request)

    def _config(self, request: Request) -> Config:
        return self.config if request.config is None else request.config

    def size(self, config: Config, tokens: int) -> int:
        """Upper bound in bytes of what `tokens` tokens keep, and need while they are indexed."""
        # In steps, for the sake of those that ask again and again.
        return self._size(config.model_dump_json(), -(-tokens // 64) * 64)

    def _size_of(self, config: str, tokens: int) -> int:
        settings = Config.model_validate_json(config)
        shapes = layer_shapes(self.network.config, settings)
        return plan(shapes, settings, sequences=1, tokens=tokens, dtype=key_dtype(self.network)).total

    def _grammar_of(self, schema: str) -> Grammar:
        return Grammar(json.loads(schema), self.tokenizer, self.runner.vocabulary, self.ends)

    def _fitting(self, config: Config, prompt: int, room: int) -> int:
        """The most tokens up to `room` whose memory is there; at least one, and then `submit` says what is missing."""
        low, high, memory = 1, room, self.scheduler.limits.memory
        while low < high:
            middle = (low + high + 1) // 2
            if self.size(config, prompt + middle) <= memory:
                low = middle
            else:
                high = middle - 1
        return low

    def _observe(self, batch: Batch, seconds: float) -> None:
        prefill = sum(piece.count for piece in batch.pieces if piece.phase is Phase.PREFILL)
        total = sum(piece.count for piece in batch.pieces)
        scheduler = self.scheduler
        self.observer.on_step(
            StepRecord(
                seconds,
                prefill,
                total - prefill,
                len(scheduler.running),
                len(scheduler.waiting),
                scheduler.reserved,
                self.prefixes.nbytes,
            )
        )

    def _run_forever(self) -> None:
        try:
            while not self._stopping:
                if not self.step():
                    self.wait()
        except Exception:
            # A fault of ours, and nothing that is left can be trusted. Nobody shall wait for an answer for ever.
            logger.exception("the engine has failed and ends")
            with self._lock:
                self._accepting = False
                for answers in list(self._requests.values()):
                    self._end_all(answers, "error", StepError("the engine has failed"))

    def wait(self) -> None:
        """After a step that had nothing to compute: waits until the next one may have."""
        with self._lock:
            if self._stopping or not self.scheduler.idle:
                # Waiting tasks that do not fit wait for others to end, or for their own time to be over.
                self._wake.wait(timeout=0.01)
                return
            self._wake.wait(timeout=1.0)


class _Answer(Task):
    """One answer to a request: what the scheduler sees of it, and its tokens, text and stored keys and values."""

    def __init__(
        self, engine: Engine, request: Request, index: int, most: int, config: Config, deliver: Deliver
    ) -> None:
        sampling, options = request.sampling, engine.options
        now = engine._clock()
        timeout = options.timeout if request.timeout is None else request.timeout
        queue_timeout = options.queue_timeout if request.queue_timeout is None else request.queue_timeout
        super().__init__(
            prompt=len(request.prompt),
            most=most,
            size=lambda tokens: engine.size(config, tokens),
            priority=request.priority,
            deadline=None if timeout is None else now + timeout,
            start_by=None if queue_timeout is None else now + queue_timeout,
            chunk=None if sampling.prompt_logprobs is None else LOGPROB_CHUNK,
        )
        self.request, self.index, self.config, self.deliver = request, index, config, deliver
        self.known = list(request.prompt)  # and what was drawn
        grammar = engine.grammar(sampling)
        self.sampler = TokenSampler(
            sampling,
            request.prompt,
            ends=engine.ends,
            vocabulary=engine.runner.vocabulary,
            index=index,
            guide=None if grammar is None else grammar.guide(),
        )
        self.last_tokens = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else engine.ends)
        self.text = Detokenizer(engine.tokenizer, skip_special_tokens=sampling.skip_special_tokens)
        self.stops = StopStrings(sampling.stop, include=sampling.include_stop)
        self.state: SequenceState | None = None
        self.cached = 0
        self.cancelled = False
        self.arrived = now
        self.first_token: float | None = None
        self.last_token = now
        self.prompt_logprobs: list[TokenLogprob] = []
        heads = engine.network.config.get_text_config(decoder=True).num_attention_heads
        self.watch = Watch(int(heads)) if request.watch else None

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


class Stream:
    """The deltas of some requests, for asyncio. Raises what `Engine.submit` raises, when it is made; then none runs."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine, self.requests = engine, requests
        self._deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._open = sum(request.sampling.n for request in requests)
        loop = asyncio.get_running_loop()

        def deliver(index: int, delta: Delta) -> None:
            loop.call_soon_threadsafe(self._deltas.put_nowait, (index, delta))

        try:
            for index, request in enumerate(requests):
                engine.submit(request, partial(deliver, index))
        except BaseException:
            self.close()
            raise

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Which request, and what was added to its answers; until all have ended."""
        while self._open:
            index, delta = await self._deltas.get()
            self._open -= delta.finish is not None
            yield index, delta

    def close(self) -> None:
        """Cancels what has not ended."""
        if self._open:
            for request in self.requests:
                self._engine.cancel(request.id)


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


def _answer(task: Task) -> _Answer:
    assert isinstance(task, _Answer)
    return task


def _nothing() -> Tensor:
    return torch.empty(0, 0, dtype=torch.float32, device="cpu")
