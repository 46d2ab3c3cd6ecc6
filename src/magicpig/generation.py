"""A local model directory and a prompt become text, measured. Knows nothing about terminals.

`open_model` -> `encode` -> `load` -> `generate`. Everything that can be wrong with the directory or the prompt is a
`ModelError` of one line. `read` and `greedy` are the same in two steps, for those who do more with the cache between
them.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    logging,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.generation.streamers import BaseStreamer

from magicpig import adapters, gguf, machine
from magicpig.advice import SamplingWarning, advice
from magicpig.config import Config
from magicpig.errors import ArgumentError, InsufficientMemoryError, MagicPigError, NotFiniteError
from magicpig.integrations.transformers import CacheReport, MagicPigCache, attach
from magicpig.integrations.transformers.compat import cache_argument, cache_of
from magicpig.integrations.transformers.shapes import layer_shapes, scale_positions, token_limit
from magicpig.model_dir import ModelError, brings_code, check_directory, gguf_file
from magicpig.text_stream import Detokenizer, StopStrings
from magicpig.weights import FORMS, use_weights
from magicpig.wording import counted, printable, shown

GREEDY = ("temperature", "top_p", "top_k")  # means nothing to it
TEMPLATE_SECONDS = 10  # for a chat template, which takes milliseconds
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
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Model:
    """A local model directory, looked into: everything but the weights. Settings are those of `open_model`."""

    directory: Path
    config: Any
    tokenizer: Any
    trust_remote_code: bool
    max_length: int | None = None
    adapter: Path | None = None
    rope_scaling: str | None = None
    weights: str = "auto"

    @property
    def settings(self) -> dict[str, Any]:
        """What `open_model` was given beside the directory."""
        names = ("trust_remote_code", "max_length", "adapter", "rope_scaling", "weights")
        return {name: getattr(self, name) for name in names}

    @property
    def limit(self) -> int | None:
        """The most tokens, prompt and answer together, that the model takes; None if it does not say.

        What it was made for, rope scaling included, unless ``max_length`` says otherwise.
        """
        return token_limit(self.config) if self.max_length is None else self.max_length


@dataclass(frozen=True)
class Generation:
    """What came out, and what it took.

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

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None with fewer than three new tokens."""
        return self.decode_steps / self.decode_s if self.decode_steps else None


def open_model(
    path: Path | str,
    *,
    trust_remote_code: bool = False,
    max_length: int | None = None,
    adapter: Path | str | None = None,
    rope_scaling: str | None = None,
    weights: str = "auto",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Model:
    """Read configuration and tokenizer of a local model; nothing is ever downloaded. `load` makes the network of it.

    path: a directory, a GGUF file, or a directory that holds one. A file is converted once (`gguf.converted`); on_stage
    is called with a sentence at each stage of that.
    max_length: the most tokens of prompt and answer, in place of what the configuration says.
    adapter: the directory of a PEFT adapter that changes weights (LoRA and its kind), which `load` merges into them.
    rope_scaling: as "yarn:4", a kind of `shapes.ROPE_SCALING` and a factor, for texts longer than the model was made
    for.
    weights: what `load` keeps the weights of linear layers in, as `weights.use_weights`.

    Raises ModelError if anything about it is wrong.
    """
    if weights not in FORMS:
        raise ArgumentError(f"weights={weights!r} is not one of {', '.join(FORMS)}")
    directory = Path(path)
    file = gguf_file(directory)
    if file is not None:
        directory = gguf.converted(file, on_stage)
    check_directory(directory)
    if adapter is not None:
        adapters.check(Path(adapter))
    local = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    config = _read(directory, "configuration", AutoConfig.from_pretrained, **local)
    if rope_scaling is not None:
        scale_positions(config, rope_scaling)
    tokenizer = _read(directory, "tokenizer", AutoTokenizer.from_pretrained, **local)
    return Model(
        directory,
        config,
        tokenizer,
        trust_remote_code,
        max_length,
        None if adapter is None else Path(adapter),
        rope_scaling,
        weights,
    )


def encode(
    model: Model,
    text: str,
    *,
    chat: bool = False,
    system: str | None = None,
    answer: str = "",
    new_tokens: int = 0,
    most: int | None = None,
    truncate: bool = False,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[int]:
    """Token ids of ``text``, or with ``chat`` of a user's message with that text, in the model's own template.

    system: what the model is told before the message. answer: how the answer begins; the model goes on from there.
    most: of more tokens, only so many. truncate: leave out the middle of a prompt that does not fit the model, which
    on_note is told; instructions and questions stand at the ends.
    Raises ModelError if nothing is left to read, or if the prompt and ``new_tokens`` do not fit the model.
    """
    tokenizer = model.tokenizer
    if chat and not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template; leave out --chat")
    if chat:
        message = [] if system is None else [{"role": "system", "content": system}]
        message.append({"role": "user", "content": text})
        try:
            with _time_limit(TEMPLATE_SECONDS):
                prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        except _TimeIsUpError:
            raise ModelError(
                f"{model.directory}: the chat template fails: it was not done after {TEMPLATE_SECONDS} seconds"
            ) from None
        except Exception as error:  # a template is a program: it may fail in any way
            raise ModelError(f"{model.directory}: the chat template fails: {_one_line(error)}") from error
    else:
        prompt = text
    # A prompt may be longer than the tokenizer's own idea of a limit; the model's is checked below.
    ids = tokenizer(prompt + answer, add_special_tokens=not chat, verbose=False)["input_ids"][:most]
    if not ids or not text:
        raise ModelError("the prompt is empty")
    if model.limit is not None and len(ids) + new_tokens > model.limit:
        kept = model.limit - new_tokens
        if not truncate or kept < 1:
            raise ModelError(
                f"the prompt has {len(ids)} tokens and {new_tokens} are to be generated, "
                f"but the model's limit is {model.limit} tokens (max_length overrules it)"
            )
        on_note(f"{counted(len(ids) - kept, 'token')} in the middle of the prompt do not fit the model, left out.")
        ids = ids[: kept - kept // 2] + ids[len(ids) - kept // 2 :]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    if max(ids) >= vocabulary:
        raise ModelError(
            f"{model.directory}: the tokenizer makes token {max(ids)}, but the model knows {vocabulary} tokens"
        )
    return list(ids)


def encode_in_two(
    model: Model, context: str, question: str, *, chat: bool = False, answer: str = "", new_tokens: int = 0
) -> tuple[list[int], list[int]]:
    """The token ids of ``context + question`` as `encode` makes them, cut where the question begins.

    A token that reaches from one into the other belongs to the second part, and so does all that follows.
    """
    ids = encode(model, context + question, chat=chat, answer=answer, new_tokens=new_tokens)
    alone = encode(model, context, chat=chat)
    same = (i for i, (token, other) in enumerate(zip(ids, alone, strict=False)) if token != other)
    cut = next(same, min(len(ids), len(alone)))
    return ids[:cut], ids[cut:]


def load(model: Model, *, dtype: str = "auto", ranks: int = 1) -> Any:
    """The network in evaluation mode, its weights read from safetensors files.

    dtype: one of `DTYPES`; "auto" is what the weights are stored in. ranks: processes of the default group of
    torch.distributed that share the weights (tensor parallel), of which this is one.
    Raises ModelError if weights are damaged or missing, MemoryError if they do not fit.
    """
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    if ranks > 1:
        _check_split(model, ranks)
    size = sum(path.stat().st_size for path in model.directory.glob("*.safetensors"))
    free = machine.free_memory()
    if size > free:
        raise InsufficientMemoryError(
            f"{model.directory}: the weights take {size / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
        )
    try:
        network, report = _read(
            model.directory,
            "weights",
            AutoModelForCausalLM.from_pretrained,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=model.trust_remote_code,
            **({} if model.rope_scaling is None else {"config": model.config}),
            **({} if ranks == 1 else {"distributed_config": DistributedConfig(tp_size=ranks)}),
        )
    except ModelError as error:
        # transformers refers to a table of its own, which is not shown.
        if isinstance(error.__cause__, RuntimeError) and (difference := _other_shape(model)):
            raise ModelError(f"{model.directory}: {difference}") from error
        raise
    # transformers would fill them with random numbers and only log it
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{model.directory}: {len(missing)} weights are missing, the first is {missing[0]}")
    if model.adapter is not None:
        network = adapters.merged(network, model.adapter)
    # Of several ranks, each has parts of matrices, which torch knows how to multiply.
    return use_weights(network.eval(), model.weights) if ranks == 1 else network.eval()


def _check_split(model: Model, ranks: int) -> None:
    if model.adapter is not None:
        raise ArgumentError(f"adapter={model.adapter}: merge it first; {ranks} processes cannot")
    if model.weights != "auto":
        raise ArgumentError(f"weights={model.weights!r}: {ranks} processes share weights as they are stored; auto does")
    for shape in layer_shapes(model.config, Config()):
        if shape.kv_heads % ranks:
            raise ArgumentError(f"{ranks} ranks cannot share {shape.kv_heads} kv heads; their number must divide them")


def silence_transformers() -> None:
    """Warnings and progress bars of its own would stand among what a command shows."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def generate(
    network: Any,
    tokenizer: Any,
    ids: list[int],
    config: Config,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    chunk: int = 1024,
    max_length: int | None = None,
    on_prefill: Callable[[int], None] = lambda tokens: None,
    on_text: Callable[[str], None] = lambda text: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Generation:
    """Generate from the prompt ``ids``; temperature 0 is greedy.

    What the model's generation_config.json says is heeded, but for `OVERRULED`; on_note is called with a sentence if
    that makes a difference, and with one of `advice` if the samples say that they are bad.
    Raises ModelError for settings in it that transformers refuses.

    stop: texts that end the answer and are no part of it; those in generation_config.json, which also end it, are.
    chunk: the prompt is read this many tokens at a time. max_length: as in `attach`.
    on_prefill is called with the number of prompt tokens read by each chunk, on_text with every piece of new text.
    """
    attach(network, config, max_length=max_length)
    watch = _Watch(tokenizer, on_text, stop)
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
            _finite(network),
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
                **sampling,
            )
    finally:
        hook.remove()
    times, report = watch.times, cache_of(output).report()
    if (said := advice(report.layers, config)) is not None:
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
    )


