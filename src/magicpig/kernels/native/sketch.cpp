#include "sketch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "parallel.h"
#include "rows.h"

namespace magicpig {
namespace {

constexpr double kFloor = 0.05;      // share of the weight that all keys get alike
constexpr int kWeightBits = 30;      // all weights together are about 2^30
constexpr int kMostBits = 27;        // and none is more than 2^27 above the floor
constexpr double kWidest = 1 << 18;  // octaves between the scores of a head and zero, in which a float is exact enough
constexpr int64_t kPilotBlocks = 64, kPilotApart = 16;
constexpr double kOctave = 1 << 23;  // of a score
constexpr double kLog2E = 1.4426950408889634;

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
      const int child = 2 * node + swapped(swaps, nodes, node);
      const uint64_t first = sums[2 * nodes + child];
      const bool second = way > first;  // either is as likely: nothing to predict
      way -= second ? first : 0;
      node = child ^ second;
    }
    return node;
  }
};

// Copies the codes and scales of keys `at` .. of one head's sketch to keys `to_at` .. of another.
void copy_keys(const uint32_t* words, const uint16_t* scales, int64_t at, int64_t count, int key_words,
               uint32_t* to_words, uint16_t* to_scales, int64_t to_at) {
  std::copy_n(scales + at, count, to_scales + to_at);
  // Runs of lanes that stay together on both sides.
  for (const int64_t end = at + count; at < end;) {
    const int64_t lane = at % kSketchKeys, to_lane = to_at % kSketchKeys;
    const int64_t n = std::min({end - at, kSketchKeys - lane, kSketchKeys - to_lane});
    const uint32_t* from = words + (at - lane) * key_words + lane;
    uint32_t* to = to_words + (to_at - to_lane) * key_words + to_lane;
    for (int word = 0; word < key_words; ++word) std::copy_n(from + word * kSketchKeys, n, to + word * kSketchKeys);
    at += n;
    to_at += n;
  }
}

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
    copy_keys(words + head * blocks * block_words, scales + head * blocks * kSketchKeys, 0, count, key_words,
              to_words + head * to_blocks * block_words, to_scales + head * to_blocks * kSketchKeys, first);
  });
}

void prepare_query(const SketchSampler& sampler, const float* turned, float offset, LogitRule rule,
                   SketchQuery* query) {
  constexpr double kMost = 1e30;  // so that no product with it is infinite
  const float unit = kernels().to_bytes(turned, sampler.dim(), query->values);
  int32_t sum = 0;
  for (int d = 0; d < sampler.head_dim; ++d) sum += query->values[d];
  const double logit = static_cast<double>(rule.scale) * unit, octaves = kLog2E * kOctave;
  query->rule = {.query = query->values,
                 .correction = static_cast<float>(((1 << sampler.bits) - 1) * sum),
                 .unit = static_cast<float>(std::clamp(rule.softcap > 0 ? logit : logit * octaves, -kMost, kMost)),
                 .offset = offset,
                 .softcap = rule.softcap,
                 .octaves = static_cast<float>(octaves)};
}

Pilot::Pilot(int64_t keys)
    : keys(keys),
      all_blocks((keys + kSketchKeys - 1) / kSketchKeys),
      apart(std::clamp<int64_t>(all_blocks / kPilotBlocks, 1, kPilotApart)) {}

int64_t Pilot::block(int64_t i) const {
  const int64_t first = i * apart;
  return first + scrambled(static_cast<uint32_t>(i)) % std::min(apart, all_blocks - first);
}

int64_t Pilot::key_count() const {
  const int64_t all = blocks() * kSketchKeys;
  return block(blocks() - 1) == all_blocks - 1 ? all - (all_blocks * kSketchKeys - keys) : all;
}

void sum_pilot(const SketchLayout& layout, const std::vector<SketchPiece>& pieces, const Pilot& pilot, int64_t begin,
               int64_t end, int heads, const ScoreRule* rules, ScoreSum* sums) {
  const int64_t block_words = static_cast<int64_t>(layout.words) * kSketchKeys;
  std::vector<SketchBlock> blocks;
  // Those whose keys lie in two blocks are put together.
  thread_local std::vector<uint32_t> words;
  thread_local std::vector<uint16_t> scales;
  words.resize(std::max<size_t>(words.size(), (end - begin) * block_words));
  scales.resize(std::max<size_t>(scales.size(), (end - begin) * kSketchKeys));
  int64_t before = 0;  // keys of earlier pieces
  auto piece = pieces.begin();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = pilot.block(i) * kSketchKeys, last = std::min(pilot.keys, first + kSketchKeys);
    for (; first >= before + piece->count; ++piece) before += piece->count;
    const int keys = static_cast<int>(last - first);
    if ((first - before) % kSketchKeys == 0 && last <= before + piece->count) {
      blocks.push_back({piece->words + (first - before) * layout.words, piece->scales + first - before, keys});
      continue;
    }
    uint32_t* to = words.data() + (i - begin) * block_words;
    uint16_t* to_scales = scales.data() + (i - begin) * kSketchKeys;
    blocks.push_back({to, to_scales, keys});
    for (int64_t key = first; key < last;) {
      for (; key >= before + piece->count; ++piece) before += piece->count;
      const int64_t at = key - before, n = std::min(last - key, piece->count - at);
      copy_keys(piece->words, piece->scales, at, n, layout.words, to, to_scales, key - first);
      key += n;
    }
  }
  kernels().sum_powers(layout, blocks.data(), static_cast<int>(blocks.size()), heads, rules, sums);
}

