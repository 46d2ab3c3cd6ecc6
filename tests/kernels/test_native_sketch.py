"""Native sketches: codes and weights as near to the reference as rounding allows; then the same sample."""

import math

import pytest
import torch
from torch import Tensor

from magicpig.kernels import native
from magicpig.kernels.sketch import reference

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD_DIMS = [1, 40, 64, 80, 96, 128, 192, 256, 512]
GROUPS = [1, 2, 3, 4, 5, 7, 8, 16]
SIZES = [1, 15, 63, 64, 65, 1000, 4097]


def make_keys(n: int, D: int, heads: int = 2) -> Tensor:
    return 3 * torch.randn(heads, n, D) * torch.rand(heads, n, 1)


def make_rows(keys: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.zeros(*keys.shape[:2], 2 * native.padded(keys.shape[2]), dtype=dtype)
    rows[:, :, : keys.shape[2]] = keys
    return rows


def sketch(keys: Tensor, bits: int) -> tuple[native.SketchSegment, native._native.SketchSampler]:
    sampler = native.make_sketcher(keys.shape[2], bits, seed=0)
    return native.sketch([make_rows(keys)], sampler, first=4), sampler


def codes(segment: native.SketchSegment, head: int, bits: int, D: int) -> Tensor:
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


def assert_weights_are_the_references(found: native.SketchWeights, scores: Tensor) -> None:
    """scores: (R, n) float64, from the whole numbers and codes of the native ones."""
    (ones, _), expected = reference.ones(scores), reference.weigh(scores)
    # A score, and what it is relative to, are float32 numbers in 2**-23 octaves that five operations have rounded.
    octaves = 5 * (float(scores.abs().max()) + 160) * 2**-24
    assert float((found.ones - ones).abs().max()) <= 2 * octaves
    assert float(((found.weights - expected).abs() - 1).div(expected).max()) <= 3 * octaves


def assert_same_draw(weights: Tensor, budget: int, doublings: int = 0) -> None:
    drawn = native.draw(weights, budget, seed=5, head=3, position=77, doublings=doublings)
    assert drawn.step == reference.step_for(weights, budget)
    assert drawn.start == reference.start_for(5, 3, 77, drawn.step)
    ids, log_u = reference.pick(weights, drawn.step, drawn.start, doublings)
    assert torch.equal(drawn.ids, ids)
    torch.testing.assert_close(drawn.log_u.double(), log_u, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_codes_and_scales_are_the_references(D, bits, isa):
    keys = make_keys(130, D)
    segment, _ = sketch(keys, bits)
    rotation = reference.make_rotation(D, 0).double()
    for g in range(2):
        expected = reference.quantise(keys[g].double(), rotation, bits)
        levels = 2 * codes(segment, g, bits, D) + 1 - 2**bits
        # A coordinate within rounding of the border between two levels may fall to either side.
        other = levels != expected.levels
        assert int(other.sum()) <= 2
        assert int((levels - expected.levels).abs().max()) <= 2
        same = ~other.any(1)
        scales = segment.scales[g, :130].double()
        # One unit in the last of eleven bits
        torch.testing.assert_close(scales[same], expected.scales[same], rtol=2**-10, atol=0)


def test_a_sketch_takes_a_few_bits_a_coordinate():
    for D, bits, most in [(128, 2, 34), (128, 1, 18), (128, 3, 50), (128, 4, 66), (64, 2, 18), (80, 2, 22)]:
        segment, _ = sketch(make_keys(6400, D), bits)
        assert segment.nbytes / 6400 / 2 <= most + 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_every_dtype_are_sketched(dtype, isa):
    keys = make_keys(70, 64).to(dtype)
    sampler = native.make_sketcher(64, 2, seed=0)
    segment = native.sketch([make_rows(keys, dtype)], sampler, first=0)
    wide, _ = sketch(keys.float(), 2)
    assert torch.equal(segment.words, wide.words)
    assert torch.equal(segment.scales, wide.scales)


def test_pieces_make_the_same_sketch_as_a_whole(isa):
    keys = make_keys(300, 40)
    sampler = native.make_sketcher(40, 2, seed=0)
    whole = native.sketch([make_rows(keys)], sampler, first=0)
    pieces = native.sketch([make_rows(keys[:, a:b]) for a, b in [(0, 1), (1, 65), (65, 200), (200, 300)]], sampler, 0)
    assert torch.equal(pieces.words, whole.words)
    assert torch.equal(pieces.scales, whole.scales)


@pytest.mark.parametrize("newer", [1, 63, 64, 130])
@pytest.mark.parametrize("older", [1, 63, 64, 130])
@pytest.mark.parametrize("bits", [2, 3])
def test_join_is_the_sketch_of_both(older, newer, bits):
    keys = make_keys(older + newer, 40)
    sampler = native.make_sketcher(40, bits, seed=0)
    a = native.sketch([make_rows(keys[:, :older])], sampler, first=10)
    b = native.sketch([make_rows(keys[:, older:])], sampler, first=10 + older)
    both, whole = native.join(a, b), native.sketch([make_rows(keys)], sampler, first=10)
    assert torch.equal(both.words, whole.words)
    assert torch.equal(both.scales, whole.scales)
    assert (both.first, both.count) == (10, older + newer)
    with pytest.raises(ValueError, match=r"^b must begin where a ends$"):
        native.join(b, a)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_weights_follow_from_codes(D, bits, isa):
    keys, query = make_keys(200, D), 4 * torch.randn(3, D)
    segment, sampler = sketch(keys, bits)
    found = native.weigh(query, segment, 1, sampler, scale=D**-0.5)
    whole, unit = reference.quantise_query(query.double(), reference.make_rotation(D, 0).double())
    assert int((found.query.to(torch.int64) - whole).abs().max()) <= 1
    levels = 2 * codes(segment, 1, bits, D) + 1 - 2**bits
    own = reference.Sketch(levels, segment.scales[1, :200].double())
    assert_weights_are_the_references(found, reference.score(found.query.long(), unit, own, scale=D**-0.5))


@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_weights_with_a_softcap(softcap, isa):
    keys, query = make_keys(200, 64), 8 * torch.randn(2, 64)
    segment, sampler = sketch(keys, 2)
    offset = torch.tensor([1.0, -3.0])
    found = native.weigh(query, segment, 0, sampler, scale=0.2, offset=offset, softcap=softcap)
    _, unit = reference.quantise_query(query.double(), reference.make_rotation(64, 0).double())
    own = reference.Sketch(2 * codes(segment, 0, 2, 64) - 3, segment.scales[0, :200].double())
    settings = {"scale": 0.2, "offset": offset.double(), "softcap": softcap}
    assert_weights_are_the_references(found, reference.score(found.query.long(), unit, own, **settings))


@pytest.mark.parametrize("n", [4095, 8192, 9001, 40_000, 150_000])
def test_weights_of_many_keys_have_the_references_pilot(n, isa):
    keys, query = make_keys(n, 32, heads=1), torch.randn(2, 32)
    segment, sampler = sketch(keys, 4)
    found = native.weigh(query, segment, 0, sampler, scale=0.1)
    _, unit = reference.quantise_query(query.double(), reference.make_rotation(32, 0).double())
    own = reference.Sketch(2 * codes(segment, 0, 4, 32) - 15, segment.scales[0, :n].double())
    assert_weights_are_the_references(found, reference.score(found.query.long(), unit, own, scale=0.1))


@pytest.mark.parametrize("size", [1e3, 1e5, 1e7, 1e30])
def test_keys_with_far_larger_logits_than_others_have_the_largest_weights(size, isa):
    keys, query = make_keys(200, 64), size * torch.randn(2, 64)
    segment, sampler = sketch(keys, 2)
    found = native.weigh(query, segment, 0, sampler, scale=0.2)
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
    together = native.weigh(query, segment, 0, sampler, scale=0.1)
    alone = [native.weigh(query[h : h + 1], segment, 0, sampler, scale=0.1) for h in range(R)]
    # A head of several has a share of the weight: as many octaves less for a score.
    expected = torch.cat([own.ones for own in alone]) + math.log2(R)
    torch.testing.assert_close(together.ones, expected, rtol=0, atol=1e-5)
    assert torch.equal(together.query, torch.cat([own.query for own in alone]))
    if R & (R - 1) == 0:  # whole octaves: the same powers, but for rounding
        mean = sum(own.weights for own in alone) / R
        assert float(((together.weights - mean).abs() - 2).div(mean).max()) <= 1e-4
    assert_same_draw(together.weights, 20)


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0, 1e4, 1e9])
def test_logits_of_every_size_are_drawn_as_the_reference_draws(size, isa):
    segment, sampler = sketch(make_keys(1000, 64), 2)
    found = native.weigh(size * torch.randn(4, 64), segment, 0, sampler, scale=0.125)
    for budget in [1, 10, 200]:
        assert_same_draw(found.weights, budget)


