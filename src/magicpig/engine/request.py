"""What is asked of the engine, and what it answers. Values only."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from magicpig.config import Config
from magicpig.engine.glance import Glance
from magicpig.errors import ArgumentError, MagicPigError

FinishReason = Literal["stop", "length", "abort", "error"]
"""stop: a stop string, a stop token or the end of the text. abort: cancelled. error: see `Delta.error`."""

LARGEST_SEED = 2**63 - 1
MOST_STOPS = 64
MOST_CHOICES = 128
MOST_LOGPROBS = 100
COLDEST = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are drawn. Names and meaning are those of OpenAI's and vLLM's interfaces.

    max_tokens: the most new tokens; None for as many as fit the model, 0 for none. min_tokens: no end before these.
    temperature: 0 takes the likeliest token. top_k: 0 for all. top_p, min_p: probabilities.
    presence_penalty, frequency_penalty: taken off the logits of tokens that the answer has (OpenAI).
    repetition_penalty: divides the logits of tokens that prompt or answer have (arXiv 1909.05858).
    logit_bias: added to the logits of tokens.
    stop: strings that end the answer, which does not contain them unless include_stop. stop_token_ids: tokens that do.
    ignore_eos: go on after the end of the text.
    seed: the same seed gives the same text, whatever else runs; None takes a new one each time.
    n: answers; the i-th has seed + i. logprobs: log-probabilities of the drawn tokens and of so many likeliest
    (natural, of the model's own distribution); None for none. prompt_logprobs: the same of the prompt's tokens.
    json_schema: what the answer has to follow (grammar.py).
    Raises ArgumentError for values out of range.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    json_schema: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 0, math.inf)
        _within("min_tokens", self.min_tokens, 0, math.inf if self.max_tokens is None else self.max_tokens)
        _within("temperature", self.temperature, 0, 100)
        _within("top_p", self.top_p, 0, 1, open_below=True)
        _within("top_k", self.top_k, 0, math.inf)
        _within("min_p", self.min_p, 0, 1)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("repetition_penalty", self.repetition_penalty, 0, 100, open_below=True)
        _within("seed", self.seed, 0, LARGEST_SEED)
        _within("n", self.n, 1, MOST_CHOICES)
        _within("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        _within("prompt_logprobs", self.prompt_logprobs, 0, MOST_LOGPROBS)
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias[{token}]", bias, -100, 100)
        if len(self.stop) > MOST_STOPS:
            raise ArgumentError(f"stop has {len(self.stop)} strings; allowed are {MOST_STOPS}")
        if self.json_schema is not None and (self.ignore_eos or self.min_tokens):
            raise ArgumentError("json_schema says where an answer ends: it allows neither ignore_eos nor min_tokens")
        if "" in self.stop:
            raise ArgumentError("stop has an empty string; leave it out")

    @property
    def greedy(self) -> bool:
        # So close to 0, dividing by it would overflow.
        return self.temperature < COLDEST


def _within(name: str, value: float | None, low: float, high: float, *, open_below: bool = False) -> None:
    # Written so that NaN is out of range, too.
    if value is not None and not (low <= value <= high and not (open_below and value == low)):
        above = f"more than {low}" if open_below else f"at least {low}"
        raise ArgumentError(f"{name}={value} must be {above}" + (f" and at most {high}" if high < math.inf else ""))


@dataclass(frozen=True)
class Request:
    """One prompt, to be answered `sampling.n` times.

    prompt: token ids. config: how the answer attends; None for what the engine has. priority: smaller comes first.
    watch: whether each token comes with a `Glance`.
    timeout: seconds until all must be done; queue_timeout: until it must have begun; None for no limit.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    config: Config | None = None
    priority: int = 0
    watch: bool = False
    timeout: float | None = None
    queue_timeout: float | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class TokenLogprob:
    """token: its id. logprob: None for the first token of a prompt. top: the likeliest tokens there, and theirs."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Report:
    """What an answer took. Bytes are those of its own keys, values and index when it ended.

    prompt_tokens, cached_tokens: of the prompt, and how many of them did not have to be read.
    new_tokens: of the answer. rows_share_mean, rows_share_max: of the indexed keys, the share that a query head read in
    a step; None if all attention was exact. predicted_error_mean, _p95, _max: of the relative error of each sampled
    head's output, and _unknown: the share of those that could not say; None likewise, and for samplers that predict
    none. preemptions: how often it gave way.
    queue_s: seconds it waited; first_token_s, total_s: from its arrival to the first token and to its end.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    rows_share_mean: float | None = None
    rows_share_max: float | None = None
    predicted_error_mean: float | None = None
    predicted_error_p95: float | None = None
    predicted_error_max: float | None = None
    predicted_error_unknown: float | None = None
    kv_bytes: int = 0
    index_bytes: int = 0
    preemptions: int = 0
    queue_s: float = 0.0
    first_token_s: float | None = None
    total_s: float = 0.0


@dataclass(frozen=True)
class Delta:
    """What one step adds to one answer.

    index: of the answer, below `n`. text: may be empty while a stop string or a character may be under way; tokens:
    those that came; logprobs: one for each of them, if asked for. prompt_logprobs: once, in the first delta.
    finish: in the last delta, with the report, and with the error if that is the reason.
    """

    index: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finish: FinishReason | None = None
    report: Report | None = None
    error: MagicPigError | None = None
    glance: Glance | None = None


@dataclass(frozen=True)
class Choice:
    """One whole answer: all its deltas together."""

    index: int
    text: str
    tokens: tuple[int, ...]
    finish: FinishReason
    report: Report
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A prompt's answers, in order of their index."""

    request: Request
    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None


class Collector:
    """Puts the deltas of a request together again."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._deltas: list[list[Delta]] = [[] for _ in range(request.sampling.n)]
        self._open = request.sampling.n

    def add(self, delta: Delta) -> bool:
        """Returns whether that was the last one. Raises the error with which an answer ended."""
        if delta.error is not None:
            raise delta.error
        self._deltas[delta.index].append(delta)
        self._open -= delta.finish is not None
        return self._open == 0

    def completion(self) -> Completion:
        """All answers; every one must have come to its end."""
        prompt = next((d.prompt_logprobs for ds in self._deltas for d in ds if d.prompt_logprobs is not None), None)
        return Completion(self.request, tuple(_choice(deltas) for deltas in self._deltas), prompt)


def _choice(deltas: list[Delta]) -> Choice:
    last = deltas[-1]
    assert last.finish is not None
    assert last.report is not None
    return Choice(
        index=last.index,
        text="".join(delta.text for delta in deltas),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        finish=last.finish,
        report=last.report,
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
    )