WeightRule weight_rule(const std::vector<ScoreRule>& head_rules, const ScoreSum* sums, int64_t parts,
                       const Pilot& pilot) {
  const int heads = static_cast<int>(head_rules.size());
  WeightRule rule{head_rules, std::vector<float>(heads), kMostBits, 1};
  for (int wide = 1; wide < heads; wide *= 2) --rule.octaves;
  rule.floor = std::max(1, static_cast<int32_t>(kFloor * (1 << kWeightBits) / static_cast<double>(pilot.keys)));
  const double unit = (1 - kFloor) * (1 << kWeightBits) / heads;
  const double share = static_cast<double>(pilot.key_count()) / static_cast<double>(pilot.keys);
  for (int h = 0; h < heads; ++h) {
    double base = sums[h].base, total = 0;
    for (int64_t i = 1; i < parts; ++i) base = std::max(base, sums[i * heads + h].base);
    for (int64_t i = 0; i < parts; ++i) {
      // Bases are whole octaves apart, so nothing is rounded here.
      const ScoreSum& part = sums[i * heads + h];
      total += std::ldexp(part.sum, static_cast<int>(std::max(part.base - base, -2000.0)));
    }
    const double shrink = std::min(1.0, kWidest / std::max(std::fabs(base), 1.0));
    (head_rules[h].softcap > 0 ? rule.heads[h].octaves : rule.heads[h].unit) *= static_cast<float>(shrink);
    rule.ones[h] = static_cast<float>((base * shrink + std::log2(total / share / unit)) * kOctave);
  }
  return rule;
}

void Weights::reset(int64_t keys, int64_t blocks) {
  keys_ = keys;
  added_ = block_ = 0;
  pieces_.clear();
  const auto grow = [](std::vector<uint32_t>& memory, int64_t count) {
    if (static_cast<int64_t>(memory.size()) < count) memory.resize(count);
  };
  grow(weights_, blocks * kSketchKeys);
  grow(sums_, blocks * (kSketchKeys / kSumKeys));
}

void Weights::add(int64_t count) {
  pieces_.push_back({added_, block_ * kSketchKeys});
  added_ += count;
  block_ += (count + kSketchKeys - 1) / kSketchKeys;
}

void Weights::settle_step(int64_t budget) {
  const int64_t groups = block_ * (kSketchKeys / kSumKeys);
  heavy_.clear();
  step_ = 1;
  if (budget < keys_) {
    uint64_t rest = 0, left = budget, bound = std::numeric_limits<uint64_t>::max();
    for (int64_t i = 0; i < groups; ++i) rest += sums_[i];
    const uint64_t total = rest;
    // Keys that are certain leave less to the others, of which then some more may be.
    for (bool more = true; more;) {
      const uint64_t least = (rest + left - 1) / left;  // that is certain
      if (least < bound) {
        bound = least - least / 4;  // so that some rounds can do with one list
        heavy_.clear();
        for (int64_t i = 0; i < groups; ++i) {
          if (sums_[i] >= bound) heavy_.push_back(static_cast<uint32_t>(i));
        }
      }
      uint64_t certain = 0, weight = 0;
      for (const uint32_t group : heavy_) {
        for (int i = 0; i < kSumKeys; ++i) {
          const uint64_t own = weights_[group * kSumKeys + i];
          certain += own >= least;
          weight += own >= least ? own : 0;
        }
      }
      more = certain != budget - left;
      left = budget - certain;
      rest = total - weight;
    }
    step_ = std::max<uint64_t>(1, rest / left);
    // No key is longer than a step.
    for (const uint32_t group : heavy_) {
      for (int i = 0; i < kSumKeys; ++i) {
        const uint64_t own = weights_[group * kSumKeys + i];
        if (own > step_) sums_[group] -= static_cast<uint32_t>(own - step_);
      }
    }
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
  constexpr uint32_t kNear = 16;  // groups that follow each other in memory, and in the walk in some order
  for (size_t i = 0; i < order_.size(); i += kNear) {
    const int64_t near = order_[i] / kNear * kNear;
    uint64_t all = 0;
    for (int64_t group = near; group < std::min<int64_t>(near + kNear, groups); ++group) all += sums_[group];
    if (walked + (all << doublings) < step_) {
      walked += all << doublings;
      continue;
    }
    for (size_t j = i; j < std::min(i + kNear, order_.size()); ++j) {
      const uint32_t group = order_[j];
      if (group >= groups) continue;
      const uint64_t entered = walked;
      walked += static_cast<uint64_t>(sums_[group]) << doublings;
      if (walked < step_) continue;
      walked -= step_;
      if (walked >= step_) walked %= step_;
      __builtin_prefetch(&weights_[group * kSumKeys]);  // where they are, unless a piece before ends amid a block
      taken_[group / 64] |= uint64_t{1} << group % 64;
      entries_[group] = entered;
    }
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
  return static_cast<uint64_t>(static_cast<unsigned __int128>(x >> 32) * step >> 32);
}

}  // namespace magicpig
