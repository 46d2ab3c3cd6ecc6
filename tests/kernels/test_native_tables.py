"""Native tables against the reference, bit for bit: same buckets, same sample, for the same codes."""

import pytest
import torch
from torch import Tensor

from magicpig.kernels import base, cpu
from magicpig.kernels.tables import reference

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [0, 1, 15, 17, 63, 64, 65, 1000]


def random_codes(G: int, n: int, K: int, L: int) -> Tensor:
    """(G, n, L) int64, as the reference has them."""
    return torch.randint(2**K, (G, n, L))


def native_form(codes: Tensor) -> Tensor:
    return codes.mT.contiguous().to(torch.uint16)


def build(codes: Tensor, K: int, first: int = 0) -> base.Segment:
    return cpu.build(native_form(codes), K, first)


def lookup(query_codes: Tensor, segment: base.Segment, head: int, min_hits: int) -> Tensor:
    return cpu.lookup(query_codes.to(torch.uint16), segment, head, min_hits)


def assert_equals_reference(segment: base.Segment, codes: Tensor, K: int) -> None:
    G, n, L = codes.shape
    assert segment.count == n
    assert segment.K == K
    assert segment.offsets.shape == (G, L, 2**K + 1)
    assert segment.ids.shape == (G, L, n)
    for g in range(G):
        expected = reference.build(codes[g], K)
        assert torch.equal(segment.offsets[g].to(torch.int64), expected.offsets)
        assert torch.equal(segment.ids[g].to(torch.int64), expected.ids)


def assert_equal_segments(a: base.Segment, b: base.Segment) -> None:
    assert (a.first, a.count) == (b.first, b.count)
    assert torch.equal(a.offsets.to(torch.int64), b.offsets.to(torch.int64))
    assert torch.equal(a.ids.to(torch.int64), b.ids.to(torch.int64))


@pytest.mark.parametrize("K", [1, 5, 10, 16])
@pytest.mark.parametrize("n", SIZES)
def test_build_is_the_references(n, K):
    codes = random_codes(3, n, K, L=4)
    assert_equals_reference(build(codes, K), codes, K)


def test_build_of_a_full_segment_uses_all_sixteen_bits_of_an_id():
    n = base.SEGMENT_ROWS
    codes = random_codes(2, n, 8, L=2)
    segment = build(codes, 8)
    assert_equals_reference(segment, codes, 8)
    assert int(segment.ids.to(torch.int64).max()) == 65535


def test_build_of_identical_codes_is_one_full_bucket():
    n = base.SEGMENT_ROWS
    codes = torch.full((1, n, 1), 3)
    segment = build(codes, 2)
    assert segment.offsets.to(torch.int64).tolist() == [[[0, 0, 0, 0, n]]]
    assert torch.equal(segment.ids.to(torch.int64)[0, 0], torch.arange(n))


def test_every_pool_builds_the_same(pool):
    codes = random_codes(2, 1000, 8, L=30)
    assert_equals_reference(build(codes, 8), codes, 8)


@pytest.mark.parametrize("newer", SIZES)
@pytest.mark.parametrize("older", SIZES)
def test_extend_is_the_build_of_both(older, newer):
    K = 5
    codes = random_codes(2, older + newer, K, L=3)
    a, b = build(codes[:, :older], K, first=100), build(codes[:, older:], K, first=100 + older)
    assert_equal_segments(cpu.extend(a, b), build(codes, K, first=100))


def test_extend_fills_a_segment_to_the_last_key():
    K, older = 8, 60_000
    codes = random_codes(1, base.SEGMENT_ROWS, K, L=2)
    a, b = build(codes[:, :older], K), build(codes[:, older:], K, first=older)
    assert_equal_segments(cpu.extend(a, b), build(codes, K))


def test_extend_leaves_its_arguments_alone():
    codes = random_codes(2, 100, 4, L=3)
    a, b = build(codes[:, :60], 4), build(codes[:, 60:], 4, first=60)
    cpu.extend(a, b)
    assert_equal_segments(a, build(codes[:, :60], 4))
    assert_equal_segments(b, build(codes[:, 60:], 4, first=60))


@pytest.mark.parametrize("count", [0, 1, 14, 63, 64, 65, 999, 1000])
def test_shorten_is_the_build_of_a_prefix(count):
    codes = random_codes(2, 1000, 6, L=5)
    segment = build(codes, 6, first=7)
    assert_equal_segments(cpu.shorten(segment, count), build(codes[:, :count], 6, first=7))
    assert_equal_segments(segment, build(codes, 6, first=7))


def test_shorten_compares_ids_as_numbers_from_0_to_65535():
    # As signed 16-bit numbers the ids of the second half would be negative and pass for the smallest.
    codes = random_codes(1, base.SEGMENT_ROWS, 6, L=2)
    count = 40_000
    assert_equal_segments(cpu.shorten(build(codes, 6), count), build(codes[:, :count], 6))


