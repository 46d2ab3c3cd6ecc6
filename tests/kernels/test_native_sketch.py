"""Native sketches: codes and scores as near to the reference as rounding allows, and from scores on the same sample."""

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


def assert_same_draw(scored: native.SketchScores, budget: int, doublings: int = 0) -> None:
    drawn = native.draw(scored, budget, seed=5, head=3, position=77, doublings=doublings)
    weights = reference.weigh(scored.scores)
    assert torch.equal(drawn.weights, weights)
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
        assert float(segment.largest[g]) == float(scales.max())


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
    assert torch.equal(both.largest, whole.largest)
    assert (both.first, both.count) == (10, older + newer)
    with pytest.raises(ValueError, match=r"^b must begin where a ends$"):
        native.join(b, a)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_scores_follow_from_codes_exactly(D, bits, isa):
    keys, query = make_keys(200, D), 4 * torch.randn(3, D)
    segment, sampler = sketch(keys, bits)
    scored = native.score(query, segment, 1, sampler, scale=D**-0.5)
    whole, unit = reference.quantise_query(query.double(), reference.make_rotation(D, 0).double())
    assert int((scored.query.to(torch.int64) - whole).abs().max()) <= 1
    levels = 2 * codes(segment, 1, bits, D) + 1 - 2**bits
    own = reference.Sketch(levels, segment.scales[1, :200].double())
    expected = reference.score(scored.query.to(torch.int64), unit, own, bits, scale=D**-0.5)
    assert torch.equal(scored.scores.fraction_bits, expected.fraction_bits)
    # Three float32 roundings of a score of up to 16 bits
    assert int((scored.scores.fixed - expected.fixed).abs().max()) <= 1
    assert float((scored.scores.fixed != expected.fixed).double().mean()) <= 0.02


@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_scores_with_a_softcap(softcap, isa):
    keys, query = make_keys(200, 64), 8 * torch.randn(2, 64)
    segment, sampler = sketch(keys, 2)
    offset = torch.tensor([1.0, -3.0])
    scored = native.score(query, segment, 0, sampler, scale=0.2, offset=offset, softcap=softcap)
    rotation = reference.make_rotation(64, 0).double()
    expected = reference.score(
        *reference.quantise_query(query.double(), rotation),
        reference.Sketch(2 * codes(segment, 0, 2, 64) - 3, segment.scales[0, :200].double()),
        2,
        scale=0.2,
        offset=offset.double(),
        softcap=softcap,
    )
    assert torch.equal(scored.scores.fraction_bits, expected.fraction_bits)
    assert int((scored.scores.fixed - expected.fixed).abs().max()) <= 1


@pytest.mark.parametrize("size", [1e3, 1e5, 1e7, 1e30])
def test_scores_of_any_size_fit_their_bits_and_keep_their_order(size, isa):
    keys, query = make_keys(200, 64), size * torch.randn(2, 64)
    segment, sampler = sketch(keys, 2)
    scored = native.score(query, segment, 0, sampler, scale=0.2)
    levels = 2 * codes(segment, 0, 2, 64) - 3
    logits = scored.query.double() @ levels.double().T * segment.scales[0, :200].double()
    expected = 32767 / 2 * logits / logits.abs().amax(1, keepdim=True)
    room = scored.scores.fixed.double().abs().amax(1, keepdim=True) / 32767
    assert float(room.min()) > 0.05
    assert float(room.max()) <= 1
    assert float((scored.scores.fixed / (2 * room) - expected).abs().max()) <= 1 / float(room.min())
    assert_same_draw(scored, 20)


@pytest.mark.parametrize("R", GROUPS)
def test_groups_of_every_size_score_alike(R, isa):
    keys, query = make_keys(130, 80), torch.randn(R, 80)
    segment, sampler = sketch(keys, 2)
    together = native.score(query, segment, 0, sampler, scale=0.1)
    for h in range(R):
        alone = native.score(query[h : h + 1], segment, 0, sampler, scale=0.1)
        assert torch.equal(together.scores.fixed[h], alone.scores.fixed[0])
        assert together.sums[h] == alone.sums[0]
    assert_same_draw(together, 20)


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0, 1e4, 1e9])
def test_logits_of_every_size_are_drawn_as_the_reference_draws(size, isa):
    segment, sampler = sketch(make_keys(1000, 64), 2)
    scored = native.score(size * torch.randn(4, 64), segment, 0, sampler, scale=0.125)
    for budget in [1, 10, 200]:
        assert_same_draw(scored, budget)


@pytest.mark.parametrize("n", SIZES)
def test_the_same_scores_give_the_same_sample(n, isa):
    segment, sampler = sketch(make_keys(n, 64), 2)
    scored = native.score(4 * torch.randn(4, 64), segment, 1, sampler, scale=0.125)
    for budget in sorted({1, 2, n // 10 + 1, n // 2 + 1, n, 2 * n}):
        for doublings in [0, 1, 5]:
            assert_same_draw(scored, budget, doublings)


def test_keys_past_the_count_do_not_exist(isa):
    query = torch.randn(3, 64)
    segment, sampler = sketch(make_keys(100, 64), 2)
    cut = native.SketchSegment(segment.words, segment.scales, segment.largest, segment.first, 70)
    scored, longer = (native.score(query, each, 0, sampler, scale=0.5) for each in (cut, segment))
    assert torch.equal(scored.scores.fixed, longer.scores.fixed[:, :70])
    assert int(native.draw(scored, 70, seed=0, head=0, position=0).ids.max()) == 69
    assert_same_draw(scored, 30)


def test_one_key_with_nearly_all_of_the_weight_leaves_the_rest_their_share(isa):
    # More keys are certain than a first look at the heaviest ones finds.
    n, budget = 4096, 64
    keys = 0.01 * torch.randn(1, n, 64)
    query = torch.ones(1, 64)
    keys[0, 7] = 5.0
    keys[0, 100:163] += 0.3 * torch.linspace(0.5, 1, 63)[:, None]
    segment, sampler = sketch(keys, 4)
    scored = native.score(query, segment, 0, sampler, scale=1.0)
    assert_same_draw(scored, budget)
    assert 7 in native.draw(scored, budget, seed=0, head=0, position=0).ids


def test_zero_keys_and_zero_queries_are_drawn_evenly(isa):
    segment, sampler = sketch(torch.zeros(1, 640, 64), 2)
    for query in [torch.zeros(2, 64), torch.randn(2, 64)]:
        scored = native.score(query, segment, 0, sampler, scale=1.0)
        assert not scored.scores.fixed.any()
        drawn = native.draw(scored, 64, seed=0, head=0, position=0)
        assert len(drawn.ids) == 64
        assert set((drawn.ids // 64).bincount().tolist()) == {6, 7}  # of 10 parts of the text, each has its share
        assert_same_draw(scored, 64)
