// One decode step of one layer for a batch of requests. The story in C++: check, append, prepare the queries, attend to
// what is exact, look up or score and draw, attend to that, merge.
#pragma once

#include <cstdint>
#include <vector>

#include "store.h"

namespace magicpig {

struct HeadSample {
  std::vector<uint32_t> ids;
  std::vector<float> log_u;
};

// Why a sequence had no part in a step: numbers that are not finite, or that its rows cannot hold.
enum class Fault : int32_t { none = 0, query = 1, keys = 2, values = 3 };

struct Step {
  Dtype dtype;        // of query, key, value and output
  int query_heads;    // H
  const void* query;  // (B, H, D) contiguous
  const void* key;    // (B, G, D) contiguous, or null: nothing is appended
  const void* value;  // (B, G, D)
  LogitRule rule;
  const float* sink_logits;                    // (H) or null: logits that join the denominator with value zero
  void* output;                                // (B, H, D)
  float* lse;                                  // (B, H)
  float* predicted_error;                      // (B, H) or null
  std::vector<HeadSample>* capture = nullptr;  // B * H samples, when asked for
};

// The stores are distinct and have the same heads and head_dim; dtypes, samplers and policies are each store's own.
// Returns the fault of each sequence. One with a fault is left as it was, its outputs are NaN, and the others go on.
std::vector<Fault> decode(const std::vector<StoreView*>& stores, const Step& step);

// The state of no rows at all, in `values` [dim] and, unless null, `spread` [dim], which are cleared.
State empty_state(int dim, float* values, float* spread = nullptr);

// Fills scratch memory with NaN before each use: a kernel that reads what it did not write shows at once.
void poison_scratch(bool on);

}  // namespace magicpig
