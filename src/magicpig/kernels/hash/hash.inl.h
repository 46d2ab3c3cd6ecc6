// Vectors -> signs of their projections on K*L directions. A register tile of kHashRows vectors against W-wide columns.
// Directions and vectors are bfloat16 numbers and sums are floats, so that every level multiplies the same numbers.
#pragma once

namespace {

constexpr int kHashRows = kRegisters == 32 ? 4 : 3;
constexpr int kHashColumns = kRegisters / 8;  // vectors of W directions

// How a rounded vector is kept: as the instruction takes it, or as floats.
#if defined(MAGICPIG_BF16)
typedef bf16 Factor;
#else
typedef float Factor;
#endif
inline void round_factor(float x, bf16* to) { narrow_one(x, to); }
inline void round_factor(float x, float* to) {
  bf16 rounded;
  narrow_one(x, &rounded);
  *to = widen_one(rounded);
}

template <int M>
inline void hash_tile(const Factor* x, int64_t stride, int pairs, const uint16_t* tile, uint64_t* bits, int64_t step) {
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
        memcpy(&x_pair, x + m * stride + 2 * pair, 4);
        const __m512bh both = (__m512bh)_mm512_set1_epi32((int)x_pair);
        for (int c = 0; c < kHashColumns; ++c) {
          acc[m][c] = (F)_mm512_dpbf16_ps((__m512)acc[m][c], (__m512bh)packed[c], both);
        }
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
inline void hash_rest(int64_t left, const Factor* x, int64_t stride, int pairs, const uint16_t* tile, uint64_t* bits,
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
  const int pairs = (directions.dim + 1) / 2, dim = 2 * pairs;
  // Rounded once per call, in pieces that stay in the first-level cache.
  constexpr int64_t kPiece = 48;
  alignas(64) Factor rounded[kPiece * kMaxDim];
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t rows = n - start < kPiece ? n - start : kPiece;
    for (int64_t i = 0; i < rows; ++i) {
      for (int d = 0; d < dim; ++d) round_factor(x[(start + i) * stride + d], rounded + i * dim + d);
    }
    for (int t = first_tile; t < last_tile; ++t) {
      const uint16_t* tile = directions.packed + (int64_t)t * pairs * kTileDirections * 2;
      uint64_t* out = bits + start * directions.tiles + t;
      int64_t i = 0;
      for (; i + kHashRows <= rows; i += kHashRows) {
        hash_tile<kHashRows>(rounded + i * dim, dim, pairs, tile, out + i * directions.tiles, directions.tiles);
      }
      hash_rest<kHashRows - 1>(rows - i, rounded + i * dim, dim, pairs, tile, out + i * directions.tiles,
                               directions.tiles);
    }
  }
}

}  // namespace