@pytest.mark.parametrize("n", SIZES)
def test_the_same_weights_give_the_same_sample(n):
    segment, sampler = sketch(make_keys(n, 64), 2)
    found = native.weigh(4 * torch.randn(4, 64), segment, 1, sampler, scale=0.125)
    for budget in sorted({1, 2, n // 10 + 1, n // 2 + 1, n, 2 * n}):
        for doublings in [0, 1, 5]:
            assert_same_draw(found.weights, budget, doublings)


@pytest.mark.parametrize("tail", [0.5, 1.0, 2.0])
def test_weights_with_a_long_tail_are_drawn_as_the_reference_draws(tail):
    # The longer the tail, the more often the keys that are certain leave others that then are certain too.
    weights = (1000 * (1 - torch.rand(5000)) ** -tail).clamp(max=2.0**27).to(torch.int64)
    for budget in [1, 7, 64, 1000, 4999]:
        assert_same_draw(weights, budget)


def test_a_step_longer_than_32_bits():
    weights = torch.full((4096,), 2**27)
    assert reference.step_for(weights, 64) == 2**33
    assert_same_draw(weights, 64)
    assert_same_draw(weights, 64, doublings=2)


def test_keys_past_the_count_do_not_exist(isa):
    query = torch.randn(3, 64)
    segment, sampler = sketch(make_keys(100, 64), 2)
    keys = native.SketchSegment(segment.words, segment.scales, segment.first, 70)
    short, _ = sketch(make_keys(100, 64), 2)  # something else where it ends
    short.words[:, 0], short.scales[:, :64] = segment.words[:, 0], segment.scales[:, :64]
    short.words[:, 1, :, :6], short.scales[:, 64:70] = segment.words[:, 1, :, :6], segment.scales[:, 64:70]
    other = native.SketchSegment(short.words, short.scales, segment.first, 70)
    found, same = (native.weigh(query, each, 0, sampler, scale=0.5) for each in (keys, other))
    assert torch.equal(found.weights, same.weights)
    assert torch.equal(found.ones, same.ones)
    assert int(native.draw(found.weights, 70, seed=0, head=0, position=0).ids.max()) == 69
    assert_same_draw(found.weights, 30)


def test_one_key_with_nearly_all_of_the_weight_leaves_the_rest_their_share(isa):
    # More keys are certain than a first look at the heaviest ones finds.
    n, budget = 4096, 64
    keys = 0.01 * torch.randn(1, n, 64)
    query = torch.ones(1, 64)
    keys[0, 7] = 5.0
    keys[0, 100:163] += 0.3 * torch.linspace(0.5, 1, 63)[:, None]
    segment, sampler = sketch(keys, 4)
    found = native.weigh(query, segment, 0, sampler, scale=1.0)
    assert_same_draw(found.weights, budget)
    assert 7 in native.draw(found.weights, budget, seed=0, head=0, position=0).ids


def test_zero_keys_and_zero_queries_are_drawn_evenly(isa):
    segment, sampler = sketch(torch.zeros(1, 640, 64), 2)
    for query in [torch.zeros(2, 64), torch.randn(2, 64)]:
        found = native.weigh(query, segment, 0, sampler, scale=1.0)
        assert len(found.weights.unique()) == 1
        drawn = native.draw(found.weights, 64, seed=0, head=0, position=0)
        assert len(drawn.ids) == 64
        assert set((drawn.ids // 64).bincount().tolist()) == {6, 7}  # of 10 parts of the text, each has its share
        assert_same_draw(found.weights, 64)
