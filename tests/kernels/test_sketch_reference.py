"""Sketches: what is kept of a key, what is said of a logit, and a walk along integer weights."""

import math

import pytest
import torch

from magicpig.kernels.algorithm import attend_full, attend_sketch, predicted_errors
from magicpig.kernels.attend.reference import attend, merge, predicted_error
from magicpig.kernels.sketch import reference as sketch
from magicpig.types import AttentionState

pytestmark = pytest.mark.usefixtures("one_thread")

# Squared error of the best uniform quantiser of a normal deviate (Max 1960, table II), by bits.
DISTORTION = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154}


KEYS = [(0, 0, 0, 0, 0), (1, 2, 3, 4, 5), (2**63 - 1, 79, 7, 10**6, 4096)]  # of starts


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(*shape: int, high: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("D", [1, 2, 40, 128])
def test_a_rotation_is_orthogonal_and_depends_on_the_seed_alone(D):
    rotation = sketch.make_rotation(D, seed=3)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(D), rtol=0, atol=1e-5)
    torch.manual_seed(1)
    assert torch.equal(sketch.make_rotation(D, seed=3), rotation)
    if D > 1:
        assert not torch.equal(sketch.make_rotation(D, seed=4), rotation)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_are_odd_numbers_of_so_many_bits(bits):
    codes = sketch.quantise(3 * normal(2000, 24), sketch.make_rotation(24, 0), bits)
    assert codes.levels.unique().tolist() == list(range(1 - 2**bits, 2**bits, 2))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_sketch_is_as_near_to_its_key_as_the_quantiser_promises(bits):
    # Rotated keys of D coordinates are like normal deviates divided by their length: for D = 256 not far from normal.
    keys = normal(400, 256) * torch.linspace(0.1, 30, 400)[:, None]
    rotation = sketch.make_rotation(256, 0).double()
    levels, scales = sketch.quantise(keys, rotation, bits)
    error = ((keys - scales[:, None] * (levels.double() @ rotation.T)).norm(dim=1) / keys.norm(dim=1)).square()
    assert float(error.mean()) == pytest.approx(DISTORTION[bits], rel=0.05)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("D", [64, 256])
def test_the_noise_of_scores_is_known_before_there_are_logits(D, bits):
    # Keys of all lengths and in few directions, and heads of different lengths: 5000 keys say it within a percent.
    keys = normal(5000, 40) @ normal(40, D, seed=1) * torch.linspace(0.2, 2, 5000)[:, None]
    query, rotation, scale = normal(3, D, seed=2) * torch.tensor([[1.0], [2.0], [0.1]]), sketch.make_rotation(D, 0), 0.3
    codes = sketch.quantise(keys, rotation.double(), bits)
    scores = sketch.score(*sketch.quantise_query(query, rotation), codes, scale=scale) * math.log(2)
    error = (scores - scale * query @ keys.T).square().mean().sqrt()
    # Of few directions a rotation makes coordinates that are not quite normal: seeds differ by some percent.
    assert sketch.score_noise(query, codes.scales, bits, scale=scale) == pytest.approx(float(error), rel=0.12)


def test_more_noise_never_means_fewer_candidates():
    counts = [sketch.candidates_by_noise(512, noise / 100) for noise in range(400)]
    assert counts == sorted(counts)
    assert (counts[0], counts[80], counts[-1]) == (512, 1024, 4096)
    assert sketch.candidates_by_noise(1, 0.5) == 2
    assert sketch.candidates_by_noise(512, math.nan) == sketch.candidates_by_noise(512, math.inf) == 4096


def test_scales_leave_an_error_at_a_right_angle_to_the_levels():
    keys, rotation = normal(50, 32), sketch.make_rotation(32, 0).double()
    levels, scales = sketch.quantise(keys, rotation, 2)
    left = (keys @ rotation - scales[:, None] * levels) * levels
    # But for the rounding of a scale to eleven bits
    assert float((left.sum(1) / (levels * levels).sum(1) / scales).abs().max()) <= 2**-11


