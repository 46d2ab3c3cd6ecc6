#include "sketch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "parallel.h"
#include "rows.h"

namespace magicpig {
namespace {

constexpr double kFloor = 0.05;      // share of the weight that all keys get alike
constexpr int kWeightBits = 30;      // all weights together are about 2^30
constexpr int kMostBits = 27;        // and none is more than 2^27 above the floor
constexpr double kWidest = 1 << 18;  // octaves between the scores of a head and zero, in which a float is exact enough
constexpr int64_t kPilotBlocks = 32, kPilotApart = 16;
constexpr double kOctave = 1 << 23;  // of a score
constexpr double kLog2E = 1.4426950408889634;
constexpr double kMostUnit = 1e30;  // so that no product with it is infinite

uint32_t scrambled(uint32_t x) {
  x = (x ^ x * 0x3D20ADEAu) + 0x9E3779B9u;
  x *= 0x5851F42Du;
  x ^= x * 0x05526C56u;
  return x ^ x * 0x53A22864u;
}

uint32_t reversed(uint32_t x, int bits) {
  uint32_t out = 0;
  for (int i = 0; i < bits; ++i) out |= (x >> i & 1) << (bits - 1 - i);
  return out;
}

}  // namespace

SketchLayout SketchSampler::layout() const {
  const auto plane = [&](int width) { return (head_dim * width + 31) / 32; };
  return {bits, head_dim, bits == 3 ? plane(2) + plane(1) : plane(bits)};
}

void sketch_rows(const SketchJob& job, uint32_t* words, uint16_t* scales, uint16_t* centres) {
  const Kernels& run = kernels();
  const SketchLayout layout = job.sampler.layout();
  const Rotation rotation = job.sampler.rotation();
  const int64_t dim = rotation.dim, block_words = static_cast<int64_t>(layout.words) * kSketchKeys;
  const int64_t stride = int64_t{1} << job.stride_shift, strides = job.count >> job.stride_shift;
  const int64_t all_centres = centres_of(job.blocks, job.stride_shift);
  const int64_t first_block = job.first / kSketchKeys, end_block = (job.first + job.count - 1) / kSketchKeys + 1;
  const int64_t pieces = end_block - first_block;  // tasks write whole blocks
  const auto row_centre = [&](int64_t head) {
    return job.row_centres == nullptr ? nullptr : job.row_centres + head * job.sampler.head_dim;
  };
  const auto centre_at = [&](int64_t head, int64_t lane) {
    return centres + (head * all_centres + (lane >> job.stride_shift)) * dim;
  };
  parallel(job.heads * strides, [&](int64_t task) {
    const int64_t head = task / strides, i = task % strides * stride;
    alignas(64) float mean[kMaxDim] = {};
    if (job.centred) {
      const Keys keys{job.dtype, rotation.head_dim, job.rows[head] + i * job.row_bytes, job.row_bytes,
                      row_centre(head)};
      mean_key(keys, stride, mean);
    }
    constexpr float kMost = 0x1.FEp127f;  // of a bfloat16
    for (float& x : mean) x = std::clamp(x, -kMost, kMost);
    run.from_float(Dtype::bf16, mean, dim, centre_at(head, job.first + i));
  });
  parallel(job.heads * pieces, [&](int64_t task) {
    const int64_t head = task / pieces, block = first_block + task % pieces;
    const int64_t begin = std::max(job.first, block * kSketchKeys);
    const int64_t n = std::min(job.first + job.count, (block + 1) * kSketchKeys) - begin;
    thread_local std::vector<float> floats, rotated;
    floats.resize(kSketchKeys * dim);
    rotated.resize(kSketchKeys * dim);
    const char* rows = job.rows[head] + (begin - job.first) * job.row_bytes;
    const Keys keys{job.dtype, rotation.head_dim, rows, job.row_bytes, row_centre(head)};
    alignas(64) float centre[kMaxDim];
    for (int64_t i = 0; i < n; ++i) {
      if (i == 0 || (begin + i) % stride == 0) run.to_float(Dtype::bf16, centre_at(head, begin + i), dim, centre);
      float* to = floats.data() + i * dim;
      keys.read(i, to);
      for (int64_t d = 0; d < dim; ++d) to[d] -= centre[d];
    }
    run.rotate(floats.data(), dim, n, rotation, rotated.data());
    uint32_t* to = words + (head * job.blocks + block) * block_words;
    for (int64_t i = 0; i < n; ++i) {
      run.pack(rotated.data() + i * dim, rotation, job.sampler.bits, job.sampler.distance,
               static_cast<int>((begin + i) % kSketchKeys), to, scales + head * job.blocks * kSketchKeys + begin + i);
    }
  });
}

void prepare_query(const SketchSampler& sampler, const float* rotated, LogitRule rule, SketchQuery* query) {
  const float unit = kernels().to_bytes(rotated, sampler.dim(), query->values);
  int32_t sum = 0;
  for (int d = 0; d < sampler.head_dim; ++d) sum += query->values[d];
  const double octaves = kLog2E * kOctave, per_logit = rule.softcap > 0 ? rule.scale : rule.scale * octaves;
  query->rule = {.query = query->values,
                 .correction = static_cast<float>(((1 << sampler.bits) - 1) * sum),
                 .unit = static_cast<float>(std::clamp(per_logit * unit, -kMostUnit, kMostUnit)),
                 .offset_unit = static_cast<float>(std::clamp(per_logit, -kMostUnit, kMostUnit)),
                 .softcap = rule.softcap,
                 .octaves = static_cast<float>(octaves)};
}

void score_offsets(const ScoredGroup& group, const void* const* centres, int64_t count, float* offsets,
                   int64_t per_head) {
  constexpr float kMost = 1e37f;  // so that a score is never the difference of two infinite numbers
  kernels().dot_vectors(Dtype::bf16, group.dim, centres, count, group.heads, group.lanes, offsets, per_head);
  for (int h = 0; h < group.heads; ++h) {
    float* own = offsets + h * per_head;
    for (int64_t i = 0; i < count; ++i) {
      const float offset = own[i] * group.rules[h].offset_unit;
      own[i] = std::isnan(offset) ? 0.0f : std::clamp(offset, -kMost, kMost);
    }
  }
}

Pilot::Pilot(int64_t keys, int64_t sinks)
    : keys(keys),
      sinks(sinks),
      first_block(sinks / kSketchKeys),
      all_blocks((keys + kSketchKeys - 1) / kSketchKeys - first_block),
      apart(std::clamp<int64_t>((all_blocks + kPilotBlocks - 1) / kPilotBlocks, 1, kPilotApart)) {}

int64_t Pilot::block(int64_t i) const {
  const int64_t first = i * apart;
  return first_block + first + scrambled(static_cast<uint32_t>(i)) % std::min(apart, all_blocks - first);
}

int64_t Pilot::key_count() const {
  const int64_t end_block = first_block + all_blocks;
  int64_t count = blocks() * kSketchKeys;
  if (block(0) == first_block) count -= sinks % kSketchKeys;
  if (block(blocks() - 1) == end_block - 1) count -= end_block * kSketchKeys - keys;
  return count;
}

void sum_pilot(const ScoredGroup& group, const std::vector<SketchPiece>& pieces, const Pilot& pilot, int64_t begin,
               int64_t end, ScoreSum* sums) {
  const int shift = group.stride_shift;
  const int64_t per_block = std::max<int64_t>(1, kSketchKeys >> shift), per_head = (end - begin) * per_block;
  std::vector<SketchBlock> blocks;
  std::vector<const void*> centres;
  thread_local std::vector<float> offsets;
  offsets.resize(std::max<size_t>(offsets.size(), group.heads * per_head));
  auto piece = pieces.begin();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = pilot.block(i) * kSketchKeys;
    while (first >= piece->first + piece->count) ++piece;
    const int64_t at = first - piece->first, last = piece->first + piece->count - 1;
    for (int64_t j = 0; j < per_block; ++j) {
      // Of a block that is not full yet, the last one for those that are not there.
      const int64_t key = std::min(first + (j << shift), last);
      centres.push_back(piece->centres + ((key - piece->first) >> shift) * group.dim);
    }
    blocks.push_back({piece->words + at * group.layout.words, piece->scales + at,
                      offsets.data() + (i - begin) * per_block,
                      static_cast<int>(std::max<int64_t>(0, pilot.sinks - first)),
                      static_cast<int>(std::min<int64_t>(kSketchKeys, pilot.keys - first))});
  }
  score_offsets(group, centres.data(), per_head, offsets.data(), per_head);
  kernels().sum_powers(group.layout, blocks.data(), static_cast<int>(blocks.size()), group.heads, group.rules,
                       {nullptr, per_head, shift}, sums);
}

