"""Sketches in plain PyTorch: keys -> codes -> scores -> weights -> a sample with known probabilities, in two phases.

Knows one key/value head and the R query heads that share it; does not know what a value is. Rounding happens in one
place, where weights become whole numbers. From there on everything is integer arithmetic, so that the same weights give
the same sample whatever the instruction set, the threads, or the language.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Distance between neighbouring levels of the uniform quantiser with the least squared error for a normal deviate
# (Max 1960, "Quantizing for minimum distortion", table II). At 2 bits it errs by 1 % more than the best levels of any
# spacing, and its codes are numbers: a score is a product of integers, without look-ups.
LEVEL_DISTANCE = {1: 1.5956, 2: 0.9957, 3: 0.5860, 4: 0.3352}

# What a level misses of a coordinate, the mean of its square over the square of the key's scale.
LEVEL_NOISE = {1: 0.5708, 2: 0.4795, 3: 0.4361, 4: 0.4109}

# Candidates for two rows, by the noise of a score up to which they do: see score_noise and docs/decisions/0022.
CANDIDATES = ((0.3, 2), (0.7, 3), (0.95, 4), (1.3, 6), (1.8, 8), (2.5, 12))
MOST_CANDIDATES = 16

FLOOR = 0.05  # share of the weight that all keys get alike, so that no key a query overlooked can weigh too much
WEIGHT_BITS = 30  # all weights together are about 2**30
MOST_BITS = 27  # no weight is more than 2**27 above the floor: sixteen of them fit 32 bits
WIDEST = 2**18  # octaves between the scores of a head and zero; of larger ones an octave becomes several
PILOT_KEYS, PILOT_BLOCKS, PILOT_APART = 64, 32, 16  # see pilot
EXACT_SHARE = 0.25  # of the keys: a larger sample would hardly be read faster than all of them, and they are exact
WALK_GROUP = 16  # keys that are walked along together

# With an epsilon: rows of the first draw, candidates for each of these, what of epsilon the next draw is meant to
# predict, and what it may predict, as a prediction is an estimate itself.
FIRST_ROWS, FIRST_CANDIDATES = 64, 4
AIM, SLACK = 0.85, 1.1
FINEST = 160  # eighths of an octave by which a step may become smaller
_MASK = (1 << 64) - 1


class Sketch(NamedTuple):
    """n keys of one head, each minus its centre: key i is about ``scales[i] * levels[i] @ rotation.T``."""

    levels: Tensor
    """int64 (n, D), odd numbers from 1 - 2**bits to 2**bits - 1; a code is (level + 2**bits - 1) / 2."""
    scales: Tensor
    """(n,), values of a float16."""


def make_rotation(head_dim: int, seed: int) -> Tensor:
    """Draw a random orthogonal matrix: float32 (D, D), uniform over all rotations and reflections.

    The QR decomposition of normal deviates, with the signs that make it unique (Mezzadri, arXiv math-ph/0609050).
    """
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64, device="cpu"))
    rotation: Tensor = (q * r.diagonal().sign()).to(torch.float32)
    return rotation


def stride_centres(keys: Tensor, stride: int) -> Tensor:
    """The centres (n / stride, D) around which ``keys`` (n, D) are sketched: the mean of each ``stride`` of them.

    They have bfloat16 values: half the memory, and a centre need not be the very mean.
    """
    means = keys.to(torch.promote_types(keys.dtype, torch.float32)).unflatten(0, (-1, stride)).mean(1)
    most = torch.finfo(torch.bfloat16).max
    centres: Tensor = means.clamp(-most, most).to(torch.bfloat16).to(means.dtype)
    return centres


def centre_offsets(query: Tensor, centres: Tensor, stride: int, *, scale: float) -> Tensor:
    """What the centres (n / stride, D) of n keys add to their logits, (R, n), for the heads ``query`` (R, D)."""
    return (scale * query.to(centres.dtype) @ centres.T).repeat_interleave(stride, 1)


def quantise(keys: Tensor, rotation: Tensor, bits: int) -> Sketch:
    """Sketch ``keys`` (n, D), centred. A rotated key has coordinates like a normal deviate, whatever the key was.

    The scale is the one that brings the levels nearest to the key: then the error is at a right angle to them.
    """
    working = torch.promote_types(keys.dtype, torch.float32)
    rotated = keys.to(working) @ rotation.to(working)
    length = rotated.double().norm(dim=1, keepdim=True)  # its square may not fit a float32
    distance = LEVEL_DISTANCE[bits] / math.sqrt(keys.shape[1]) * length
    half = 2 ** (bits - 1)
    steps = (rotated / torch.where(distance > 0, distance, 1.0)).floor().clamp(-half, half - 1)
    levels = 2 * steps + 1
    scales = (rotated * levels).sum(1) / (levels * levels).sum(1)
    stored = scales.clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
    return Sketch(levels.to(torch.int64), stored.to(working))


def quantise_query(query: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """``query`` (R, D), rotated, as int64 (R, D) in -127 .. 127 times one float (R,) a head."""
    working = torch.promote_types(query.dtype, torch.float32)
    return quantise_rotated(query.to(working) @ rotation.to(working))


def quantise_rotated(rotated: Tensor) -> tuple[Tensor, Tensor]:
    """The same of queries that are rotated already."""
    unit = rotated.abs().amax(1) / 127
    return (rotated / torch.where(unit > 0, unit, 1.0)[:, None]).round().to(torch.int64), unit


def pack_words(levels: Tensor, bits: int) -> Tensor:
    """``levels`` (n, D) as codes in 32-bit words (n, words): the layout of `SketchLayout` in native/kernels.h."""
    codes, packed = (levels + 2**bits - 1) // 2, []
    for width, low in _planes(bits):
        own = codes >> low & (1 << width) - 1
        own = torch.nn.functional.pad(own, (0, -own.shape[1] % (32 // width))).unflatten(1, (-1, 32 // width))
        packed.append((own << _places(width)).sum(2))
    return torch.cat(packed, 1).to(torch.int32)


def unpack_words(words: Tensor, head_dim: int, bits: int) -> Tensor:
    """The levels (n, D) int64 in the words of a kv head, (blocks, words, 64)."""
    rows, first = words.permute(0, 2, 1).flatten(0, 1).to(torch.int64), 0
    codes = torch.zeros(len(rows), head_dim, dtype=torch.int64, device="cpu")
    for width, low in _planes(bits):
        count = -(-head_dim * width // 32)
        own = rows[:, first : first + count, None] >> _places(width) & (1 << width) - 1
        codes |= own.flatten(1)[:, :head_dim] << low
        first += count
    levels: Tensor = 2 * codes + 1 - 2**bits
    return levels


def _planes(bits: int) -> list[tuple[int, int]]:
    """How many bits of a code are kept together, and the first of them."""
    return [(2, 0), (1, 2)] if bits == 3 else [(bits, 0)]


def _places(width: int) -> Tensor:
    """At which bit of a word each of its codes begins."""
    place = _count(32 // width)
    return 8 * (place % 4) + width * (place // 4)


def score(
    query: Tensor,
    unit: Tensor,
    sketch: Sketch,
    *,
    scale: float,
    offset: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Logits of base two that the sketch expects, (R, n), of the heads ``query``, ``unit`` (as from `quantise_query`).

    offset (R, n) joins the logits, before a softcap: what the centres of the keys add, see `centre_offsets`.
    """
    logits = (scale * unit)[:, None] * sketch.scales * (query @ sketch.levels.T)
    if offset is not None:
        logits = logits + offset
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / math.log(2.0)


