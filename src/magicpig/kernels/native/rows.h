// Rows that are kept as whole numbers, and how one half of a row, its key or its value, is written and read.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace magicpig {

enum class Half : int { key = 0, value = 1 };

// Writes `dim` floats, the padding included, into one half of a row.
void write_half(Dtype dtype, int dim, Half half, const float* from, char* row);
// Reads the key of a row, the padding included.
void read_key(Dtype dtype, int dim, const char* row, float* to);

// The keys of consecutive rows of one head.
struct Keys {
  Dtype dtype;
  int head_dim;
  const char* rows;
  int64_t row_bytes;
  const float* centre;  // [head_dim], what the rows are kept minus, or null

  // Key i as it came, but for rounding, the padding included.
  void read(int64_t i, float* to) const;
};
// The mean of `count` keys, a power of two of them, in `mean` [dim]. The same bits on every machine.
void mean_key(const Keys& keys, int64_t count, float* mean);

// Writes one half of `count` rows of whole numbers of every head, on all threads.
struct BytesJob {
  const float* from;  // [heads][count][head_dim], finite
  int heads;
  int64_t count;
  int head_dim;
  char* const* rows;  // the first of each head
  int64_t row_bytes;
  Half half;
};
void write_bytes(const BytesJob& job);

}  // namespace magicpig
