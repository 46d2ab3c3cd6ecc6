"""SimHash codes: signs of projections, packed, reproducible."""

import math

import pytest
import torch

from magicpig.kernels.hash.reference import hash_vectors, make_planes


@pytest.mark.parametrize("K", [1, 2, 10, 11, 15, 16])
@pytest.mark.parametrize("n", [0, 1, 15, 17])
def test_a_code_is_the_signs_of_its_tables_projections(K, n):
    L, D = 7, 24
    planes = make_planes(D, K, L, seed=3)
    vectors = torch.randn(n, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    codes = hash_vectors(vectors, planes, K)
    rounded = vectors.to(torch.bfloat16).double()
    assert codes.shape == (n, L)
    assert codes.dtype == torch.int64
    for i in range(n):
        for t in range(L):
            bits = [int(rounded[i] @ planes[:, t * K + k].double() > 0) for k in range(K)]
            assert codes[i, t] == sum(bit << k for k, bit in enumerate(bits))


def test_leading_axes_are_kept():
    planes = make_planes(8, K=5, L=3, seed=0)
    vectors = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(2))
    codes = hash_vectors(vectors, planes, K=5)
    assert codes.shape == (2, 4, 6, 3)
    torch.testing.assert_close(codes[1, 2], hash_vectors(vectors[1, 2], planes, K=5))


def test_length_of_a_vector_does_not_matter_and_opposites_differ_in_every_bit():
    K, L = 9, 40
    planes = make_planes(16, K, L, seed=5)
    vectors = torch.randn(30, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    codes = hash_vectors(vectors, planes, K)
    assert torch.equal(hash_vectors(vectors * 1024.0, planes, K), codes)
    assert torch.equal(hash_vectors(-vectors, planes, K), codes ^ (2**K - 1))


def test_zero_has_code_zero():
    planes = make_planes(16, K=10, L=6, seed=0)
    assert hash_vectors(torch.zeros(2, 16), planes, K=10).eq(0).all()
    assert hash_vectors(-torch.zeros(2, 16), planes, K=10).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_vectors_of_every_precision_are_hashed_at_their_values_in_bfloat16(dtype):
    # A float32 sum of 32 exact products errs by less than 32 * 2**-24 of the sum of magnitudes, itself below
    # |x| |plane| < 6 * 9; a projection farther from zero than that must get its true sign.
    planes = make_planes(32, K=8, L=50, seed=1)
    vectors = torch.randn(40, 32, generator=torch.Generator().manual_seed(4)).to(dtype)
    rounded = vectors.to(torch.bfloat16).double()
    projections = rounded @ planes.double()
    clear = (projections.abs() > 32 * 2**-24 * 54).unflatten(-1, (50, 8)).all(-1)
    assert clear.float().mean() > 0.9
    exact = hash_vectors(rounded, planes, K=8)
    assert torch.equal(hash_vectors(vectors, planes, K=8)[clear], exact[clear])


def test_planes_depend_on_the_seed_alone():
    torch.manual_seed(0)
    first = make_planes(64, K=10, L=20, seed=7)
    before = torch.random.get_rng_state()
    torch.manual_seed(123)
    assert torch.equal(make_planes(64, K=10, L=20, seed=7), first)
    assert not torch.equal(make_planes(64, K=10, L=20, seed=8), first)
    torch.manual_seed(0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_planes_are_bfloat16_values_in_float32():
    planes = make_planes(48, K=3, L=5, seed=0)
    assert planes.dtype == torch.float32
    assert planes.shape == (48, 15)
    assert torch.equal(planes.to(torch.bfloat16).float(), planes)


def test_planes_are_standard_normal():
    count = 128 * 10 * 150
    planes = make_planes(128, K=10, L=150, seed=0).double()
    # Five standard errors: of the mean, 1 / sqrt(n); of the variance, sqrt(2 / n). Rounding to eight bits
    # adds at most 2**-17 to the variance. Directions are independent: so are their products, with variance 1.
    assert abs(planes.mean()) < 5 / math.sqrt(count)
    assert abs(planes.var() - 1) < 5 * math.sqrt(2 / count) + 2**-17
    assert abs((planes[:, :-1] * planes[:, 1:]).mean()) < 5 / math.sqrt(count)


def test_planes_that_make_no_whole_table_are_refused():
    with pytest.raises(ValueError, match=r"^planes must have a multiple of K = 7 columns, got 30$"):
        hash_vectors(torch.zeros(1, 8), make_planes(8, K=10, L=3, seed=0), K=7)
