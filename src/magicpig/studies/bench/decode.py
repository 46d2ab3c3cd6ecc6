"""Tokens per second of `model.generate`, for models of real shapes whose long prompt nobody has to read.

Weights are random, keys and values made up (synthetic.py) and put straight into the stores, the same in every layer:
the time of a token depends on neither. Queries are what random weights make of random words; they hash like others, so
about as many keys are sampled as of a trained model. Nothing is said of quality, and prefill is never timed.

Where memory allows, all samplers take turns in one process; otherwise each takes turns with full attention, by this
library's exact kernel. Caches of one kind of rows are forks of one, so what none of them changes is there once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from magicpig.config import EXACT, Config, KVDtype
from magicpig.integrations.transformers import MagicPigCache, attach
from magicpig.integrations.transformers.compat import cache_argument
from magicpig.integrations.transformers.layer import MagicPigLayer
from magicpig.integrations.transformers.shapes import layer_shapes
from magicpig.kernels import library
from magicpig.kernels.base import BLOCK_ROWS
from magicpig.machine import free_memory
from magicpig.store.planner import plan
from magicpig.studies.bench.clocks import PARTS, Clocks
from magicpig.studies.bench.layer import indexing_s
from magicpig.studies.bench.quiet import Quiet
from magicpig.studies.bench.shapes import settings
from magicpig.studies.bench.synthetic import synthetic_context
from magicpig.studies.evaluation.matrix import Method
from magicpig.studies.provenance import provenance
from magicpig.weights import use_weights

_NOISE = 1 << 20  # random numbers that are made; matrices repeat them
_COMFORT = 0.75  # of the free memory, which other programs use, too


@dataclass(frozen=True)
class Result:
    """One context, batch and sampler. Milliseconds per step, which is a token of each request of the batch.

    The parts are medians and add up to about token_ms. tokens_per_s: of all requests together. token_ms: median
    without indexing, plus index_ms; ratio_full: how many times as long full attention takes.
    weights_ms, attention_ms, python_ms, generate_ms: see clocks.py; python_us_per_layer: of this package, without its
    native code. index_ms: of indexing a block of tokens, spread over the block. build_s: indexing the context.
    read_ms: of full attention, a plain read of all rows on all threads, below which attention_ms cannot fall.
    sampled_share: of the body, read by a head; None where nothing was sampled. calls: tokens that were timed;
    quiet_calls: those that never waited for a processor, by which times are told (quiet.py).
    """

    context: int
    name: str
    batch: int
    config: dict[str, object]
    tokens_per_s: float
    token_ms: float
    token_min_ms: float
    ratio_full: float | None
    weights_ms: float
    attention_ms: float
    read_ms: float | None
    index_ms: float
    python_ms: float
    generate_ms: float
    python_us_per_layer: float
    sampled_share: float | None
    build_s: float
    calls: int
    quiet_calls: int
    kv_bytes: int
    index_bytes: int


def model_config(name: str, layers: int | None, positions: int) -> PreTrainedConfig:
    """The configuration of a shape, for texts of ``positions`` tokens. Raises ValueError for what there is not."""
    shape = settings(name, layers)
    kind = shape.pop("model_type")
    config = AutoConfig.for_model(kind, **shape, max_position_embeddings=positions)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    return config


@torch.no_grad()
def random_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with uniform random matrices that keep activations of order one, made in seconds."""
    model: PreTrainedModel
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    noise = torch.empty(_NOISE, dtype=torch.float32, device="cpu")
    noise = noise.uniform_(-(3**0.5), 3**0.5, generator=generator).to(dtype)
    for weights in model.parameters():
        if weights.ndim == 1:  # of a norm
            weights.fill_(1.0)
            continue
        for piece in weights.view(-1).split(_NOISE):
            torch.mul(noise[: len(piece)], weights.shape[1] ** -0.5, out=piece)
    model.eval()
    return model


def describe(decoder: Decoder, shape: str, repeats: int) -> dict[str, object]:
    """Machine, software and settings: what somebody else needs to repeat the measurement."""
    return {
        **provenance(),
        "shape": shape,
        "sizes": settings(shape, decoder.layers),
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "weights": f"uniform, {_NOISE} random numbers repeated; norms 1",
        "weights_kept_in": decoder.weights,
        "repeats": repeats,
        "steps": decoder.steps,
    }


