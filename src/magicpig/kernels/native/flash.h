// Exact attention of many queries, as of a prompt, on all threads. A table of its own, since it has a form that no level of
// the other verbs needs: tiles of matrices.
#pragma once

#include "kernels.h"

namespace magicpig {

constexpr int kFlashKeys = 128;  // keys that are packed at a time

// Queries [rows][dim] over keys and values of one head, whose rows are `key_stride` and `value_stride` elements apart.
// Query i sees the first ends[i] of them.
struct FlashTask {
  Dtype dtype;  // of keys and values: a floating-point one
  int dim;
  const void *key, *value;
  int64_t key_stride, value_stride, keys;
  const float* queries;
  const int64_t* ends;
  int rows;
};

struct FlashKernels {
  const char* name;
  size_t (*scratch_bytes)(Dtype dtype, int rows, int dim);
  int (*width)(int dim);  // of a row of sums
  int (*padded)(int rows);
  // Sums of softmax terms times values [padded rows][width], their totals [rows], and maxima [rows] of logits in octaves,
  // to which the terms are relative.
  void (*attend)(const FlashTask& task, LogitRule rule, char* scratch, float* sums, float* maxima, float* totals);
};

// The form in use, which the level decides; and whether that may be tiles where the processor has them.
const FlashKernels& flash_kernels();
void use_tiles(bool on);

struct ManyQueries {
  Dtype dtype;
  int heads, kv_heads, dim;
  int64_t tokens, keys;
  const void *query, *key, *value;                             // the last dimension is contiguous
  int64_t query_strides[2], key_strides[2], value_strides[2];  // elements from head to head, and from token to token
  bool causal;                                                 // query t sees the keys up to t
  LogitRule rule;
};

// output (H, T, D) and lse (H, T), natural logarithms.
void attend_many(const ManyQueries& many, float* output, float* lse);

}  // namespace magicpig
