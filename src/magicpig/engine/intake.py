"""What requests may ask of an engine, and the memory that they take."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from magicpig.config import Config
from magicpig.engine.errors import ContextLengthError
from magicpig.engine.grammar import Grammar
from magicpig.engine.options import EngineOptions
from magicpig.engine.request import Request, SamplingParams
from magicpig.engine.sampling import check_tokens
from magicpig.errors import ArgumentError
from magicpig.generation import end_tokens
from magicpig.integrations.transformers import MagicPigCache
from magicpig.integrations.transformers.shapes import key_dtype, layer_shapes
from magicpig.store.planner import plan


class Intake:
    """What the model allows, and what the engine has for all requests.

    network: a transformers model. tokenizer: its own. config: how answers attend, unless a request says otherwise.
    split: among how many processes the heads of each layer are.
    """

    def __init__(self, network: Any, tokenizer: Any, config: Config, options: EngineOptions, *, split: int = 1) -> None:
        self.network, self.tokenizer, self.config, self.options = network, tokenizer, config, options
        text = network.config.get_text_config(decoder=True)
        self.max_length = options.longest(network)
        self.vocabulary, self.query_heads = int(text.vocab_size), int(text.num_attention_heads) // split
        self._split = split
        self.ends = end_tokens(tokenizer, network)
        self._size = lru_cache(maxsize=4096)(self._size_of)
        self._grammar = lru_cache(maxsize=64)(self._grammar_of)

    def config_of(self, request: Request) -> Config:
        """How its answers attend."""
        return self.config if request.config is None else request.config

    def check(self, request: Request, memory: int) -> int:
        """The most tokens each answer may have, of an engine with so many bytes.

        Raises what `Engine.submit` raises, but for a full queue.
        """
        prompt, vocabulary = request.prompt, self.vocabulary
        if not prompt:
            raise ArgumentError("the prompt is empty")
        if not (min(prompt) >= 0 and max(prompt) < vocabulary):
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise ArgumentError(f"the prompt has token {wrong}; the model knows the tokens 0 to {vocabulary - 1}")
        check_tokens(request.sampling, vocabulary)
        self.grammar(request.sampling)
        config = self.config_of(request)
        try:
            MagicPigCache(self.network.config, config)
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
        return self._fitting(config, len(prompt), room, memory) if asked is None else asked

    def grammar(self, sampling: SamplingParams) -> Grammar | None:
        """What an answer has to follow, if anything. The first one takes a second. Raises GrammarError."""
        if sampling.json_schema is None:
            return None
        return self._grammar(json.dumps(sampling.json_schema, sort_keys=True))

    def size(self, config: Config, tokens: int) -> int:
        """Upper bound in bytes of what `tokens` tokens keep, and need while they are indexed."""
        # In steps, for the sake of those that ask again and again.
        return self._size(config.model_dump_json(), -(-tokens // 64) * 64)

    def _size_of(self, config: str, tokens: int) -> int:
        settings = Config.model_validate_json(config)
        shapes = [shape.part(self._split) for shape in layer_shapes(self.network.config, settings)]
        return plan(shapes, settings, sequences=1, tokens=tokens, dtype=key_dtype(self.network)).total

    def _grammar_of(self, schema: str) -> Grammar:
        return Grammar(json.loads(schema), self.tokenizer, self.vocabulary, self.ends)

    def _fitting(self, config: Config, prompt: int, room: int, memory: int) -> int:
        """The most tokens up to `room` whose memory is there; at least one, and then `submit` says what is missing."""
        low, high = 1, room
        while low < high:
            middle = (low + high + 1) // 2
            if self.size(config, prompt + middle) <= memory:
                low = middle
            else:
                high = middle - 1
        return low
