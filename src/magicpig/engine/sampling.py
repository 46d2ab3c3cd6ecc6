"""From logits to a token, for one answer: transformers' logits processors in the order of `generate`, its own seed.

With the same seed and settings an answer gets the tokens that `generate` draws after `torch.manual_seed(seed)`.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from magicpig.engine.grammar import Guide
from magicpig.engine.request import LARGEST_SEED, SamplingParams, TokenLogprob
from magicpig.errors import ArgumentError

_IDS: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
_SCORES: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class TokenSampler:
    """Draws the tokens of one answer. index: of the answer, which shifts the seed.

    prompt: its token ids. ends: the tokens that end an answer. vocabulary: tokens that the model knows. guide: which of
    them may come, or None.
    Raises ArgumentError for tokens that the model does not know.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        *,
        ends: Collection[int],
        vocabulary: int,
        index: int = 0,
        guide: Guide | None = None,
    ) -> None:
        check_tokens(params, vocabulary)
        self.params, self._guide = params, guide
        self._processors = _processors(params, len(prompt), ends, vocabulary)
        self._generator = torch.Generator()
        seed = secrets.randbelow(LARGEST_SEED) if params.seed is None else (params.seed + index) % LARGEST_SEED
        self._generator.manual_seed(seed)
        # Only processors look at what was said before.
        self._known = torch.tensor([prompt], **_IDS) if self._processors else None
        self._length = len(prompt)

    @property
    def plain(self) -> bool:
        """Whether the token is that of the largest logit, whatever was said before."""
        return self.params.greedy and not self._processors and self._guide is None

    def draw(self, logits: Tensor, likeliest: int | None = None) -> int:
        """The next token, of logits (vocabulary,) in float32 that are finite or minus infinity.

        likeliest: that of the largest logit, if it is known.
        """
        if likeliest is not None and self.plain:
            return likeliest
        scores: Any = logits[None]
        if self._guide is not None:
            scores = self._guide.apply(scores)
        if self._known is not None:
            known: Any = self._known[:, : self._length]
            scores = self._processors(known, scores)
        if self.params.greedy:
            token = int(scores.argmax(-1))
        else:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        self.remember(token)
        return token

    def remember(self, token: int) -> None:
        """Notes a token that was drawn elsewhere."""
        if self._guide is not None:
            self._guide.remember(token)
        if self._known is None:
            return
        if self._length == self._known.shape[1]:
            self._known = torch.cat([self._known, torch.zeros_like(self._known)], 1)
        self._known[0, self._length] = token
        self._length += 1


def check_tokens(params: SamplingParams, vocabulary: int) -> None:
    """Raises ArgumentError if the settings name tokens that the model does not know."""
    for name, tokens in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise ArgumentError(f"{name} has token {token}; the model knows the tokens 0 to {vocabulary - 1}")


def logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Of the tokens that came after each row of logits (n, vocabulary), and of the `top` likeliest ones there."""
    if not tokens:
        return []
    table = logits.log_softmax(-1)
    chosen = table.gather(1, torch.tensor(tokens, **_IDS)[:, None])[:, 0].tolist()
    best = table.topk(min(top, table.shape[1]), -1)
    return [
        TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(tokens, chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _processors(
    params: SamplingParams, prompt_tokens: int, ends: Collection[int], vocabulary: int
) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if params.logit_bias:
        processors.append(_Bias(params.logit_bias, vocabulary))
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        processors.append(_AnswerPenalty(params.presence_penalty, params.frequency_penalty, prompt_tokens))
    ends = {*ends, *params.stop_token_ids}
    if params.min_tokens and ends:
        processors.append(
            MinNewTokensLengthLogitsProcessor(prompt_tokens, params.min_tokens, torch.tensor(sorted(ends), **_IDS))
        )
    if params.greedy:
        return processors
    if params.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(min(params.top_k, vocabulary)))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors


class _Bias(LogitsProcessor):
    def __init__(self, bias: Mapping[int, float], vocabulary: int) -> None:
        self.bias = torch.zeros(vocabulary, **_SCORES)
        self.bias[list(bias)] = torch.tensor(list(bias.values()), **_SCORES)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.bias


class _AnswerPenalty(LogitsProcessor):
    """OpenAI's: logit - frequency_penalty * count - presence_penalty * (count > 0), counted in the answer alone."""

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self.presence, self.frequency, self.prompt_tokens = presence, frequency, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        counts = torch.zeros_like(scores)
        said = input_ids[:, self.prompt_tokens :]
        counts.scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)
