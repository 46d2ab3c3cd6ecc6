"""Attention over plain tensors for one step: for researchers, notebooks and tests. Nothing is kept between calls."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from magicpig.attention.step import attend_stores, step_info
from magicpig.config import Config, KVDtype, SamplerName
from magicpig.errors import ArgumentError, ArgumentTypeError, NotFiniteError
from magicpig.kernels import algorithm, base, library
from magicpig.kernels.rows.reference import from_bytes, to_bytes
from magicpig.samplers import Context, sampler_of
from magicpig.settings import DrawPolicy, IndexSpec, Policy
from magicpig.store import KVStore
from magicpig.types import StepInfo


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    sampler: SamplerName | None = None,
    budget: float = 512,
    candidates: float | None = None,
    bits: int = 2,
    epsilon: float | None = None,
    centre: bool = True,
    kv_dtype: KVDtype = "model",
    K: int | None = None,
    L: int | None = None,
    min_hits: int | None = None,
    seed: int = 0,
    sinks: int = 4,
    recent: int = 64,
    block: int = 256,
    scale: float | None = None,
    softcap: float | None = None,
    kernels: Literal["cpu", "reference"] | None = None,
) -> tuple[Tensor, Tensor, StepInfo]:
    """Attention of one new token over N keys, exact (`sampler="full"`) or from a sample (MagicPIG, arXiv 2410.16179).

    "sketch", the default, draws `candidates` by what a few `bits` of each coordinate say of their logits, and of these
    by their logits a `budget` of rows; "lsh", the default where K, L or min_hits is given, is the paper's sampler. The
    others, with a `budget` too, are there for comparison: docs/algorithm.md.

    query: (B, H, 1, D); keys, values: (B, G, N, D) with H a multiple of G; float32, bfloat16, float16 or float64, CPU.
    Settings are those of `Config`; scale defaults to 1 / sqrt(D). There is no length below which sampling is left out.
    kernels: "cpu", or "reference" for the plain PyTorch specification (the default for float64).

    Returns output (B, H, 1, D) in the query's dtype; lse (B, H), natural log of the (estimated) softmax denominator;
    and info, whose ids[b][h] are the sampled positions, log_u[b][h] their log inclusion probabilities, and rows (B, G)
    the number of distinct sampled rows per kv head. The first `sinks` and last `recent` tokens are always read, as are
    those before them that do not fill a `block`, a power of two: they are in none of them. predicted_error (B, H) is
    the relative error of the output that the sample lets expect.
    Raises ArgumentError, a ValueError, on bad shapes, dtypes, layouts, devices, settings, and where a gradient is asked
    for; NotFiniteError, one too, where inputs, logits or sums of values are not finite.
    """
    chosen = {"sampler": sampler, "K": K, "L": L, "min_hits": min_hits}
    config = Config(
        **{name: setting for name, setting in chosen.items() if setting is not None},
        budget=budget,
        candidates=candidates,
        bits=bits,
        epsilon=epsilon,
        centre=centre,
        kv_dtype=kv_dtype,
        seed=seed,
        sinks=sinks,
        recent=recent,
        block=block,
        exact_below=0,
    )
    scale = _check(query, keys, values, scale)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ArgumentError(f"softcap={softcap} must be positive and finite")
    if kernels is None:
        kernels = "reference" if query.dtype == torch.float64 else "cpu"
    if kernels == "reference":
        return _attend_reference(query, keys, values, config, scale, softcap)
    if kernels != "cpu":
        raise ArgumentError(f"kernels={kernels!r} is not one of 'cpu', 'reference'")
    stores = []
    for b in range(len(keys)):
        store = KVStore(keys.shape[1], keys.shape[3], keys.dtype, config, sampled=True)
        store.append(keys[b], values[b])
        store.settle()
        stores.append(store)
    state, info = attend_stores(query[:, :, 0], stores, scale=scale, softcap=softcap)
    # Their sum, before it is divided by that of the weights, may not fit where each of them does.
    if not bool(state.output.isfinite().all()):
        largest = float(values.abs().amax())
        raise NotFiniteError(f"values of up to {largest:.3g} have a weighted sum that float32 does not hold")
    return state.output[:, :, None], state.lse, info


def _attend_reference(
    query: Tensor, keys: Tensor, values: Tensor, config: Config, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, StepInfo]:
    (_, _, N, D), states, samples, errors = keys.shape, [], [], []
    sampler, policy = sampler_of(IndexSpec.of(config), D), Policy.of(config, sampled=config.samples)
    end = policy.index_end(N, config.block)
    for q, k, v in zip(query[:, :, 0], keys, values, strict=True):
        if config.kv_dtype == "int8":
            k, v = _as_kept(k, config, centred=config.centre), _as_kept(v, config, centred=False)
        if end == 0:
            state, drawn = (
                algorithm.attend_full(q, k, v, scale=scale, softcap=softcap),
                [algorithm.no_sample()] * len(q),
            )
            error = torch.zeros_like(state.lse)
        else:
            context = Context(config.sinks, end, N, layer=0, first_head=0, scale=scale, softcap=softcap)
            state, drawn = sampler.reference(q, k, v, DrawPolicy.of(config), context)
            error = algorithm.predicted_errors(state, drawn, q, k, v, scale=scale, softcap=softcap)
        states.append(state)
        samples.append(drawn)
        errors.append(torch.full_like(error, math.nan) if sampler.chooses and end else error)
    output = torch.stack([state.output for state in states])[:, :, None].to(query.dtype)
    info = step_info(samples, torch.stack(errors), keys.shape[1])
    return output, torch.stack([state.lse for state in states]), info


def _as_kept(x: Tensor, config: Config, *, centred: bool) -> Tensor:
    """Keys or values (G, N, D) after a store has rounded their whole strides to whole numbers."""
    x = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    kept = x.shape[1] // config.block * config.block
    for rows in x[:, :kept].split(base.BLOCK_ROWS, 1):
        centre = rows[:, : config.block].mean(1, keepdim=True) if centred else 0.0
        rows.copy_(from_bytes(*to_bytes(rows - centre)) + centre)
    return x


def _check(query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> float:
    """Refuses what attention cannot be computed of; returns the scale."""
    library.check_threads()
    largest = {name: _largest(name, x, query) for name, x in (("query", query), ("keys", keys), ("values", values))}
    B, H, T, D = query.shape
    if B < 1 or H < 1 or D < 1:
        raise ArgumentError(f"query has shape {tuple(query.shape)}; no sequence, head or dimension may be empty")
    if T != 1:
        raise ArgumentError(f"query has shape {tuple(query.shape)}; expected (B, H, 1, D): one step at a time")
    if keys.shape[0] != B or keys.shape[3] != D or keys.shape[1] < 1 or H % keys.shape[1]:
        raise ArgumentError(
            f"keys has shape {tuple(keys.shape)}; expected ({B}, G, N, {D}) with G dividing the {H} query heads"
        )
    if values.shape != keys.shape:
        raise ArgumentError(f"values has shape {tuple(values.shape)}; expected {tuple(keys.shape)} as the keys")
    if keys.shape[2] < 1:
        raise ArgumentError("keys is empty; at least one token is needed")
    if scale is None:
        scale = D**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ArgumentTypeError(f"scale={scale!r} must be a number")
    if not math.isfinite(scale := _as_float(scale)):
        raise ArgumentError(f"scale={scale} must be finite")
    # Keys may be twice as long once they are centred.
    logit = abs(scale) * 2 * D * largest["query"] * largest["keys"]
    if not logit < torch.finfo(torch.promote_types(query.dtype, torch.float32)).max:
        raise NotFiniteError(
            f"scale={scale} with queries of up to {largest['query']:.3g} and keys of up to {largest['keys']:.3g} "
            "gives logits that are not finite"
        )
    return scale


def _as_float(number: float) -> float:
    """Of an int too large for one, an infinity."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _largest(name: str, x: Tensor, query: Tensor) -> float:
    """The largest magnitude in a checked tensor."""
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        raise ArgumentError(f"{name} is nested or {x.layout}; expected a dense tensor")
    if x.ndim != 4:
        raise ArgumentError(f"{name} has shape {tuple(x.shape)}; expected four dimensions")
    if x.dtype not in (*base.DTYPES, torch.float64):
        raise ArgumentError(f"{name} has dtype {x.dtype}; allowed: float32, bfloat16, float16, float64")
    if x.device.type != "cpu":
        raise ArgumentError(f"{name} is on {x.device}; attend reads host memory, move it to the cpu")
    if x.dtype != query.dtype:
        raise ArgumentError(f"{name} has dtype {x.dtype} and query {query.dtype}; expected the same")
    if x.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(f"{name} requires a gradient, which attend does not pass on; use {name}.detach()")
    largest = float(x.abs().amax()) if x.numel() else 0.0
    if not math.isfinite(largest):
        raise NotFiniteError(f"{name} has entries that are not finite (NaN or inf)")
    return largest
