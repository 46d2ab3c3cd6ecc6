"""SimHash in plain PyTorch: the sign pattern of a vector under random hyperplanes (Charikar 2002).

Knows vectors and planes; does not know which vectors are keys, if they were centred, or what codes are for.
"""

import torch
from torch import Tensor

from magicpig.errors import ArgumentError

CENTRE_STRIDES, CENTRE_KEYS = 16, 4096  # of a segment, at most, whose mean is its centre


def make_planes(head_dim: int, K: int, L: int, seed: int) -> Tensor:
    """Draw the normals of ``L * K`` random hyperplanes: float32 of shape (head_dim, L * K).

    Column ``t * K + k`` decides bit ``k`` of the code in table ``t``. Entries are standard normal, rounded to
    bfloat16 values so that every instruction set multiplies the very same numbers. The draw depends on
    ``seed`` alone and leaves PyTorch's global generator untouched.
    """
    generator = torch.Generator().manual_seed(seed)
    # Drawn in float64: PyTorch's float32 sampler takes another path on machines with AVX2.
    normals = torch.randn(head_dim, L * K, generator=generator, dtype=torch.float64, device="cpu")
    return normals.to(torch.bfloat16).to(torch.float32)


def hash_vectors(vectors: Tensor, planes: Tensor, K: int) -> Tensor:
    """Hash ``vectors`` (..., n, D) with ``planes`` (D, L * K) to codes (..., n, L), int64 in [0, 2**K).

    Bit ``k`` of a code is set where the vector, its entries rounded to bfloat16, lies strictly on the positive side of
    its plane: a zero vector has code 0. Products are exact; sums are in float64 for float64 vectors and in float32
    otherwise, so where one is within rounding of zero, its order decides the bit.
    Raises ArgumentError if the planes do not make a whole number of tables.
    """
    if planes.shape[-1] % K:
        raise ArgumentError(f"planes must have a multiple of K = {K} columns, got {planes.shape[-1]}")
    working = torch.promote_types(vectors.dtype, torch.float32)
    rounded = vectors.to(torch.float32).to(torch.bfloat16).to(working)
    bits = rounded @ planes.to(working) > 0
    powers = 2 ** torch.arange(K, dtype=torch.int64, device=vectors.device)
    codes: Tensor = (bits.unflatten(-1, (-1, K)) * powers).sum(-1)
    return codes


def centre_strides(indexed: int, stride: int) -> int:
    """How many of the ``indexed`` strides of an index segment, at least one, make its centre."""
    most = max(1, min(CENTRE_STRIDES, CENTRE_KEYS // stride))
    return min(most, 1 << indexed.bit_length() - 1)


def segment_centre(keys: Tensor, stride: int) -> Tensor:
    """The centre (D,) that is taken off ``keys`` (n, D), all of one index segment, before they are hashed.

    The mean of the first strides, a power of two of them and 16 at most: so it follows from how many keys there are,
    and hardly ever changes when there are more.
    """
    first = centre_strides(len(keys) // stride, stride) * stride
    return keys[:first].to(torch.promote_types(keys.dtype, torch.float32)).mean(0)