double sum_scale_squares(const std::vector<SketchPiece>& pieces, const Pilot& pilot, int64_t begin, int64_t end) {
  double totals[8] = {};  // so that one sum need not wait for the last
  auto piece = pieces.begin();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = pilot.block(i) * kSketchKeys;
    while (first >= piece->first + piece->count) ++piece;
    float scales[kSketchKeys];
    kernels().to_float(Dtype::f16, piece->scales + first - piece->first, kSketchKeys, scales);
    const int64_t from = std::max<int64_t>(0, pilot.sinks - first),
                  to = std::min<int64_t>(kSketchKeys, pilot.keys - first);
    std::fill(scales, scales + from, 0.0f);
    std::fill(scales + to, scales + kSketchKeys, 0.0f);
    for (int64_t j = 0; j < kSketchKeys; j += 8) {
      for (int i = 0; i < 8; ++i) totals[i] += static_cast<double>(scales[j + i]) * scales[j + i];
    }
  }
  return std::accumulate(totals, totals + 8, 0.0);
}

int64_t candidates_by_noise(int64_t rows, double noise) {
  constexpr std::pair<double, int> kForTwoRows[] = {{0.3, 2}, {0.7, 3}, {0.95, 4}, {1.3, 6}, {1.8, 8}, {2.5, 12}};
  for (const auto& [most, count] : kForTwoRows) {
    if (noise <= most) return (rows * count + 1) / 2;
  }
  return rows * 8;
}