def score_noise(query: Tensor, scales: Tensor, bits: int, *, scale: float, sinks: int = 0) -> float:
    """The standard deviation by which scores miss logits, in nats, of heads ``query`` (R, D) in root mean square.

    scales (n,): of the keys, those of a `pilot` are looked at. A rotated key is off by as much in each coordinate, and
    by what the others do not know of, so the square is that of the query times that of a coordinate. A softcap, which
    brings both closer, is left out.
    """
    own = scales[pilot(len(scales), sinks)].double()
    square = query.double().square().sum(1).mean() * own.square().mean() * LEVEL_NOISE[bits]
    return scale * math.sqrt(square)


def candidates_by_noise(rows: int, noise: float) -> int:
    """How many candidates to draw so that the sample of `rows` of them errs little more than one by perfect weights."""
    for_two = next((count for most, count in CANDIDATES if noise <= most), MOST_CANDIDATES)
    return -(-rows * for_two // 2)


def power_of_two(x: Tensor, most: float = 127.0) -> Tensor:
    """About 2**x, float32: the line between neighbouring powers, at most 6 % above them; from 2**-30 to 2**most.

    Schraudolph (1999): x + 127, shifted, is the bit pattern of that float. Weights need be no better: the
    probabilities follow from the weights, not from what they approximate.
    """
    pattern = (x.double().clamp(-30, most) + 127) * 2**23
    return pattern.to(torch.int32).view(torch.float32)


def pilot(n: int, sinks: int = 0) -> Tensor:
    """The keys (m,) int64, ascending, from which the sum of all powers is estimated: blocks of neighbours, one of many.

    None of the first ``sinks`` keys is among them.

    One key in 16; of short texts more, so that there are 16 to 32 blocks (docs/log.md). What a head gives all keys
    together need not be known well: weights need not be shares for probabilities to be right. But heads whose sum is
    far too small for that of others get rows that those need.
    """
    begin = sinks // PILOT_KEYS
    blocks = -(-n // PILOT_KEYS) - begin
    apart = min(max(-(-blocks // PILOT_BLOCKS), 1), PILOT_APART)
    first = torch.arange(0, blocks, apart, dtype=torch.int64, device="cpu")
    chosen = begin + first + _scrambled(_count(len(first))) % (blocks - first).clamp(max=apart)
    keys = (chosen[:, None] * PILOT_KEYS + _count(PILOT_KEYS)).flatten()
    return keys[(keys >= sinks) & (keys < n)]


def log_normalisers(scores: Tensor, sinks: int = 0) -> tuple[Tensor, Tensor]:
    """The score (R,) float64 to which each head gives a weight of 1, for all weights to sum to about 2**30.

    Also the factor (R,) by which its scores have to be multiplied first. The first ``sinks`` keys do not count.
    """
    R, n = scores.shape
    some = scores[:, pilot(n, sinks)].double()
    base = some.amax(1).floor()  # whole octaves change a power by a factor
    total = power_of_two(some - base[:, None]).double().sum(1) * (n - sinks) / some.shape[1]
    shrink = (WIDEST / base.abs().clamp(min=1)).clamp(max=1.0)
    one = shrink * base + (total / ((1 - FLOOR) * 2**WEIGHT_BITS / R)).log2()
    return one, shrink


def weigh(scores: Tensor, sinks: int = 0) -> Tensor:
    """Integer weights (n,) int64 of scores (R, n): about the mean of the heads' softmax, and for every key a floor.

    The first ``sinks`` keys, which are always attended to, weigh nothing, and so are never picked.
    """
    R, n = scores.shape
    most = MOST_BITS - (R - 1).bit_length()
    shares = torch.zeros(n, dtype=torch.float32, device="cpu")
    for own, one, shrink in zip(scores.double(), *log_normalisers(scores, sinks), strict=True):
        shares += power_of_two(shrink * own - one, most)
    weights = shares.to(torch.int64) + max(1, int(FLOOR * 2**WEIGHT_BITS / (n - sinks)))
    weights[:sinks] = 0
    return weights


def step_for(weights: Tensor, budget: int) -> int:
    """The step t for which the keys' min(weight, t) add up to `budget` steps, within one; 1 if all keys fit.

    Keys of at least this weight are certain; the others share what is left of the budget.
    """
    if budget >= int((weights > 0).sum()):
        return 1
    rest = int(weights.sum())
    for weight in weights.sort(descending=True).values.tolist():
        if weight * budget < rest or budget == 1:
            break
        rest, budget = rest - weight, budget - 1
    return max(1, rest // budget)


def start_for(seed: int, layer: int, head: int, position: int, draw: int, step: int) -> int:
    """A number in [0, step), uniform over the others: the only randomness of a draw.

    head: of all key/value heads of the model, wherever this one lives. draw: which of a step's, see `draw_number`. Five
    rounds of the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """
    return luck(seed, layer, head, position, draw) * step >> 32


def luck(seed: int, layer: int, head: int, position: int, draw: int) -> int:
    """What of `start_for` does not depend on the step: 32 random bits."""
    x = 0
    for word in (seed, layer, head, position, draw):
        x = (x ^ word) + 0x9E3779B97F4A7C15 & _MASK
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
        x = x ^ x >> 31
    return x >> 32


def draw_number(phase: int, rows: int) -> int:
    """Names the draw of `rows` rows in phase 1 or 2 among those of a step."""
    return 2 * rows + phase - 1


def pick(weights: Tensor, step: int, start: int) -> tuple[Tensor, Tensor]:
    """Systematic sampling (Madow 1949): walk along the weights, none longer than a step, and take what a step ends in.

    The way goes as `walk_order` says. Returns ids (S,) int64, ascending, and log_u (S,) float64 with u = min(1,
    weight / step).
    """
    order = walk_order(len(weights))
    steps = (weights[order].clamp(max=step).cumsum(0) + start) // step
    taken = torch.diff(steps, prepend=steps.new_zeros(1)) > 0
    ids = order[taken].sort().values
    return ids, (weights[ids].double() / step).clamp(max=1.0).log()


def weigh_logits(logits: Tensor, log_u: Tensor) -> Tensor:
    """Integer weights (m,) int64 of keys drawn with log u (m,), by their logits (R, m): 2**30 in all, each 1 at least.

    They are the mean of the heads' softmax over 1 / u: of a key that is drawn again with probability weight / step, u
    times that is in proportion to what it adds to the outputs. The heads' denominators are those that the draw
    estimates.
    """
    shares = (logits.double() - log_u.double()).softmax(-1).mean(0)
    weights: Tensor = (2**WEIGHT_BITS * shares.nan_to_num(0.0)).to(torch.int64) + 1
    return weights


class TwoPhases(NamedTuple):
    """What was drawn, ids (S,) int64, ascending, and log_u (S,), and how: the candidates (m,) and log u of the first
    phase, their weights (m,) in the second, and its step. Without a second phase weights is None.
    """

    ids: Tensor
    log_u: Tensor
    candidates: Tensor
    log_u_first: Tensor
    weights: Tensor | None
    step: int


def draw(
    weights: Tensor,
    logits: Callable[[Tensor], Tensor],
    rows: int,
    candidates: int,
    start: Callable[[int, int], int],
) -> TwoPhases:
    """Draws `rows` keys in two phases: `candidates` by weights (n,), and of these by the logits that they really have.

    logits(ids) are those (R, m) of keys (m,); start(draw, step) as of `start_for`, draw being a `draw_number`. Where
    there are to be no more candidates than rows they are the sample.
    log_u is the log of the product of both phases' probabilities: dividing by it is unbiased (the double expansion
    estimator, Särndal, Swensson and Wretman 1992, 9.3).
    """
    first = max(rows, candidates)
    step = step_for(weights, first)
    ids, log_u = pick(weights, step, start(draw_number(1, first), step))
    if candidates <= rows:
        return TwoPhases(ids, log_u, ids, log_u, None, step)
    exact = weigh_logits(logits(ids), log_u)
    step = step_for(exact, rows)
    again, log_u_again = pick(exact, step, start(draw_number(2, rows), step))
    return TwoPhases(ids[again], log_u[again] + log_u_again, ids, log_u, exact, step)


def first_rows(budget: int, epsilon: float | None) -> int:
    """How many rows to draw first: the budget, or a few, from which more are chosen, where there is an epsilon."""
    return min(budget, FIRST_ROWS) if epsilon else budget


def is_enough(error: float, epsilon: float, *, first: bool) -> bool:
    """Whether the error that a draw predicts is small enough; first: of a step."""
    return error <= (1.0 if first else SLACK) * epsilon


def more_rows(rows: int, drawn: TwoPhases, logits: Tensor, errors: Tensor, epsilon: float) -> int:
    """How many rows to draw where `rows`, drawn like this, predict errors (R,) of which one is too large.

    logits (R, m): of the candidates. An error's square is a sum of a²(1/u − 1) times the distance of a value, with a
    head's shares a of the softmax, and u = min(1, w/t), w being their mean over the heads. It falls with a smaller step
    t as the candidates, each of which stands for 1/u1 keys, let expect of that sum without the values. So where few
    keys have most of the weight, and soon are certain, it takes fewer rows than the square root law says. The output
    that an error is relative to is too long by as much as is expected of its square.
    """
    if not bool(errors.isfinite().all()):
        return rows << 20
    squares = errors.double().square()
    squares = squares / (1 - squares.clamp(max=0.5))
    least = math.ceil(1.2 * rows)
    if drawn.weights is None:  # little is known but the law
        return max(least, math.ceil(rows * min(float(squares.max()) / (AIM * epsilon) ** 2, 2.0**20)))
    u, own = drawn.log_u_first.double().exp(), logits.double()
    w = drawn.weights.double() * u
    shares = (own - own.amax(1, keepdim=True)).exp()
    terms = shares.square() / u

    def left(t: float) -> Tensor:
        return (terms * (t / w - 1).clamp(min=0)).sum(1)

    def expected(t: float) -> float:
        return float(((w / t).clamp(max=1) / u).sum())

    before = left(drawn.step)

    def enough(eighths: int) -> bool:
        t = drawn.step * 2 ** (-eighths / 8)
        falls = torch.where(before > 0, left(t) / before, t / drawn.step)
        return bool((squares * falls <= (AIM * epsilon) ** 2).all())

    low, high = 0, FINEST
    if not enough(high):
        return rows << 20
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    more = expected(drawn.step * 2 ** (-high / 8)) / expected(drawn.step)
    return max(least, 8 * math.ceil(rows * more / 8))  # so that rounding hardly ever makes another draw


def _count(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.int64, device="cpu")


def walk_order(n: int) -> Tensor:
    """The order (n,) int64 in which a walk visits n keys: a binary tree over them, at each node either half first.

    Neighbours stay together, so that a systematic sample is spread over the text as evenly as in the text's own order.
    But steps of equal weights no longer end in keys at equal distances, which in a text that repeats itself are all
    alike (Stevens and Olsen 2004). Which halves are swapped (as in Owen 1995) says the hash of Laine and Karras (2011).
    It is the same order for every seed: that a sample is random comes from where the walk starts.
    """
    groups = -(-n // WALK_GROUP)
    bits = (groups - 1).bit_length()
    group = _reversed(_scrambled(_reversed(_count(1 << bits), bits)) & (1 << bits) - 1, bits)
    swaps = (_scrambled(group) * 0x9E3779B1 & 0xFFFFFFFF)[:, None] >> 17  # a bit for each node inside a group
    lane, path = _count(WALK_GROUP), torch.zeros_like(swaps)
    for level in range(4):
        node = (1 << level) - 1 + path
        path = 2 * path + ((lane >> (3 - level) ^ swaps >> node) & 1)
    order = (group[:, None] * WALK_GROUP + path).flatten()
    return order[order < n]


def _scrambled(x: Tensor) -> Tensor:
    """A permutation of the numbers below 2**32 in which each bit is swapped or not, as those below it say."""
    x = (x ^ x * 0x3D20ADEA) + 0x9E3779B9 & 0xFFFFFFFF
    x = x * 0x5851F42D & 0xFFFFFFFF
    x = (x ^ x * 0x05526C56) & 0xFFFFFFFF
    return (x ^ x * 0x53A22864) & 0xFFFFFFFF


def _reversed(x: Tensor, bits: int) -> Tensor:
    """The lowest ``bits`` bits of each number, the first of them last."""
    out = torch.zeros_like(x)
    for i in range(bits):
        out |= (x >> i & 1) << (bits - 1 - i)
    return out
