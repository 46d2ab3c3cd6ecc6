"""Native sketches: codes and weights as near to the reference as rounding allows; then the same sample."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from magicpig.kernels import base, cpu
from magicpig.kernels.rows.reference import from_bytes, halves, to_bytes
from magicpig.kernels.sketch import reference

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD_DIMS = [1, 40, 64, 80, 96, 128, 192, 256, 512]
GROUPS = [1, 2, 3, 4, 5, 7, 8, 16]
SIZES = [1, 15, 63, 64, 65, 1000, 4097]
STRIDES = [8, 16, 32, 64, 128, 512]


def make_keys(n: int, D: int, heads: int = 2) -> Tensor:
    return 3 * torch.randn(heads, n, D) * torch.rand(heads, n, 1)


def make_rows(keys: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.zeros(*keys.shape[:2], 2 * base.padded(keys.shape[2]), dtype=dtype)
    rows[:, :, : keys.shape[2]] = keys
    return rows


def sketch(
    keys: Tensor, bits: int, stride: int = 8, *, centred: bool = True
) -> tuple[base.SketchSegment, cpu._native.SketchSampler]:
    """The sketch of keys (G, n, D), of as many as there are: the last stride is filled up with others."""
    n, sampler = keys.shape[1], cpu.make_sketcher(keys.shape[2], bits, seed=0)
    more = torch.randn(len(keys), -n % stride, keys.shape[2])
    whole = cpu.sketch([make_rows(torch.cat([keys, more], 1))], sampler, 0, stride=stride, centred=centred)
    return replace(whole, count=n), sampler


def scores_of(
    found: base.SketchWeights, segment: base.SketchSegment, head: int, bits: int, query: Tensor, stride: int, **rule
) -> Tensor:
    """What the reference makes of the whole numbers, codes and centres of the native side, in float64."""
    n, D = segment.count, query.shape[1]
    _, unit = reference.quantise_query(query.double(), reference.make_rotation(D, 0).double())
    own = reference.Sketch(2 * codes(segment, head, bits, D) + 1 - 2**bits, segment.scales[head, :n].double())
    centres = segment.centres[head, :, :D].double()
    offset = reference.centre_offsets(query.double(), centres, stride, scale=rule["scale"])[:, :n]
    per_logit = 1 if rule.get("softcap") else 1 / math.log(2)
    strides = -(-n // stride)
    torch.testing.assert_close(
        found.offsets.double(), per_logit * offset[:, ::stride][:, :strides], rtol=1e-5, atol=1e-5 * D**0.5
    )
    return reference.score(found.query.long(), unit, own, offset=offset, **rule)


def codes(segment: base.SketchSegment, head: int, bits: int, D: int) -> Tensor:
    """The codes (n, D) in a segment, read as kernels.h says they are laid out."""
    words = segment.words[head].permute(0, 2, 1).reshape(-1, segment.words.shape[2])[: segment.count].to(torch.int64)
    out, word = torch.zeros(segment.count, D, dtype=torch.int64), 0
    for width, low in [(2, 0), (1, 2)] if bits == 3 else [(bits, 0)]:
        per_word = 32 // width
        for d in range(D):
            k, j = divmod(d % per_word, 4)
            out[:, d] |= ((words[:, word + d // per_word] >> (8 * j + width * k)) & (2**width - 1)) << low
        word += -(-D // per_word)
    assert word == segment.words.shape[2]
    return out


def assert_weights_are_the_references(found: base.SketchWeights, scores: Tensor, sinks: int = 0) -> None:
    """scores: (R, n) float64, from the whole numbers and codes of the native ones."""
    (octave, _), expected = reference.log_normalisers(scores, sinks), reference.weigh(scores, sinks)
    assert not found.weights[:sinks].any()
    assert (found.weights[sinks:] > 0).all()
    # A score, and what it is relative to, are float32 numbers in 2**-23 octaves that five operations have rounded.
    # An offset is a sum of D products more, whose roundings add up like their root.
    octaves = 12 * (float(scores.abs().max()) + 160) * 2**-24
    assert float((found.log_normalisers - octave).abs().max()) <= 2 * octaves
    assert float(((found.weights - expected).abs() - 1).div(expected.clamp(min=1)).max()) <= 3 * octaves


def assert_same_draw(weights: Tensor, budget: int, phase: int = 1) -> None:
    sinks = int((weights == 0).sum())
    assert not weights[:sinks].any()
    drawn = cpu.draw(weights, budget, seed=5, layer=9, head=3, position=77, phase=phase, sinks=sinks)
    assert drawn.step == reference.step_for(weights, budget)
    assert drawn.start == reference.start_for(5, 9, 3, 77, reference.draw_number(phase, budget), drawn.step)
    ids, log_u = reference.pick(weights, drawn.step, drawn.start)
    assert torch.equal(drawn.ids, ids)
    torch.testing.assert_close(drawn.log_u.double(), log_u, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_codes_and_scales_are_the_references(D, bits, isa):
    keys = make_keys(130, D)
    segment, _ = sketch(keys, bits, stride=32)
    rotation = reference.make_rotation(D, 0).double()
    for g in range(2):
        centres = segment.centres[g, :5, :D].double().repeat_interleave(32, 0)[:130]
        expected = reference.quantise(keys[g].double() - centres, rotation, bits)
        levels = 2 * codes(segment, g, bits, D) + 1 - 2**bits
        # A coordinate within rounding of the border between two levels may fall to either side.
        other = levels != expected.levels
        assert int(other.sum()) <= 2
        assert int((levels - expected.levels).abs().max()) <= 2
        same = ~other.any(1)
        scales = segment.scales[g, :130].double()
        # One unit in the last of eleven bits
        torch.testing.assert_close(scales[same], expected.scales[same], rtol=2**-10, atol=0)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("D", [1, 80, 128])
def test_centres_are_the_means_of_strides(D, stride, isa):
    keys = 5 * torch.randn(2, 1, D) + make_keys(2 * stride, D)
    segment, _ = sketch(keys, 2, stride)
    assert segment.centres.shape[:2] == (2, -(-segment.blocks * 64 // stride))
    for g in range(2):
        expected = reference.stride_centres(keys[g].double(), stride)
        found = segment.centres[g, :2, :D].double()
        # A sum in another order may be rounded to the next bfloat16.
        assert float(((found - expected).abs() - 2**-8 * expected.abs()).max()) <= 1e-6
        assert not segment.centres[g, :2, D:].any()
    plain, _ = sketch(keys, 2, stride, centred=False)
    assert not plain.centres.any()
    rotation = reference.make_rotation(D, 0).double()
    same = 2 * codes(plain, 0, 2, D) - 3 == reference.quantise(keys[0].double(), rotation, 2).levels
    assert int((~same).sum()) <= 2


def test_centres_of_the_largest_keys_are_finite(isa):
    keys = torch.full((1, 64, 32), 3.4e38)
    keys[0, 32:] = -3.4e38
    for stride in (32, 64):
        segment, sampler = sketch(keys, 2, stride)
        assert segment.centres.isfinite().all()
        assert segment.scales.isfinite().all()
        found = cpu.weigh(torch.randn(2, 32), [segment], 0, sampler, stride=stride, scale=0.1)
        assert (found.weights > 0).all()


def test_a_sketch_takes_a_few_bits_a_coordinate():
    for D, bits, most in [(128, 2, 34), (128, 1, 18), (128, 3, 50), (128, 4, 66), (64, 2, 18), (80, 2, 22)]:
        segment, _ = sketch(make_keys(6400, D), bits, stride=256)
        assert segment.nbytes / 6400 / 2 <= most + 1.01  # a byte of it for the centre


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_every_dtype_are_sketched(dtype, isa):
    keys = make_keys(72, 64).to(dtype)
    sampler = cpu.make_sketcher(64, 2, seed=0)
    segment = cpu.sketch([make_rows(keys, dtype)], sampler, 0, stride=8)
    wide, _ = sketch(keys.float(), 2)
    assert_same_sketch(segment, wide)


def test_rows_of_whole_numbers_are_sketched_as_what_they_stand_for(isa):
    keys, sampler = make_keys(72, 40), cpu.make_sketcher(40, 2, seed=0)
    centre = 7 * torch.randn(2, 40)
    numbers, scales = to_bytes(keys)
    rows = torch.zeros(2, 72, base.row_width(40, torch.int8), dtype=torch.int8)
    cpu.write_bytes(keys, rows, 0)
    segment = cpu.sketch([rows], sampler, 0, stride=8, row_centres=[centre])
    wide, _ = sketch(from_bytes(numbers, scales) + centre[:, None], 2)
    # Products with a scale may be rounded apart by one bit.
    assert float((segment.words == wide.words).double().mean()) > 0.99
    torch.testing.assert_close(segment.centres.float(), wide.centres.float(), rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(segment.scales.float(), wide.scales.float(), rtol=0.02, atol=1e-6)


def assert_same_sketch(a: base.SketchSegment, b: base.SketchSegment) -> None:
    """But for keys of a last block that are not there."""
    assert (a.count, a.blocks) == (b.count, b.blocks)
    last = a.count % 64 or 64
    assert torch.equal(a.words[:, :-1], b.words[:, :-1])
    assert torch.equal(a.words[:, -1, :, :last], b.words[:, -1, :, :last])
    assert torch.equal(a.scales[:, : a.count], b.scales[:, : a.count])
    assert torch.equal(a.centres, b.centres)


def test_pieces_make_the_same_sketch_as_a_whole(isa):
    keys = make_keys(304, 40)
    sampler = cpu.make_sketcher(40, 2, seed=0)
    whole = cpu.sketch([make_rows(keys)], sampler, 0, stride=8)
    parts = [make_rows(keys[:, a:b]) for a, b in [(0, 8), (8, 64), (64, 200), (200, 304)]]
    assert_same_sketch(cpu.sketch(parts, sampler, 0, stride=8), whole)


@pytest.mark.parametrize("newer", [8, 56, 64, 136])
@pytest.mark.parametrize("older", [8, 56, 64, 136])
@pytest.mark.parametrize("bits", [2, 3])
def test_a_sketch_goes_on_in_its_own_memory(older, newer, bits):
    keys = make_keys(older + newer, 40)
    sampler = cpu.make_sketcher(40, bits, seed=0)
    segment = cpu.new_sketch(2, older + newer, sampler, 64, 8)
    cpu.sketch_into(segment, 0, [make_rows(keys[:, :older])], sampler, stride=8)
    before = [x.clone() for x in (segment.words[:, : older // 64], segment.scales[:, :older])]
    cpu.sketch_into(segment, older, [make_rows(keys[:, older:])], sampler, stride=8)
    assert_same_sketch(segment, cpu.sketch([make_rows(keys)], sampler, 64, stride=8))
    assert torch.equal(segment.words[:, : older // 64], before[0])
    assert torch.equal(segment.scales[:, :older], before[1])
    assert (segment.first, segment.count) == (64, older + newer)


@pytest.mark.parametrize("stride", [0, 4, 12, 8192])
def test_strides_that_are_no_power_of_two_or_go_over_a_block_are_refused(stride):
    with pytest.raises(ValueError, match=rf"^stride={stride} is not allowed; allowed: powers of two from 8 to 4096$"):
        base.stride_shift(stride)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_weights_follow_from_codes_and_centres(D, bits, isa):
    keys, query = make_keys(200, D) + torch.randn(2, 1, D), 4 * torch.randn(3, D)
    segment, sampler = sketch(keys, bits)
    found = cpu.weigh(query, [segment], 1, sampler, stride=8, scale=D**-0.5)
    whole, _ = reference.quantise_query(query.double(), reference.make_rotation(D, 0).double())
    assert int((found.query.to(torch.int64) - whole).abs().max()) <= 1
    assert_weights_are_the_references(found, scores_of(found, segment, 1, bits, query, 8, scale=D**-0.5))


@pytest.mark.parametrize("sinks", [0, 1, 17, 64, 700])
@pytest.mark.parametrize("stride", STRIDES)
def test_strides_of_every_size_and_any_number_of_sinks(stride, sinks, isa):
    # Strides that lie far from each other, and an odd number of keys.
    keys, query = make_keys(1001, 64) + torch.randn(2, 126, 64).repeat_interleave(8, 1)[:, :1001], torch.randn(5, 64)
    segment, sampler = sketch(keys, 2, stride)
    found = cpu.weigh(query, [segment], 0, sampler, stride=stride, scale=0.2, sinks=sinks)
    assert_weights_are_the_references(found, scores_of(found, segment, 0, 2, query, stride, scale=0.2), sinks)
    for budget in (1, 100, 1001 - sinks, 2000):
        assert_same_draw(found.weights, budget)


@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_weights_with_a_softcap(softcap, isa):
    keys, query = make_keys(200, 64) + 2 * torch.randn(2, 1, 64), 8 * torch.randn(2, 64)
    segment, sampler = sketch(keys, 2)
    found = cpu.weigh(query, [segment], 0, sampler, stride=8, scale=0.2, softcap=softcap)
    settings = {"scale": 0.2, "softcap": softcap}
    assert_weights_are_the_references(found, scores_of(found, segment, 0, 2, query, 8, **settings))


@pytest.mark.parametrize("n", [4095, 8192, 9001, 40_000, 150_000])
def test_weights_of_many_keys_have_the_references_pilot(n, isa):
    keys, query = make_keys(n, 32, heads=1), torch.randn(2, 32)
    segment, sampler = sketch(keys, 4, stride=256)
    found = cpu.weigh(query, [segment], 0, sampler, stride=256, scale=0.1, sinks=4)
    assert_weights_are_the_references(found, scores_of(found, segment, 0, 4, query, 256, scale=0.1), 4)


@pytest.mark.parametrize("size", [1e3, 1e5, 1e7, 1e30])
def test_keys_with_far_larger_logits_than_others_have_the_largest_weights(size, isa):
    keys, query = make_keys(200, 64), size * torch.randn(2, 64)
    segment, sampler = sketch(keys, 2, centred=False)
    found = cpu.weigh(query, [segment], 0, sampler, stride=8, scale=0.2)
    levels = 2 * codes(segment, 0, 2, 64) - 3
    best = (found.query.double() @ levels.double().T * segment.scales[0, :200].double()).argmax(1)
    floor = int(0.05 * 2**30 / 200)
    assert (found.weights[best] >= floor + 2**26).all()
    assert int(found.weights.max()) <= floor + 2**27
    assert int(found.weights.median()) == floor
    assert_same_draw(found.weights, 20)


@pytest.mark.parametrize("R", GROUPS)
def test_groups_of_every_size_weigh_alike(R, isa):
    keys, query = make_keys(1000, 80), torch.randn(R, 80)
    segment, sampler = sketch(keys, 2)
    together = cpu.weigh(query, [segment], 0, sampler, stride=8, scale=0.1)
    alone = [cpu.weigh(query[h : h + 1], [segment], 0, sampler, stride=8, scale=0.1) for h in range(R)]
    # A head of several has a share of the weight: as many octaves less for a score.
    expected = torch.cat([own.log_normalisers for own in alone]) + math.log2(R)
    torch.testing.assert_close(together.log_normalisers, expected, rtol=0, atol=1e-5)
    assert torch.equal(together.query, torch.cat([own.query for own in alone]))
    if R & (R - 1) == 0:  # whole octaves: the same powers, but for rounding
        mean = sum(own.weights for own in alone) / R
        assert float(((together.weights - mean).abs() - 2).div(mean).max()) <= 1e-4
    assert_same_draw(together.weights, 20)


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0, 1e4, 1e9])
def test_logits_of_every_size_are_drawn_as_the_reference_draws(size, isa):
    segment, sampler = sketch(make_keys(1000, 64), 2)
    found = cpu.weigh(size * torch.randn(4, 64), [segment], 0, sampler, stride=8, scale=0.125)
    for budget in [1, 10, 200]:
        assert_same_draw(found.weights, budget)


@pytest.mark.parametrize("n", SIZES)
def test_the_same_weights_give_the_same_sample(n, isa):
    segment, sampler = sketch(make_keys(n, 64), 2)
    found = cpu.weigh(4 * torch.randn(4, 64), [segment], 1, sampler, stride=8, scale=0.125)
    for budget in sorted({1, 2, n // 10 + 1, n // 2 + 1, n, 2 * n}):
        for phase in (1, 2):
            assert_same_draw(found.weights, budget, phase)


@pytest.mark.parametrize("tail", [0.5, 1.0, 2.0])
def test_weights_with_a_long_tail_are_drawn_as_the_reference_draws(tail, isa):
    # The longer the tail, the more often the keys that are certain leave others that then are certain too.
    weights = (1000 * (1 - torch.rand(5000)) ** -tail).clamp(max=2.0**27).to(torch.int64)
    for budget in [1, 7, 64, 1000, 4999]:
        assert_same_draw(weights, budget)


def test_a_step_longer_than_32_bits(isa):
    weights = torch.full((4096,), 2**27)
    assert reference.step_for(weights, 64) == 2**33
    assert_same_draw(weights, 64)


def test_keys_past_the_count_do_not_exist(isa):
    query = torch.randn(3, 64)
    segment, sampler = sketch(make_keys(100, 64), 2)
    keys = replace(segment, count=70)
    short, _ = sketch(make_keys(100, 64), 2)  # something else where it ends
    short.words[:, 0], short.scales[:, :64] = segment.words[:, 0], segment.scales[:, :64]
    short.words[:, 1, :, :6], short.scales[:, 64:70] = segment.words[:, 1, :, :6], segment.scales[:, 64:70]
    short.centres[:, :9] = segment.centres[:, :9]
    other = replace(short, count=70)
    found, same = (cpu.weigh(query, [each], 0, sampler, stride=8, scale=0.5) for each in (keys, other))
    assert torch.equal(found.weights, same.weights)
    assert torch.equal(found.log_normalisers, same.log_normalisers)
    assert int(cpu.draw(found.weights, 70, seed=0, head=0, position=0).ids.max()) == 69
    assert_same_draw(found.weights, 30)


def test_one_key_with_nearly_all_of_the_weight_leaves_the_rest_their_share(isa):
    # More keys are certain than a first look at the heaviest ones finds.
    n, budget = 4096, 64
    keys = 0.01 * torch.randn(1, n, 64)
    query = torch.ones(1, 64)
    keys[0, 7] = 5.0
    keys[0, 100:163] += 0.3 * torch.linspace(0.5, 1, 63)[:, None]
    segment, sampler = sketch(keys, 4, centred=False)
    found = cpu.weigh(query, [segment], 0, sampler, stride=8, scale=1.0)
    assert_same_draw(found.weights, budget)
    assert 7 in cpu.draw(found.weights, budget, seed=0, head=0, position=0).ids


def test_zero_keys_and_zero_queries_are_drawn_evenly(isa):
    segment, sampler = sketch(torch.zeros(1, 640, 64), 2)
    for query in [torch.zeros(2, 64), torch.randn(2, 64)]:
        found = cpu.weigh(query, [segment], 0, sampler, stride=8, scale=1.0)
        assert len(found.weights.unique()) == 1
        drawn = cpu.draw(found.weights, 64, seed=0, head=0, position=0)
        assert len(drawn.ids) == 64
        assert set((drawn.ids // 64).bincount().tolist()) == {6, 7}  # of 10 parts of the text, each has its share
        assert_same_draw(found.weights, 64)


# --- the second phase -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize(("D", "R"), [(1, 1), (40, 3), (64, 4), (80, 7), (128, 2), (256, 8), (512, 5)])
def test_rows_are_weighed_by_their_logits(D, R, dtype, isa):
    keys, query = make_keys(5000, D, heads=1)[0], 2 * torch.randn(R, D)
    # Nothing may depend on the values.
    values = torch.full_like(keys, torch.nan if dtype != torch.int8 else 0.0)
    whole = dtype == torch.int8
    blocks = cpu.interleave(keys, values, dtype) if whole else base.as_rows(keys.to(dtype), values.to(dtype))
    stored, _ = halves(blocks, D)
    offsets = torch.randn(R, 2)
    for n in SIZES:
        ids, log_u = torch.randperm(5000)[:n].sort().values, -torch.randn(n).abs()
        for softcap in (0.0, 3.0):
            for joined in (None, offsets):
                found = cpu.weigh_rows(
                    query, blocks.split(4096), ids, log_u, scale=D**-0.5, offsets=joined, softcap=softcap
                )
                logits = D**-0.5 * (query.double() @ stored[ids].double().T)
                logits = logits if joined is None else logits + joined.double()[:, ids // 4096]
                logits = softcap * torch.tanh(logits / softcap) if softcap else logits
                expected = reference.weigh_logits(logits, log_u)
                # A logit is a sum of D products in float32; a weight follows its rounding.
                rounding = 2e-5 * max(1.0, float(logits.abs().max()))
                assert float(((found - expected).abs() - 1).div(expected).max()) <= rounding
                assert_same_draw(found, max(1, n // 4), phase=2)


def test_logits_that_are_no_numbers_weigh_next_to_nothing(isa):
    keys = torch.randn(100, 64)
    keys[7] = torch.inf
    found = cpu.weigh_rows(
        torch.ones(2, 64), [base.as_rows(keys, keys)], torch.arange(100), torch.zeros(100), scale=1.0
    )
    assert found.ge(1).all()
    assert found.le(2**30 + 1).all()


def test_no_rows_have_no_weights(isa):
    keys, nothing = torch.randn(10, 64), torch.zeros(0)
    found = cpu.weigh_rows(torch.ones(2, 64), [base.as_rows(keys, keys)], nothing.long(), nothing, scale=1.0)
    assert found.shape == (0,)
