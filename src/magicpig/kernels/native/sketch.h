// Sketches of keys, and the draw of a sample from the integer weights that scores become.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace magicpig {

// How keys are sketched and how many are drawn. The rotation and `distance` come from kernels/sketch/reference.py.
struct SketchSampler {
  int head_dim, bits;
  uint64_t seed;
  double budget;   // rows of a kv head and step; below 1 a share of the body
  float epsilon;   // predicted error at which a draw is good enough; 0: never asked
  double limit;    // share of the body; a draw that would need more of it reads all of it
  float distance;  // between levels, relative to the length of a key
  std::vector<float> rows;

  int dim() const { return (head_dim + kLane - 1) / kLane * kLane; }
  Rotation rotation() const { return {rows.data(), head_dim, dim()}; }
  SketchLayout layout() const;
};

// Sketches `count` keys of every kv head into lanes `first` .. of a segment of `blocks` blocks a head.
// `rows[g]` points at the first row of head g; consecutive ones are `row_bytes` apart. Of rows of floats only the keys are
// looked at, zero padded to a multiple of kLane.
struct SketchJob {
  Dtype dtype;
  int heads;
  int64_t count;
  int64_t row_bytes;
  const char* const* rows;
  const SketchSampler& sampler;
  int64_t first;
  int64_t blocks;
};
void sketch_rows(const SketchJob& job, uint32_t* words, uint16_t* scales);

// Copies the codes and scales of `count` keys of every head to lanes `first` .. of a larger segment.
void copy_sketch(const uint32_t* words, const uint16_t* scales, int64_t count, int64_t blocks, int heads, int key_words,
                 uint32_t* to_words, uint16_t* to_scales, int64_t first, int64_t to_blocks);

// A query head, turned and rounded to whole numbers.
struct SketchQuery {
  int8_t values[kMaxDim];
  ScoreRule rule;
};
// turned: by the rotation, zero padded to dim. offset: of the logits, before a softcap.
void prepare_query(const SketchSampler& sampler, const float* turned, float offset, LogitRule rule, SketchQuery* query);

// A stretch of one kv head's keys: codes and scales from the start of a block on.
struct SketchPiece {
  const uint32_t* words;
  const uint16_t* scales;
  int64_t count;
};

// Which keys a head's weight is estimated from: one block of every `apart`. See pilot in the reference.
struct Pilot {
  int64_t keys, all_blocks, apart;

  explicit Pilot(int64_t keys);
  int64_t blocks() const { return (all_blocks + apart - 1) / apart; }
  int64_t block(int64_t i) const;  // the i-th
  int64_t key_count() const;       // in all of them
};

// Sums of the powers of the scores of blocks begin <= i < end of a pilot, one a head. Its blocks are of the keys' places
// among all, wherever pieces end.
void sum_pilot(const SketchLayout& layout, const std::vector<SketchPiece>& pieces, const Pilot& pilot, int64_t begin,
               int64_t end, int heads, const ScoreRule* rules, ScoreSum* sums);

// How the scores of a group become weights.
struct WeightRule {
  std::vector<ScoreRule> heads;
  std::vector<float> ones;  // of each head, the score that weighs 1
  int octaves;              // no head adds more than 2^octaves to a weight
  int32_t floor;
};
// sums: of a pilot in `parts` parts, of all heads each.
WeightRule weight_rule(const std::vector<ScoreRule>& heads, const ScoreSum* sums, int64_t parts, const Pilot& pilot);

// The weights of one kv head's keys: [block][kSketchKeys], and what a walk along them needs. A piece has
// blocks of its own; the walk knows the keys by their place among all, wherever pieces end.
class Weights {
 public:
  // Makes room for `keys` keys in `blocks` blocks.
  void reset(int64_t keys, int64_t blocks);
  // What `Kernels::weigh` fills, from a block on.
  uint32_t* weights(int64_t block) { return &weights_[block * kSketchKeys]; }
  uint32_t* sums(int64_t block) { return &sums_[block * (kSketchKeys / kSumKeys)]; }
  // The next piece has `count` keys.
  void add(int64_t count);
  // Fixes the step in which the walk goes, once all weights are there: see step_for in kernels/sketch/reference.py.
  void settle_step(int64_t budget);
  uint64_t step() const { return step_; }
  // Systematic sampling: which keys, ascending, and log u. See pick in the reference.
  void pick(uint64_t start, int doublings, std::vector<uint32_t>* keys, std::vector<float>* log_u);

 private:
  struct Piece {
    int64_t key, slot;  // of its first key: place among all keys, and in weights_
  };

  void join_sums();
  void order_walk(int bits);
  const Piece* read_group(int64_t group, const Piece* piece, uint32_t* to) const;

  int64_t keys_, added_, block_;
  std::vector<Piece> pieces_;
  std::vector<uint32_t> weights_;
  std::vector<uint32_t> sums_;     // [block][kSketchKeys / kSumKeys]; then of kSumKeys keys each, in their order
  std::vector<uint32_t> heavy_;    // groups in which there may be keys longer than a step
  std::vector<uint32_t> order_;    // of groups of kSumKeys keys: see walk_order in the reference
  std::vector<uint64_t> taken_;    // a bit for each group in which a step ends
  std::vector<uint64_t> entries_;  // where in its step the walk comes to such a group
  int order_bits_ = -1;
  uint64_t step_;
};

// Uniform in [0, step), from three numbers alone: start_for in the reference.
uint64_t start_for(uint64_t seed, uint64_t head, uint64_t position, uint64_t step);

}  // namespace magicpig
