#include "sketch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "parallel.h"
#include "rows.h"

namespace magicpig {
namespace {

constexpr double kFloor = 0.05;      // share of the weight that all keys get alike
constexpr int kWeightBits = 30;      // all weights together are about 2^30
constexpr int64_t kLargePerRow = 8;  // keys looked at as candidates for certainty, per row of the budget, at most
constexpr double kLog2E = 1.4426950408889634;

// The least weight of a key.
uint32_t floor_weight(int64_t keys) {
  return std::max(1u, static_cast<uint32_t>(kFloor * (1 << kWeightBits) / static_cast<double>(keys)));
}

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

// In a group each node of the tree over its lanes has a bit of `swaps`: whether a walk comes to its second half first.
bool swapped(uint32_t swaps, int nodes, int node) { return swaps >> (nodes - 1 + node) & 1; }

// The tree over the weights of a group.
struct GroupTree {
  uint64_t sums[2 * kSumKeys];  // of node i among n at [n + i]

  explicit GroupTree(const uint32_t* weights) {
    std::copy_n(weights, kSumKeys, sums + kSumKeys);
    for (int i = kSumKeys - 1; i > 0; --i) sums[i] = sums[2 * i] + sums[2 * i + 1];
  }
  uint64_t sum() const { return sums[1]; }
  // The lane that a walk is in after `way` of the sum.
  int lane_at(uint32_t swaps, uint64_t way) const {
    int node = 0;
    for (int nodes = 1; nodes < kSumKeys; nodes *= 2) {
      int child = 2 * node + swapped(swaps, nodes, node);
      const uint64_t first = sums[2 * nodes + child];
      if (way > first) {
        way -= first;
        child ^= 1;
      }
      node = child;
    }
    return node;
  }
};

}  // namespace

SketchLayout SketchSampler::layout() const {
  const auto plane = [&](int width) { return (head_dim * width + 31) / 32; };
  return {bits, head_dim, bits == 3 ? plane(2) + plane(1) : plane(bits)};
}

void sketch_rows(const SketchJob& job, uint32_t* words, uint16_t* scales) {
  const Kernels& run = kernels();
  const SketchLayout layout = job.sampler.layout();
  const Rotation rotation = job.sampler.rotation();
  const int64_t dim = rotation.dim, block_words = static_cast<int64_t>(layout.words) * kSketchKeys;
  const int64_t first_block = job.first / kSketchKeys, end_block = (job.first + job.count - 1) / kSketchKeys + 1;
  const int64_t pieces = end_block - first_block;  // tasks write whole blocks
  parallel(job.heads * pieces, [&](int64_t task) {
    const int64_t head = task / pieces, block = first_block + task % pieces;
    const int64_t begin = std::max(job.first, block * kSketchKeys);
    const int64_t n = std::min(job.first + job.count, (block + 1) * kSketchKeys) - begin;
    thread_local std::vector<float> keys, turned;
    keys.resize(kSketchKeys * dim);
    turned.resize(kSketchKeys * dim);
    const char* rows = job.rows[head] + (begin - job.first) * job.row_bytes;
    for (int64_t i = 0; i < n; ++i) read_key(job.dtype, rotation.dim, rows + i * job.row_bytes, keys.data() + i * dim);
    run.turn(keys.data(), dim, n, rotation, turned.data());
    uint32_t* to = words + (head * job.blocks + block) * block_words;
    for (int64_t i = 0; i < n; ++i) {
      run.pack(turned.data() + i * dim, rotation, job.sampler.bits, job.sampler.distance,
               static_cast<int>((begin + i) % kSketchKeys), to, scales + head * job.blocks * kSketchKeys + begin + i);
    }
  });
}

void copy_sketch(const uint32_t* words, const uint16_t* scales, int64_t count, int64_t blocks, int heads, int key_words,
                 uint32_t* to_words, uint16_t* to_scales, int64_t first, int64_t to_blocks) {
  const int64_t block_words = static_cast<int64_t>(key_words) * kSketchKeys;
  parallel(heads, [&](int64_t head) {
    const uint32_t* from = words + head * blocks * block_words;
    uint32_t* to = to_words + head * to_blocks * block_words;
    std::copy_n(scales + head * blocks * kSketchKeys, count, to_scales + head * to_blocks * kSketchKeys + first);
    // Runs of lanes that stay together on both sides.
    for (int64_t i = 0; i < count;) {
      const int64_t lane = i % kSketchKeys, to_lane = (first + i) % kSketchKeys;
      const int64_t n = std::min({count - i, kSketchKeys - lane, kSketchKeys - to_lane});
      for (int word = 0; word < key_words; ++word) {
        std::copy_n(from + i / kSketchKeys * block_words + word * kSketchKeys + lane, n,
                    to + (first + i) / kSketchKeys * block_words + word * kSketchKeys + to_lane);
      }
      i += n;
    }
  });
}

void prepare_query(const SketchSampler& sampler, const float* turned, float offset, float largest, LogitRule rule,
                   SketchQuery* query) {
  const float unit = kernels().to_bytes(turned, sampler.dim(), query->values);
  int32_t sum = 0, magnitude = 0;
  for (int d = 0; d < sampler.head_dim; ++d) {
    sum += query->values[d];
    magnitude += std::abs(query->values[d]);
  }
  const int top_level = (1 << sampler.bits) - 1;
  const float logit = rule.scale * unit;
  const double bound =
      rule.softcap > 0 ? rule.softcap : static_cast<double>(std::fabs(logit)) * magnitude * top_level * largest;
  const double room = std::floor(std::log2(32767 / std::max(bound * kLog2E, 1e-30)));
  const int fraction_bits = static_cast<int>(std::clamp(room, 0.0, static_cast<double>(kScoreBits)));
  // With too little room even for whole octaves an octave becomes several: no score may leave its 16 bits.
  const float octaves = static_cast<float>(std::ldexp(kLog2E, room < 0 ? static_cast<int>(room) : fraction_bits));
  query->rule = {.query = query->values,
                 .correction = top_level * sum,
                 .fraction_bits = fraction_bits,
                 .unit = rule.softcap > 0 ? logit : logit * octaves,
                 .offset = offset,
                 .softcap = rule.softcap,
                 .octaves = octaves};
}

WeightRule weight_rule(const ScoreSum* sums, int64_t count, int64_t stride, int fraction_bits) {
  int32_t base = sums[0].base;
  for (int64_t i = 1; i < count; ++i) base = std::max(base, sums[i * stride].base);
  double total = 0;  // bases are whole octaves apart, so nothing is rounded here
  for (int64_t i = 0; i < count; ++i) {
    const int octaves = (base - sums[i * stride].base) >> fraction_bits;
    total += std::ldexp(sums[i * stride].sum, -octaves);
  }
  const double above = std::nearbyint(std::ldexp(std::log2(total), fraction_bits));
  return {base + static_cast<int32_t>(above), fraction_bits};
}

void Weights::reset(int64_t keys, int64_t blocks, int64_t budget) {
  keys_ = keys;
  budget_ = budget;
  block_ = found_ = added_ = 0;
  pieces_.clear();
  const auto grow = [](std::vector<uint32_t>& memory, int64_t count) {
    if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  };
  grow(weights_, blocks * kSketchKeys);
  grow(sums_, blocks * (kSketchKeys / kSumKeys));
  // Shares of all keys sum to less than 1.6, and a candidate has at least 1 / (kLargePerRow * budget) of it.
  grow(large_, std::min(keys, 2 * kLargePerRow * budget) + kSketchKeys);
}

void Weights::add(const int16_t* fixed, int64_t count, int heads, const WeightRule* rules) {
  const float unit = static_cast<float>((1 - kFloor) * (1 << kWeightBits) / heads);
  const auto floor = static_cast<int32_t>(floor_weight(keys_));
  const float certain = static_cast<float>(1 << kWeightBits) / static_cast<float>(kLargePerRow * budget_);
  uint32_t* large = large_.data() + found_;
  const int64_t found =
      kernels().weigh(fixed, count, heads, rules, unit, floor, certain, weights_.data() + block_ * kSketchKeys,
                      sums_.data() + block_ * (kSketchKeys / kSumKeys), large);
  for (int64_t i = 0; i < found; ++i) large[i] += static_cast<uint32_t>(block_ * kSketchKeys);
  pieces_.push_back({added_, block_ * kSketchKeys});
  found_ += found;
  added_ += count;
  block_ += (count + kSketchKeys - 1) / kSketchKeys;
}

// Whether the keys of more than `lightest`, which are in large_, are enough to know the step.
bool Weights::solve(uint64_t lightest) {
  std::vector<uint32_t> heavy(found_);
  for (int64_t i = 0; i < found_; ++i) heavy[i] = weights_[large_[i]];
  std::sort(heavy.begin(), heavy.end(), std::greater<>());
  uint64_t rest = 0, budget = budget_;
  for (int64_t i = 0; i < sum_count(); ++i) rest += sums_[i];
  bool enough = false;
  for (const uint64_t weight : heavy) {
    enough = weight * budget < rest || budget == 1;
    if (enough) break;
    rest -= weight;
    --budget;
  }
  step_ = std::max<uint64_t>(1, rest / budget);
  return enough || budget == 1 || lightest * budget < rest;
}

void Weights::settle_step() {
  if (budget_ >= keys_) {
    step_ = 1;
  } else {
    uint64_t lightest = (1 << kWeightBits) / (kLargePerRow * budget_) + floor_weight(keys_) + 1;
    // Where few keys have nearly all of the weight, lighter ones than expected are certain too.
    while (!solve(lightest)) {
      lightest /= 16;
      found_ = 0;
      if (static_cast<int64_t>(large_.size()) < block_ * kSketchKeys) large_.resize(block_ * kSketchKeys);
      for (int64_t i = 0; i < block_ * kSketchKeys; ++i) {
        if (weights_[i] > lightest) large_[found_++] = static_cast<uint32_t>(i);
      }
    }
  }
  // No key is longer than a step.
  for (int64_t i = 0; i < found_; ++i) {
    const uint32_t weight = weights_[large_[i]];
    if (weight > step_) sums_[large_[i] / kSumKeys] -= static_cast<uint32_t>(weight - step_);
  }
  join_sums();
}

// Turns the sums of a piece's keys into those of all keys, of which the first of a piece may be amid a group.
void Weights::join_sums() {
  const int64_t groups = (keys_ + kSumKeys - 1) / kSumKeys;
  const auto aligned = [](const Piece& piece) { return piece.key % kSumKeys == 0; };
  if (step_ > 1 && std::all_of(pieces_.begin(), pieces_.end(), aligned)) {
    // Blocks begin anew with each piece, so sums only move to the front.
    for (size_t p = 0; p < pieces_.size(); ++p) {
      const int64_t first = pieces_[p].key / kSumKeys;
      const int64_t end = p + 1 < pieces_.size() ? pieces_[p + 1].key / kSumKeys : groups;
      std::memmove(&sums_[first], &sums_[pieces_[p].slot / kSumKeys], (end - first) * sizeof(sums_[0]));
    }
    return;
  }
  std::fill_n(sums_.begin(), groups, 0);
  for (size_t p = 0; p < pieces_.size(); ++p) {
    const int64_t end = p + 1 < pieces_.size() ? pieces_[p + 1].key : keys_;
    for (int64_t key = pieces_[p].key; key < end; ++key) {
      const uint64_t weight = weights_[pieces_[p].slot + key - pieces_[p].key];
      sums_[key / kSumKeys] += static_cast<uint32_t>(std::min(weight, step_));
    }
  }
}

void Weights::order_walk(int bits) {
  if (bits == order_bits_) return;
  order_bits_ = bits;
  order_.resize(size_t{1} << bits);
  for (uint32_t i = 0; i < order_.size(); ++i) order_[i] = reversed(scrambled(reversed(i, bits)), bits);
}

void Weights::pick(uint64_t start, int doublings, std::vector<uint32_t>* keys, std::vector<float>* log_u) {
  keys->clear();
  log_u->clear();
  const int64_t groups = (keys_ + kSumKeys - 1) / kSumKeys;
  int bits = 0;
  while (int64_t{1} << bits < groups) ++bits;
  order_walk(bits);
  taken_.assign((groups + 63) / 64, 0);
  entries_.resize(groups);
  uint64_t walked = (start << doublings) % step_;
  for (const uint32_t group : order_) {
    if (group >= groups) continue;
    const uint64_t entered = walked;
    walked += static_cast<uint64_t>(sums_[group]) << doublings;
    if (walked < step_) continue;
    walked -= step_;
    if (walked >= step_) walked %= step_;
    __builtin_prefetch(&weights_[group * kSumKeys]);  // where they are, unless a piece before ends amid a block
    taken_[group / 64] |= uint64_t{1} << group % 64;
    entries_[group] = static_cast<uint32_t>(entered);
  }
  const double inverse = 1 / static_cast<double>(step_);
  const Piece* piece = pieces_.data();
  for (size_t word = 0; word < taken_.size(); ++word) {
    for (uint64_t left = taken_[word]; left != 0; left &= left - 1) {
      const int64_t group = static_cast<int64_t>(word) * 64 + __builtin_ctzll(left);
      uint32_t weights[kSumKeys];
      piece = read_group(group, piece, weights);
      const uint32_t swaps = scrambled(static_cast<uint32_t>(group)) * 0x9E3779B1u >> 17;
      const GroupTree tree(weights);
      const uint64_t round_up = (uint64_t{1} << doublings) - 1;
      uint32_t taken = 0;
      for (uint64_t way = step_ - entries_[group]; way <= tree.sum() << doublings; way += step_) {
        taken |= 1u << tree.lane_at(swaps, (way + round_up) >> doublings);
      }
      for (; taken != 0; taken &= taken - 1) {
        const int lane = __builtin_ctz(taken);
        const uint64_t weight = static_cast<uint64_t>(weights[lane]) << doublings;
        keys->push_back(static_cast<uint32_t>(group * kSumKeys + lane));
        log_u->push_back(weight >= step_ ? 0.0f : std::log(static_cast<float>(static_cast<double>(weight) * inverse)));
      }
    }
  }
}

// The weights of the keys of a group, as long as a step at most, zero where no key is. Returns the piece of the first of them,
// which is not before `piece`.
const Weights::Piece* Weights::read_group(int64_t group, const Piece* piece, uint32_t* to) const {
  const Piece* last = pieces_.data() + pieces_.size() - 1;
  const int64_t first = group * kSumKeys, end = std::min(keys_, first + kSumKeys);
  while (piece < last && first >= piece[1].key) ++piece;
  const Piece* of = piece;
  for (int64_t key = first; key < end;) {
    while (of < last && key >= of[1].key) ++of;
    const int64_t until = of < last ? std::min(end, of[1].key) : end;
    const uint32_t* from = &weights_[of->slot + key - of->key];
    for (; key < until; ++key) to[key - first] = static_cast<uint32_t>(std::min<uint64_t>(*from++, step_));
  }
  std::fill(to + (end - first), to + kSumKeys, 0);
  return piece;
}

uint64_t start_for(uint64_t seed, uint64_t head, uint64_t position, uint64_t step) {
  uint64_t x = 0;
  for (const uint64_t word : {seed, head, position}) {
    x = (x ^ word) + 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    x = x ^ x >> 31;
  }
  return (x >> 32) * step >> 32;
}

}  // namespace magicpig
