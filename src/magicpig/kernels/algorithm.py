"""MagicPIG's Algorithm 1 (arXiv 2410.16179) in plain PyTorch: the specification of every faster version.

Read `attend_lsh` from top to bottom; its verbs are the folders beside this file. `attend_sketch` is the same estimator
with another sampler. They handle one query token of one request, keep no state between calls, and compute in float64 if
they are given float64.
"""

import torch
from torch import Tensor

from magicpig.collision import log_inclusion
from magicpig.errors import ArgumentError
from magicpig.kernels.attend.reference import attend, merge, predicted_error, row_logits
from magicpig.kernels.hash.reference import hash_vectors, make_planes, segment_centre
from magicpig.kernels.sketch import reference as sketch
from magicpig.kernels.tables.reference import build, lookup
from magicpig.types import AttentionState, Sample

SEGMENT_KEYS = 65536  # of one index segment, each of which has a centre of its own


def index_end(tokens: int, *, recent: int, stride: int) -> int:
    """How many of the first ``tokens`` keys are indexed: whole strides, so that ``recent`` tokens are left at least."""
    return max(0, tokens - recent) // stride * stride


def attend_lsh(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    K: int,
    L: int,
    min_hits: int,
    sinks: int,
    recent: int,
    scale: float,
    softcap: float | None = None,
    seed: int = 0,
    stride: int = 256,
    centre: bool = True,
    planes: Tensor | None = None,
) -> tuple[AttentionState, list[Sample]]:
    """Estimate attention from the keys that hashing samples, the first ``sinks``, and those that are not indexed yet.

    query   (H, D), the H = G * R query heads of one token; head h reads key/value head h // R
    keys    (G, N, D)
    values  (G, N, Dv)
    stride  keys that are indexed at once; `index_end` says how many are
    planes  (D, L * K) as from `make_planes`, which is otherwise called with ``seed``
    centre  False hashes the keys as they are, to see what centring is for

    Returns output (H, Dv) with lse (H,), and for every query head its sample: ascending positions among the N
    tokens, and their natural-log inclusion probabilities. Where no more than the sinks are indexed, attention is exact
    and the samples are empty. Raises ArgumentError if G does not divide H.
    """
    kv_heads, tokens, head_dim = keys.shape
    end = index_end(tokens, recent=recent, stride=stride)
    if end <= sinks:
        return attend_full(query, keys, values, scale=scale, softcap=softcap), [no_sample()] * len(query)
    working = torch.promote_types(query.dtype, torch.float32)
    query, keys, values = query.to(working), keys.to(working), values.to(working)
    if planes is None:
        planes = make_planes(head_dim, K, L, seed)

    states, samples = [], []
    position = torch.arange(tokens, dtype=torch.int64, device=keys.device)
    static = (position < sinks) | (position >= end)
    for group, key, value in zip(_grouped(query, kv_heads), keys, values, strict=True):
        # Keys live in a narrow cone opposite to the queries and would hardly ever collide with them.
        # Softmax does not notice when all keys move together; hashing does.
        segments = key[:end].split(SEGMENT_KEYS)
        centred = torch.cat([own - segment_centre(own, stride) if centre else own for own in segments])
        tables = build(hash_vectors(centred, planes, K), K)

        for head in group.unsqueeze(1):
            found = lookup(hash_vectors(head, planes, K)[0], *tables, min_hits)
            found = found[found >= sinks]
            log_u = log_inclusion(cosine(head, centred[found]), K, L, min_hits)
            sample = Sample(ids=found, log_u=log_u)

            exact = attend(head, key[static], value[static], scale=scale, softcap=softcap)
            sampled = attend(head, key[sample.ids], value[sample.ids], scale=scale, log_u=sample.log_u, softcap=softcap)
            states.append(merge([exact, sampled]))
            samples.append(sample)

    output = torch.cat([state.output for state in states])
    lse = torch.cat([state.lse for state in states])
    return AttentionState(output=output, lse=lse), samples