def test_a_key_of_length_zero_scores_nothing_and_a_huge_one_stays_finite():
    keys = torch.stack([torch.zeros(16), torch.full((16,), 1e30)])
    codes = sketch.quantise(keys, sketch.make_rotation(16, 0), 2)
    assert codes.scales.tolist() == [0.0, 65504.0]
    query, unit = sketch.quantise_query(torch.ones(1, 16), sketch.make_rotation(16, 0))
    assert float(sketch.score(query, unit, codes, scale=1.0)[0, 0]) == 0.0


def test_queries_keep_two_digits():
    query, rotation = normal(5, 64), sketch.make_rotation(64, 0).double()
    whole, unit = sketch.quantise_query(query, rotation)
    assert whole.abs().amax(1).tolist() == [127] * 5
    assert float((whole * unit[:, None] - query @ rotation).abs().max()) <= 0.5 * float(unit.max()) * (1 + 1e-12)
    nothing, unit = sketch.quantise_query(torch.zeros(1, 64), rotation)
    assert not nothing.any()
    assert unit.tolist() == [0.0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_scores_are_logits_of_base_two(bits):
    keys, query, rotation = normal(300, 48), 5 * normal(3, 48, seed=1), sketch.make_rotation(48, 0).double()
    codes = sketch.quantise(keys, rotation, bits)
    whole, unit = sketch.quantise_query(query, rotation)
    logits = 0.2 * (whole * unit[:, None]) @ (codes.scales[:, None] * codes.levels).T
    torch.testing.assert_close(sketch.score(whole, unit, codes, scale=0.2), logits / math.log(2))


def test_a_softcap_acts_on_scores():
    keys, rotation = normal(100, 32), sketch.make_rotation(32, 0).double()
    codes = sketch.quantise(keys, rotation, 2)
    query = sketch.quantise_query(20 * normal(2, 32, seed=1), rotation)
    offset = normal(2, 100, seed=2)
    plain = sketch.score(*query, codes, scale=0.2)
    torch.testing.assert_close(
        sketch.score(*query, codes, scale=0.2, offset=offset), plain + offset / math.log(2), rtol=1e-12, atol=1e-12
    )
    capped = sketch.score(*query, codes, scale=0.2, offset=offset, softcap=5.0)
    torch.testing.assert_close(capped, 5 * torch.tanh((plain * math.log(2) + offset) / 5) / math.log(2))


def test_a_centre_of_each_stride_leaves_less_to_sketch():
    # Strides that lie about centres as long as their spread: half of the squares are in the centres.
    strides, keys = normal(20, 1, 64, seed=1), normal(20, 32, 64)
    keys = (keys + strides).flatten(0, 1)
    centres = sketch.stride_centres(keys, 32)
    assert centres.shape == (20, 64)
    assert torch.equal(centres, centres.to(torch.bfloat16).double())
    mean = keys.unflatten(0, (20, 32)).mean(1)
    assert float(((centres - mean).abs() / mean.abs()).max()) <= 2**-8
    rotation, query = sketch.make_rotation(64, 0).double(), normal(3, 64, seed=3)
    whole, unit = sketch.quantise_query(query, rotation)
    around = sketch.quantise(keys - centres.repeat_interleave(32, 0), rotation, 2)
    offset = sketch.centre_offsets(query, centres, 32, scale=0.2)
    torch.testing.assert_close(offset[:, 31], 0.2 * query @ centres[0])
    right = 0.2 * query @ keys.T / math.log(2)
    error = (sketch.score(whole, unit, around, scale=0.2, offset=offset) - right).square().mean()
    alone = (sketch.score(whole, unit, sketch.quantise(keys, rotation, 2), scale=0.2) - right).square().mean()
    # A key's error is of the size of what is sketched of it, at a right angle: half of the squares.
    assert float(error / alone) == pytest.approx(0.5, rel=0.1)


def test_centres_of_the_largest_keys_are_finite():
    assert sketch.stride_centres(torch.full((8, 4), 3.4e38, dtype=torch.float64), 8).float().isfinite().all()


def test_powers_of_two_lie_on_the_lines_between_them():
    x = torch.arange(-30 * 128, 3 * 128 + 1).double() / 128
    powers, exact = sketch.power_of_two(x).double(), 2.0**x
    assert torch.equal(powers[::128], exact[::128])
    assert ((powers >= exact * (1 - 1e-12)) & (powers <= 1.0615 * exact)).all()
    assert (powers.diff() > 0).all()
    assert sketch.power_of_two(torch.tensor([-1e9, 1e9, 5.0]), most=3).tolist() == [2.0**-30, 8.0, 8.0]


@pytest.mark.parametrize("n", [1, 63, 64, 65, 8191, 8192, 16_384, 100_000, 131_072, 300_001])
def test_a_pilot_has_no_sinks_and_is_otherwise_as_if_they_were_not_there(n):
    for sinks in {1, 4, 63, 64, 65, n // 2, n - 1} - {n}:
        if sinks < n:
            before = sinks // 64 * 64
            expected = sketch.pilot(n - before) + before
            assert torch.equal(sketch.pilot(n, sinks), expected[expected >= sinks])
            assert len(sketch.pilot(n, sinks)) > 0


@pytest.mark.parametrize("n", [1, 63, 64, 65, 8191, 8192, 16_384, 100_000, 131_072, 300_001])
def test_a_pilot_is_one_block_of_neighbours_out_of_as_many_as_are_far_apart(n):
    keys = sketch.pilot(n)
    blocks = -(-n // 64)
    apart = min(-(-blocks // 32), 16)
    assert (keys.diff() > 0).all()
    assert int(keys.min()) >= 0
    assert int(keys.max()) < n
    chosen = (keys // 64).unique()
    # One of each `apart` blocks, and all of its keys
    assert torch.equal(chosen // apart, torch.arange(-(-blocks // apart)))
    assert len(keys) == sum(min(64, n - 64 * int(block)) for block in chosen)
    if apart > 1:
        # Of `apart` places, so many draws meet this many on average.
        met = apart * (1 - (1 - 1 / apart) ** len(chosen))
        assert len((chosen % apart).unique()) >= 0.8 * met
    else:
        assert len(keys) == n


def test_weights_are_the_mean_softmax_over_heads_and_a_floor():
    logits = torch.stack([5 * normal(1000), 2 * normal(1000, seed=1), torch.zeros(1000).double()])
    weights = sketch.weigh(logits / math.log(2))
    floor = int(0.05 * 2**30 / 1000)
    assert int(weights.min()) >= floor
    shares = (weights - floor) / (0.95 * 2**30)
    # A power errs by up to 6 %, and so does the sum it is divided by. No head gives a key more than 2**25.
    expected = logits.softmax(-1).mean(0)
    light = weights < 2**25
    assert int(light.sum()) > 980
    assert float((shares / expected - 1)[light].abs().max()) <= 0.13
    assert (weights[~light] <= 2**27 + floor).all()
    assert (expected[~light] > 0.03).all()


def test_weights_of_many_keys_are_shares_but_for_a_factor_of_each_head():
    scores = torch.stack([3 * normal(20_000), normal(20_000, seed=1)])
    weights, each = sketch.weigh(scores), [sketch.weigh(own[None]) for own in scores]
    floor = int(0.05 * 2**30 / 20_000)
    expected = sum((own - floor).double() for own in each) / 2 + floor
    assert float((weights - expected).abs().max()) <= 2
    # 1280 keys of the pilot have sums of powers with standard errors of about a quarter, and a fiftieth.
    totals = torch.tensor([float((own - floor).double().sum()) for own in each]) / (0.95 * 2**30)
    assert 0.3 < float(totals[0]) < 1.8
    assert 0.92 < float(totals[1]) < 1.08


def test_sinks_weigh_nothing_and_change_nothing_for_the_others():
    scores = torch.stack([3 * normal(1000), normal(1000, seed=1)])
    scores[:, :5] += 100.0
    weights, alone = sketch.weigh(scores, sinks=5), sketch.weigh(scores[:, 5:])
    assert not weights[:5].any()
    assert torch.equal(weights[5:], alone)
    step = sketch.step_for(weights, 50)
    assert step == sketch.step_for(alone, 50)
    assert sketch.step_for(weights, 995) == 1
    for start in range(0, step, step // 37):
        assert int(sketch.pick(weights, step, start)[0].min()) >= 5
    everything, log_u = sketch.pick(weights, 1, 0)
    assert everything.tolist() == list(range(5, 1000))
    assert not log_u.any()


def test_every_key_has_a_weight_however_many_there_are():
    weights = sketch.weigh(torch.tensor([[0.0] + [-1e4] * 999]))
    assert weights[1:].unique().tolist() == [int(0.05 * 2**30 / 1000)]


@pytest.mark.parametrize("budget", [1, 2, 10, 99, 100, 1000])
@pytest.mark.parametrize("high", [2, 50, 10**8])
def test_step_spends_the_budget(high, budget):
    weights = integers(100, high=high) ** 2
    step = sketch.step_for(weights, budget)
    spent = int(weights.clamp(max=step).sum()) / step
    if budget >= 100:
        assert step == 1
    elif step == 1:
        assert spent >= budget
    else:
        # A step is rounded down: by less than one in `step`, which the budget multiplies.
        assert budget <= spent < budget * (1 + 1 / step) + 1e-9


@pytest.mark.parametrize("budget", [1, 3, 7, 12])
def test_over_all_starts_a_key_is_picked_exactly_as_often_as_u_says(budget):
    weights = torch.tensor([3, 1, 40, 2, 7, 7, 1, 1, 90, 5, 12, 2, 2, 3])
    step = sketch.step_for(weights, budget)
    picked = torch.zeros(len(weights), dtype=torch.int64)
    for start in range(step):
        ids, log_u = sketch.pick(weights, step, start)
        picked[ids] += 1
        torch.testing.assert_close(log_u.exp(), (weights[ids] / step).clamp(max=1).double())
        assert abs(len(ids) - int(weights.clamp(max=step).sum()) / step) < 1
    assert torch.equal(picked, weights.clamp(max=step))


def test_weights_of_logits_are_the_mean_softmax_over_probabilities():
    logits, log_u = torch.stack([3 * normal(400), 20 + normal(400, seed=1)]), -normal(400, seed=2).abs()
    weights = sketch.weigh_logits(logits, log_u)
    expected = ((logits - log_u).exp() / (logits - log_u).exp().sum(1, keepdim=True)).mean(0)
    assert ((weights - 1 - 2**30 * expected).abs() <= 1).all()
    assert abs(int(weights.sum()) - 2**30) <= 400
    # In proportion to what a key adds to the sums, with the probability that it is there in the first place
    certain = sketch.weigh_logits(logits[:1], torch.zeros(400).double())
    assert float((certain / certain.sum() - logits[0].softmax(-1)).abs().max()) <= 1e-6
    # One key with all of the weight, and logits that are no numbers
    assert sketch.weigh_logits(torch.tensor([[800.0, 0.0, -800.0]]), torch.zeros(3)).tolist() == [2**30 + 1, 1, 1]
    assert sketch.weigh_logits(torch.full((2, 3), math.nan), torch.zeros(3)).tolist() == [1, 1, 1]


def starts_of(first: int, second: int):
    return lambda draw, step: (first if draw % 2 == 0 else second) % step


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_over_all_starts_of_both_phases_sums_are_exact(rows):
    weights = torch.tensor([3, 1, 40, 2, 7, 7, 1, 1, 24, 5, 12, 2, 2, 3])
    # The second phase has long steps: of its starts every 2**20-th, and a few more.
    logits, values = normal(2, 14), normal(14, 3, seed=1)
    step = sketch.step_for(weights, 8)
    total, exact = torch.zeros(2, 3).double(), logits.exp() @ values
    for start in range(step):
        ids, log_u = sketch.pick(weights, step, start)
        again = sketch.step_for(sketch.weigh_logits(logits[:, ids], log_u), rows)
        seconds = range(0, again, max(1, again // 400))
        for second in seconds:
            drawn, log_uu = sketch.draw(weights, lambda i: logits[:, i], rows, 8, starts_of(start, second))[:2]
            assert abs(len(drawn) - rows) <= 1
            assert set(drawn.tolist()) <= set(ids.tolist())
            total += (logits[:, drawn] - log_uu).exp() @ values[drawn] / len(seconds) / step
    # 400 starts are a grid, whose sums err by about 1 / 400 of a step
    assert float((total - exact).abs().max()) <= 0.02 * float((logits.exp() @ values.abs()).max())


def test_as_many_candidates_as_rows_are_the_sample():
    weights = integers(1000, high=10**6)
    starts = starts_of(12345, 999)
    step = sketch.step_for(weights, 50)
    ids, log_u = sketch.pick(weights, step, 12345 % step)

    def never(ids):
        raise AssertionError("no key need be looked at")

    for candidates in (1, 49, 50):
        drawn = sketch.draw(weights, never, 50, candidates, starts)
        assert torch.equal(drawn[0], ids)
        assert torch.equal(drawn[1], log_u)


def test_all_keys_as_candidates_are_drawn_by_their_logits_alone():
    logits = 2 * normal(3, 500)
    ids, log_u = sketch.draw(integers(500, high=9), lambda i: logits[:, i], 60, 500, starts_of(0, 77777))[:2]
    weights = sketch.weigh_logits(logits, torch.zeros(500))
    expected = sketch.pick(weights, sketch.step_for(weights, 60), 77777)
    assert torch.equal(ids, expected[0])
    assert torch.equal(log_u, expected[1])


def all_drawn(logits: torch.Tensor, rows: int) -> sketch.TwoPhases:
    """A draw of `rows` keys of which all are candidates."""
    n = logits.shape[1]
    return sketch.draw(torch.full((n,), 1000), lambda ids: logits[:, ids], rows, n, starts_of(0, 12345))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_as_many_rows_are_drawn_as_the_error_asked_for_takes(spread, seed):
    # All keys are candidates and all values are as far from the output: errors follow from the probabilities alone.
    n, epsilon, logits = 4000, 0.05, spread * normal(3, 4000, seed=seed)
    shares = logits.softmax(1)
    weights = sketch.weigh_logits(logits, torch.zeros(n))

    def errors(rows: int) -> torch.Tensor:
        u = (weights / sketch.step_for(weights, rows)).clamp(max=1).double()
        return (shares.square() * (1 / u - 1)).sum(1).sqrt()

    far = 0.4 / float(errors(64).max())  # of values: so that 64 rows err by 0.4, of an output as long as it seems
    true = math.sqrt(1 - 0.4**2)  # what it is, over what it seems
    rows = sketch.more_rows(64, all_drawn(logits, 64), logits, far * errors(64), epsilon)
    assert far / true * float(errors(rows).max()) <= 1.02 * sketch.AIM * epsilon
    # No more than an eighth of an octave, and eight rows, above that
    assert far / true * float(errors(int(rows / 1.12) - 8).max()) > sketch.AIM * epsilon


def test_candidates_stand_for_the_keys_that_they_were_drawn_from():
    # Of equal keys: (N/B - 1) falls as the square of the error.
    n, epsilon, error = 100_000, 0.1, 0.3
    logits = torch.zeros(2, n, dtype=torch.float64)
    drawn = sketch.draw(torch.full((n,), 1000), lambda ids: logits[:, ids], 64, 256, starts_of(3, 5))
    rows = sketch.more_rows(64, drawn, logits[:, drawn.candidates], torch.tensor([error, 0.01]), epsilon)
    square = error**2 / (1 - error**2)
    expected = n / (1 + (n / 64 - 1) * (sketch.AIM * epsilon) ** 2 / square)
    assert expected <= 1.01 * rows <= 1.12 * expected + 8


def test_one_phase_knows_the_square_root_law_alone():
    logits = normal(2, 1000)
    drawn = sketch.draw(integers(1000, high=10**6), lambda ids: logits[:, ids], 64, 64, starts_of(1, 2))
    errors = torch.tensor([0.05, 3 * sketch.AIM * 0.1])
    squares = float(errors[1]) ** 2
    more = sketch.more_rows(64, drawn, logits[:, drawn.ids], errors, 0.1)
    assert more == pytest.approx(64 * 9 / (1 - squares), abs=1)
    assert sketch.more_rows(64, drawn, logits[:, drawn.ids], torch.tensor([0.0, 0.1]), 0.1) == 90


@pytest.mark.parametrize("errors", [[math.inf, 0.1], [0.1, math.nan]])
def test_an_error_that_is_not_known_takes_everything(errors):
    logits = normal(2, 1000)
    assert sketch.more_rows(64, all_drawn(logits, 64), logits, torch.tensor(errors), 0.05) > 2**25


def test_what_is_enough():
    assert sketch.is_enough(0.05, 0.05, first=True)
    assert not sketch.is_enough(0.051, 0.05, first=True)
    assert sketch.is_enough(0.0549, 0.05, first=False)
    assert not sketch.is_enough(0.056, 0.05, first=False)
    assert not sketch.is_enough(math.nan, 0.05, first=False)
    assert sketch.first_rows(512, None) == 512
    assert sketch.first_rows(512, 0.05) == 64
    assert sketch.first_rows(20, 0.05) == 20


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 100, 1024, 5000])
def test_a_walk_comes_to_every_key_once(n):
    assert torch.equal(sketch.walk_order(n).sort().values, torch.arange(n))


def test_a_walk_keeps_neighbours_together():
    order = sketch.walk_order(4096)
    for size in (2, 16, 64, 1024):  # every node of the tree, in one go
        parts = order.view(-1, size) // size
        assert (parts == parts[:, :1]).all()
    swapped = (order.view(-1, 2)[:, 0] % 2).double()  # 2048 fair coins
    assert abs(float(swapped.mean()) - 0.5) < 5 * 0.5 / math.sqrt(2048)


def test_starts_are_spread_and_reproducible():
    step = 1000
    starts = [
        sketch.start_for(seed, layer, head, position, draw, step)
        for seed in range(2)
        for layer in range(4)
        for head in range(4)
        for position in range(25)
        for draw in (sketch.draw_number(1, 512), sketch.draw_number(2, 512))
    ]
    assert all(0 <= start < step for start in starts)
    # 1600 uniform numbers from 0 to 999: their mean has a standard error of 7.2
    assert abs(sum(starts) / len(starts) - 499.5) < 5 * 7.2
    assert len(set(starts)) > 700
    # Written down, so that another program, or another year, draws the same
    assert [sketch.start_for(*key, 2**30) for key in KEYS] == [
        506173094,
        607050349,
        761028288,
    ]


def test_a_budget_of_all_keys_is_exact_attention():
    query, keys, values = normal(6, 20), normal(2, 90, 20, seed=1), normal(2, 90, 9, seed=2)
    state, samples = attend_sketch(
        query, keys, values, bits=2, budget=80, candidates=80, sinks=3, recent=7, stride=4, scale=0.2
    )
    exact = attend_full(query, keys, values, scale=0.2)
    torch.testing.assert_close(state.output, exact.output, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.lse, exact.lse, rtol=1e-12, atol=1e-12)
    assert samples[0].ids.tolist() == list(range(3, 80))
    assert not samples[0].log_u.any()
    assert not predicted_errors(state, samples, query, keys, values, scale=0.2).any()


def test_short_contexts_are_exact():
    query, keys, values = normal(2, 20), normal(1, 10, 20, seed=1), normal(1, 10, 9, seed=2)
    state, samples = attend_sketch(query, keys, values, bits=2, budget=8, candidates=32, sinks=3, recent=7, scale=0.2)
    torch.testing.assert_close(state.output, attend_full(query, keys, values, scale=0.2).output)
    assert [len(sample.ids) for sample in samples] == [0, 0]
    # Samples of nothing say nothing: that nothing was left out knows who asked for them.
    assert predicted_errors(state, samples, query, keys, values, scale=0.2).isnan().all()


def test_heads_of_a_group_share_rows_and_groups_do_not():
    query, keys, values = normal(4, 20), normal(2, 900, 20, seed=1), normal(2, 900, 9, seed=2)
    state, samples = attend_sketch(
        query, keys, values, bits=2, budget=50, candidates=200, sinks=3, recent=7, stride=8, scale=0.2
    )
    assert samples[0] is samples[1]
    assert not torch.equal(samples[0].ids, samples[2].ids)
    assert 49 <= len(samples[0].ids) <= 51
    assert state.output.shape == (4, 9)
    assert (predicted_errors(state, samples, query, keys, values, scale=0.2) > 0).all()


def test_predicted_error_is_its_formula():
    query, keys, values = normal(2, 8), normal(30, 8, seed=1), normal(30, 5, seed=2)
    log_u = -normal(20, seed=3).abs()
    exact = attend(query, keys[20:], values[20:], scale=0.3)
    state = merge([exact, attend(query, keys[:20], values[:20], scale=0.3, log_u=log_u)])
    error = predicted_error(state, query, keys[:20], values[:20], log_u, scale=0.3)
    for h in range(2):
        terms = (0.3 * keys @ query[h]).exp()
        x = terms[:20] / log_u.exp() / state.lse[h].exp()
        away = (values[:20] - state.output[h]).norm(dim=1)
        variance = sum(float((1 - u) * xi**2 * a**2) for u, xi, a in zip(log_u.exp(), x, away, strict=True))
        assert float(error[h]) == pytest.approx(math.sqrt(variance) / float(state.output[h].norm()), rel=1e-9)


def test_nothing_uncertain_has_no_predicted_error():
    state = AttentionState(torch.zeros(1, 4), torch.zeros(1))
    rows = torch.ones(3, 4), torch.ones(3, 4)
    assert predicted_error(state, torch.ones(1, 4), *rows, torch.zeros(3), scale=1.0).tolist() == [0.0]
    assert predicted_error(state, torch.ones(1, 4), *rows, torch.full((3,), -1.0), scale=1.0).tolist() == [math.inf]


def test_a_sample_of_nothing_and_one_too_large_to_be_squared_predict_nothing():
    state = AttentionState(torch.ones(1, 4), torch.zeros(1))
    nothing = torch.ones(0, 4), torch.ones(0, 4), torch.ones(0)
    assert predicted_error(state, torch.ones(1, 4), *nothing, scale=1.0).isnan().all()
    huge = torch.ones(3, 4), torch.full((3, 4), 1e25)
    for value in (1.0, 2e25):
        state = AttentionState(torch.full((1, 4), value), torch.zeros(1))
        assert not predicted_error(state, torch.ones(1, 4), *huge, torch.full((3,), -1.0), scale=1.0).isfinite().any()
