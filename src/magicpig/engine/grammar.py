"""Answers that follow a JSON schema, by llguidance (the extra `structured`): tokens that cannot go on are ruled out."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from magicpig.errors import ArgumentError
from magicpig.wording import printable

ANY_OBJECT = {"type": "object"}
_BYTE = torch.arange(8, dtype=torch.uint8, device="cpu")


class GrammarError(ArgumentError):
    """A JSON schema that cannot be followed, or nothing that could follow one."""

    code = "unsupported_schema"


class Grammar:
    """What a JSON schema allows, for one tokenizer; answers make their own `Guide`.

    Raises GrammarError for a schema that is not understood, and where llguidance is not installed.
    """

    def __init__(self, schema: Mapping[str, Any], tokenizer: Any, vocabulary: int, ends: Collection[int]) -> None:
        try:
            from llguidance import LLMatcher
        except ModuleNotFoundError:
            raise GrammarError(
                "JSON schemas cannot be followed here: llguidance is not installed: pip install 'magicpig[structured]'"
            ) from None
        if not ends:
            raise GrammarError("the model has no token that ends an answer, so none can end where its schema does")
        self._matcher, self._vocabulary = LLMatcher, vocabulary
        self._tokens = _tokens(tokenizer, vocabulary, tuple(sorted(ends)))
        try:
            compact: Any = {"whitespace_flexible": False}
            self._grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=compact)
            error = LLMatcher.validate_grammar(self._grammar, self._tokens)
        except ValueError as wrong:
            error = str(wrong)
        if error:
            raise GrammarError(f"the JSON schema cannot be followed: {printable(error, 300)}")

    def guide(self) -> Guide:
        """For one answer, at its beginning."""
        return Guide(self._matcher(self._tokens, self._grammar), self._vocabulary)


class Guide:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._allowed = torch.zeros(1, -(-vocabulary // 32), dtype=torch.int32, device="cpu")

    def apply(self, scores: Tensor) -> Tensor:
        """Scores (1, vocabulary) with minus infinity for what may not come next."""
        self._matcher.unsafe_compute_mask_ptr(self._allowed.data_ptr(), self._allowed.nbytes)
        bits = (self._allowed.view(torch.uint8)[:, :, None] >> _BYTE) & 1
        return scores.masked_fill(bits.view(1, -1)[:, : scores.shape[1]] == 0, float("-inf"))

    def remember(self, token: int) -> None:
        """Goes on by a token that `apply` allowed."""
        self._matcher.consume_token(token)


@lru_cache(maxsize=4)
def _tokens(tokenizer: Any, vocabulary: int, ends: tuple[int, ...]) -> Any:
    """Takes a second, and is the same for all requests."""
    from llguidance.hf import from_tokenizer

    try:
        return from_tokenizer(tokenizer, n_vocab=max(vocabulary, len(tokenizer)), eos_token=list(ends))
    except ValueError as error:
        said = printable(str(error), 200)
        raise GrammarError(f"JSON schemas cannot be followed with this tokenizer: {said}") from None
