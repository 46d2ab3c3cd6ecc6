"""A `MagicPigCache` in a file: a prompt that has been read once serves other processes.

The file is as store/disk.py says. Its manifest has the identity of the model, whose keys these are, the settings, and
a hash of every stride of tokens, if these were given.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from magicpig.config import Config
from magicpig.errors import ArgumentError
from magicpig.integrations.transformers.compat import Cache
from magicpig.integrations.transformers.layer import MagicPigLayer
from magicpig.kernels.arena import UNLIMITED, Arena
from magicpig.store.blocks import Block
from magicpig.store.disk import StoreFileError, pack, read_tensors, token_chain, unpack, write_tensors

Made = TypeVar("Made", bound=Cache)

FORMAT = "magicpig.cache"
VERSION = 1
SAMPLES = 64  # numbers of each parameter that make a model's identity
# Of a model's configuration, what does not change what it computes.
_UNSAID = (
    "_name_or_path",
    "transformers_version",
    "_attn_implementation",
    "_attn_implementation_internal",
    "use_cache",
)


class WrongModelError(StoreFileError):
    """A file of keys and values of another model."""

    code = "wrong_model"


class WrongTokensError(StoreFileError):
    """A file of keys and values of another text."""

    code = "wrong_tokens"


def identity(model: PreTrainedModel) -> dict[str, str]:
    """What tells a model from others: hashes of its configuration, and of some numbers of every parameter."""
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _UNSAID}
    weights = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        count = min(SAMPLES, len(flat))
        at = torch.linspace(0, len(flat) - 1, count, dtype=torch.float64, device="cpu").long().to(flat.device)
        weights.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        weights.update(flat[at].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    text = json.dumps(settings, sort_keys=True, default=str)
    return {
        "type": str(model.config.model_type),
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "weights": weights.hexdigest(),
    }


def save(cache: Cache, config: Config, path: Path | str, model: PreTrainedModel, tokens: Any = None) -> None:
    """See `MagicPigCache.save`."""
    tensors: dict[str, Tensor] = {}
    seen: dict[Any, str] = {}
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(cache.layers):
        own: Any = layer
        if not own.is_initialized:
            layers.append({"kind": "empty"})
        elif hasattr(own, "stores"):
            own.check_attended()
            stores = [pack(store, f"{index}.{row}", tensors, seen) for row, store in enumerate(own.stores)]
            if own.real is not None:
                tensors[f"{index}.real"] = own.real
            layers.append(
                {"kind": "stores", "stores": stores, "positions": own.positions, "query_heads": own.query_heads}
            )
        else:  # a stock layer, of sliding attention
            tensors |= {f"{index}.{part}": getattr(own, part).detach().cpu() for part in ("keys", "values")}
            layers.append({"kind": "window", "seen": own.get_seq_length()})
    manifest = {
        "version": VERSION,
        "model": identity(model),
        "config": config.model_dump(mode="json"),
        "layers": layers,
        "tokens": None if tokens is None else _chains(tokens, cache, config.block),
    }
    write_tensors(path, FORMAT, manifest, tensors)


def load(
    make: Callable[[Config], Made],
    path: Path | str,
    model: PreTrainedModel,
    tokens: Any = None,
    arena: Arena = UNLIMITED,
) -> Made:
    """See `MagicPigCache.load`. make: an empty cache of these settings."""
    manifest, tensors = read_tensors(path, FORMAT)
    if manifest["version"] != VERSION:
        raise StoreFileError(f"{path}: version {manifest['version']} of the format; this package reads {VERSION}")
    own = identity(model)
    differ = [name for name in own if own[name] != manifest["model"][name]]
    if differ:
        raise WrongModelError(
            f"{path}: has keys and values of another model than the {own['type']} at hand (other {', '.join(differ)})"
        )
    config = Config(**manifest["config"])
    cache = make(config)
    blocks: dict[str, Block] = {}
    for index, (layer, packed) in enumerate(zip(cache.layers, manifest["layers"], strict=True)):
        if packed["kind"] == "stores":
            _fill(layer, index, packed, tensors, arena, blocks)
        elif packed["kind"] == "window":
            keys, values = (tensors[f"{index}.{part}"].to(model.device, copy=True) for part in ("keys", "values"))
            stock: Any = layer
            stock.lazy_initialization(keys, values)
            stock.keys, stock.values, stock.cumulative_length = keys, values, packed["seen"]
    if tokens is not None:
        _compare(path, manifest["tokens"], _chains(tokens, cache, config.block), config.block)
    return cache


def _fill(
    layer: Any, index: int, packed: dict[str, Any], tensors: dict[str, Tensor], arena: Arena, blocks: dict[str, Block]
) -> None:
    own: MagicPigLayer = layer
    stores = [unpack(each, f"{index}.{row}", tensors, arena, blocks) for row, each in enumerate(packed["stores"])]
    real = tensors.get(f"{index}.real")
    own.restore(stores, packed["positions"], packed["query_heads"], None if real is None else real.clone())


def _chains(tokens: Any, cache: Cache, stride: int) -> list[list[str]]:
    """The hashes of each sequence's tokens, (B, positions) or of one sequence (positions,), without padding."""
    ids = torch.as_tensor(tokens, dtype=torch.int64, device="cpu")
    ids = ids[None] if ids.ndim == 1 else ids
    layer: Any = next((layer for layer in cache.layers if hasattr(layer, "stores")), None)
    rows = len(layer.stores) if layer is not None else len(ids)
    positions = layer.positions if layer is not None else ids.shape[1]
    if ids.shape != (rows, positions):
        raise ArgumentError(
            f"tokens has shape {tuple(ids.shape)}; expected ({rows}, {positions}), what the cache holds"
        )
    real = torch.ones_like(ids, dtype=torch.bool) if layer is None or layer.real is None else layer.real
    return [token_chain(own[kept].tolist(), stride) for own, kept in zip(ids, real, strict=True)]


def _compare(
    path: Path | str, saved: Sequence[Sequence[str]] | None, given: Sequence[Sequence[str]], stride: int
) -> None:
    if saved is None:
        raise WrongTokensError(f"{path}: was saved without its tokens, so they cannot be compared")
    for row, (ours, theirs) in enumerate(zip(saved, given, strict=True)):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if a != b:
                raise WrongTokensError(
                    f"{path}: sequence {row} has other tokens from position {i * stride} on, or near"
                )
