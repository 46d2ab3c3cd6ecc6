"""Many requests, one model: `Engine.step` is the story. Schedule, run, sample, finish.

Requests come from any thread (`submit`) and are answered through a function that is called with each `Delta`. Steps are
run by the thread that `start` makes, or by whoever calls `step`. What takes long and is no step is done beside them:
building the index of a prompt, fetching one from a file. Its answer waits, and no other does. The engine knows tokens
and texts, nothing of HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from magicpig.advice import advice
from magicpig.config import Config
from magicpig.engine.answer import Answer, Deliver, answer_of, samples
from magicpig.engine.errors import RequestTimeoutError, ShuttingDownError, StepError
from magicpig.engine.grammar import Grammar
from magicpig.engine.intake import Intake
from magicpig.engine.observer import Observer, StepRecord
from magicpig.engine.options import EngineOptions
from magicpig.engine.prefix_cache import PrefixCache
from magicpig.engine.prompt_files import PromptFile, PromptFiles
from magicpig.engine.ranks import Group, GroupError, Leader, splits_attention
from magicpig.engine.request import Delta, FinishReason, Request, SamplingParams
from magicpig.engine.runner import Outcome, Runner, SequenceState
from magicpig.engine.sampling import logprobs
from magicpig.engine.scheduler import Batch, Phase, Piece, Scheduler, Status, Task
from magicpig.engine.stream import Stream
from magicpig.errors import ArgumentError, MagicPigError

logger = logging.getLogger("magicpig.engine")


class Engine:
    """Answers requests with one network, which belongs to it until `close`.

    network: a transformers model in evaluation mode. tokenizer: its own. config: how answers attend, unless a request
    says otherwise. observer: is told what happens. clock: seconds, for the scheduler.
    group: the processes that share the network, of which this one is rank 0; the others `follow`.
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
        group: Group | None = None,
    ) -> None:
        self.network, self.tokenizer = network, tokenizer
        self.config = Config() if config is None else config
        options = EngineOptions() if options is None else options
        self.observer = Observer() if observer is None else observer
        split = group.size if group is not None and splits_attention(network) else 1
        self.intake = Intake(network, tokenizer, self.config, options, split=split)
        place = options.place(network, self.config)
        if group is not None and place.accelerator is not None:
            raise ArgumentError(
                f"device={options.device}: {group.size} ranks place their parts themselves; leave it out"
            )
        limits, files = options.limits(1 if group is None else group.here), None
        if options.cache_dir is not None:
            if group is not None:
                raise ArgumentError("cache_dir: a file has the heads of one process, and there are several")
            files = PromptFiles(options.cache_dir, options.cache_limit, network, tokenizer)
        self.prefixes = PrefixCache(int(options.cache_share * limits.memory), files)
        self.scheduler = Scheduler(
            limits,
            on_admit=self._admitted,
            on_preempt=self._preempted,
            held=lambda: self.prefixes.nbytes,
            reclaim=self.prefixes.reclaim,
        )
        make = partial(Runner, place=place) if group is None else partial(Leader, group)
        self.runner: Runner = make(network, self.config, max_length=self.max_length)
        self._clock = clock
        # Held whenever the scheduler or an answer changes; not while the model computes.
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        # Beside the steps, and neither behind the other.
        self._indexing = ThreadPoolExecutor(1, thread_name_prefix="magicpig-index")
        self._fetching = ThreadPoolExecutor(1, thread_name_prefix="magicpig-fetch")
        self._requests: dict[str, list[Answer]] = {}
        self._thread: threading.Thread | None = None
        self._accepting, self._stopping = True, False
        self._observed = (0, 0, 0, 0)
        self.failure: Exception | None = None  # that has ended the thread of `start`
        self._advised = False  # that settings do not work

    # --- what callers do, from any thread -----------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self.intake.max_length

    def check(self, request: Request) -> int:
        """The most tokens each answer may have. Raises what `submit` raises, but for a full queue."""
        return self.intake.check(request, self.scheduler.limits.memory)

    def grammar(self, sampling: SamplingParams) -> Grammar | None:
        """What an answer has to follow, if anything. The first one takes a second. Raises GrammarError."""
        return self.intake.grammar(sampling)

    def size(self, config: Config, tokens: int) -> int:
        """Upper bound in bytes of what `tokens` tokens keep, and need while they are indexed."""
        return self.intake.size(config, tokens)

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Takes a request in. `deliver` is called, from the thread of the steps, with each delta until all answers end.

        Raises ArgumentError and those below it (ContextLengthError, RequestTooLargeError) for requests that cannot be
        served, QueueFullError for one too many, ShuttingDownError after `close` has begun.
        """
        most = self.check(request)
        config = self.intake.config_of(request)
        came, n = self._clock(), request.sampling.n
        answers = [Answer(self.intake, request, index, most, deliver, came) for index in range(n)]
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
            self.runner.idle()
            with self._lock:
                self._observe(batch, 0.0)
            return False
        outcomes = self._run(batch)
        with self._lock:
            self.scheduler.commit(batch)
            for piece, outcome in zip(batch.pieces, outcomes, strict=True):
                self._advance(piece, outcome)
            self._observe(batch, time.perf_counter() - start)
        return True

    def _run(self, batch: Batch) -> list[Outcome]:
        work = [answer_of(piece.task).work(piece) for piece in batch.pieces]
        try:
            return self.runner.run(work)
        except GroupError:
            raise
        except Exception as error:
            # Nobody knows what of it was stored, so these requests are lost; the next ones need not be.
            logger.exception("a step of %d sequences failed", len(work))
            failed = StepError(f"a step of the model failed: {type(error).__name__}")
            return [Outcome(_nothing(), failed) for _ in work]

    def _advance(self, piece: Piece, outcome: Outcome) -> None:
        """What a piece brings its answer: maybe a token, maybe its end."""
        answer = answer_of(piece.task)
        if answer.status is not Status.RUNNING or answer.cancelled:
            return
        if outcome.error is not None:
            self._end_all(self._family(answer), "error", outcome.error)
            return
        answer.add_prompt_logprobs(piece, outcome.logits)
        if not piece.reaches_end:
            return
        if answer.produced == 0 and answer.index == 0:
            self._prompt_is_read(answer, outcome)
        else:
            self._accept(answer, outcome)

    def _prompt_is_read(self, leader: Answer, outcome: Outcome) -> None:
        """All answers draw their first token, and go on from what the first one has stored, when it is indexed."""
        state = leader.state_now()
        answers = list(self._family(leader))
        for answer in answers:
            self._accept(answer, outcome)
        going = [answer for answer in answers if answer.status is not Status.DONE]
        wanted = bool(going) or self.prefixes.files is not None
        if wanted and any(store.length >= store.due for store in state.stores):
            leader.held = True
            self.runner.will_index(state)
            self._indexing.submit(self._guard, self._index, leader, state, going)
        else:
            self._share(leader, state, going)

    def _share(self, leader: Answer, state: SequenceState, going: Iterable[Answer]) -> None:
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

    def _accept(self, answer: Answer, outcome: Outcome) -> None:
        """Draws the next token and hands on what it means; ends the answer where it is the last."""
        now = self._clock()
        if answer.most == 0:
            self._deliver(answer, Delta(answer.index, prompt_logprobs=answer.take_prompt_logprobs()))
            self._end(answer, "length")
            return
        token = answer.sampler.draw(outcome.logits[-1], outcome.likeliest)
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
                () if top is None else tuple(logprobs(outcome.logits[-1:], [token], top)),
                answer.take_prompt_logprobs(),
                glance=answer.glance(),
            ),
        )
        if finish is not None:
            self._end(answer, finish)

    # --- beside the steps, in threads of their own --------------------------------------------------------------------

    def _index(self, leader: Answer, state: SequenceState, going: Sequence[Answer]) -> None:
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

    def _fetch(self, answer: Answer, file: PromptFile) -> None:
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

    def _guard(self, work: Callable[..., None], answer: Answer, *arguments: Any) -> None:
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
            answer = answer_of(task)
            if answer.status is Status.DONE:  # with another answer to the same request
                continue
            seconds = self._clock() - answer.arrived
            begun = "done" if answer.admitted is not None else "begun"
            error = RequestTimeoutError(f"the request was not {begun} after {seconds:.1f} s")
            self._end_all(self._family(answer), "error", error)

    def _end_all(self, answers: Iterable[Answer], finish: FinishReason, error: MagicPigError | None) -> None:
        for answer in list(answers):
            if answer.status is not Status.DONE:
                self._end(answer, finish, error)

    def _end(self, answer: Answer, finish: FinishReason, error: MagicPigError | None = None) -> None:
        self.scheduler.finish(answer)
        report = answer.report(self._clock())
        self._advise(answer)
        answer.state = None
        self.runner.forget()
        self._deliver(answer, Delta(answer.index, finish=finish, report=report, error=error))
        self.observer.on_end(answer.request, answer.index, finish, report)
        if all(other.status is Status.DONE for other in self._family(answer)):
            del self._requests[answer.request.id]

    def _advise(self, answer: Answer) -> None:
        """Says once what samples say of themselves, if that is bad."""
        if self._advised or answer.state is None:
            return
        if (said := advice(samples(answer.state), answer.state.config)) is not None:
            self._advised = True
            logger.warning("%s", said)

    def _deliver(self, answer: Answer, delta: Delta) -> None:
        try:
            answer.deliver(delta)
        except Exception:
            # Whoever asked is gone, an event loop that was closed for example.
            logger.warning("request %s: nobody takes its answer", answer.request.id, exc_info=True)
            self.cancel(answer.request.id)

    def _family(self, answer: Answer) -> list[Answer]:
        return self._requests[answer.request.id]

    # --- what the scheduler asks --------------------------------------------------------------------------------------

    def _admitted(self, task: Task) -> int:
        answer = answer_of(task)
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
        answer = answer_of(task)
        answer.state = None
        self.runner.forget()
        self.observer.on_preempted(answer.request)

    def _observe(self, batch: Batch, seconds: float) -> None:
        prefill = sum(piece.count for piece in batch.pieces if piece.phase is Phase.PREFILL)
        total = sum(piece.count for piece in batch.pieces)
        scheduler = self.scheduler
        held = (len(scheduler.running), len(scheduler.waiting), scheduler.reserved, self.prefixes.nbytes)
        record = StepRecord(seconds, prefill, total - prefill, *held)
        if batch.pieces:
            self.observer.on_step(record)
        elif held != self._observed:
            self.observer.on_rest(record)
        self._observed = held

    def _run_forever(self) -> None:
        try:
            while not self._stopping:
                if not self.step():
                    self.wait()
        except Exception as error:
            # Nothing that is left can be trusted. Nobody shall wait for an answer for ever.
            if isinstance(error, GroupError):  # says all
                logger.error("%s", error)
            else:
                logger.exception("the engine has failed and ends")
            self.failure = error
            told = error if isinstance(error, GroupError) else StepError("the engine has failed")
            with self._lock:
                self._accepting = False
                for answers in list(self._requests.values()):
                    self._end_all(answers, "error", told)

    def wait(self) -> None:
        """After a step that had nothing to compute: waits until the next one may have."""
        with self._lock:
            if self._stopping or not self.scheduler.idle:
                # Waiting tasks that do not fit wait for others to end, or for their own time to be over.
                self._wake.wait(timeout=0.01)
                return
            self._wake.wait(timeout=1.0)


def _nothing() -> Tensor:
    return torch.empty(0, 0, dtype=torch.float32, device="cpu")
