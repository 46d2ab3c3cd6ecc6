// One decode step of one layer for a batch of requests: append, hash, look up, attend, merge. The story in C++.
// With a sketch: append, turn, score, weigh, draw, attend, merge.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "sketch.h"

namespace magicpig {

// The predicted errors of all sampled heads and steps: how many, their sum, the largest, and how many fell in each bin.
// `unknown` ones are apart: where nothing was drawn, or where the prediction is not finite.
struct PredictedErrors {
  static constexpr int kBins = 128, kBinsPerOctave = 8;  // bin i: up to 2^((i + 1) / 8 - 12), below and above included
  int64_t count = 0, unknown = 0;
  double sum = 0, largest = 0;
  std::array<int64_t, kBins> bins{};

  void add(double error);
};

// What the kernels know of one request's store in one layer. Memory belongs to the Python side, which keeps it alive
// and tells this view whenever a pointer or a boundary moves.
struct StoreView {
  Dtype dtype = Dtype::f32;
  int heads = 0;      // G
  int head_dim = 0;   // D
  int dim = 0;        // D padded
  int64_t sinks = 0;  // positions [0, sinks) and [indexed_to, length) are attended exactly
  int64_t indexed_to = 0;
  int64_t length = 0;
  std::vector<float> mean;  // [G][dim]; zeros until the store is centred

  struct Block {
    char* rows;           // of head 0
    int64_t head_stride;  // bytes
  };
  std::vector<Block> blocks;
  std::vector<const char*> row_blocks;  // [G][blocks]: what the gather kernel walks

  struct IndexSegment {
    const uint32_t* offsets;  // [G][L][2^K + 1]
    const uint16_t* ids;      // [G][L][count]
    int64_t first;
    int64_t count;
  };
  std::vector<IndexSegment> segments;

  struct SketchSegment {
    const uint32_t* words;   // [G][blocks][words][kSketchKeys]
    const uint16_t* scales;  // [G][blocks * kSketchKeys]
    int64_t first;
    int64_t count;
    int64_t blocks;
  };
  std::vector<SketchSegment> sketches;

  // Since creation, summed over query heads.
  int64_t steps = 0, sampled_rows = 0, body_rows = 0;
  double max_share = 0;
  PredictedErrors predicted;

  size_t row_bytes() const { return row_size(dtype, dim); }
  char* row(int64_t position, int head) const {
    const Block& block = blocks[position >> kBlockShift];
    return block.rows + head * block.head_stride + (position & (kBlockRows - 1)) * row_bytes();
  }
  void blocks_changed();
};

// The sampler of the paper: K * L packed directions and the law of its inclusion probabilities.
struct LshSampler {
  int head_dim, K, L, min_hits;
  std::vector<uint16_t> packed;
  std::vector<float> log_u;  // kLawSize + 1 values

  Directions directions() const { return {packed.data(), head_dim, (K * L + kTileDirections - 1) / kTileDirections}; }
};

struct HeadSample {
  std::vector<uint32_t> ids;
  std::vector<float> log_u;
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
};

// All stores have the same heads, head_dim and dtype, and are distinct; those that sample use `lsh` or `sketch`, of which
// one is given at most.
// Throws RangeError when a query, key or value is not finite or does not fit (nothing is appended then).
void decode(const std::vector<StoreView*>& stores, const LshSampler* lsh, const SketchSampler* sketch,
            const Step& step);

// The state of no rows at all, in `values` [dim] and, unless null, `spread` [dim], which are cleared.
State empty_state(int dim, float* values, float* spread = nullptr);

// Fills scratch memory with NaN before each use: a kernel that reads what it did not write shows at once.
void poison_scratch(bool on);

}  // namespace magicpig
