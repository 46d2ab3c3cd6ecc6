// Vectors -> signs of their projections on K*L directions. A register tile of kHashRows vectors against W-wide columns;
// directions are bfloat16 pairs, so that every level multiplies the same numbers (accumulation is float32).
#pragma once

namespace {

constexpr int kHashRows = kRegisters == 32 ? 4 : 3;
constexpr int kHashColumns = kRegisters / 8;  // vectors of W directions

#if defined(MAGICPIG_BF16)
// Two bfloat16 products and their sum in one instruction; the emulation serves to test this code on any AVX-512 machine.
inline F dot_pair(F acc, U directions, uint32_t x_pair) {
#if defined(MAGICPIG_EMULATE_BF16)
  const U x = x_pair - U{};
  acc = acc + (F)(directions << 16) * (F)(x << 16);
  return acc + (F)(directions & 0xffff0000u) * (F)(x & 0xffff0000u);
#else
  return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)directions, (__m512bh)_mm512_set1_epi32((int)x_pair));
#endif
}
#endif

template <int M>
inline void hash_tile(const float* x, int64_t stride, int pairs, const uint16_t* tile, uint64_t* bits, int64_t step) {
  uint64_t word[M] = {};
  for (int column = 0; column < kTileDirections; column += kHashColumns * W) {
    F acc[M][kHashColumns] = {};
    for (int pair = 0; pair < pairs; ++pair) {
      const uint16_t* from = tile + ((int64_t)pair * kTileDirections + column) * 2;
      U packed[kHashColumns];
      memcpy(packed, from, sizeof packed);
#if defined(MAGICPIG_BF16)
      for (int m = 0; m < M; ++m) {
        uint32_t x_pair;
        memcpy(&x_pair, (const uint16_t*)(x + m * stride) + 2 * pair, 4);
        for (int c = 0; c < kHashColumns; ++c) acc[m][c] = dot_pair(acc[m][c], packed[c], x_pair);
      }
#else
      F even[kHashColumns], odd[kHashColumns];
      for (int c = 0; c < kHashColumns; ++c) {
        even[c] = (F)(packed[c] << 16);
        odd[c] = (F)(packed[c] & 0xffff0000u);
      }
      for (int m = 0; m < M; ++m) {
        const float x0 = x[m * stride + 2 * pair], x1 = x[m * stride + 2 * pair + 1];
        for (int c = 0; c < kHashColumns; ++c) {
          acc[m][c] += even[c] * x0;
          acc[m][c] += odd[c] * x1;
        }
      }
#endif
    }
    for (int m = 0; m < M; ++m) {
      for (int c = 0; c < kHashColumns; ++c) word[m] |= positive(acc[m][c]) << (column + c * W);
    }
  }
  for (int m = 0; m < M; ++m) bits[m * step] = word[m];
}

template <int M>
inline void hash_rest(int64_t left, const float* x, int64_t stride, int pairs, const uint16_t* tile, uint64_t* bits,
                      int64_t step) {
  if constexpr (M > 0) {
    if (left == M) {
      hash_tile<M>(x, stride, pairs, tile, bits, step);
    } else {
      hash_rest<M - 1>(left, x, stride, pairs, tile, bits, step);
    }
  }
}

void hash(const float* x, int64_t stride, int64_t n, const Directions& directions, int first_tile, int last_tile,
          uint64_t* bits) {
  const int pairs = (directions.dim + 1) / 2;
#if defined(MAGICPIG_BF16)
  // Rounded once per call, in pieces that stay in the first-level cache.
  constexpr int kPiece = 48;
  alignas(64) float rounded[kPiece * (kMaxDim / 2)];
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t rows = n - start < kPiece ? n - start : kPiece;
    for (int64_t i = 0; i < rows; ++i) {
      bf16* to = (bf16*)(rounded + i * pairs);
      for (int d = 0; d < 2 * pairs; ++d) narrow_one(x[(start + i) * stride + d], to + d);
    }
    const float* from = rounded;
    const int64_t from_stride = pairs;
#else
  constexpr int64_t kPiece = 48;
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t rows = n - start < kPiece ? n - start : kPiece;
    const float* from = x + start * stride;
    const int64_t from_stride = stride;
#endif
    for (int t = first_tile; t < last_tile; ++t) {
      const uint16_t* tile = directions.packed + (int64_t)t * pairs * kTileDirections * 2;
      uint64_t* out = bits + start * directions.tiles + t;
      int64_t i = 0;
      for (; i + kHashRows <= rows; i += kHashRows) {
        hash_tile<kHashRows>(from + i * from_stride, from_stride, pairs, tile, out + i * directions.tiles,
                             directions.tiles);
      }
      hash_rest<kHashRows - 1>(rows - i, from + i * from_stride, from_stride, pairs, tile, out + i * directions.tiles,
                               directions.tiles);
    }
  }
}

}  // namespace
