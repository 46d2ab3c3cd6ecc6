"""Sketches in plain PyTorch: keys -> codes -> scores -> weights -> a sample with known probabilities.

Knows one key/value head and the R query heads that share it; does not know what a value is. Rounding happens in one
place: a score becomes a 16-bit number. From there on everything is integer arithmetic, so that the same scores give
the same sample whatever the instruction set, the threads, or the language.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Distance between neighbouring levels of the uniform quantiser with the least squared error for a normal deviate
# (Max 1960, "Quantizing for minimum distortion", table II). At 2 bits it errs by 1 % more than the best levels of any
# spacing, and its codes are numbers: a score is a product of integers, without look-ups.
LEVEL_DISTANCE = {1: 1.5956, 2: 0.9957, 3: 0.5860, 4: 0.3352}

FLOOR = 0.05  # share of the weight that all keys get alike, so that no key a query overlooked can weigh too much
WEIGHT_BITS = 30  # all weights together are about 2**30
SCORE_BITS = 7  # fraction bits of a score, in octaves, unless the largest possible score needs more whole bits
FARTHEST = 40  # octaves below the largest score at which a key counts for nothing but its floor
EXACT_SHARE = 0.25  # of the keys: a larger sample would hardly be read faster than all of them, and they are exact
WALK_GROUP = 16  # keys that are walked along together
_MASK = (1 << 64) - 1


class Sketch(NamedTuple):
    """n keys of one head: key i is about ``scales[i] * levels[i] @ rotation.T``."""

    levels: Tensor
    """int64 (n, D), odd numbers from 1 - 2**bits to 2**bits - 1; a code is (level + 2**bits - 1) / 2."""
    scales: Tensor
    """(n,), values of a float16."""


class Scores(NamedTuple):
    """What the sketch says of the logits: ``fixed * 2**-fraction_bits`` is a logit of base 2, but for a constant."""

    fixed: Tensor
    """int64 (R, n), numbers of 16 bits."""
    fraction_bits: Tensor
    """int64 (R,)."""


def make_rotation(head_dim: int, seed: int) -> Tensor:
    """Draw a random orthogonal matrix: float32 (D, D), uniform over all rotations and reflections.

    The QR decomposition of normal deviates, with the signs that make it unique (Mezzadri, arXiv math-ph/0609050).
    """
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64))
    rotation: Tensor = (q * r.diagonal().sign()).to(torch.float32)
    return rotation


def quantise(keys: Tensor, rotation: Tensor, bits: int) -> Sketch:
    """Sketch ``keys`` (n, D), centred. A rotated key has coordinates like a normal deviate, whatever the key was.

    The scale is the one that brings the levels nearest to the key: then the error is at a right angle to them.
    """
    working = torch.promote_types(keys.dtype, torch.float32)
    turned = keys.to(working) @ rotation.to(working)
    length = turned.double().norm(dim=1, keepdim=True)  # its square may not fit a float32
    distance = LEVEL_DISTANCE[bits] / math.sqrt(keys.shape[1]) * length
    half = 2 ** (bits - 1)
    steps = (turned / torch.where(distance > 0, distance, 1.0)).floor().clamp(-half, half - 1)
    levels = 2 * steps + 1
    scales = (turned * levels).sum(1) / (levels * levels).sum(1)
    stored = scales.clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
    return Sketch(levels.to(torch.int64), stored.to(working))


def quantise_query(query: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """``query`` (R, D), rotated, as int64 (R, D) in -127 .. 127 times one float (R,) a head."""
    working = torch.promote_types(query.dtype, torch.float32)
    turned = query.to(working) @ rotation.to(working)
    unit = turned.abs().amax(1) / 127
    return (turned / torch.where(unit > 0, unit, 1.0)[:, None]).round().to(torch.int64), unit


def score(
    query: Tensor,
    unit: Tensor,
    sketch: Sketch,
    bits: int,
    *,
    scale: float,
    offset: Tensor | None = None,
    softcap: float | None = None,
) -> Scores:
    """Logits that the sketch expects, of the heads ``query``, ``unit`` (as from `quantise_query`), as 16-bit numbers.

    offset (R,) joins the logits before a softcap; without one it would change all alike.
    """
    dots = query @ sketch.levels.T
    logits = (scale * unit)[:, None] * sketch.scales * dots
    # No score can be larger than this; its bits before the binary point decide how many are left behind it.
    largest = abs(scale) * unit * query.abs().sum(1) * (2**bits - 1) * sketch.scales.max().clamp(min=0)
    if softcap is not None:
        start = torch.zeros_like(unit) if offset is None else offset
        logits = softcap * torch.tanh((logits + start[:, None]) / softcap)
        largest = torch.full_like(unit, softcap)
    octaves = logits / math.log(2.0)
    room = torch.floor(torch.log2(32767 / (largest / math.log(2.0)).clamp(min=1e-30)))
    fraction_bits = room.clamp(0, SCORE_BITS).to(torch.int64)
    # With too little room even for whole octaves an octave becomes several: no score may leave its 16 bits.
    exponent = torch.where(room < 0, room, fraction_bits)
    return Scores((octaves * 2.0 ** exponent[:, None]).round().to(torch.int64), fraction_bits)


def power_of_two(fixed: Tensor, fraction_bits: int) -> Tensor:
    """About 2**(fixed * 2**-fraction_bits), float32: the line between neighbouring powers, at most 6 % above them.

    Schraudolph (1999): such a number, shifted, is the bit pattern of that float. Weights need be no better: the
    probabilities follow from the weights, not from what they approximate.
    """
    near = fixed.clamp(min=-FARTHEST << fraction_bits)
    pattern = (near << (23 - fraction_bits)) + (127 << 23)
    return pattern.to(torch.int32).view(torch.float32)


def weigh(scores: Scores) -> Tensor:
    """Integer weights (n,) int64: the mean over heads of the softmax of the scores, and for every key a floor."""
    R, n = scores.fixed.shape
    shares = torch.zeros(n)
    for fixed, fraction_bits in zip(scores.fixed, scores.fraction_bits.tolist(), strict=True):
        base = int(fixed.max()) >> fraction_bits << fraction_bits  # whole octaves change a power by a factor
        total = float(power_of_two(fixed - base, fraction_bits).double().sum())
        shares += power_of_two(fixed - base - round(math.log2(total) * 2**fraction_bits), fraction_bits)
    unit = torch.tensor((1 - FLOOR) * 2**WEIGHT_BITS / R, dtype=torch.float32)
    return (shares * unit).to(torch.int64) + max(1, int(FLOOR * 2**WEIGHT_BITS / n))


def step_for(weights: Tensor, budget: int) -> int:
    """The step t for which the keys' min(weight, t) add up to `budget` steps, within one; 1 if all keys fit.

    Keys of at least this weight are certain; the others share what is left of the budget.
    """
    if budget >= len(weights):
        return 1
    rest = int(weights.sum())
    for weight in weights.sort(descending=True).values.tolist():
        if weight * budget < rest or budget == 1:
            break
        rest, budget = rest - weight, budget - 1
    return max(1, rest // budget)


def start_for(seed: int, head: int, position: int, step: int) -> int:
    """A number in [0, step), uniform over seeds, heads and positions: the only randomness of a draw.

    Three rounds of the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """
    x = 0
    for word in (seed, head, position):
        x = (x ^ word) + 0x9E3779B97F4A7C15 & _MASK
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
        x = x ^ x >> 31
    return (x >> 32) * step >> 32


def pick(weights: Tensor, step: int, start: int, doublings: int = 0) -> tuple[Tensor, Tensor]:
    """Systematic sampling (Madow 1949): walk along the weights, none longer than a step, and take what a step ends in.

    The way goes as `walk_order` says. doublings: halves the step that often but keeps the walk. Twice as many keys
    are taken, and those of before are among them.
    Returns ids (S,) int64, ascending, and log_u (S,) float64 with u = min(1, weight / step).
    """
    order = walk_order(len(weights))
    steps = ((weights[order].clamp(max=step).cumsum(0) + start) << doublings) // step
    taken = torch.diff(steps, prepend=torch.tensor([(start << doublings) // step])) > 0
    ids = order[taken].sort().values
    return ids, ((weights[ids] << doublings).double() / step).clamp(max=1.0).log()


def walk_order(n: int) -> Tensor:
    """The order (n,) int64 in which a walk visits n keys: a binary tree over them, at each node either half first.

    Neighbours stay together, so that a systematic sample is spread over the text as evenly as in the text's own order.
    But steps of equal weights no longer end in keys at equal distances, which in a text that repeats itself are all
    alike (Stevens and Olsen 2004). Which halves are swapped (as in Owen 1995) says the hash of Laine and Karras (2011).
    It is the same order for every seed: that a sample is random comes from where the walk starts.
    """
    groups = -(-n // WALK_GROUP)
    bits = (groups - 1).bit_length()
    group = _reversed(_scrambled(_reversed(torch.arange(1 << bits), bits)) & (1 << bits) - 1, bits)
    swaps = (_scrambled(group) * 0x9E3779B1 & 0xFFFFFFFF)[:, None] >> 17  # a bit for each node inside a group
    lane, path = torch.arange(WALK_GROUP), torch.zeros_like(swaps)
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
