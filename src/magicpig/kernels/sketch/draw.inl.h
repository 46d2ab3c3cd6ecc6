// Integer weights -> a systematic sample, nearly without branches that depend on what is drawn. See pick in
// kernels/sketch/reference.py.
#pragma once

namespace {

constexpr int kDrawnAtOnce = 4;  // ids written at once
static_assert(kDrawnAtOnce <= kPickSlack);

// Of each level of the tree over a group, by the distance of siblings' lanes: the bit of `swaps` that a lane's parent has,
// and all ones where the lane is in the parent's second half.
struct GroupLevels {
  uint32_t bit[4][kSumKeys], second[4][kSumKeys];

  constexpr GroupLevels() : bit(), second() {
    for (int level = 0; level < 4; ++level) {
      const int distance = 1 << level, parents = kSumKeys / (2 * distance);
      for (int lane = 0; lane < kSumKeys; ++lane) {
        bit[level][lane] = 1u << (parents - 1 + lane / (2 * distance));
        second[level][lane] = lane / distance % 2 == 1 ? ~0u : 0;
      }
    }
  }
};
static_assert(kSumKeys == 16);
alignas(64) constexpr GroupLevels kGroupLevels;

struct GroupOfKeys {
  static constexpr int kVectors = kSumKeys / W;
  U weights[kVectors] = {};  // of each key
  U before[kVectors] = {};   // of all that a walk comes to before it in its group

  void read(const uint32_t* from, uint32_t most, uint32_t swaps) {
    U sums[kVectors];  // of the half of a parent that a lane is in
    for (int v = 0; v < kVectors; ++v) {
      const U own = load(from + v * W);
      sums[v] = weights[v] = own < most ? own : most - U{};
      before[v] = U{};
    }
    add_level<0>(swaps, sums);
    add_level<1>(swaps, sums);
    add_level<2>(swaps, sums);
    add_level<3>(swaps, sums);
  }

  // The key in which the walk is after `way` of the group's weights.
  int lane_at(uint32_t way) const {
    uint64_t found = 0;
    for (int v = 0; v < kVectors; ++v) found |= below((way - 1) - before[v], weights[v]) << (v * W);
    return __builtin_ctzll(found);
  }

 private:
  template <int LEVEL>
  void add_level(uint32_t swaps, U (&sums)[kVectors]) {
    constexpr int kDistance = 1 << LEVEL;
    U others[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kDistance < W) {
        others[v] = across<kDistance>(sums[v]);
      } else {
        others[v] = sums[v ^ (kDistance / W)];
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const U bit = load(kGroupLevels.bit[LEVEL] + v * W), second = load(kGroupLevels.second[LEVEL] + v * W);
      const U later = (U)((bit & swaps) == bit) ^ second;
      before[v] += others[v] & later;
      sums[v] += others[v];
    }
  }
};

// log(x) of n numbers in (0, 1], in place, within two units in the last place. The polynomial is that of Cephes' logf
// (Moshier 1989).
inline void take_logs(float* x, int64_t n) {
  constexpr float kPolynomial[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                   -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                   2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
  constexpr int32_t kHalfRoot = 0x3f3504f3;  // the bits of sqrt(1/2)
  for (int64_t i = 0; i < n; i += W) {
    const I bits = (I)load(x + i);
    const I octaves = (bits - kHalfRoot) >> 23;
    const F m = (F)(bits - (octaves << 23)) - 1.0f;  // in [sqrt(1/2) - 1, sqrt(2) - 1)
    const F e = to_f(octaves), square = m * m;
    F y = splat(kPolynomial[0]);
    for (int k = 1; k < 9; ++k) y = y * m + kPolynomial[k];
    y = y * m * square - 2.12194440e-4f * e - 0.5f * square;
    store(x + i, m + y + 0.693359375f * e);
  }
}

int64_t pick(const uint32_t* weights, const uint32_t* sums, const Walk& walk, uint64_t step, uint64_t start,
             uint64_t* taken, uint32_t* ids, float* log_u) {
  const int64_t words = (walk.groups * kSumKeys + 63) / 64;
  memset(taken, 0, sizeof(uint64_t) * words);
  const uint32_t most = step < ~0u ? (uint32_t)step : ~0u;
  const int near = walk.count < kNearGroups ? (int)walk.count : kNearGroups;
  uint64_t walked = 0, way = step - start;  // `way`: where the next step ends
  GroupOfKeys keys;
  int64_t read = -1;  // which group they are: in a large sample several steps end in one
  for (int64_t i = 0; i < walk.count; i += near) {
    if (walk.order[i] / kNearGroups * kNearGroups >= walk.groups) continue;
    uint64_t ends[kNearGroups + 1];
    ends[0] = walked;
    for (int j = 0; j < near; ++j) ends[j + 1] = walked += sums[walk.order[i + j]];
    for (int j = near; j < kNearGroups; ++j) ends[j + 1] = walked;
    for (; way <= walked; way += step) {
      int j = 0;
      for (int k = 1; k < kNearGroups; ++k) j += ends[k] < way;
      const int64_t group = walk.order[i + j];
      if (group != read) keys.read(weights + group * kSumKeys, most, walk.swaps[group]);
      read = group;
      const int64_t key = group * kSumKeys + keys.lane_at((uint32_t)(way - ends[j]));
      taken[key / 64] |= (uint64_t)1 << key % 64;
    }
  }
  int64_t count = 0;
  for (int64_t word = 0; word < words; ++word) {
    uint64_t left = taken[word];
    const int drawn = __builtin_popcountll(left);
    for (int done = 0; done < drawn; done += kDrawnAtOnce) {
      for (int i = 0; i < kDrawnAtOnce; ++i, left &= left - 1) {
        ids[count + done + i] = (uint32_t)(word * 64 + __builtin_ctzll(left | (uint64_t)1 << 63));
      }
    }
    count += drawn;
  }
  const double inverse = 1 / (double)step;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t own = weights[ids[i]];
    log_u[i] = (float)((own < most ? own : most) * inverse);
  }
  for (int64_t i = count; i % W != 0; ++i) log_u[i] = 1.0f;
  take_logs(log_u, count);
  return count;
}

int64_t heavy_keys(const uint32_t* weights, const uint32_t* sums, int64_t groups, uint32_t bound, uint32_t* keys) {
  const U least = bound - U{};
  int64_t count = 0;
  for (int64_t group = 0; group < groups; ++group) {
    if (sums[group] < bound) continue;
    uint64_t light = 0;
    for (int v = 0; v < kSumKeys; v += W) light |= below(load(weights + group * kSumKeys + v), least) << v;
    for (uint64_t left = ~light & ((1u << kSumKeys) - 1); left != 0; left &= left - 1) {
      keys[count++] = (uint32_t)(group * kSumKeys + __builtin_ctzll(left));
    }
  }
  return count;
}

}  // namespace