class Decoder:
    """A model of random weights that generates behind synthetic contexts, by several samplers in turns."""

    def __init__(
        self,
        name: str,
        *,
        layers: int | None,
        dtype: torch.dtype,
        longest: int,
        steps: int,
        weights: str = "auto",
    ) -> None:
        config = model_config(name, layers, longest + steps + 2)
        self.model_config, self.dtype, self.steps, self.weights = config, dtype, steps, weights
        self._model: PreTrainedModel | None = None

    @property
    def layers(self) -> int:
        return int(self.model_config.num_hidden_layers)

    def weight_bytes(self) -> int:
        """Bytes of the model's weights."""
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(self.model_config, dtype=self.dtype)
        model.tie_weights()
        return sum(weights.nbytes for weights in model.parameters())

    def check(self, context: int, methods: Sequence[Method], batch: int = 1) -> list[list[Method]]:
        """The methods as groups that memory lets take turns.

        Raises ValueError for a context that is too short, MemoryError for one that is too long.
        """
        for config in (method.config for method in methods):
            if context <= config.sinks + config.recent:
                raise ValueError(
                    f"context={context} has nothing to sample; it must exceed {config.sinks + config.recent}"
                )
        full = [method for method in methods if not method.config.samples]
        sampled = [method for method in methods if method not in full]
        shapes = layer_shapes(self.model_config, EXACT)
        fixed = 2 * context * shapes[0].kv_heads * shapes[0].head_dim * self.dtype.itemsize  # made once, then copied
        fixed += self.weight_bytes() if self._model is None else 0
        fixed += sum(self._cache_bytes(context, _exact(kv_dtype), batch) for kv_dtype in _kinds(methods))
        each = [self._cache_bytes(context, method.config, batch) for method in sampled]
        free = free_memory()
        if (needed := fixed + max(each, default=0)) > free:
            asked = f"context={context}" if batch == 1 else f"context={context} of {batch} requests"
            raise MemoryError(
                f"{asked} needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are "
                f"available; fewer layers than {self.layers} need less"
            )
        if fixed + sum(each) <= _COMFORT * free:
            return [list(methods)]
        return [[*full, method] for method in sampled]

    def _cache_bytes(self, context: int, config: Config, batch: int = 1) -> int:
        shapes, tokens = layer_shapes(self.model_config, config), context + self.steps + 2
        return plan(shapes, config, sequences=batch, tokens=tokens, dtype=self.dtype).total

    def measure(
        self,
        context: int,
        methods: Sequence[Method],
        *,
        repeats: int,
        batch: int = 1,
        beside: Sequence[Callable[[], None]] = (),
        on_round: Callable[[], None] = lambda: None,
    ) -> list[Result]:
        """Generate ``steps`` tokens ``repeats`` times by each method, in turns; one `Result` each.

        batch: requests that are answered together. beside: who else has a turn, once more than there are repeats.
        on_round is called after every answer. Raises what `check` raises, before anything is made.
        """
        groups = self.check(context, methods, batch)
        self.model()
        bases = {kv_dtype: self.filled(context, _exact(kv_dtype), batch) for kv_dtype in _kinds(methods)}
        results: dict[str, Result] = {}
        for number, group in enumerate(groups):
            others = beside if number == 0 else ()
            for result in self._in_turns(bases, group, context, repeats, others, on_round):
                results.setdefault(result.name, result)  # full attention is in every group
        return list(results.values())

    def model(self) -> PreTrainedModel:
        """The model, attached; made when it is first asked for."""
        if self._model is None:
            self._model = attach(use_weights(random_model(self.model_config, self.dtype), self.weights), EXACT)
        return self._model

    def filled(self, context: int, exact: Config, batch: int = 1) -> MagicPigCache:
        """A cache whose every sequence holds a synthetic context in every layer, indexed by nothing yet."""
        shapes = layer_shapes(self.model_config, EXACT)
        heads, D = shapes[0].kv_heads, shapes[0].head_dim
        data = synthetic_context(context - 1, heads=heads, kv_heads=heads, head_dim=D, dtype=self.dtype)
        cache = MagicPigCache(self.model_config, exact)
        for layer in _layers(cache):
            layer.lazy_initialization(*(each.expand(batch, *each.shape) for each in (data.keys, data.values)))
            for store in layer.stores:
                store.append(data.keys, data.values)
            layer.positions = context
        return cache

    def _in_turns(
        self,
        bases: dict[KVDtype, MagicPigCache],
        methods: Sequence[Method],
        context: int,
        repeats: int,
        beside: Sequence[Callable[[], None]],
        on_round: Callable[[], None],
    ) -> list[Result]:
        caches, builds = [], []
        for method in methods:
            caches.append(bases[method.config.kv_dtype].fork(method.config))
            start = time.perf_counter()
            caches[-1].settle()
            builds.append(time.perf_counter() - start)
        clocks = [Clocks() for _ in methods]
        for turn in range(repeats + 1):
            for cache, clock in zip(caches, clocks, strict=True):
                self._generate(cache, context, clock)
                if turn == 0:  # to warm up
                    clock.tokens.clear()
                    clock.waited.clear()
                else:
                    on_round()
            for other in beside:
                other()
        times = [_Times.of(clock, _index_seconds(cache)) for cache, clock in zip(caches, clocks, strict=True)]
        full = next((t.token for t, method in zip(times, methods, strict=True) if not method.config.samples), None)
        return [
            self._result(method, cache, context, each, build, full)
            for method, cache, each, build in zip(methods, caches, times, builds, strict=True)
        ]

    def _generate(self, cache: MagicPigCache, context: int, clock: Clocks) -> None:
        model = self.model()
        prompt = torch.zeros(_sequences(cache), context + 1, dtype=torch.int64, device="cpu")
        prompt[:, -1] = 1 + context % 7  # any word
        with clock.running(model):
            model.generate(  # type: ignore[operator]
                prompt,
                **cache_argument(cache),
                max_new_tokens=self.steps + 1,
                do_sample=False,
                streamer=clock,
            )
        cache.crop(context - cache.get_seq_length())

    def _result(
        self,
        method: Method,
        cache: MagicPigCache,
        context: int,
        times: _Times,
        build_s: float,
        full: float | None,
    ) -> Result:
        report = cache.report()
        return Result(
            context=context,
            name=method.name,
            batch=_sequences(cache),
            config=method.config.model_dump(mode="json"),
            tokens_per_s=_sequences(cache) / times.token,
            token_ms=1e3 * times.token,
            token_min_ms=1e3 * times.shortest,
            ratio_full=None if full is None else full / times.token,
            weights_ms=1e3 * times.parts["weights"],
            attention_ms=1e3 * times.parts["attention"],
            read_ms=None if method.config.samples else 1e3 * _read_seconds(cache),
            index_ms=1e3 * times.parts["index"],
            python_ms=1e3 * times.parts["python"],
            generate_ms=1e3 * times.parts["generate"],
            python_us_per_layer=1e6 * times.parts["python"] / self.layers,
            sampled_share=report.sampled_share_mean,
            build_s=build_s,
            calls=times.quiet.calls,
            quiet_calls=times.quiet.quiet,
            kv_bytes=report.kv_bytes,
            index_bytes=report.index_bytes,
        )


