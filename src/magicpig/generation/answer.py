"""A prompt is answered by transformers' own `generate`, and measured. Knows nothing about terminals."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from magicpig.advice import SamplingWarning, advice
from magicpig.config import Config
from magicpig.errors import ArgumentError, MagicPigError
from magicpig.generation.lossless import MODES, Decoding, Drafts, check, why_not_to_the_bit
from magicpig.generation.passes import even_chunk, finite
from magicpig.integrations.transformers import CacheReport, attach
from magicpig.integrations.transformers.compat import cache_of
from magicpig.model_dir import ModelError
from magicpig.placement.device import Device
from magicpig.text_stream import Detokenizer, StopStrings
from magicpig.wording import one_line, shown

GREEDY = ("temperature", "top_p", "top_k")  # means nothing to it
OVERRULED = {  # in the generation settings of a model: one answer is written, token by token, over our own cache
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "cache_implementation": None,
    "cache_config": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
}
HARMLESS = {  # settings that models have and transformers always takes, or that are given with each call
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "do_sample",
    "max_length",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
}


@dataclass(frozen=True)
class Generation:
    """What came out, and what it took.

    drafts: in lossless mode, what became of what sampling drafted; `cache` is then about the drafts.
    first_step_s: seconds of the first decode step, which also builds the index; None with fewer than two new tokens.
    decode_s, decode_steps: the steps after that one.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    prefill_s: float
    first_step_s: float | None
    decode_s: float
    decode_steps: int
    cache: CacheReport
    drafts: Drafts | None = None

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None with fewer than three new tokens."""
        return self.decode_steps / self.decode_s if self.decode_steps else None


def generate(
    network: Any,
    tokenizer: Any,
    ids: list[int],
    config: Config,
    *,
    max_new_tokens: int,
    mode: str = "sampled",
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    chunk: int = 1024,
    max_length: int | None = None,
    device: str | Device = "cpu",
    placement: str = "auto",
    on_prefill: Callable[[int], None] = lambda tokens: None,
    on_text: Callable[[str], None] = lambda text: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Generation:
    """Generate from the prompt ``ids``; temperature 0 is greedy.

    What the model's generation_config.json says is heeded, but for `OVERRULED`; on_note is called with a sentence if
    that makes a difference, and with one of `advice` if the samples say that they are bad.
    Raises ModelError for settings in it that transformers refuses, and ArgumentError and UnsupportedModelError for what
    lossless mode cannot do.

    mode: one of `MODES`. "lossless" gives the tokens of full attention, or with a temperature tokens that are
    distributed as its are, and samples only to draft them (lossless.py); on_note is told where that holds up to
    rounding alone.
    stop: texts that end the answer and are no part of it; those in generation_config.json, which also end it, are.
    chunk: the prompt is read this many tokens at a time. max_length, device, placement: as in `attach`.
    on_prefill is called with the number of prompt tokens read by each chunk, on_text with every piece of new text.
    """
    if mode not in MODES:
        raise ArgumentError(f"mode={shown(mode)}: must be one of {', '.join(MODES)}")
    watch = _Watch(tokenizer, on_text, stop)
    lossless = Decoding(watch) if mode == "lossless" else None
    if lossless is not None:
        check(config, network.config)
        if device != "cpu":
            raise ArgumentError("mode='lossless' is exact to the bit on the CPU alone; leave device out")
        if (reason := why_not_to_the_bit(network)) is not None:
            on_note(reason)
    attach(network, config, max_length=max_length, device=device, placement=placement)
    torch.manual_seed(config.seed)
    # None switches off what the model's own generation settings may say.
    sampling: dict[str, Any] = (
        {"temperature": temperature, "top_p": top_p} if temperature > 0 else dict.fromkeys(GREEDY)
    )
    if network.generation_config.stop_strings is not None:
        sampling["tokenizer"] = tokenizer
    hook = network.register_forward_hook(
        lambda _, __, kwargs, ___: on_prefill(kwargs["input_ids"].shape[1]) if not watch.times else None,
        with_kwargs=True,
    )
    prompt = torch.tensor([ids], device=network.device, dtype=torch.int64)
    try:
        start = time.perf_counter()
        with (
            warnings.catch_warnings(),
            _overruled(network, on_note),
            _blaming_settings(network),
            finite(network),
        ):
            warnings.simplefilter("ignore", SamplingWarning)  # a note says it
            output = network.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                prefill_chunk_size=even_chunk(len(ids), chunk),
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                pad_token_id=_pad_token(network),
                streamer=watch,
                stopping_criteria=StoppingCriteriaList([_AtStop(watch)]),
                return_dict_in_generate=True,  # with the cache that `attach` made
                **({} if lossless is None else {"custom_generate": lossless}),
                **sampling,
            )
    finally:
        hook.remove()
    times, report = watch.times, cache_of(output).report()
    if lossless is None and (said := advice(report.layers, config)) is not None:
        on_note(said)
    return Generation(
        text=watch.text,
        token_ids=output.sequences[0, len(ids) :].tolist(),
        prompt_tokens=len(ids),
        prefill_s=times[0] - start,
        first_step_s=times[1] - times[0] if len(times) > 1 else None,
        decode_s=times[-1] - times[1] if len(times) > 1 else 0.0,
        decode_steps=max(len(times) - 2, 0),
        cache=report,
        drafts=None if lossless is None else lossless.drafts,
    )


class _Watch(BaseStreamer):
    """Notes when each new token arrived, hands its text on, and knows when a text in ``stop`` has come."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], stop: Sequence[str]) -> None:
        self.text_of, self.stops = Detokenizer(tokenizer), StopStrings(stop)
        self.on_text = on_text
        self.times: list[float] = []
        self.text = ""
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self._prompt:  # comes first, at once
            self._prompt = False
            return
        self.times.append(time.perf_counter())
        if not self.stops.found:
            self._show(self.stops.push(self.text_of.push(int(value))))

    def end(self) -> None:
        if not self.stops.found:
            self._show(self.stops.push(self.text_of.flush()) + self.stops.flush())

    def _show(self, text: str) -> None:
        if text:
            self.text += text
            self.on_text(text)


class _AtStop(StoppingCriteria):
    # Not that of transformers, which does not know all tokenizers.
    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full(input_ids.shape[:1], self.watch.stops.found, dtype=torch.bool, device=input_ids.device)


def _pad_token(network: Any) -> int:
    # Nothing is ever padded here, but without one transformers warns.
    pad = network.generation_config.pad_token_id
    return 0 if pad is None else pad


@contextmanager
def _overruled(network: Any, on_note: Callable[[str], None]) -> Iterator[None]:
    """Take out of the generation settings what one sampled answer cannot have, and put it back afterwards."""
    settings = network.generation_config
    before = {name: getattr(settings, name, None) for name in OVERRULED}
    plain = GenerationConfig()
    try:
        for name, given in before.items():
            if given not in (None, OVERRULED[name], getattr(plain, name, None)):
                on_note(f"generation_config.json asks for {name}={shown(given)}, which is left out here.")
            if given is not None:
                setattr(settings, name, OVERRULED[name])
        yield
    finally:
        for name, given in before.items():
            if given is not None:
                setattr(settings, name, given)


@contextmanager
def _blaming_settings(network: Any) -> Iterator[None]:
    """Where a model has settings of its own for generating, what transformers refuses is in them."""
    own = sorted(set(network.generation_config.to_diff_dict()) - {*HARMLESS, *OVERRULED})
    try:
        yield
    except MagicPigError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
        if not own:
            raise
        raise ModelError(f"generation_config.json ({', '.join(own)}): {one_line(error)}") from error
