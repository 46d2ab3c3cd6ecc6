"""The twin of kernels/hash: sign patterns of vectors, packed into codes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from magicpig.errors import ArgumentError

TABLES = 16  # of a program: what a product of matrices has at least


def hash_vectors(vectors: Tensor, planes: Tensor, K: int) -> Tensor:
    """Codes (n, L) int32 of vectors (n, D) by planes (D, L * K), float32: see kernels/hash/reference.py.

    Sums are in float32: where one is within rounding of zero, its order decides the bit.
    Raises ArgumentError if the planes do not make a whole number of tables.
    """
    (n, D), columns = vectors.shape, planes.shape[1]
    if columns % K:
        raise ArgumentError(f"planes has {columns} columns; expected a multiple of K={K}")
    L = columns // K
    codes = torch.empty(n, L, dtype=torch.int32, device=vectors.device)
    rounded = vectors.to(torch.float32).to(torch.bfloat16)
    block_d = max(16, triton.next_power_of_2(D))
    grid = (triton.cdiv(n, 16), triton.cdiv(L, TABLES))
    if n:
        _hash[grid](rounded.contiguous(), planes.contiguous(), codes, n, D, L, K, block_d, TABLES)
    return codes


@triton.jit
def _hash(vectors, planes, codes, n, D, L, K, BLOCK_D: tl.constexpr, TABLES: tl.constexpr):
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    table = tl.program_id(1) * TABLES + tl.arange(0, TABLES)
    d = tl.arange(0, BLOCK_D)
    x = tl.load(vectors + row[:, None] * D + d[None, :], mask=(row[:, None] < n) & (d[None, :] < D), other=0.0)
    x = x.to(tl.float32)
    code = tl.zeros((16, TABLES), tl.int32)
    for k in range(K):
        at = planes + d[:, None] * (L * K) + table[None, :] * K + k
        normal = tl.load(at, mask=(d[:, None] < D) & (table[None, :] < L), other=0.0)
        side = tl.dot(x, normal, input_precision="ieee")
        code += (side > 0).to(tl.int32) << k
    tl.store(codes + row[:, None] * L + table[None, :], code, mask=(row[:, None] < n) & (table[None, :] < L))
