"""Verbs in Triton equal the references: interpreted where there is no accelerator, on odd sizes and poisoned memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from magicpig.errors import ArgumentError
from magicpig.kernels import cpu, library
from magicpig.kernels.attend import reference as attention
from magicpig.kernels.base import SampledHalf, padded
from magicpig.kernels.hash import reference as hashing
from magicpig.kernels.sketch import reference

verbs = pytest.importorskip("magicpig.kernels.triton")
sketches = pytest.importorskip("magicpig.kernels.triton.sketch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD_DIMS = [16, 40, 64, 80, 128]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What `torch.empty` gives is NaN, or the largest number there is."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def test_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()


# --- hash -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "D", "K", "L"), [(1, 16, 1, 1), (3, 40, 7, 17), (17, 128, 10, 33), (33, 80, 11, 5)])
def test_hash_codes_are_the_references(n: int, D: int, K: int, L: int) -> None:
    vectors, planes = torch.randn(n, D), hashing.make_planes(D, K, L, seed=3)
    vectors[0] = 0
    codes = verbs.hash_vectors(vectors.to(DEVICE), planes.to(DEVICE), K).cpu()
    expected = hashing.hash_vectors(vectors.double(), planes.double(), K)
    rounded = vectors.bfloat16().double()
    sums = rounded @ planes.double()
    # A sum of D float32 products errs by D roundings of the largest partial sum at most.
    doubtful = sums.abs() <= D * 2**-24 * (rounded.abs() @ planes.double().abs())
    mask = ((~doubtful).unflatten(-1, (L, K)) * 2 ** torch.arange(K)).sum(-1)
    mask[0] = 2**K - 1
    assert ((codes.long() ^ expected) & mask == 0).all()
    assert not codes[0].any()
    with pytest.raises(ArgumentError, match=f"multiple of K={K + 1}"):
        verbs.hash_vectors(vectors.to(DEVICE), torch.zeros(D, (K + 1) * L + 1, device=DEVICE), K + 1)


# --- sketch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "D"), [(1, 40), (65, 80), (63, 128)])
def test_codes_of_keys_are_the_references(n: int, D: int, bits: int) -> None:
    rotated = 3 * torch.randn(2, n, D) * torch.rand(2, n, 1)
    rotated[1, 0] = 0
    words, scales = (x.cpu() for x in verbs.sketch_keys(rotated.to(DEVICE), bits))
    for g in range(2):
        expected = reference.quantise(rotated[g].double(), torch.eye(D, dtype=torch.float64), bits)
        levels = reference.unpack_words(words[g], D, bits)
        assert torch.equal(levels[:n], expected.levels)
        assert torch.equal(scales[g, :n], expected.scales.half())
        assert not scales[g, n:].any()
        assert not words[g].permute(0, 2, 1).flatten(0, 1)[n:].any()


def indexed(n: int, D: int, bits: int, stride: int, heads: int = 2) -> tuple[Any, ...]:
    """The index of keys that the processor's kernels make, on the device, with NaN behind the last key."""
    keys = 3 * torch.randn(heads, -(-n // stride) * stride, D) * torch.rand(heads, 1, 1) + 1
    rows = torch.zeros(heads, keys.shape[1], 2 * padded(D))
    rows[:, :, :D] = keys
    sampler = cpu.make_sketcher(D, bits, seed=0)
    segment = cpu.sketch([rows], sampler, 0, stride=stride)
    segment.scales[:, n:] = math.nan
    segment.centres[:, -(-n // stride) :] = math.nan
    return replace(segment, count=n), sampler, segment.words.to(DEVICE), segment.scales.to(DEVICE)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("n", "D", "R", "stride", "sinks"),
    [(1, 16, 1, 8, 0), (63, 40, 3, 16, 4), (65, 64, 2, 256, 1), (260, 80, 5, 32, 4), (200, 128, 4, 64, 70)],
)
def test_the_same_whole_numbers_give_the_processors_weights_bit_for_bit(
    n: int, D: int, R: int, stride: int, sinks: int, bits: int
) -> None:
    segment, sampler, words, scales = indexed(n, D, bits, stride)
    query, scale = torch.randn(2, R, D), D**-0.5
    own = [cpu.weigh(q, [segment], g, sampler, stride=stride, scale=scale, sinks=sinks) for g, q in enumerate(query)]
    _, unit = sketches.whole_numbers(torch.stack([cpu.rotate(q, sampler) for q in query]))
    octave = 2.0**23
    unit = (unit.double() * (float(torch.tensor(scale)) * math.log2(math.e) * octave)).float()
    weights = sketches.weigh_whole(
        torch.stack([o.query for o in own]).to(DEVICE).contiguous(),
        unit.to(DEVICE),
        torch.stack([o.offsets for o in own]).to(DEVICE) * octave,
        torch.stack([o.log_normalisers for o in own]).float().to(DEVICE) * octave,
        words,
        scales,
        n,
        bits=bits,
        stride=stride,
        sinks=sinks,
    )
    for g in range(2):
        if library.isa() == "portable":  # without fused instructions, and so rounded once more
            torch.testing.assert_close(weights[g].cpu().long(), own[g].weights, rtol=1e-4, atol=1)
        else:
            assert torch.equal(weights[g].cpu().long(), own[g].weights)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize(("n", "D", "R", "bits"), [(63, 40, 3, 4), (700, 64, 4, 2), (300, 16, 1, 1), (257, 80, 8, 3)])
def test_weights_are_the_references(n: int, D: int, R: int, bits: int, softcap: float) -> None:
    stride, sinks, scale = 32, 4, D**-0.5
    segment, _, words, scales = indexed(n, D, bits, stride)
    rotation = reference.make_rotation(D, 0)
    query = torch.randn(2, R, D)
    weighed = verbs.weigh(
        query.to(DEVICE),
        (query @ rotation).to(DEVICE),
        words,
        scales,
        segment.centres[:, :, :D].to(DEVICE),
        n,
        bits=bits,
        stride=stride,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
    )
    for g in range(2):
        levels = reference.unpack_words(segment.words[g], D, bits)[:n]
        offset = weighed.offsets[g].cpu().double() / (1 if softcap else math.log2(math.e) * 2**23)
        _, unit = reference.quantise_rotated((query[g] @ rotation).double())
        scores = reference.score(
            weighed.query[g].cpu().long(),
            unit,
            reference.Sketch(levels, segment.scales[g, :n].double()),
            scale=scale,
            offset=offset.repeat_interleave(stride, 1)[:, :n],
            softcap=softcap or None,
        )
        # As in test_native_sketch.py: roundings of scores in 2**-23 octaves.
        octaves = 12 * (float(scores.abs().max()) + 160) * 2**-24
        ones, _ = reference.log_normalisers(scores, sinks)
        assert float((weighed.log_normalisers[g].cpu() / 2**23 - ones).abs().max()) <= 2 * octaves
        expected, found = reference.weigh(scores, sinks), weighed.weights[g].cpu().long()
        assert not found[:sinks].any()
        assert float(((found - expected).abs() - 1).div(expected.clamp(min=1)).max()) <= 3 * octaves


# --- draw -------------------------------------------------------------------------------------------------------------


def weights_like(n: int, seed: int, heavy: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shares = (heavy * torch.randn(n, generator=generator)).exp()
    return (shares / shares.sum() * 2**27).long().clamp(1, 2**27)


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize(
    ("n", "budget", "sinks"),
    [(1, 1, 0), (15, 4, 1), (17, 16, 0), (17, 17, 4), (1000, 60, 4), (4097, 512, 5), (3000, 1500, 0)],
)
def test_samples_are_the_processors_bit_for_bit(n: int, budget: int, sinks: int, phase: int) -> None:
    rows = torch.stack([weights_like(n, i, heavy) for i, heavy in enumerate((0.0, 1.0, 5.0))])
    rows[:, :sinks] = 0
    drawn = verbs.draw(
        rows.to(DEVICE, torch.int32),
        budget,
        seed=5,
        layer=9,
        heads=[3, 4, 70],
        position=77,
        sinks=sinks,
        phase=phase,
    )
    for i, head in enumerate((3, 4, 70)):
        right = cpu.draw(rows[i], budget, seed=5, layer=9, head=head, position=77, phase=phase, sinks=sinks)
        count = int(drawn.counts[i])
        assert int(drawn.steps[i]) == right.step == reference.step_for(rows[i], budget)
        assert torch.equal(drawn.ids[i, :count].cpu().long(), right.ids)
        assert (drawn.ids[i, count:] == n).all()
        torch.testing.assert_close(drawn.log_u[i, :count].cpu(), right.log_u, rtol=1e-6, atol=2e-7)
        assert not drawn.log_u[i, count:].any()
    with pytest.raises(ArgumentError, match="budget=0"):
        verbs.draw(rows.to(DEVICE, torch.int32), 0, seed=0, layer=0, heads=[0, 1, 2], position=1)


# --- attend, merge ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(("R", "S", "D"), [(1, 1, 16), (3, 31, 40), (7, 300, 64), (17, 33, 80)])
def test_attention_over_a_sample_and_its_predicted_error_are_the_references(
    R: int, S: int, D: int, softcap: float
) -> None:
    rows = torch.zeros(3, 700, 2 * padded(D))
    for half in (0, padded(D)):
        rows[:, :, half : half + D] = torch.randn(3, 700, D)
    rows[:, 650:] = math.nan
    query, scale = torch.randn(3, R, D), D**-0.5
    counts = torch.tensor([S, max(0, S - 5), 0], dtype=torch.int32)
    ids = torch.stack([torch.randperm(650)[:S].sort().values for _ in range(3)])
    log_u = -2 * torch.rand(3, S)
    log_u[:, ::4] = 0
    log_u[1, int(counts[1]) :] = math.nan
    ids[1, int(counts[1]) :] = 650
    on = [x.to(DEVICE) for x in (query, rows, counts, log_u, ids.to(torch.int32))]
    state, spread = verbs.attend(*on, scale=scale, softcap=softcap)
    exact, nothing = verbs.attend(on[0], on[1], torch.full_like(on[2], 49), scale=scale, softcap=softcap)
    assert not nothing.any()
    whole = verbs.merge(torch.stack([state.output, exact.output]), torch.stack([state.lse, exact.lse]))
    half = SampledHalf(type(state)(state.output.cpu(), state.lse.cpu()), spread.cpu(), [], [])
    predicted = half.predicted_error(type(whole)(whole.output.cpu(), whole.lse.cpu()))
    rule = {"scale": scale, "softcap": softcap or None}
    for unit in range(3):
        keys, values = rows[unit, :, :D].double(), rows[unit, :, padded(D) : padded(D) + D].double()
        chosen = ids[unit, : int(counts[unit])]
        u = log_u[unit, : int(counts[unit])].double()
        q = query[unit].double()
        right = attention.attend(q, keys[chosen], values[chosen], log_u=u, **rule)
        window = attention.attend(q, keys[:49], values[:49], **rule)
        both = attention.merge([right, window])
        for found, expected in ((state, right), (exact, window), (whole, both)):
            torch.testing.assert_close(found.output[unit].cpu().double(), expected.output, rtol=2e-5, atol=2e-6)
            torch.testing.assert_close(found.lse[unit].cpu().double(), expected.lse, rtol=1e-5, atol=2e-6)
        if len(chosen):
            error = attention.predicted_error(both, q, keys[chosen], values[chosen], u, **rule)
            torch.testing.assert_close(predicted[unit].double(), error, rtol=2e-4, atol=1e-6)
        else:
            assert not predicted[unit].any()
    with pytest.raises(ArgumentError, match="rows has shape"):
        verbs.attend(on[0], on[1][:, :, 1:], on[2], scale=scale)


@pytest.mark.parametrize("P", [1, 2, 5])
def test_merged_states_are_the_references(P: int) -> None:
    outputs, lses = torch.randn(P, 3, 5, 40), 30 * torch.randn(P, 3, 5)
    lses[:, 0, 0] = -math.inf
    lses[0, 1] = -math.inf
    outputs[lses.isneginf()] = 0
    found = verbs.merge(outputs.to(DEVICE), lses.to(DEVICE))
    parts = [type(found)(o.double(), e.double()) for o, e in zip(outputs, lses, strict=True)]
    expected = attention.merge(parts)
    torch.testing.assert_close(found.output.cpu().double(), expected.output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.lse.cpu().double(), expected.lse, rtol=1e-6, atol=1e-6)
    assert found.lse[0, 0] == -math.inf
    assert not found.output[0, 0].any()
