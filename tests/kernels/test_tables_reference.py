"""Hash tables against the definition they exist to speed up."""

import pytest
import torch

from magicpig.kernels.tables.reference import build, extend, lookup, lookup_brute_force

SIZES = [0, 1, 15, 17, 1000]


def random_codes(n: int, K: int, L: int, seed: int) -> torch.Tensor:
    return torch.randint(2**K, (n, L), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("min_hits", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("K", [1, 4, 11])
@pytest.mark.parametrize("n", SIZES)
def test_lookup_finds_what_the_definition_says(n, K, min_hits):
    L = 9
    codes = random_codes(n, K, L, seed=n + K)
    tables = build(codes, K)
    for query in random_codes(20, K, L, seed=1):
        found = lookup(query, *tables, min_hits)
        assert found.dtype == torch.int64
        assert torch.equal(found, lookup_brute_force(query, codes, min_hits))


def test_brute_force_counts_tables_not_bits():
    keys = torch.tensor([[1, 2, 3], [1, 2, 0], [0, 2, 0], [0, 0, 0]])
    query = torch.tensor([1, 2, 3])
    assert lookup_brute_force(query, keys, 1).tolist() == [0, 1, 2]
    assert lookup_brute_force(query, keys, 2).tolist() == [0, 1]
    assert lookup_brute_force(query, keys, 3).tolist() == [0]


def test_more_collisions_than_a_byte_can_count():
    # 300 identical codes: a counter of 8 bits would come back to 44 hits, and 256 of them to none.
    L = 300
    codes = torch.full((17, L), 5)
    tables = build(codes, K=4)
    query = torch.full((L,), 5)
    for min_hits in [1, 2, 45, 256, 300]:
        assert lookup(query, *tables, min_hits).tolist() == list(range(17))
    assert lookup(query[:256], *build(codes[:, :256], K=4), min_hits=1).tolist() == list(range(17))


def test_nothing_is_found_when_nothing_collides():
    tables = build(torch.zeros(50, 6, dtype=torch.int64), K=3)
    assert lookup(torch.full((6,), 7), *tables, min_hits=1).tolist() == []


@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize("n", SIZES)
def test_buckets_partition_the_ids_in_ascending_order(n, K):
    L = 4
    codes = random_codes(n, K, L, seed=2)
    offsets, ids = build(codes, K)
    assert offsets.shape == (L, 2**K + 1)
    assert ids.shape == (L, n)
    assert offsets[:, 0].eq(0).all()
    assert offsets[:, -1].eq(n).all()
    for t in range(L):
        for code in range(2**K):
            bucket = ids[t, offsets[t, code] : offsets[t, code + 1]]
            assert torch.equal(bucket, (codes[:, t] == code).nonzero().squeeze(-1))


@pytest.mark.parametrize("K", [1, 4, 11])
@pytest.mark.parametrize("newer", SIZES)
@pytest.mark.parametrize("older", SIZES)
def test_extending_equals_building_from_the_concatenation(older, newer, K):
    codes = random_codes(older + newer, K, L=5, seed=older + newer)
    extended = extend(build(codes[:older], K), build(codes[older:], K))
    rebuilt = build(codes, K)
    assert torch.equal(extended.offsets, rebuilt.offsets)
    assert torch.equal(extended.ids, rebuilt.ids)


@pytest.mark.parametrize("code", [-1, 16])
def test_codes_that_do_not_fit_are_refused(code):
    with pytest.raises(ValueError, match=r"^codes must lie in 0 \.\. 15 for K = 4"):
        build(torch.tensor([[3], [code]]), K=4)


def test_zero_hits_are_refused():
    codes = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^min_hits must be at least 1, got 0$"):
        lookup(codes[0], *build(codes, K=1), min_hits=0)
    with pytest.raises(ValueError, match=r"^min_hits must be at least 1, got 0$"):
        lookup_brute_force(codes[0], codes, min_hits=0)
