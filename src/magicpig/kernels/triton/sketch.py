"""The twin of kernels/sketch up to the weights: keys -> codes, codes and queries -> scores -> integer weights.

A score is computed as the processor's kernels do, product by product and fused where they fuse: from the same whole
numbers, offsets and normalisers come the same weights, bit for bit. Only a softcap's tanh is another one.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from magicpig.kernels.base import SKETCH_KEYS, sketch_words
from magicpig.kernels.sketch import reference

OCTAVE = tl.constexpr(2.0**23)  # of a score: the distance of the exponent from the low end of a float
NO_OCTAVES = tl.constexpr(127 * 2.0**23)  # the bits of 1 and of 2^-30, as numbers
LEAST_POWER = tl.constexpr(97 * 2.0**23)
MOST_UNIT, MOST_OFFSET = 1e30, 1e37  # so that no score is infinite, nor the difference of two that are


class Weighed(NamedTuple):
    """weights: (U, n) int32; query: (U, R, D) int8, the whole numbers of the rotated queries; offsets: (U, R, strides)
    float32, what centres add to scores in units of 2^-23 octaves, to logits where there is a softcap; log_normalisers:
    (U, R) float32, the score to which each head gives a weight of one, in the same unit.
    """

    weights: Tensor
    query: Tensor
    offsets: Tensor
    log_normalisers: Tensor


def sketch_keys(rotated: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of keys (G, n, D) float32 that are centred and rotated: words (G, blocks, words, 64) int32 and
    scales (G, blocks * 64) float16, zeros behind the last key. See `quantise` in kernels/sketch/reference.py.
    """
    G, n, D = rotated.shape
    blocks, words = triton.cdiv(n, SKETCH_KEYS), sketch_words(D, bits)
    codes = torch.zeros(G, blocks, words, SKETCH_KEYS, dtype=torch.int32, device=rotated.device)
    scales = torch.zeros(G, blocks * SKETCH_KEYS, dtype=torch.float16, device=rotated.device)
    distance = reference.LEVEL_DISTANCE[bits] / math.sqrt(D)
    if n:
        block_d = triton.next_power_of_2(D)
        rotated = rotated.contiguous()
        _quantise[(G, blocks)](rotated, codes, scales, n, D, words, blocks, distance, bits, block_d, SKETCH_KEYS)
    return codes, scales


def weigh(
    query: Tensor,
    rotated: Tensor,
    words: Tensor,
    scales: Tensor,
    centres: Tensor,
    count: int,
    *,
    bits: int,
    stride: int,
    scale: float,
    softcap: float = 0.0,
    sinks: int = 0,
) -> Weighed:
    """Weights of the first `count` keys of an index for all heads of a sequence; the first `sinks` have none.

    query, rotated: (U, R, D) float32, as they are and times the rotation; words: (U, blocks, words, 64) int32; scales:
    (U, blocks * 64) float16; centres: (U, strides, D) of any float dtype. bits: of a code; stride: keys of a centre.
    """
    octaves = 1.0 if softcap > 0 else math.log2(math.e) * OCTAVE.value
    whole, unit = whole_numbers(rotated)
    scale = struct.unpack("f", struct.pack("f", scale))[0]  # a float32, as the processor's kernels have it
    unit = (scale * octaves * unit.double()).clamp(-MOST_UNIT, MOST_UNIT).float()
    offsets = query.float() @ centres[:, : triton.cdiv(count, stride)].float().mT
    per_logit = min(max(scale * octaves, -MOST_UNIT), MOST_UNIT)
    offsets = (offsets * per_logit).nan_to_num(0.0).clamp(-MOST_OFFSET, MOST_OFFSET)
    rule = _Rule(whole, unit, offsets, softcap, math.log2(math.e) * OCTAVE.value)
    index = words, scales, count, bits, stride, sinks
    ones, shrink = _log_normalisers(rule, index)
    return Weighed(_weights(rule.shrunk(shrink), index, ones), whole, offsets, ones)


def weigh_whole(
    whole: Tensor,
    unit: Tensor,
    offsets: Tensor,
    log_normalisers: Tensor,
    words: Tensor,
    scales: Tensor,
    count: int,
    *,
    bits: int,
    stride: int,
    softcap: float = 0.0,
    sinks: int = 0,
) -> Tensor:
    """The last part of `weigh`: weights (U, count) int32 of what the others made. unit: (U, R) float32, what a whole
    number of a rotated query adds to a score, in its unit.
    """
    rule = _Rule(whole, unit, offsets, softcap, math.log2(math.e) * OCTAVE.value)
    return _weights(rule, (words, scales, count, bits, stride, sinks), log_normalisers)


