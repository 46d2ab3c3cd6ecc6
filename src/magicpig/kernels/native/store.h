// What the kernels know of one request's store in one layer.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <memory>
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

// The sampler of the paper: K * L packed directions.
struct LshSampler {
  int head_dim, K, L;
  std::vector<uint16_t> packed;

  int tiles() const { return (K * L + kTileDirections - 1) / kTileDirections; }
  Directions directions() const { return {packed.data(), head_dim, tiles()}; }
};

// In how many tables a key must collide to be drawn, and how probable that is: kLawSize + 1 values (see InclusionLaw).
struct HitLaw {
  int min_hits;
  std::vector<float> log_u;
};

// How much is drawn, and by which luck. It may change between any two steps.
struct DrawPolicy {
  double budget = 512;    // a sketch: rows of a kv head and step; below 1 a share of the body
  double candidates = 0;  // a sketch: keys that these are drawn from, by their logits; likewise. 0: by its noise
  float epsilon = 0;      // a sketch: predicted error at which a draw is good enough; 0: never asked
  double limit = 1;       // a sketch: share of the body; a draw that would need more of it reads all of it
  uint64_t seed = 0;
  std::shared_ptr<const HitLaw> law;  // hashing
};

// Memory belongs to the Python side, which keeps it alive and tells this view whenever a pointer or a boundary moves.
struct StoreView {
  Dtype dtype = Dtype::f32;  // of rows in blocks
  int heads = 0;             // G
  int head_dim = 0;          // D
  int dim = 0;               // D padded
  int layer = 0;
  int first_head = 0;  // of all kv heads of the model, which one is head 0 here
  int64_t sinks = 0;   // positions [0, sinks) and [indexed_to, length) are attended exactly
  int64_t indexed_to = 0;
  int64_t length = 0;

  struct Block {
    char* rows;           // of head 0
    int64_t head_stride;  // bytes
  };
  std::vector<Block> blocks;
  std::vector<const char*> row_blocks;  // [G][blocks]: what the gather kernel walks
  std::vector<float> row_centres;       // [G][blocks][dim], what the keys in a block are kept minus; empty: nothing

  // Rows of positions [tail_from, length), in a float dtype of their own.
  Dtype tail_dtype = Dtype::f32;
  Block tail{nullptr, 0};
  int64_t tail_from = std::numeric_limits<int64_t>::max();

  struct IndexSegment {
    const uint32_t* offsets;  // [G][L][2^K + 1]
    const uint16_t* ids;      // [G][L][count]
    int64_t first;            // a segment lies between two multiples of kSegmentRows
    int64_t count;
  };
  std::vector<IndexSegment> segments;
  std::vector<float> hash_centres;  // [G][ranges of kSegmentRows positions][dim]; empty: keys are hashed as they are

  struct SketchSegment {
    const uint32_t* words;    // [G][blocks][words][kSketchKeys]
    const uint16_t* scales;   // [G][blocks * kSketchKeys]
    const uint16_t* centres;  // [G][centres_of(blocks)][dim] of bfloat16
    int64_t first;            // a multiple of kSketchKeys
    int64_t count;
    int64_t blocks;
  };
  std::vector<SketchSegment> sketches;
  int stride_shift = 8;  // keys of a stride

  std::shared_ptr<const LshSampler> lsh;  // at most one of the two
  std::shared_ptr<const SketchSampler> sketch;
  DrawPolicy policy;

  // Since creation, summed over query heads.
  int64_t steps = 0, sampled_rows = 0, body_rows = 0;
  int64_t whole_bodies = 0;  // how often all of the body was read
  double max_share = 0;
  PredictedErrors predicted;

  // Without a sampler, others attend to the body.
  bool sampling() const { return indexed_to > sinks; }
  int64_t body() const { return indexed_to - sinks; }
  size_t row_bytes() const { return row_size(dtype, dim); }
  char* row(int64_t position, int head) const {
    const Block& block = blocks[position >> kBlockShift];
    return block.rows + head * block.head_stride + (position & (kBlockRows - 1)) * row_bytes();
  }
  char* tail_row(int64_t position, int head) const {
    return tail.rows + head * tail.head_stride + (position - tail_from) * row_size(tail_dtype, dim);
  }
  const float* row_centre(int64_t block, int head) const {
    return row_centres.empty() ? nullptr : row_centres.data() + (head * blocks.size() + block) * dim;
  }
  const char* const* rows_of(int head) const { return row_blocks.data() + head * blocks.size(); }
  // Of one head: what its keys were hashed minus, in terms of the rows as they are kept; without offsets, of which there
  // are as many. Before a step `prepare_hashed_from` makes it.
  void prepare_hashed_from();
  RowCentres hashed_from(int head) const;
  int64_t hashed_from_count() const;
  // The centre that number i of those was hashed minus, [dim], or null: none.
  const float* hash_centre(int64_t i, int head) const;

  // The setters copy addresses and centres; `set_blocks` forgets the centres of blocks. A centre is [G][head_dim] floats, one for each block or segment.
  void set_blocks(std::vector<Block> own);
  void set_row_centres(const std::vector<const float*>& centres);
  void set_segments(std::vector<IndexSegment> own, const std::vector<const float*>& centres);

 private:
  int64_t ranges() const { return static_cast<int64_t>(hash_centres.size()) / (static_cast<int64_t>(heads) * dim); }

  std::vector<float> hashed_from_;           // [G][ranges or blocks][dim] in lane order
  const Kernels* hashed_from_by_ = nullptr;  // whose lane order; null: to be made anew
};

}  // namespace magicpig