WeightRule weight_rule(const std::vector<ScoreRule>& head_rules, const ScoreSum* sums, int64_t parts,
                       const Pilot& pilot) {
  const int heads = static_cast<int>(head_rules.size());
  WeightRule rule{head_rules, std::vector<float>(heads), kMostBits, 1};
  for (int wide = 1; wide < heads; wide *= 2) --rule.octaves;
  const auto body = static_cast<double>(pilot.keys - pilot.sinks);
  rule.floor = std::max(1, static_cast<int32_t>(kFloor * (1 << kWeightBits) / body));
  const double unit = (1 - kFloor) * (1 << kWeightBits) / heads;
  const double share = static_cast<double>(pilot.key_count()) / body;
  for (int h = 0; h < heads; ++h) {
    double base = sums[h].base, total = 0;
    for (int64_t i = 1; i < parts; ++i) base = std::max(base, sums[i * heads + h].base);
    for (int64_t i = 0; i < parts; ++i) {
      // Bases are whole octaves apart, so nothing is rounded here.
      const ScoreSum& part = sums[i * heads + h];
      total += std::ldexp(part.sum, static_cast<int>(std::max(part.base - base, -2000.0)));
    }
    const double shrink = std::min(1.0, kWidest / std::max(std::fabs(base), 1.0));
    ScoreRule& own = rule.heads[h];
    if (own.softcap > 0) {
      own.octaves *= static_cast<float>(shrink);
    } else {
      own.unit *= static_cast<float>(shrink);
      own.offset_unit *= static_cast<float>(shrink);
    }
    rule.log_normalisers[h] = static_cast<float>((base * shrink + std::log2(total / share / unit)) * kOctave);
  }
  return rule;
}

void weigh_piece(const ScoredGroup& group, const SketchPiece& piece, const WeightRule& rule, uint32_t* weights,
                 uint32_t* sums) {
  const int64_t count = ((piece.count - 1) >> group.stride_shift) + 1;
  // A block that is not full has offsets for all its lanes.
  const int64_t per_head = centres_of((piece.count + kSketchKeys - 1) / kSketchKeys, group.stride_shift);
  std::vector<const void*> centres(count);
  for (int64_t i = 0; i < count; ++i) centres[i] = piece.centres + i * group.dim;
  thread_local std::vector<float> offsets;
  offsets.assign(group.heads * per_head, 0.0f);
  ScoredGroup own = group;
  own.rules = rule.heads.data();
  score_offsets(own, centres.data(), count, offsets.data(), per_head);
  kernels().weigh(group.layout, piece.words, piece.scales, piece.count, group.heads, own.rules,
                  {offsets.data(), per_head, group.stride_shift}, rule.log_normalisers.data(), rule.octaves, rule.floor,
                  weights, sums);
}

void Weights::reset(int64_t keys, int64_t sinks) {
  keys_ = keys;
  sinks_ = sinks;
  settled_ = false;
  const int64_t blocks = (keys + kSketchKeys - 1) / kSketchKeys;
  const auto grow = [](std::vector<uint32_t>& memory, int64_t count) {
    if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  };
  grow(weights_, blocks * kSketchKeys);
  // A walk looks at as many groups at a time, those that have no keys among them.
  const int64_t sums = (blocks * (kSketchKeys / kSumKeys) + kNearGroups - 1) / kNearGroups * kNearGroups;
  grow(sums_, sums);
  std::fill(sums_.begin() + groups(), sums_.begin() + sums, 0u);
}

