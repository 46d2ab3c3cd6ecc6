// One decode step of one layer for a batch of requests. The story in C++: check, append, prepare the queries, attend to
// what is exact, look up or score and draw, attend to that, merge.
#pragma once

#include <cstdint>
#include <vector>

#include "store.h"

namespace magicpig {

constexpr int kMaxGroup = 256;  // query heads of one kv head; so many queries attend at once

struct HeadSample {
  std::vector<uint32_t> ids;
  std::vector<float> log_u;
};

// Why a sequence had no part in a step: numbers that are not finite, or that its rows cannot hold.
enum class Fault : int32_t { none = 0, query = 1, keys = 2, values = 3 };

// What a step makes of the queries of a sequence, where that was made elsewhere. At most one of the two is there.
struct Prepared {
  const uint16_t* codes = nullptr;  // (H, L): their hash codes
  const float* rotated = nullptr;   // (H, D): they times the rotation of the sketch
};

// The half of a step that attends to what is drawn: the exact rows are attended to elsewhere, and whoever merges the two
// adds the sink logits. The weight of a row that the next lines speak of is its share of the state of this half.
struct SampledHalf {
  // (B, H, D + 2): sums of (1 - u) weight^2 times the value, its square, and 1, which the error of the whole output can
  // be predicted from.
  float* spread;
  // The state of the other half, (B, H, D) and (B, H), by which a draw with an epsilon finds out whether it is enough;
  // or null where no store has an epsilon.
  const float* exact_output = nullptr;
  const float* exact_lse = nullptr;
};

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
  const Prepared* prepared = nullptr;          // (B) or null: all is made here
  const SampledHalf* half = nullptr;           // null: the whole step; else `output` is of float32
};

// The stores are distinct and have the same heads and head_dim; dtypes, samplers and policies are each store's own.
// Returns the fault of each sequence. One with a fault is left as it was, its outputs are NaN, and the others go on.
// Throws std::invalid_argument, and does nothing, for half of a step by an epsilon without the state of the other half.
std::vector<Fault> decode(const std::vector<StoreView*>& stores, const Step& step);

// The state of no rows at all, in `values` [dim] and, unless null, `spread` [dim], which are cleared.
State empty_state(int dim, float* values, float* spread = nullptr);

// Fills scratch memory with NaN before each use: a kernel that reads what it did not write shows at once.
void poison_scratch(bool on);

}  // namespace magicpig