@pytest.mark.parametrize("K", [1, 4, 9])
@pytest.mark.parametrize("n", SIZES)
def test_lookup_is_the_references(n, K, isa):
    L = 9
    codes = random_codes(2, n, K, L)
    segment = build(codes, K)
    for query in random_codes(1, 10, K, L)[0]:
        for g in range(2):
            tables = reference.build(codes[g], K)
            for min_hits in [1, 2, 3, 4, 5]:
                found = lookup(query, segment, g, min_hits)
                assert found.dtype == torch.int64
                assert torch.equal(found, reference.lookup(query, *tables, min_hits))


def test_lookup_in_a_full_segment_is_the_references(isa):
    K, L = 6, 40
    codes = random_codes(1, base.SEGMENT_ROWS, K, L)
    segment = build(codes, K)
    query = codes[0, -1]
    for min_hits in [1, 2, 3]:
        found = lookup(query, segment, 0, min_hits)
        assert torch.equal(found, reference.lookup_brute_force(query, codes[0], min_hits))
    assert found[-1] == base.SEGMENT_ROWS - 1


@pytest.mark.parametrize("min_hits", [1, 2, 3, 5, 44, 45, 127])
@pytest.mark.parametrize("L", [150, 255, 256, 257, 300, 512, 1024])
def test_counters_do_not_wrap_when_every_table_agrees(L, min_hits, isa):
    # A byte comes back to 0 after 256 hits, to 44 after 300.
    for n in [1, 65, 1000]:
        segment = build(torch.full((1, n, L), 5), 4)
        query = torch.full((L,), 5)
        assert torch.equal(lookup(query, segment, 0, min_hits), torch.arange(n))


@pytest.mark.parametrize("L", [300, 1024])
def test_counters_keep_keys_just_below_and_just_above_the_threshold_apart(L, isa):
    # Key i agrees in i tables, spread over the first, the last or all of them.
    min_hits, n = 127, 200
    hits = torch.arange(n)[:, None]
    query = torch.ones(L, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.stack([torch.randperm(L, generator=generator) for _ in range(n)])
    for order in [torch.arange(L).expand(n, L), torch.arange(L).flip(0).expand(n, L), shuffled]:
        codes = (order < hits).long()[None]
        found = lookup(query, build(codes, 1), 0, min_hits)
        assert torch.equal(found, torch.arange(min_hits, n))


def test_nothing_is_found_when_nothing_collides(isa):
    segment = build(torch.zeros(1, 500, 6, dtype=torch.int64), 3)
    assert lookup(torch.full((6,), 7), segment, 0, 1).tolist() == []


@pytest.mark.parametrize("first", [0, 4, 65_540, 2**31 - 70_000])
def test_positions_count_from_the_first_key_of_the_segment(first, isa):
    K, L = 3, 8
    codes = random_codes(1, 1000, K, L)
    query = random_codes(1, 1, K, L)[0, 0]
    found = lookup(query, build(codes, K, first), 0, 2)
    assert 0 < len(found) < 1000
    assert torch.equal(found, first + reference.lookup_brute_force(query, codes[0], 2))


def test_codes_of_sixteen_bits(isa):
    K, L = 16, 5
    codes = torch.tensor([0, 1, 32767, 32768, 65535]).repeat(20)[None, :, None].expand(1, 100, L)
    segment = build(codes, K)
    for code in [0, 1, 2, 32767, 32768, 65534, 65535]:
        found = lookup(torch.full((L,), code), segment, 0, L)
        assert torch.equal(found, (codes[0, :, 0] == code).nonzero()[:, 0])


def test_arguments_that_do_not_fit_are_refused():
    codes = native_form(random_codes(1, 10, 4, 3))
    segment = cpu.build(codes, 4, first=0)
    with pytest.raises(ValueError, match=r"^codes must be contiguous uint16$"):
        cpu.build(codes.to(torch.int64), 4, 0)
    with pytest.raises(ValueError, match=r"^codes must be contiguous uint16$"):
        cpu.build(codes.mT, 4, 0)
    with pytest.raises(ValueError, match=r"^a segment holds at most 65536 keys, got 65537$"):
        cpu.build(torch.zeros(1, 1, 65537, dtype=torch.uint16), 4, 0)
    with pytest.raises(ValueError, match=r"^b must begin where a ends$"):
        cpu.extend(segment, segment)
    longer = cpu.build(torch.zeros(1, 3, 65530, dtype=torch.uint16), 4, first=10)
    with pytest.raises(ValueError, match=r"^a segment holds at most 65536 keys$"):
        cpu.extend(segment, longer)
    for count in [-1, 11]:
        with pytest.raises(ValueError, match=rf"^count={count} is out of range; allowed: 0 to 10$"):
            cpu.shorten(segment, count)
    with pytest.raises(ValueError, match=r"^query codes must be contiguous uint16$"):
        cpu.lookup(torch.zeros(3, dtype=torch.int64), segment, 0, 1)
