"""How an endpoint with OpenAI's interface does under load: ragged prompts that arrive at random, measured by a client.

Knows HTTP only, so it measures other servers as well. Prompts are sentences of random words, of random lengths; gaps
between arrivals are exponential (Poisson arrivals). The first token is the first event with text.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from magicpig.errors import ArgumentError
from magicpig.studies.evaluation.tasks import lexicon


@dataclass(frozen=True)
class Load:
    """requests: how many. rate: arrivals a second, math.inf for all at once. concurrency: the most under way.

    words: the fewest and the most words of a prompt; lengths are even in their logarithm. max_tokens: of each answer,
    which goes on after the end of the text. hang_up: the share of clients that leave after the first piece of text.
    extra: more fields of each request. seed: of prompts, arrivals and who leaves.
    """

    requests: int = 32
    rate: float = math.inf
    concurrency: int = 8
    words: tuple[int, int] = (10, 4000)
    max_tokens: int = 64
    hang_up: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.words
        if not 1 <= low <= high:
            raise ArgumentError(f"words={low},{high} must be at least 1, the smaller one first")
        if not 0 <= self.hang_up <= 1:
            raise ArgumentError(f"hang_up={self.hang_up} must be at least 0 and at most 1")
        for name in ("requests", "rate", "concurrency", "max_tokens"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True)
class Outcome:
    """One request, in seconds. gaps: between pieces of text. error: what went wrong, else None. left: hung up."""

    prompt_tokens: int
    new_tokens: int
    first_s: float
    gaps: tuple[float, ...]
    total_s: float
    error: str | None = None
    left: bool = False


@dataclass(frozen=True)
class Result:
    """A load and what became of it. seconds: from the first request to the last answer."""

    load: Load
    seconds: float
    outcomes: tuple[Outcome, ...]

    def summary(self) -> dict[str, float | int | None]:
        """Rates over all seconds; medians and 95th percentiles of those that were answered."""
        good = [outcome for outcome in self.outcomes if outcome.error is None and not outcome.left]
        errors = sum(outcome.error is not None for outcome in self.outcomes)
        gaps = [gap for outcome in good for gap in outcome.gaps]
        first, total = [outcome.first_s for outcome in good], [outcome.total_s for outcome in good]
        return {
            "requests": len(self.outcomes),
            "errors": errors,
            "hung_up": len(self.outcomes) - len(good) - errors,
            "seconds": self.seconds,
            "requests_per_s": len(good) / self.seconds,
            "prompt_tokens_per_s": sum(outcome.prompt_tokens for outcome in good) / self.seconds,
            "new_tokens_per_s": sum(outcome.new_tokens for outcome in good) / self.seconds,
            "first_token_s_p50": quantile(first, 0.5),
            "first_token_s_p95": quantile(first, 0.95),
            "next_token_s_p50": quantile(gaps, 0.5),
            "next_token_s_p95": quantile(gaps, 0.95),
            "total_s_p50": quantile(total, 0.5),
            "total_s_p95": quantile(total, 0.95),
        }


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that this share of them does not exceed; None of nothing."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def prompts(load: Load) -> list[str]:
    """The prompts of a load, the same each time."""
    chance, words = random.Random(load.seed), lexicon.english()
    low, high = (math.log(bound) for bound in load.words)
    lengths = [round(math.exp(chance.uniform(low, high))) for _ in range(load.requests)]
    return [" ".join(chance.choices(words, k=length)) for length in lengths]


def drive(
    url: str,
    load: Load,
    *,
    model: str | None = None,
    api_key: str | None = None,
    timeout: float = 600.0,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
) -> Result:
    """Sends a load to the endpoint at `url`, up to and with /v1, and waits for all answers."""
    return asyncio.run(_drive(url, load, model, api_key, timeout, on_done))


async def _drive(
    url: str,
    load: Load,
    model: str | None,
    api_key: str | None,
    timeout: float,
    on_done: Callable[[Outcome], None],
) -> Result:
    chance, room = random.Random(load.seed + 1), asyncio.Semaphore(load.concurrency)
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, limits=limits) as client:
        named = {} if model is None else {"model": model}

        async def one(prompt: str, *, leave: bool) -> Outcome:
            async with room:
                body = {**named, "prompt": prompt, "max_tokens": load.max_tokens, **load.extra}
                outcome = await _ask(client, body, leave=leave)
            on_done(outcome)
            return outcome

        start, tasks = time.perf_counter(), []
        for prompt in prompts(load):
            tasks.append(asyncio.create_task(one(prompt, leave=chance.random() < load.hang_up)))
            if load.rate < math.inf:
                await asyncio.sleep(chance.expovariate(load.rate))
        outcomes = await asyncio.gather(*tasks)
        return Result(load, time.perf_counter() - start, tuple(outcomes))


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], *, leave: bool) -> Outcome:
    body = {
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **body,
    }
    start = time.perf_counter()
    times: list[float] = []
    usage: dict[str, Any] = {}
    error: str | None = None
    try:
        async with client.stream("POST", "completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                error = f"status {answer.status_code}"
            async for line in answer.aiter_lines():
                if error is not None or not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    error = str(event["error"].get("code"))
                usage = event.get("usage") or usage
                if any(choice.get("text") for choice in event.get("choices", ())):
                    times.append(time.perf_counter())
                    if leave:
                        break
    except httpx.HTTPError as broken:
        error = type(broken).__name__
    end = time.perf_counter()
    if error is None and not times:
        error = "no text"
    return Outcome(
        prompt_tokens=int(usage.get("prompt_tokens", 0)),
        new_tokens=int(usage.get("completion_tokens", 0)),
        first_s=(times[0] if times else end) - start,
        gaps=tuple(b - a for a, b in itertools.pairwise(times)),
        total_s=end - start,
        error=error,
        left=leave and error is None,
    )
