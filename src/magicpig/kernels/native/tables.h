// Codes -> buckets, and buckets + buckets -> buckets: plain loops over 16-bit integers, the same on every machine.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace magicpig {

// Rounds (D, K * L) row-major float directions to bfloat16 and packs them into tiles; the last tile is padded with zeros.
void pack_directions(const float* directions, int dim, int columns, uint16_t* packed);

// codes[i * L + t] from the signs bits[i * tiles ..]: bit k of code t is sign t * K + k.
void codes_of(const uint64_t* bits, int64_t n, int tiles, int K, int L, uint16_t* codes, int64_t key_stride,
              int64_t table_stride);

// Hash codes of n rows of G heads: codes[(g * L + t) * n + i].
// `rows[g]` points at the first key of head g; consecutive keys are `row_bytes` apart and zero padded to `dim`.
struct HashJob {
  Dtype dtype;
  int dim;
  int heads;
  int64_t count;
  int64_t row_bytes;
  const char* const* rows;
  const float* centres;  // [heads][head_dim], which is taken off the keys as they are kept, or null
  int head_dim;
  Directions directions;
  int K, L;
  int64_t code_stride;  // keys of a table of `codes`
};
void hash_rows(const HashJob& job, uint16_t* codes);

// Counting sort, stable: ids ascend inside a bucket. codes [tables][count] -> offsets [tables][2^K + 1], ids [tables][count].
void build(const uint16_t* codes, int64_t tables, int64_t count, int K, uint32_t* offsets, uint16_t* ids);

// The index of a's keys followed by b's.
struct Buckets {
  const uint32_t* offsets;
  const uint16_t* ids;
  int64_t count;
};
void extend(const Buckets& a, const Buckets& b, int64_t tables, int K, uint32_t* offsets, uint16_t* ids);

// The index of the first `count` keys of a.
void shorten(const Buckets& a, int64_t count, int64_t tables, int K, uint32_t* offsets, uint16_t* ids);

}  // namespace magicpig