@dataclass(frozen=True)
class _Times:
    """Seconds per token: median and least of the whole, medians of the parts."""

    token: float
    shortest: float
    parts: dict[str, float]
    quiet: Quiet

    @classmethod
    def of(cls, clock: Clocks, index: float) -> _Times:
        """From a clock's tokens. Few steps index, and then a whole block: ``index`` stands for that time.

        Tokens that waited for a processor do not count, unless all did.
        """
        calm = [token for token, waited in zip(clock.tokens, clock.waited, strict=True) if not waited]
        tokens = calm or clock.tokens
        whole = [sum(token.values()) - token["index"] + index for token in tokens]
        parts = {part: statistics.median(token[part] for token in tokens) for part in PARTS}
        return cls(statistics.median(whole), min(whole), parts | {"index": index}, Quiet(len(clock.tokens), len(calm)))


def _kinds(methods: Sequence[Method]) -> set[KVDtype]:
    return {method.config.kv_dtype for method in methods}


def _exact(kv_dtype: KVDtype) -> Config:
    """Full attention over rows of this kind: what a cache is filled by before it is forked."""
    return EXACT.changed({"kv_dtype": kv_dtype})


def _layers(cache: MagicPigCache) -> list[MagicPigLayer]:
    return [layer for layer in cache.layers if isinstance(layer, MagicPigLayer)]


def _sequences(cache: MagicPigCache) -> int:
    return len(_layers(cache)[0].stores)


def _read_seconds(cache: MagicPigCache) -> float:
    """Reading the rows of all layers once, the median of three times."""
    rows = [memory.tensor for layer in _layers(cache) for store in layer.stores for memory in store.memories()[0]]
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        for each in rows:
            library.stream_read(each)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def _index_seconds(cache: MagicPigCache) -> float:
    """Per token, of all layers: indexing tokens that leave the recent window."""
    spent = 0.0
    for layer in _layers(cache):
        for store in (each.fork() for each in layer.stores if each.settled):
            some = store.blocks(0, min(BLOCK_ROWS, store.length))
            keys, values = (torch.cat(parts, 1) for parts in zip(*some, strict=True))
            spent += indexing_s(store, keys, values)
    return spent