@torch.inference_mode()
def fill(
    network: Any,
    ids: list[int],
    cache: MagicPigCache,
    *,
    chunk: int = 1024,
    on_chunk: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Feed ``ids``, at least one, to an attached network, ``chunk`` at a time, for what ``cache`` then holds of them.

    on_chunk is called with the number of tokens of each chunk.
    """
    with cache.filling():
        tokens = torch.tensor([ids], device=network.device, dtype=torch.int64)
        for piece in tokens.split(even_chunk(len(ids), chunk), 1):
            _forward(network, piece, cache)
            on_chunk(piece.shape[1])


@torch.inference_mode()
def read(
    network: Any,
    ids: list[int],
    cache: MagicPigCache,
    *,
    chunk: int = 1024,
    on_chunk: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """As `fill`, for the logits of the next token, (vocabulary,); ``cache`` says how it attends."""
    last = len(ids) - even_chunk(len(ids), chunk)
    if last > 0:
        fill(network, ids[:last], cache, chunk=chunk, on_chunk=on_chunk)
    logits = _forward(network, torch.tensor([ids[max(0, last) :]], device=network.device, dtype=torch.int64), cache)
    on_chunk(len(ids) - max(0, last))
    return logits


def _forward(network: Any, ids: Tensor, cache: MagicPigCache) -> Tensor:
    only_last = {"logits_to_keep": 1} if network._supports_logits_to_keep() else {}
    with _finite(network):
        logits: Tensor = network(ids, **cache_argument(cache), **only_last).logits[0, -1]
    return logits


def greedy(
    network: Any, logits: Tensor, cache: MagicPigCache, *, max_new_tokens: int, stop: Collection[int]
) -> list[int]:
    """The likeliest token of ``logits`` and those that follow it, up to ``max_new_tokens`` or the first in ``stop``."""
    ids = [int(logits.argmax())]
    while len(ids) < max_new_tokens and ids[-1] not in stop:
        ids.append(int(read(network, ids[-1:], cache).argmax()))
    return ids


def stop_tokens(model: Model, network: Any) -> frozenset[int]:
    """The tokens that end an answer: what the model's generation settings say, else the tokenizer's end of text."""
    try:
        return end_tokens(model.tokenizer, network)
    except ModelError as error:
        raise ModelError(f"{model.directory}: {error}") from None


def end_tokens(tokenizer: Any, network: Any) -> frozenset[int]:
    """As `stop_tokens`, for a model that was not opened from a directory."""
    stop = network.generation_config.eos_token_id
    stop = tokenizer.eos_token_id if stop is None else stop
    tokens = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if not all(isinstance(token, int) for token in tokens):
        raise ModelError(f"eos_token_id={shown(stop)}: must be a token or a list of tokens")
    return frozenset(tokens)


def even_chunk(tokens: int, chunk: int) -> int:
    """A chunk size near ``chunk`` that leaves no small rest: a few tokens alone would be taken for decoding."""
    return math.ceil(tokens / math.ceil(tokens / chunk))


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


@contextmanager
def _finite(network: Any) -> Iterator[None]:
    """Blame the model where the store refuses what it computes."""
    try:
        yield
    except NotFiniteError as error:
        raise ModelError(
            f"the model computes {error}; its weights or its dtype {network.dtype} may be at fault"
        ) from error


def _pad_token(network: Any) -> int:
    # Nothing is ever padded here, but without one transformers warns.
    pad = network.generation_config.pad_token_id
    return 0 if pad is None else pad


def _other_shape(model: Model) -> str | None:
    """The first weight whose shape is not what the configuration asks for; None where names do not tell."""
    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(model.config, trust_remote_code=model.trust_remote_code).state_dict()
    for path in sorted(model.directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dictionary
                there = file.get_slice(name).get_shape()
                if name in wanted and there != list(wanted[name].shape):
                    asked = list(wanted[name].shape)
                    return f"the weights have {name} with shape {there}, the configuration asks for {asked}"
    return None


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
        raise ModelError(f"generation_config.json ({', '.join(own)}): {_one_line(error)}") from error


class _TimeIsUpError(Exception):
    """Raised by a signal."""


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raises _TimeIsUpError in what takes longer. Only where signals arrive: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _TimeIsUpError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _read(directory: Path, what: str, reader: Callable[..., Any], **options: Any) -> Any:
    try:
        return reader(directory, **options)
    except MemoryError:
        raise
    except Exception as error:
        if not options["trust_remote_code"] and brings_code(directory):
            raise ModelError(
                f"{directory}: cannot read the {what}: {_one_line(error)}; the directory brings Python code of its "
                "own, which runs only with --trust-remote-code"
            ) from None
        # Broken files surface as many types, down to plain Exception; whatever it is, it is about this directory.
        raise ModelError(f"{directory}: cannot read the {what}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return printable(str(error) or type(error).__name__, 200)
