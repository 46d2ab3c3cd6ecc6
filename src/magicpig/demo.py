"""A randomly initialised Llama reads a real document and writes on, with all keys and with a sample of them.

Reads the prompt once, exactly. From there two caches go on side by side, one exact and one sampled, given the same
tokens in turns, so that what differs between them is the attention and nothing else.
"""

from __future__ import annotations

import pydoc_data.topics
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from magicpig.config import Config
from magicpig.generation import even_chunk
from magicpig.integrations.transformers import CacheReport, MagicPigCache, attach
from magicpig.kernels import native

PROBES = 4  # steps in which the two attentions are compared layer by layer
CHUNK = 2048


@dataclass(frozen=True)
class LayerError:
    """Relative L2 error of one layer's attention output against exact attention given the same query, over heads."""

    layer: int
    kind: str
    mean: float
    max: float


@dataclass(frozen=True)
class Demo:
    """What was seen. Seconds for prefill and index, milliseconds per token for decoding (medians)."""

    document: str
    tokens: int
    new_tokens: int
    repeated: bool
    parameters: int
    dtype: str
    config: Config
    prefill_s: float
    index_s: float
    full_ms: float
    sampled_ms: float
    same_token: int
    text: str
    errors: list[LayerError]
    report: CacheReport

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.tokens / self.prefill_s


def project_text() -> tuple[str, str]:
    """A name and the text of the project's own documentation, and of Python's where that is not at hand."""
    tree = Path(__file__).resolve().parents[2]
    pages = [tree / "README.md", *sorted((tree / "docs").rglob("*.md"))] if (tree / "docs").is_dir() else []
    own = "\n".join(page.read_text(encoding="utf-8") for page in pages if page.is_file())
    own = own or str(metadata("magicpig").json.get("description", ""))
    return "the documentation of this project, then of Python", own + "".join(pydoc_data.topics.topics.values())


def build_model(dtype: torch.dtype, *, layers: int = 4, hidden: int = 512, seed: int = 0) -> Any:
    """A Llama with random weights over bytes: 8 query heads on 2 key/value heads of dimension 64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=hidden**-0.5,  # keeps the size of activations, and so logits of size 1
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor computes in it, float32 elsewhere: emulated bfloat16 is slower than float32."""
    return torch.bfloat16 if native.isa() == "avx512bf16" else torch.float32


@torch.inference_mode()
def run(
    text: str,
    document: str,
    *,
    tokens: int = 32768,
    new_tokens: int = 32,
    config: Config | None = None,
    model: Any = None,
    on_prefill: Callable[[int], None] = lambda tokens: None,
) -> Demo:
    """Read ``tokens`` bytes of ``text``, repeated if it is too short, and write ``new_tokens`` more.

    config: by default the paper's (10, 150) with layer 0 exact. on_prefill: called with the tokens of each chunk read.
    Raises ValueError if there is nothing to read or to write.
    """
    data = text.encode()
    if not data:
        raise ValueError("the document is empty")
    if tokens < 1 or new_tokens < 3:
        raise ValueError(f"tokens={tokens}, new_tokens={new_tokens}: at least 1 to read and 3 to write are needed")
    config = config or Config(dense_layers=(0,))
    model = build_model(fast_dtype()) if model is None else model
    attach(model, config)
    ids = torch.frombuffer(bytearray((data * (-(-tokens // len(data))))[:tokens]), dtype=torch.uint8).long()[None]

    sampled = MagicPigCache(model.config, config)
    start = time.perf_counter()
    for chunk in ids.split(even_chunk(tokens, CHUNK), dim=1):
        logits = model(chunk, past_key_values=sampled, logits_to_keep=1).logits
        on_prefill(chunk.shape[1])
    prefill_s = time.perf_counter() - start
    exact = _exact_copy(sampled, model)

    first = next_id = logits[:, -1:].argmax(-1)
    written, same = [first], 0
    times: dict[str, list[float]] = {"full": [], "sampled": []}
    for _ in range(new_tokens - 1):
        chosen = {}
        for name, cache in (("full", exact), ("sampled", sampled)):
            start = time.perf_counter()
            chosen[name] = model(next_id, past_key_values=cache).logits[:, -1:].argmax(-1)
            times[name].append(time.perf_counter() - start)
        next_id = chosen["sampled"]
        same += int(torch.equal(chosen["full"], next_id))
        written.append(next_id)
    full_ms, sampled_ms = (statistics.median(times[name][1:]) * 1e3 for name in ("full", "sampled"))

    return Demo(
        document=document,
        tokens=tokens,
        new_tokens=new_tokens,
        repeated=tokens > len(data),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        config=config,
        prefill_s=prefill_s,
        index_s=max(0.0, times["sampled"][0] - sampled_ms / 1e3),  # the first step builds the index
        full_ms=full_ms,
        sampled_ms=sampled_ms,
        same_token=same,
        text=bytes(torch.cat(written, 1)[0].tolist()).decode(errors="replace"),
        errors=_compare(model, sampled, exact, next_id),
        report=sampled.report(),
    )


def _exact_copy(cache: MagicPigCache, model: Any) -> MagicPigCache:
    """A cache with the same tokens that reads all of them in every step."""
    copy = MagicPigCache(model.config, Config(sampler="full"))
    layer: Any
    original: Any
    for layer, original in zip(copy.layers, cache.layers, strict=True):
        for keys, values in original.stores[0].blocks():
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.stores[0].append(keys, values)
        layer.positions = original.positions
    return copy


def _compare(model: Any, sampled: MagicPigCache, exact: MagicPigCache, next_id: Tensor) -> list[LayerError]:
    """Decode `PROBES` tokens with ``sampled``; every layer attends to ``exact`` as well, given the same input."""
    errors: list[list[Tensor]] = [[] for _ in sampled.layers]
    with _attending_twice(model, exact, errors):
        for _ in range(PROBES):
            next_id = model(next_id, past_key_values=sampled).logits[:, -1:].argmax(-1)
    return [
        LayerError(layer.layer, layer.kind, float(torch.stack(each).mean()), float(torch.stack(each).max()))
        for layer, each in zip(sampled.report().layers, errors, strict=True)
    ]


@contextmanager
def _attending_twice(model: Any, exact: MagicPigCache, errors: list[list[Tensor]]) -> Iterator[None]:
    """Collect per head how far each attention output is from that over ``exact``, for the same hidden state."""
    outputs: list[Tensor] = []

    def attend_exactly(module: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        outputs.clear()
        module.forward(*arguments, **options | {"past_key_values": exact})

    def keep_heads(module: Any, arguments: tuple[Tensor, ...]) -> None:
        outputs.append(arguments[0].double().unflatten(-1, (model.config.num_attention_heads, -1)))

    def compare(module: Any, *_: Any) -> None:
        truth, estimate = outputs
        errors[module.layer_idx].append((estimate - truth).norm(dim=-1) / truth.norm(dim=-1))

    hooks = []
    for layer in model.model.layers:
        attention = layer.self_attn
        hooks.append(attention.register_forward_pre_hook(attend_exactly, with_kwargs=True))
        hooks.append(attention.o_proj.register_forward_pre_hook(keep_heads))
        hooks.append(attention.register_forward_hook(compare))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