void Weights::clear_sinks() {
  std::fill_n(weights_.begin(), sinks_, 0);
  sum_weights((sinks_ + kSumKeys - 1) / kSumKeys);
}

void Weights::sum_weights(int64_t groups) {
  for (int64_t group = 0; group < groups; ++group) {
    const auto first = weights_.begin() + group * kSumKeys;
    sums_[group] = std::accumulate(first, first + kSumKeys, 0u);
  }
}

void Weights::settle_step(int64_t budget) {
  clear_sinks();
  if (settled_) sum_weights(groups());  // they were cut to another step
  settled_ = true;
  heavy_count_ = 0;
  step_ = 1;
  most_ = keys_ - sinks_;
  if (budget < most_) {
    uint64_t rest = 0, left = budget, bound = std::numeric_limits<uint64_t>::max();
    for (int64_t i = 0; i < groups(); ++i) rest += sums_[i];
    const uint64_t total = rest;
    // Keys that are certain leave less to the others, of which then some more may be.
    for (bool more = true; more;) {
      const uint64_t least = (rest + left - 1) / left, before = left;  // that is certain
      if (least < bound) {
        bound = least - least / 4;  // so that some rounds can do with one list
        list_heavy(bound);
        rest = total;
        left = budget;
      }
      size_t kept = 0;
      for (const uint32_t own : open_) {
        const bool certain = own >= least;
        open_[kept] = own;
        kept += !certain;
        left -= certain;
        rest -= certain ? own : 0;
      }
      open_.resize(kept);
      more = left != before;
    }
    step_ = std::max<uint64_t>(1, rest / left);
    // The step was rounded down, and a walk begins within one.
    if (step_ > 1) most_ = budget + static_cast<int64_t>(left / step_) + 2;
  }
  // No key is longer than a step.
  if (step_ == 1) {
    for (int64_t i = 0; i < groups(); ++i) {
      sums_[i] = 0;
      for (int j = 0; j < kSumKeys; ++j) sums_[i] += weights_[i * kSumKeys + j] > 0;
    }
    return;
  }
  for (int64_t i = 0; i < heavy_count_; ++i) {
    const uint64_t own = weights_[heavy_[i]];
    if (own > step_) sums_[heavy_[i] / kSumKeys] -= static_cast<uint32_t>(own - step_);
  }
}

// Finds the keys that weigh `bound` or more.
void Weights::list_heavy(uint64_t bound) {
  heavy_.resize(std::max<size_t>(heavy_.size(), keys_));
  const bool none = bound > std::numeric_limits<uint32_t>::max();
  heavy_count_ =
      none ? 0
           : kernels().heavy_keys(weights_.data(), sums_.data(), groups(), static_cast<uint32_t>(bound), heavy_.data());
  open_.resize(heavy_count_);
  for (int64_t i = 0; i < heavy_count_; ++i) open_[i] = weights_[heavy_[i]];
}

void Weights::order_walk(int bits) {
  if (bits == order_bits_) return;
  order_bits_ = bits;
  order_.resize(size_t{1} << bits);
  swaps_.resize(order_.size());
  for (uint32_t i = 0; i < order_.size(); ++i) {
    order_[i] = reversed(scrambled(reversed(i, bits)), bits);
    swaps_[i] = static_cast<uint16_t>(scrambled(i) * 0x9E3779B1u >> 17);
  }
}

void Weights::pick(uint64_t start, std::vector<uint32_t>* keys, std::vector<float>* log_u) {
  const int64_t groups = this->groups();
  int bits = 0;
  while (int64_t{1} << bits < groups) ++bits;
  order_walk(bits);
  taken_.resize(std::max<size_t>(taken_.size(), (keys_ + 63) / 64));
  keys->resize(most_ + kPickSlack);
  log_u->resize(most_ + kPickSlack);
  const Walk walk{order_.data(), swaps_.data(), static_cast<int64_t>(order_.size()), groups};
  const int64_t count =
      kernels().pick(weights_.data(), sums_.data(), walk, step_, start, taken_.data(), keys->data(), log_u->data());
  keys->resize(count);
  log_u->resize(count);
}

uint64_t start_for(const DrawKey& key, uint64_t step) {
  uint64_t x = 0;
  for (const uint64_t word : {key.seed, key.layer, key.head, key.position, key.draw}) {
    x = (x ^ word) + 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    x = x ^ x >> 31;
  }
  return static_cast<uint64_t>(static_cast<unsigned __int128>(x >> 32) * step >> 32);
}

}  // namespace magicpig
