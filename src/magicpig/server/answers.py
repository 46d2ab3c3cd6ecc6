"""What clients get: deltas of the engine as the JSON of OpenAI's interface, whole or in a stream of events."""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from magicpig.engine.request import Collector, Completion, Delta, Report, TokenLogprob
from magicpig.engine.stream import Stream
from magicpig.server.errors import as_api_error

OF_USAGE = ("prompt_tokens", "cached_tokens", "new_tokens")  # the rest of a report stands under `magicpig`


class Usage:
    """Tokens of all prompts and answers of one HTTP request, and what their attention read."""

    def __init__(self) -> None:
        self._reports: dict[int, list[Report]] = {}

    def add(self, prompt: int, report: Report) -> None:
        self._reports.setdefault(prompt, []).append(report)

    def as_dict(self) -> dict[str, Any]:
        every = [report for reports in self._reports.values() for report in reports]
        prompts = sum(reports[0].prompt_tokens for reports in self._reports.values())
        cached = sum(reports[0].cached_tokens for reports in self._reports.values())
        new = sum(report.new_tokens for report in every)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": new,
            "total_tokens": prompts + new,
            "prompt_tokens_details": {"cached_tokens": cached},
            "magicpig": _attention(every),
        }


def _attention(reports: Sequence[Report]) -> dict[str, Any]:
    """Of one answer its report; of several the mean of means, the sum of bytes and counts, the largest of all else."""
    rows = [{k: v for k, v in asdict(report).items() if k not in OF_USAGE} for report in reports]
    merged: dict[str, Any] = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows if row[name] is not None]
        if not values:
            merged[name] = None
        elif name.endswith(("_mean", "_unknown")):
            merged[name] = sum(values) / len(values)
        elif name.endswith("_bytes") or name == "preemptions":
            merged[name] = sum(values)
        else:
            merged[name] = max(values)
    return merged


