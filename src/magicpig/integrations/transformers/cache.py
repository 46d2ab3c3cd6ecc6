"""A transformers cache whose full-attention layers are those of layer.py: what `model.generate(cache=...)` takes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from magicpig.attention.step import Phase
from magicpig.config import Config
from magicpig.errors import ArgumentError, ArgumentTypeError, MagicPigError
from magicpig.integrations.transformers import compat, saved
from magicpig.integrations.transformers.compat import Cache
from magicpig.integrations.transformers.errors import (
    CacheMismatchError,
    CacheStateError,
    UnsupportedModelError,
)
from magicpig.integrations.transformers.layer import MagicPigLayer, layer_report, shallow
from magicpig.integrations.transformers.shapes import sizes_of
from magicpig.kernels.arena import UNLIMITED, Arena
from magicpig.placement import CPU, Placement
from magicpig.placement.choice import place_of
from magicpig.placement.device import Device
from magicpig.report import CacheReport
from magicpig.settings import DrawPolicy
from magicpig.store import KVStore

SUPPORTED_LAYERS = ("full_attention", "sliding_attention")


class MagicPigCache(Cache):
    """What `model.generate(cache=...)` and `model(cache=...)` take to attend by sampling.

    transformers before 5.24 calls the argument `past_key_values`; `generate` of an attached model takes both names.

    model_config: the model's; config: ours. Layers of sliding attention keep the stock cache of transformers.
    arena: where the memory of stores comes from, with its limit if it has one.
    device, placement: as in `magicpig.where.Where`; or a placement that is there, with its device.
    A pass of a single token is decoding, one of several is prefill, which is exact; `decoding`, `prefilling` and
    `verifying` say otherwise.
    Every sequence of the batch has a store of its own per layer, so its result does not depend on the others.
    Raises UnsupportedModelError for models with layers of any other kind; ValueError for settings of layers that the
    model has not got.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: Config | None = None,
        *,
        arena: Arena = UNLIMITED,
        device: str | Device = "cpu",
        placement: str | Placement = "auto",
    ) -> None:
        self.config = Config() if config is None else config
        if device != "cpu" or placement != "auto":
            placement = place_of(device, placement, self.config, lambda: sizes_of(model_config, self.config))
        place = CPU if isinstance(placement, str) else placement
        self._model: weakref.ref[PreTrainedModel] | None = None
        decoder = model_config.get_text_config(decoder=True)
        types, settings = compat.layer_types(decoder)
        if shared := types.count(compat.SHARED):
            raise UnsupportedModelError(
                decoder.model_type,
                f"its last {shared} layers attend to the keys of earlier ones (num_kv_shared_layers)",
            )
        if unsupported := sorted(set(types) - set(SUPPORTED_LAYERS)):
            raise UnsupportedModelError(decoder.model_type, f"it has layers of type {', '.join(unsupported)}")
        for index in self.config.layers:
            if index >= len(types):
                raise ArgumentError(f"layers.{index}: the model has layers 0 to {len(types) - 1}")
            if types[index] != "full_attention":
                raise ArgumentError(f"layers.{index}: the layer attends to a sliding window, of which all is read")
        layers: list[Any] = [
            MagicPigLayer(self.config.of_layer(index), index, arena, place)
            if kind == "full_attention"
            else compat.new_layer(kind, kw)
            for index, (kind, kw) in enumerate(zip(types, settings, strict=True))
        ]
        super().__init__(layers=layers)
        if own := self._own():
            own[-1].last = True

    # The store is no business of torch.compile, here and in the attention function.
    @compat.opaque
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx >= len(self.layers):
            raise CacheMismatchError(
                f"the cache is of another model: it has {len(self.layers)} layers, the model at least {layer_idx + 1}"
            )
        first: Any = self.layers[0]
        layer: Any = self.layers[layer_idx]
        states = layer.update(key_states, value_states, *args, **kwargs)
        if layer.get_seq_length() != first.get_seq_length():
            raise CacheStateError(
                f"layers 0 and {layer_idx} have not seen the same tokens: a forward pass was interrupted; "
                "use a new MagicPigCache"
            )
        return states

    def fork(self, config: Config | None = None) -> MagicPigCache:
        """A cache that holds the same tokens and goes its own way; the two share memory until one of them writes.

        config: how the new cache attends, if not as this one: one prompt, read once, then serves many settings. Indexes
        are kept where they do not depend on what has changed, and otherwise built anew. A ValueError where the rows
        depend on it: for another kv_dtype, and for int8 rows another block or centre.
        The report of the new cache counts what it reads itself.
        """
        other = shallow(self)
        other.config = self.config if config is None else config
        other.layers = [
            # Stock layers replace their tensors and never write into them.
            layer.fork(config and config.of_layer(index)) if isinstance(layer, MagicPigLayer) else copy.copy(layer)
            for index, layer in enumerate(self.layers)
        ]
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> MagicPigCache:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ArgumentTypeError(
            "a MagicPigCache cannot be pickled; fork() or copy.deepcopy makes a copy in this process, save() "
            "and load() bring it to another"
        )

    def settle(self) -> None:
        """Indexes now what the next decode step would index."""
        for layer in self._own():
            layer.place.rest()
            for store in layer.stores:
                store.settle()

    @property
    def samples(self) -> bool:
        """Whether the next decode step samples in some layer."""
        stores = self._stores()
        return any(store.policy.index_end(store.length + 1, store.spec.stride) > 0 for store in stores)

    def draw_by(self, policy: DrawPolicy, sequence: int | None = None) -> None:
        """From the next step on, one sequence of the batch, or all of them, draws by other settings."""
        for layer in self._own():
            for row, store in enumerate(layer.stores):
                if sequence is None or row == sequence:
                    store.draw = policy

    @property
    def errors(self) -> dict[int, MagicPigError]:
        """Sequences of the batch that have failed, and why. Their outputs are NaN; the others are served."""
        found: dict[int, MagicPigError] = {}
        for layer in self._own():
            found = layer.errors | found
        return found

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Inside, passes of several tokens are decoded, too: one by one, each over an index of those before it.

        So does a server that has read a document before the question comes.
        """
        with self._phase(Phase.DECODE):
            yield

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        """Inside, passes of a single token are prefill, too: exact."""
        with self._phase(Phase.PREFILL):
            yield

    @contextmanager
    def verifying(self) -> Iterator[None]:
        """Inside, passes attend exactly, each token to the bit as in a pass of its own without a sampler."""
        with self._phase(Phase.VERIFY):
            yield

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Inside, passes only fill the cache: what the model returns means nothing.

        Only that depends on the attention of the last layer, which therefore stores its tokens and computes nothing.
        """
        with self._phase(Phase.PREFILL, last=Phase.STORE):
            yield

    @contextmanager
    def _phase(self, phase: Phase, last: Phase | None = None) -> Iterator[None]:
        before = [(layer, layer.phase) for layer in self._own()]
        for layer, _ in before:
            layer.phase = last if last is not None and layer is self.layers[-1] else phase
        try:
            yield
        finally:
            for layer, own in before:
                layer.phase = own

    def remember(self, model: PreTrainedModel) -> None:
        """Notes whose keys and values these are, for `save`."""
        self._model = weakref.ref(model)

    def save(self, path: Path | str, *, model: PreTrainedModel | None = None, tokens: Any = None) -> None:
        """Writes what the cache holds to a file, which appears whole or not at all.

        model: whose keys these are; may be left out where a call of `generate` on an attached model has filled the
        cache. tokens: ids (B, positions) of what it holds, for `load` to compare.
        Raises ArgumentError where the model is not known or tokens do not fit, and OSError.
        """
        model = self._model() if model is None and self._model is not None else model
        if model is None:
            raise ArgumentError("the cache does not know its model; say cache.save(path, model=model)")
        if self.errors:
            raise ArgumentError(
                f"sequences {sorted(self.errors)} of the batch have failed; there is nothing to save of them"
            )
        saved.save(self, self.config, path, model, tokens)

    @classmethod
    def load(
        cls, path: Path | str, model: PreTrainedModel, *, tokens: Any = None, arena: Arena = UNLIMITED
    ) -> MagicPigCache:
        """The cache that `save` wrote, for the same model. Rows stay in the file until something is written to them.

        tokens: ids (B, positions), to make sure that it holds these. To go on by other settings, fork it.
        Raises StoreFileError where there is no such file, DamagedFileError where it has changed or lost its end,
        WrongModelError and WrongTokensError; all of them are ValueErrors.
        """
        cache = saved.load(lambda config: cls(model.config, config, arena=arena), path, model, tokens, arena)
        cache.remember(model)
        return cache

    def _own(self) -> list[MagicPigLayer]:
        return [layer for layer in self.layers if isinstance(layer, MagicPigLayer)]

    def _stores(self) -> list[KVStore]:
        return [store for layer in self._own() for store in layer.stores]

    def report(self) -> CacheReport:
        """What the cache holds, and what decoding has read so far."""
        return CacheReport(tuple(layer_report(index, layer) for index, layer in enumerate(self.layers)))