def attend_sketch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    bits: int,
    budget: int,
    candidates: int | None = None,
    sinks: int,
    recent: int,
    scale: float,
    epsilon: float | None = None,
    softcap: float | None = None,
    seed: int = 0,
    layer: int = 0,
    first_head: int = 0,
    stride: int = 256,
    centre: bool = True,
) -> tuple[AttentionState, list[Sample]]:
    """Estimate attention from ``budget`` keys per key/value head, drawn in two phases.

    ``candidates`` keys by what a sketch says of their logits; of these ``budget`` by the logits that they have. None:
    so many as the noise of the sketch asks for, see `candidates_by_noise`.

    Shapes, ``sinks``, ``recent``, ``stride`` and what is returned as in `attend_lsh`; bits of a code are 1 to 4. The
    heads of a group share one sample. With ``epsilon`` a first one of few rows says how many it takes for a relative
    error as small as that in all of them (`more_rows`), whatever the budget. Where that would be more than a quarter of
    the keys, all are read. ``layer`` and
    ``first_head``, the place of key/value head 0 among those of the model, say with ``seed`` and N what is drawn.
    """
    kv_heads, tokens, head_dim = keys.shape
    end = index_end(tokens, recent=recent, stride=stride)
    if end <= sinks:
        return attend_full(query, keys, values, scale=scale, softcap=softcap), [no_sample()] * len(query)
    working = torch.promote_types(query.dtype, torch.float32)
    query, keys, values = query.to(working), keys.to(working), values.to(working)
    rotation = sketch.make_rotation(head_dim, seed)

    states, samples = [], []
    position = torch.arange(tokens, dtype=torch.int64, device=keys.device)
    static = (position < sinks) | (position >= end)
    for g, (group, key, value) in enumerate(zip(_grouped(query, kv_heads), keys, values, strict=True)):
        body = key[:end]
        centres = sketch.stride_centres(body, stride) if centre else torch.zeros_like(body[::stride])
        codes = sketch.quantise(body - centres.repeat_interleave(stride, 0), rotation, bits)
        offset = sketch.centre_offsets(group, centres, stride, scale=scale)
        scores = sketch.score(
            *sketch.quantise_query(group, rotation), codes, scale=scale, offset=offset, softcap=softcap
        )
        weights = sketch.weigh(scores, sinks)
        exact = attend(group, key[static], value[static], scale=scale, softcap=softcap)
        noise = sketch.score_noise(group, codes.scales, bits, scale=scale, sinks=sinks)

        def logits(ids: Tensor, group: Tensor = group, key: Tensor = key) -> Tensor:
            return row_logits(group, key[ids], scale=scale, softcap=softcap)

        def start(draw: int, step: int, head: int = first_head + g) -> int:
            return sketch.start_for(seed, layer, head, tokens, draw, step)

        rows = first = sketch.first_rows(budget, epsilon)
        while True:
            everything = rows > first and rows > sketch.EXACT_SHARE * (end - sinks)
            if not everything:
                wanted = (
                    sketch.candidates_by_noise(rows, noise) if candidates is None else -(-rows * candidates // budget)
                )
                if epsilon is not None and rows == first:
                    wanted = max(wanted, sketch.FIRST_CANDIDATES * rows)
                draw = sketch.draw(weights, logits, rows, wanted, start)
                sample = Sample(ids=draw.ids, log_u=draw.log_u)
            else:
                found = torch.arange(sinks, end, dtype=torch.int64, device="cpu")
                sample = Sample(ids=found, log_u=torch.zeros(end - sinks, dtype=torch.float64, device="cpu"))
            drawn = key[sample.ids], value[sample.ids]
            sampled = attend(group, *drawn, scale=scale, log_u=sample.log_u, softcap=softcap)
            state = merge([exact, sampled])
            errors = predicted_error(state, group, *drawn, sample.log_u, scale=scale, softcap=softcap)
            if epsilon is None or everything or sketch.is_enough(float(errors.max()), epsilon, first=rows == first):
                break
            rows = sketch.more_rows(rows, draw, logits(draw.candidates), errors, epsilon)
        states.append(state)
        samples += [sample] * len(group)

    output = torch.cat([state.output for state in states])
    lse = torch.cat([state.lse for state in states])
    return AttentionState(output=output, lse=lse), samples


def no_sample(dtype: torch.dtype = torch.float64) -> Sample:
    """Of a head that draws nothing, as all it attends to is read."""
    return Sample(
        ids=torch.empty(0, dtype=torch.int64, device="cpu"),
        log_u=torch.empty(0, dtype=dtype, device="cpu"),
    )


def predicted_errors(
    state: AttentionState,
    samples: list[Sample],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """What the samples behind a state say of its error: (H,), see `predicted_error`.

    Of heads that left out keys: a sample of nothing says nothing, also where there was nothing to draw from.
    """
    errors, group = [], len(query) // len(keys)
    for h, sample in enumerate(samples):
        own = AttentionState(state.output[h : h + 1], state.lse[h : h + 1])
        rows = keys[h // group, sample.ids], values[h // group, sample.ids]
        errors.append(predicted_error(own, query[h : h + 1], *rows, sample.log_u, scale=scale, softcap=softcap))
    return torch.cat(errors)


def attend_full(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, softcap: float | None = None
) -> AttentionState:
    """Exact attention: query (H, D), keys (G, N, D), values (G, N, Dv) to output (H, Dv) and lse (H,)."""
    groups = _grouped(query, len(keys))
    states = [
        attend(group, key, value, scale=scale, softcap=softcap)
        for group, key, value in zip(groups, keys, values, strict=True)
    ]
    return AttentionState(
        output=torch.cat([state.output for state in states]),
        lse=torch.cat([state.lse for state in states]),
    )


def cosine(query: Tensor, keys: Tensor) -> Tensor:
    """Cosine between ``query`` (1, D) and each of ``keys`` (n, D); 0 where either is zero.

    The code of a zero vector is 0, which others share with probability 2**-K, as if at right angles to it.
    """
    return _unit(keys) @ _unit(query)[0]


def _unit(vectors: Tensor) -> Tensor:
    lengths = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(lengths > 0, lengths, 1.0)


def _grouped(query: Tensor, kv_heads: int) -> Tensor:
    if len(query) % kv_heads:
        raise ArgumentError(f"query must have a multiple of the {kv_heads} key/value heads, got {len(query)}")
    return query.reshape(kv_heads, -1, query.shape[-1])