@dataclass
class Answers:
    """One HTTP request under way.

    chat: whether it is one. calls: whether answers may be calls of functions; then they are told when they are whole.
    echoes: by prompt, the text that comes before each answer. tokenizer: names tokens.
    id, created, model: as in every object that the client gets.
    """

    stream: Stream
    chat: bool
    id: str
    model: str
    tokenizer: Any
    echoes: Sequence[str] | None = None
    logprobs: bool = False
    include_usage: bool = False
    calls: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    _held: dict[int, str] = field(default_factory=dict, init=False)

    async def whole(self) -> dict[str, Any]:
        """All answers in one object. Raises MagicPigError where one ended by an error."""
        collectors = [Collector(request) for request in self.stream.requests]
        usage = Usage()
        async for prompt, delta in self.stream:
            collectors[prompt].add(delta)
            if delta.report is not None:
                usage.add(prompt, delta.report)
        choices = []
        for prompt, collector in enumerate(collectors):
            choices += self._choices(prompt, collector.completion())
        name = "chat.completion" if self.chat else "text_completion"
        return {**self._head(name), "choices": choices, "usage": usage.as_dict()}

    async def events(self) -> AsyncIterator[bytes]:
        """The same as server-sent events: one for each piece of text, then usage if asked for, then [DONE]."""
        usage, begun = Usage(), set[int]()
        name = "chat.completion.chunk" if self.chat else "text_completion"
        extra = {"usage": None} if self.include_usage else {}
        try:
            async for prompt, delta in self.stream:
                if delta.error is not None:
                    yield event(as_api_error(delta.error).body())
                    break
                index = prompt * self.stream.requests[prompt].sampling.n + delta.index
                if delta.report is not None:
                    usage.add(prompt, delta.report)
                chunks = self._chunks(prompt, index, delta, first=index not in begun)
                begun.add(index)
                seen = {} if delta.glance is None else {"magicpig": asdict(delta.glance)}
                for choices in [[choice] for choice in chunks] or ([[]] if seen else []):
                    yield event({**self._head(name), "choices": choices, **extra, **seen})
            else:
                if self.include_usage:
                    yield event({**self._head(name), "choices": [], "usage": usage.as_dict()})
            yield b"data: [DONE]\n\n"
        finally:
            self.stream.close()

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def _choices(self, prompt: int, completion: Completion) -> list[dict[str, Any]]:
        choices = []
        for choice in completion.choices:
            answer: dict[str, Any] = {"index": prompt * len(completion.choices) + choice.index}
            finish: str = choice.finish
            if self.chat:
                content, tool_calls = self._calls(choice.text)
                answer["message"] = {"role": "assistant", "content": content, "refusal": None}
                if tool_calls:
                    answer["message"]["tool_calls"], finish = tool_calls, "tool_calls"
                answer["logprobs"] = self._chat_logprobs(choice.logprobs) if self.logprobs else None
            else:
                entries = [*(completion.prompt_logprobs or ()), *choice.logprobs]
                answer["text"] = ("" if self.echoes is None else self.echoes[prompt]) + choice.text
                answer["logprobs"] = self._logprobs(entries) if self.logprobs else None
            choices.append(answer | {"finish_reason": finish})
        return choices

    def _chunks(self, prompt: int, index: int, delta: Delta, *, first: bool) -> list[dict[str, Any]]:
        """What a client is told of a delta; nothing while text is held back."""
        if self.chat:
            chunks: list[dict[str, Any]] = []
            if first:
                chunks.append({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
            finish: str | None = delta.finish
            if self.calls:
                self._held[index] = self._held.get(index, "") + delta.text
                if finish is not None:
                    content, tool_calls = self._calls(self._held.pop(index))
                    said = {"tool_calls": [{"index": i, **call} for i, call in enumerate(tool_calls)]}
                    finish = "tool_calls" if tool_calls else finish
                    part: dict[str, Any] = said if tool_calls else {"content": content}
                    chunks.append({"index": index, "delta": part, "finish_reason": None})
            elif delta.text or (self.logprobs and delta.tokens):
                logprobs = {"logprobs": self._chat_logprobs(delta.logprobs)} if self.logprobs else {}
                chunks.append({"index": index, "delta": {"content": delta.text}, **logprobs, "finish_reason": None})
            if finish is not None:
                chunks.append({"index": index, "delta": {}, "finish_reason": finish})
            return chunks
        text = delta.text if not first or self.echoes is None else self.echoes[prompt] + delta.text
        entries = [*(delta.prompt_logprobs or ()), *delta.logprobs]
        if not text and delta.finish is None and not (self.logprobs and entries):
            return []
        logprobs_of = self._logprobs(entries) if self.logprobs and entries else None
        return [{"index": index, "text": text, "logprobs": logprobs_of, "finish_reason": delta.finish}]

    def _calls(self, text: str) -> tuple[str | None, list[dict[str, Any]]]:
        """The calls of functions that a text is, if there are any; else the text."""
        found = tool_calls(text) if self.calls else []
        made = [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for name, arguments in found
        ]
        return (None if made else text), made

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """As of completions: parallel lists."""
        tokens, offsets, at = [], [], 0
        for entry in entries:
            tokens.append(token_text(self.tokenizer, entry.token))
            offsets.append(at)
            at += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [None if entry.logprob is None else self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float | None]:
        """By text, the likeliest where several tokens have the same; the drawn token is always among them."""
        top: dict[str, float | None] = {}
        for token, logprob in (*entry.top, (entry.token, entry.logprob)):
            top.setdefault(token_text(self.tokenizer, token), _finite(logprob))
        return top

    def _chat_logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            {
                **self._named(entry.token, entry.logprob),
                "top_logprobs": [self._named(token, logprob) for token, logprob in entry.top],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = token_text(self.tokenizer, token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def tool_calls(text: str) -> list[tuple[str, Any]]:
    """Names and arguments of the calls in a text: JSON alone, or in the tags that Hermes and Qwen were taught."""
    parts = re.findall(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", text, re.DOTALL) or [text.strip()]
    calls = []
    for part in parts:
        try:
            call = json.loads(part)
            calls.append((str(call["name"]), call["arguments"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            return []
    return calls


def token_text(tokenizer: Any, token: int) -> str:
    """A token on its own: its text, or where that is no whole character the tokenizer's name for it."""
    text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if text and "\ufffd" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token))


def _finite(logprob: float | None) -> float | None:
    # JSON has no infinity; a token that cannot be drawn has this in OpenAI's answers.
    return None if logprob is None else logprob if math.isfinite(logprob) else -9999.0


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
