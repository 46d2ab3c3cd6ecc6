"""`LLM(model).generate(prompts)`: many prompts at once, from Python."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from magicpig.config import Config
from magicpig.engine.engine import Engine
from magicpig.engine.observer import Observer
from magicpig.engine.options import EngineOptions
from magicpig.engine.request import Collector, Completion, Delta, Request, SamplingParams
from magicpig.engine.template import chat_prompt
from magicpig.errors import ArgumentError, MagicPigError
from magicpig.generation import load, open_model

Prompt = str | Sequence[int]


class LLM:
    """A model that answers many prompts at once, each with its own settings, as it would answer each alone.

    model: the directory of a transformers model, a GGUF file, or a network in evaluation mode and then `tokenizer` too.
    config: how answers attend. dtype, weights: what a model of a directory computes in, and what its linear layers keep
    their weights in (`weights.use_weights`). options: by name, those of `EngineOptions`.
    Raises ModelError for directories that cannot be used, UnsupportedModelError for models that cannot.

    Use it in a `with` statement, or call `close`, to get a network back as it was.
    """

    def __init__(
        self,
        model: Path | str | Any,
        tokenizer: Any = None,
        config: Config | None = None,
        *,
        dtype: str = "auto",
        weights: str = "auto",
        observer: Observer | None = None,
        **options: Any,
    ) -> None:
        chosen = EngineOptions(**options)
        if isinstance(model, (str, Path)):
            opened = open_model(model, weights=weights)
            tokenizer = opened.tokenizer if tokenizer is None else tokenizer
            model = load(opened, dtype=dtype, device=chosen.device)
        elif tokenizer is None:
            raise ArgumentError("tokenizer is missing; a network does not know its own")
        self.tokenizer = tokenizer
        self.engine = Engine(model, tokenizer, config, chosen, observer=observer)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        config: Config | None = None,
        progress: bool = True,
    ) -> list[Completion]:
        """Answers all prompts, in their order. params: for all, or one for each.

        prompts: texts, or token ids. Raises, before anything is computed, ArgumentError for a prompt that cannot be
        answered; and what ends an answer early.
        """
        every: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(every)
        if len(params) != len(every):
            raise ArgumentError(f"params has {len(params)} entries for {len(every)} prompts")
        return self.run(
            [Request(self._encode(prompt), own, config) for prompt, own in zip(every, params, strict=True)],
            progress=progress,
        )

    def chat(
        self,
        conversations: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        config: Config | None = None,
        progress: bool = True,
    ) -> list[Completion]:
        """As `generate`, for conversations: lists of messages {"role", "content"}, in the model's chat template."""
        one = bool(conversations) and isinstance(conversations[0], Mapping)
        every: list[Any] = [conversations] if one else list(conversations)
        prompts = [chat_prompt(self.tokenizer, messages) for messages in every]
        return self.generate(prompts, params, config=config, progress=progress)

    def run(self, requests: Sequence[Request], *, progress: bool = True) -> list[Completion]:
        """As `generate`, for requests as they are."""
        for request in requests:
            self.engine.check(request)
        found: list[Completion | None] = [None] * len(requests)
        with _progress(len(requests), shown=progress) as bar:
            for index, done in self.complete(requests):
                if isinstance(done, MagicPigError):
                    raise done
                found[index] = done
                bar.update(1)
                bar.set_postfix_str(f"{self.engine.unfinished} running", refresh=False)
        return [completion for completion in found if completion is not None]

    def complete(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion | MagicPigError]]:
        """The number of each request with its answers, or with what ended it early; those that end first come first."""
        waiting, left = list(enumerate(requests))[::-1], len(requests)
        ended: deque[tuple[int, Completion | MagicPigError]] = deque()
        failed: set[int] = set()

        def deliver(index: int, collector: Collector, delta: Delta) -> None:
            if delta.error is not None:
                if index not in failed:  # once, of several answers
                    failed.add(index)
                    ended.append((index, delta.error))
            elif collector.add(delta):
                ended.append((index, collector.completion()))

        try:
            while left:
                while waiting and len(self.engine.scheduler.waiting) < self.engine.scheduler.limits.running:
                    index, request = waiting.pop()
                    try:
                        self.engine.submit(request, partial(deliver, index, Collector(request)))
                    except MagicPigError as error:
                        ended.append((index, error))
                if not self.engine.step() and not ended:
                    self.engine.wait()
                while ended:
                    left -= 1
                    yield ended.popleft()
        finally:
            for request in requests:
                self.engine.cancel(request.id)
            self.engine.step()

    def close(self) -> None:
        """Gives the network back as it was."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer(prompt, verbose=False)["input_ids"])
        return tuple(prompt)


def _is_one(prompts: Any) -> bool:
    return isinstance(prompts, str) or bool(len(prompts) and isinstance(prompts[0], int))


def _progress(total: int, *, shown: bool) -> AbstractContextManager[Any]:
    if not shown:
        return nullcontext(_NoBar())
    from tqdm.auto import tqdm

    bar: AbstractContextManager[Any] = tqdm(total=total, desc="Answering", unit="prompt", dynamic_ncols=True)
    return bar


class _NoBar:
    def update(self, n: int) -> None: ...
    def set_postfix_str(self, text: str, refresh: bool) -> None: ...
