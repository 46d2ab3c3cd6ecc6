// Sketches of keys, and the draw of a sample from the integer weights that scores become.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace magicpig {

// How keys are sketched. The rotation and `distance` come from kernels/sketch/reference.py.
struct SketchSampler {
  int head_dim, bits;
  float distance;  // between levels, relative to the length of a key
  double noise;    // what a level misses of a coordinate: mean square, over that of the scale
  std::vector<float> rows;

  int dim() const { return (head_dim + kLane - 1) / kLane * kLane; }
  Rotation rotation() const { return {rows.data(), head_dim, dim()}; }
  SketchLayout layout() const;
};

// How many centres there are for each kv head of a segment of `blocks` blocks.
constexpr int64_t centres_of(int64_t blocks, int stride_shift) {
  return ((blocks * kSketchKeys - 1) >> stride_shift) + 1;
}

// Sketches `count` keys of every kv head, whole strides of 2^stride_shift keys, into lanes `first` .. of a segment of
// `blocks` blocks a head, and puts the centres of the strides, which are their means, beside.
// `rows[g]` points at the first row of head g; consecutive ones are `row_bytes` apart. Of rows of floats only the keys are
// looked at, zero padded to a multiple of kLane.
struct SketchJob {
  Dtype dtype;
  int heads;
  int64_t count;
  int64_t row_bytes;
  const char* const* rows;
  const float* row_centres;  // [heads][head_dim], what the rows are kept minus, or null
  const SketchSampler& sampler;
  int64_t first;
  int64_t blocks;
  int stride_shift;
  bool centred;  // otherwise all centres are zero
};
// words [heads][blocks][words][kSketchKeys], scales [heads][blocks * kSketchKeys], centres [heads][centres_of(..)][dim], of
// bfloat16.
void sketch_rows(const SketchJob& job, uint32_t* words, uint16_t* scales, uint16_t* centres);

// A query head, rotated and rounded to whole numbers.
struct SketchQuery {
  int8_t values[kMaxDim];
  ScoreRule rule;
};
// rotated: by the rotation, zero padded to dim.
void prepare_query(const SketchSampler& sampler, const float* rotated, LogitRule rule, SketchQuery* query);

// A stretch of one kv head's keys, from `first` on, a multiple of kSketchKeys and of the stride.
struct SketchPiece {
  const uint32_t* words;
  const uint16_t* scales;
  const uint16_t* centres;
  int64_t first, count;
};

// The query heads of a group and how their scores come about.
struct ScoredGroup {
  SketchLayout layout;
  int dim, stride_shift, heads;
  const ScoreRule* rules;
  const float* const* lanes;  // the queries in lane order of bfloat16
};

// What `count` centres add to the scores of a group: of head h at offsets[h * per_head ..].
void score_offsets(const ScoredGroup& group, const void* const* centres, int64_t count, float* offsets,
                   int64_t per_head);

// Which keys a head's weight is estimated from: one block of every `apart`, without the sinks. See pilot in the reference.
struct Pilot {
  int64_t keys, sinks, first_block, all_blocks, apart;

  Pilot(int64_t keys, int64_t sinks);
  int64_t blocks() const { return (all_blocks + apart - 1) / apart; }
  int64_t block(int64_t i) const;  // the i-th
  int64_t key_count() const;       // in all of them
};

// Blocks of a pilot whose powers are summed together, in tasks of their own.
constexpr int64_t kPilotPart = 64;
// Sums of the powers of the scores of blocks begin <= i < end of a pilot, one a head. The pieces, in order, have all keys.
void sum_pilot(const ScoredGroup& group, const std::vector<SketchPiece>& pieces, const Pilot& pilot, int64_t begin,
               int64_t end, ScoreSum* sums);

// The sum of the squares of the scales of those keys.
double sum_scale_squares(const std::vector<SketchPiece>& pieces, const Pilot& pilot, int64_t begin, int64_t end);

// How many candidates to draw for a sample of `rows`, by the noise of a score: see candidates_by_noise in the reference.
int64_t candidates_by_noise(int64_t rows, double noise);

// How the scores of a group become weights.
struct WeightRule {
  std::vector<ScoreRule> heads;
  std::vector<float> log_normalisers;  // of each head, the score that weighs 1
  int octaves;                         // no head adds more than 2^octaves to a weight
  int32_t floor;
};
// sums: of a pilot in `parts` parts, of all heads each.
WeightRule weight_rule(const std::vector<ScoreRule>& heads, const ScoreSum* sums, int64_t parts, const Pilot& pilot);

// Weights of a piece's keys, in whole blocks, and sums of kSumKeys of them each. group: without its rules.
void weigh_piece(const ScoredGroup& group, const SketchPiece& piece, const WeightRule& rule, uint32_t* weights,
                 uint32_t* sums);

// The weights of one kv head's keys, and what a walk along them needs.
class Weights {
 public:
  // Makes room for `keys` keys, of which the first `sinks` are not to be drawn.
  void reset(int64_t keys, int64_t sinks);
  // What `weigh_piece` fills, from a key on, the first of a block.
  uint32_t* weights(int64_t key) { return &weights_[key]; }
  uint32_t* sums(int64_t key) { return &sums_[key / kSumKeys]; }
  // Fixes the step in which the walk goes, once all weights are there: see step_for in kernels/sketch/reference.py. For
  // another budget it may be called again.
  void settle_step(int64_t budget);
  uint64_t step() const { return step_; }
  // Systematic sampling: which keys, ascending, and log u. See pick in the reference.
  void pick(uint64_t start, std::vector<uint32_t>* keys, std::vector<float>* log_u);

 private:
  void clear_sinks();
  void sum_weights(int64_t groups);
  void list_heavy(uint64_t bound);
  void order_walk(int bits);
  int64_t groups() const { return (keys_ + kSumKeys - 1) / kSumKeys; }

  int64_t keys_, sinks_;
  std::vector<uint32_t> weights_;
  std::vector<uint32_t> sums_;   // of kSumKeys keys each
  std::vector<uint32_t> heavy_;  // keys that may be longer than a step
  int64_t heavy_count_;
  std::vector<uint32_t> open_;   // weights of those that are not known to be
  std::vector<uint32_t> order_;  // of the walk, as the next line: see Walk
  std::vector<uint16_t> swaps_;
  std::vector<uint64_t> taken_;  // a bit for each key that a step ends in
  int order_bits_ = -1;
  bool settled_ = false;
  uint64_t step_;
  int64_t most_;  // keys that a step can end in
};

// What is said of a draw but for its step: see start_for and draw_number in the reference.
struct DrawKey {
  uint64_t seed, layer, head, position, draw;
};
constexpr uint64_t draw_number(int phase, int64_t rows) { return 2 * static_cast<uint64_t>(rows) + (phase - 1); }
// Uniform in [0, step), from these numbers alone.
uint64_t start_for(const DrawKey& key, uint64_t step);

}  // namespace magicpig