def whole_numbers(rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries (U, R, D) as int8 times one float32 (U, R) each."""
    unit = rotated.float().abs().amax(-1) / 127
    whole = (rotated / torch.where(unit > 0, unit, 1.0)[..., None]).round().to(torch.int8)
    return whole.contiguous(), unit


class _Rule(NamedTuple):
    """How the scores of U groups come about: whole (U, R, D) int8, unit (U, R), offsets (U, R, strides) float32."""

    whole: Tensor
    unit: Tensor
    offsets: Tensor
    softcap: float
    octaves: float

    def shrunk(self, factor: Tensor) -> _Rule:
        """With scores times a factor (U, R)."""
        if self.softcap > 0:  # one factor for all heads, as they share the number that follows the tanh
            return self._replace(octaves=self.octaves * float(factor.min()))
        return self._replace(unit=self.unit * factor, offsets=self.offsets * factor[..., None])


_Index = tuple[Tensor, Tensor, int, int, int, int]


def _log_normalisers(rule: _Rule, index: _Index) -> tuple[Tensor, Tensor]:
    """See `log_normalisers` in kernels/sketch/reference.py: (U, R) float32 each."""
    _, _, count, _, _, sinks = index
    R = rule.whole.shape[1]
    keys = reference.pilot(count, sinks)
    blocks = (keys // SKETCH_KEYS).unique().to(torch.int32)
    scores = _scores(rule, index, blocks.to(rule.whole.device))
    some = scores.double() / OCTAVE.value
    base = some.amax(-1).floor()
    total = reference.power_of_two(some - base[..., None]).double()
    total = torch.where(some.isneginf(), 0.0, total).sum(-1) * (count - sinks) / len(keys)
    shrink = (reference.WIDEST / base.abs().clamp(min=1)).clamp(max=1.0)
    weight = (1 - reference.FLOOR) * 2**reference.WEIGHT_BITS / R
    ones = shrink * base + (total / weight).log2()
    return (ones * OCTAVE.value).float(), shrink.float()


def _launch(rule: _Rule, index: _Index) -> tuple[tuple[Tensor | int | float, ...], dict[str, int]]:
    """The arguments that kernels over an index have in common."""
    words, scales, count, bits, stride, sinks = index
    _, R, D = rule.whole.shape
    sums = rule.whole.sum(-1, dtype=torch.int32).float()
    tensors = (words, scales, rule.whole, rule.unit.contiguous(), sums.contiguous(), rule.offsets.contiguous())
    assert all(x.is_contiguous() for x in (words, scales))
    numbers = count, sinks, words.shape[1], words.shape[2], R, D, rule.offsets.shape[-1], rule.softcap, rule.octaves
    planes = reference._planes(bits)
    shape = {"SHIFT": stride.bit_length() - 1, "BITS": bits, "HEADS": max(16, triton.next_power_of_2(R))}
    for i, (width, _) in enumerate(planes):
        own = triton.cdiv(D * width, 32)
        # As many words as a product of matrices takes, 32 codes at least, and a power of two.
        shape[f"WORDS{i}"] = max(width, triton.next_power_of_2(own))
    return (*tensors, *numbers), {"WORDS1": 1, "CAPPED": int(rule.softcap > 0), "LANES": SKETCH_KEYS, **shape}


def _scores(rule: _Rule, index: _Index, blocks: Tensor) -> Tensor:
    """Scores (U, R, len(blocks) * 64) float32 of the keys of some blocks, -inf where there is none or it is a sink."""
    U, R, _ = rule.whole.shape
    scores = torch.empty(U, R, len(blocks) * SKETCH_KEYS, dtype=torch.float32, device=rule.whole.device)
    arguments, shape = _launch(rule, index)
    _score_blocks[(U, len(blocks))](scores, blocks, len(blocks), *arguments, **shape)
    return scores


def _weights(rule: _Rule, index: _Index, ones: Tensor) -> Tensor:
    _, _, count, _, _, sinks = index
    U, R, _ = rule.whole.shape
    weights = torch.empty(U, count, dtype=torch.int32, device=rule.whole.device)
    most = float((127 + reference.MOST_BITS - (R - 1).bit_length()) * 2**23)
    floor = max(1, int(reference.FLOOR * 2**reference.WEIGHT_BITS / (count - sinks)))
    arguments, shape = _launch(rule, index)
    grid = (U, triton.cdiv(count, SKETCH_KEYS))
    _weigh_blocks[grid](weights, ones.contiguous(), most, floor, *arguments, **shape)
    return weights


@triton.jit
def _fused(x, y, z):
    """x * y + z, rounded once: the product of two float32 is a float64. Triton's own fma rounds twice where it is
    interpreted.
    """
    return (x.to(tl.float64) * y.to(tl.float64) + z.to(tl.float64)).to(tl.float32)


@triton.jit
def _power(bits, most):
    """See `power_of_two` in kernels/sketch/reference.py."""
    return tl.maximum(tl.minimum(bits, most), LEAST_POWER).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _plane(block, query, first, words, R, D, WIDTH: tl.constexpr, WORDS: tl.constexpr, HEADS: tl.constexpr,
           LANES: tl.constexpr):  # fmt: skip
    """Products (HEADS, LANES) int32 of the codes of one plane with the heads' whole numbers."""
    PER_WORD: tl.constexpr = 32 // WIDTH
    word, lane, head = tl.arange(0, WORDS), tl.arange(0, LANES), tl.arange(0, HEADS)
    at = block + (first + word)[:, None] * LANES + lane[None, :]
    packed = tl.load(at, mask=(word < words)[:, None], other=0)
    i = tl.arange(0, PER_WORD)
    place = 8 * (i % 4) + WIDTH * (i // 4)
    codes = (packed[:, None, :] >> place[None, :, None]) & ((1 << WIDTH) - 1)
    codes = tl.reshape(codes, (WORDS * PER_WORD, LANES)).to(tl.int8)
    d = tl.arange(0, WORDS * PER_WORD)
    numbers = tl.load(query + head[:, None] * D + d[None, :], mask=(head[:, None] < R) & (d[None, :] < D), other=0)
    return tl.dot(numbers, codes, out_dtype=tl.int32)


@triton.jit
def _score(unit_id, block_id, words, scales, query, unit, sums, offsets, count, blocks, all_words, R, D, strides,
           softcap, octaves, SHIFT: tl.constexpr, BITS: tl.constexpr, HEADS: tl.constexpr, WORDS0: tl.constexpr,
           WORDS1: tl.constexpr, CAPPED: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Scores (HEADS, LANES) of the keys of one block, in units of 2^-23 octaves."""
    head, lane = tl.arange(0, HEADS), tl.arange(0, LANES)
    block = words + (unit_id.to(tl.int64) * blocks + block_id) * all_words * LANES
    own = query + unit_id * R * D
    if BITS == 3:
        low = (D * 2 + 31) // 32
        dots = _plane(block, own, 0, low, R, D, 2, WORDS0, HEADS, LANES)
        dots += 4 * _plane(block, own, low, all_words - low, R, D, 1, WORDS1, HEADS, LANES)
    else:
        dots = _plane(block, own, 0, all_words, R, D, BITS, WORDS0, HEADS, LANES)
    there = head < R
    each = tl.load(unit + unit_id * R + head, mask=there, other=0.0)
    level = -(tl.load(sums + unit_id * R + head, mask=there, other=0.0) * ((1 << BITS) - 1)) * each
    key = block_id * LANES + lane
    at = scales + unit_id.to(tl.int64) * blocks * LANES + key
    scale = tl.load(at, mask=key < count, other=0.0).to(tl.float32)
    stride = tl.minimum(key >> SHIFT, strides - 1)
    at = offsets + (unit_id * R + head)[:, None].to(tl.int64) * strides + stride[None, :]
    offset = tl.load(at, mask=there[:, None], other=0.0)
    inner = _fused(dots.to(tl.float32), (2.0 * each)[:, None], level[:, None])
    score = _fused(scale[None, :], inner, offset)
    if CAPPED:
        score = octaves * (softcap * (1.0 - 2.0 / (tl.exp(2.0 * (score / softcap)) + 1.0)))
    return score


@triton.jit
def _score_blocks(scores, chosen, count_chosen, words, scales, query, unit, sums, offsets, count, sinks, blocks,
                  all_words, R, D, strides, softcap, octaves, SHIFT: tl.constexpr, BITS: tl.constexpr,
                  HEADS: tl.constexpr, WORDS0: tl.constexpr, WORDS1: tl.constexpr, CAPPED: tl.constexpr,
                  LANES: tl.constexpr):  # fmt: skip
    unit_id, i = tl.program_id(0), tl.program_id(1)
    block_id = tl.load(chosen + i)
    score = _score(unit_id, block_id, words, scales, query, unit, sums, offsets, count, blocks, all_words, R, D,
                   strides, softcap, octaves, SHIFT, BITS, HEADS, WORDS0, WORDS1, CAPPED, LANES)  # fmt: skip
    head, lane = tl.arange(0, HEADS), tl.arange(0, LANES)
    key = block_id * LANES + lane
    score = tl.where(((key >= sinks) & (key < count))[None, :], score, float("-inf"))
    at = scores + ((unit_id * R + head)[:, None].to(tl.int64) * count_chosen + i) * LANES + lane[None, :]
    tl.store(at, score, mask=(head < R)[:, None])


@triton.jit
def _weigh_blocks(weights, ones, most, floor, words, scales, query, unit, sums, offsets, count, sinks, blocks,
                  all_words, R, D, strides, softcap, octaves, SHIFT: tl.constexpr, BITS: tl.constexpr,
                  HEADS: tl.constexpr, WORDS0: tl.constexpr, WORDS1: tl.constexpr, CAPPED: tl.constexpr,
                  LANES: tl.constexpr):  # fmt: skip
    unit_id, block_id = tl.program_id(0), tl.program_id(1)
    score = _score(unit_id, block_id, words, scales, query, unit, sums, offsets, count, blocks, all_words, R, D,
                   strides, softcap, octaves, SHIFT, BITS, HEADS, WORDS0, WORDS1, CAPPED, LANES)  # fmt: skip
    head, lane = tl.arange(0, HEADS), tl.arange(0, LANES)
    one = tl.load(ones + unit_id * R + head, mask=head < R, other=0.0)
    powers = _power(score + (-one + NO_OCTAVES)[:, None], most)
    share = tl.zeros((LANES,), tl.float32)
    for r in range(R):  # one after the other, as elsewhere: a sum in another order is rounded to another weight
        share += tl.sum(tl.where((head == r)[:, None], powers, 0.0), 0)
    key = block_id * LANES + lane
    weight = tl.where(key < sinks, 0, share.to(tl.int32) + floor)
    tl.store(weights + unit_id.to(tl.int64) * count + key, weight, mask=key < count)


@triton.jit
def _quantise(rotated, words, scales, n, D, all_words, blocks, DISTANCE: tl.constexpr, BITS: tl.constexpr,
              BLOCK_D: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    head, block_id = tl.program_id(0), tl.program_id(1)
    lane, d = tl.arange(0, LANES), tl.arange(0, BLOCK_D)
    key = block_id * LANES + lane
    HALF: tl.constexpr = 1 << (BITS - 1)
    row = rotated + (head.to(tl.int64) * n + key) * D
    here = (key < n)[:, None] & (d < D)[None, :]
    x = tl.load(row[:, None] + d[None, :], mask=here, other=0.0)
    wide = x.to(tl.float64)  # its square may not fit a float32
    length = DISTANCE * tl.sqrt(tl.sum(wide * wide, 1))
    step = tl.where(length > 0, length, 1.0)
    level = 2.0 * tl.minimum(tl.maximum(tl.floor(wide / step[:, None]), -HALF), HALF - 1) + 1.0
    level = tl.where(here, level, 0.0)
    best = tl.sum(wide * level, 1) / tl.maximum(tl.sum(level * level, 1), 1.0)
    best = tl.minimum(best, 65504.0).to(tl.float16)
    tl.store(scales + head.to(tl.int64) * blocks * LANES + key, best, mask=key < n)
    to = words + (head.to(tl.int64) * blocks + block_id) * all_words * LANES + lane
    if BITS == 3:
        low = (D * 2 + 31) // 32
        _pack(row, step, key < n, D, to, low, 2, 0, HALF, LANES)
        _pack(row, step, key < n, D, to + low * LANES, all_words - low, 1, 2, HALF, LANES)
    else:
        _pack(row, step, key < n, D, to, all_words, BITS, 0, HALF, LANES)


@triton.jit
def _pack(row, step, here, D, to, words, WIDTH: tl.constexpr, LOW: tl.constexpr, HALF: tl.constexpr,
          LANES: tl.constexpr):  # fmt: skip
    """Writes the words of one plane, keys side by side."""
    PER_WORD: tl.constexpr = 32 // WIDTH
    for word in range(words):
        packed = tl.zeros((LANES,), tl.int32)
        for i in tl.static_range(PER_WORD):
            d = word * PER_WORD + i
            x = tl.load(row + d, mask=here & (d < D), other=0.0).to(tl.float64)
            code = tl.minimum(tl.maximum(tl.floor(x / step), -HALF), HALF - 1).to(tl.int32) + HALF
            code = tl.where(here & (d < D), code >> LOW & ((1 << WIDTH) - 1), 0)
            packed |= code << (8 * (i % 4) + WIDTH * (i // 4))
        tl.store(to + word * LANES, packed, mask=here)
