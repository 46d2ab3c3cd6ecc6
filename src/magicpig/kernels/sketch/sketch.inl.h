// Keys -> codes of a few bits -> scores -> integer weights. Lanes are keys: a block of kSketchKeys keys is a row of 32-bit
// words for every 32 / bits coordinates, so that a score needs no sum across lanes and one load serves all query heads.
#pragma once

namespace {

constexpr int kTurnRows = W == 16 ? 6 : 2;       // vectors turned at once
constexpr int kTurnColumns = kLane / W;          // of W coordinates each
constexpr int kScoreHeads = 4;                   // heads scored at once
constexpr int kScoreVectors = W == 16 ? 4 : 2;   // of W keys each
constexpr int kSketchVectors = kSketchKeys / W;  // of a block
constexpr int kRebaseOctaves = 8;                // by which scores may exceed the base of their sum
constexpr int kPrefetchBlocks = 1;               // blocks of codes requested ahead

template <int M>
inline void turn_tile(const float* x, int64_t stride, const Rotation& rotation, int column, float* y) {
  F acc[M][kTurnColumns] = {};
  for (int d = 0; d < rotation.head_dim; ++d) {
    const float* row = rotation.rows + (int64_t)d * rotation.dim + column;
    F part[kTurnColumns];
    for (int c = 0; c < kTurnColumns; ++c) part[c] = load(row + c * W);
    for (int m = 0; m < M; ++m) {
      for (int c = 0; c < kTurnColumns; ++c) acc[m][c] += part[c] * x[m * stride + d];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < kTurnColumns; ++c) store(y + (int64_t)m * rotation.dim + column + c * W, acc[m][c]);
  }
}

void turn(const float* x, int64_t stride, int64_t n, const Rotation& rotation, float* y) {
  int64_t i = 0;
  const auto turn_rows = [&]<int M>() {
    for (; i + M <= n; i += M) {
      for (int column = 0; column < rotation.dim; column += kTurnColumns * W) {
        turn_tile<M>(x + i * stride, stride, rotation, column, y + i * rotation.dim);
      }
    }
  };
  turn_rows.template operator()<kTurnRows>();
  turn_rows.template operator()<2>();
  turn_rows.template operator()<1>();
}

// Codes of one turned key, and the scale that brings its levels nearest to it.
inline float quantise(const float* y, int head_dim, int dim, int bits, float distance, int32_t* codes) {
  F top{};
  for (int d = 0; d < dim; d += W) top = max(top, max(load(y + d), -load(y + d)));
  // Relative to the largest coordinate no square overflows. Of zeros, and of keys that are too large to turn, all
  // codes are alike and the scale is zero.
  const float largest_of_all = largest(top);
  const float inverse = largest_of_all > 0.0f && largest_of_all <= 3e38f ? 1.0f / largest_of_all : 0.0f;
  F squares{};
  for (int d = 0; d < dim; d += W) squares += (load(y + d) * inverse) * (load(y + d) * inverse);
  const float length = __builtin_sqrtf(sum(squares)) * distance;
  const float per_step = length > 0.0f ? 1.0f / length : 0.0f;
  const int half = 1 << (bits - 1);
  F along{}, own{};
  for (int d = 0; d < dim; d += W) {
    const F unit = inverse > 0.0f ? load(y + d) * inverse : F{};
    const F clamped = min(max(unit * per_step, splat((float)-half)), splat((float)half - 0.5f));
    const I code = truncate(clamped + (float)half);  // not negative: truncating is rounding down
    const F level = to_f(2 * code - (2 * half - 1));
    memcpy(codes + d, &code, sizeof code);
    // Padding is zero and so adds nothing to `along`; to `own` it would.
    along += unit * level;
    own += level * level;
  }
  float padding = 0.0f;
  for (int d = head_dim; d < dim; ++d) padding += 1.0f;  // the level of zero is one
  return largest_of_all * (sum(along) / (sum(own) - padding));
}

// Writes coordinates' codes into the words of one plane: `width` bits of each, from bit `low` of the code on.
inline uint32_t* pack_plane(const int32_t* codes, int head_dim, int width, int low, uint32_t* words) {
  const int per_word = 32 / width, mask = (1 << width) - 1;
  for (int first = 0; first < head_dim; first += per_word, words += kSketchKeys) {
    uint32_t word = 0;
    for (int i = 0; i < per_word && first + i < head_dim; ++i) {
      word |= (uint32_t)((codes[first + i] >> low) & mask) << (8 * (i & 3) + width * (i >> 2));
    }
    *words = word;
  }
  return words;
}

void pack(const float* turned, const Rotation& rotation, int bits, float distance, int lane, uint32_t* block,
          uint16_t* scale) {
  alignas(64) int32_t codes[kMaxDim];
  float best = quantise(turned, rotation.head_dim, rotation.dim, bits, distance, codes);
  best = best >= 0.0f && best <= 65504.0f ? best : best > 65504.0f ? 65504.0f : 0.0f;
  f16 narrow;
  narrow_one(best, &narrow);
  *scale = narrow.bits;
  uint32_t* words = block + lane;
  if (bits == 3) {
    words = pack_plane(codes, rotation.head_dim, 2, 0, words);
    pack_plane(codes, rotation.head_dim, 1, 2, words);
  } else {
    pack_plane(codes, rotation.head_dim, bits, 0, words);
  }
}

// acc[h][v] += products of WIDTH-bit codes, times 2^SHIFT, with the heads' whole numbers, for VECTORS * W keys.
template <int WIDTH, int SHIFT, int HEADS, int VECTORS>
inline const uint32_t* add_plane(const uint32_t* words, const uint32_t* ahead, int head_dim, const int8_t* const* query,
                                 I (*acc)[VECTORS]) {
  constexpr int kPerWord = 32 / WIDTH, kGroups = 8 / WIDTH;
  constexpr int kLargest = ((1 << WIDTH) - 1) << SHIFT;
  constexpr int kWords = kByteDots / (kLargest * kGroups);  // whose products fit a sum
  static_assert(kWords >= 1);
  const int count = (head_dim + kPerWord - 1) / kPerWord;
  for (int first = 0; first < count; first += kWords) {
    const int last = count < first + kWords ? count : first + kWords;
    ByteSum sums[HEADS][VECTORS] = {};
    for (int word = first; word < last; ++word) {
      U packed[VECTORS];
      for (int v = 0; v < VECTORS; ++v) packed[v] = load(words + (int64_t)word * kSketchKeys + v * W);
      for (int v = 0; v < VECTORS * W; v += 16) __builtin_prefetch(ahead + (int64_t)word * kSketchKeys + v, 0, 2);
#pragma GCC unroll 8
      for (int k = 0; k < kGroups; ++k) {
        U codes[VECTORS];
        for (int v = 0; v < VECTORS; ++v) {
          const int right = WIDTH * k - SHIFT;
          codes[v] = (right >= 0 ? packed[v] >> right : packed[v] << -right) & (0x01010101u * kLargest);
        }
        for (int h = 0; h < HEADS; ++h) {
          int32_t four;
          memcpy(&four, query[h] + word * kPerWord + 4 * k, 4);
          for (int v = 0; v < VECTORS; ++v) sums[h][v] = add_dot(sums[h][v], codes[v], splat(four));
        }
      }
    }
    for (int h = 0; h < HEADS; ++h) {
      for (int v = 0; v < VECTORS; ++v) acc[h][v] += total(sums[h][v]);
    }
  }
  return words + (int64_t)count * kSketchKeys;
}

template <int HEADS, int VECTORS>
inline void code_dots(int bits, const uint32_t* words, const uint32_t* ahead, int head_dim, const int8_t* const* query,
                      I (*acc)[VECTORS]) {
  switch (bits) {
    case 1:
      add_plane<1, 0, HEADS, VECTORS>(words, ahead, head_dim, query, acc);
      break;
    case 2:
      add_plane<2, 0, HEADS, VECTORS>(words, ahead, head_dim, query, acc);
      break;
    case 3: {
      const uint32_t* rest = add_plane<2, 0, HEADS, VECTORS>(words, ahead, head_dim, query, acc);
      add_plane<1, 2, HEADS, VECTORS>(rest, ahead + (rest - words), head_dim, query, acc);
      break;
    }
    default:
      add_plane<4, 0, HEADS, VECTORS>(words, ahead, head_dim, query, acc);
  }
}

// About 2^x for a score, relative to a base: see power_of_two in kernels/sketch/reference.py.
inline F power_of_two(I fixed, int32_t base, int fraction_bits) {
  const I near = max(fixed - base, splat((int32_t)(-(kFarthest << fraction_bits))));
  return (F)((near << (23 - fraction_bits)) + (127 << 23));
}

// The sum of the powers of one head's scores so far, whose base only ever rises.
struct PowerSum {
  F sum;
  int32_t base, limit;
};

inline void add_powers(const I* fixed, int fraction_bits, PowerSum* to) {
  I top = fixed[0];
  for (int v = 1; v < kSketchVectors; ++v) top = max(top, fixed[v]);
  if (positive(to_f(top - to->limit)) != 0) {
    const int32_t octave = (int32_t)largest(to_f(top)) >> fraction_bits;
    const int32_t base = octave << fraction_bits;
    const int fall = octave - (to->base >> fraction_bits);
    to->sum = to->sum * (fall > 126 ? 0.0f : __builtin_ldexpf(1.0f, -fall));
    to->base = base;
    to->limit = base + (kRebaseOctaves << fraction_bits);
  }
  for (int v = 0; v < kSketchVectors; ++v) to->sum += power_of_two(fixed[v], to->base, fraction_bits);
}

// Scores of one block for HEADS heads: written to `fixed` [HEADS][kSketchKeys], their powers added to `sums`.
template <int HEADS>
inline void score_block(const SketchLayout& layout, const uint32_t* words, const uint32_t* ahead,
                        const uint16_t* scales, int count, const ScoreRule* rules, int16_t* fixed, PowerSum* sums) {
  const int8_t* query[HEADS];
  for (int h = 0; h < HEADS; ++h) query[h] = rules[h].query;
  I scores[HEADS][kSketchVectors];
  for (int v0 = 0; v0 < kSketchVectors; v0 += kScoreVectors) {
    I acc[HEADS][kScoreVectors] = {};
    code_dots<HEADS, kScoreVectors>(layout.bits, words + v0 * W, ahead + v0 * W, layout.head_dim, query, acc);
    for (int v = 0; v < kScoreVectors; ++v) {
      const F scale = widen((const f16*)scales + (v0 + v) * W);
      for (int h = 0; h < HEADS; ++h) {
        const ScoreRule& rule = rules[h];
        const F dot = to_f(2 * acc[h][v] - rule.correction);
        F score = scale * dot * rule.unit;
        if (rule.softcap > 0.0f) score = cap_logits(score + rule.offset, rule.softcap) * rule.octaves;
        scores[h][v0 + v] = nearest(min(max(score, splat(-32768.0f)), splat(32767.0f)));
      }
    }
  }
  for (int h = 0; h < HEADS; ++h) {
    if (count < kSketchKeys) {
      alignas(64) int16_t kept[kSketchKeys];
      for (int v = 0; v < kSketchVectors; ++v) store(kept + v * W, scores[h][v]);
      for (int i = count; i < kSketchKeys; ++i) kept[i] = -32768;
      for (int v = 0; v < kSketchVectors; ++v) scores[h][v] = load(kept + v * W);
    }
    for (int v = 0; v < kSketchVectors; ++v) store(fixed + h * kSketchKeys + v * W, scores[h][v]);
    add_powers(scores[h], rules[h].fraction_bits, &sums[h]);
  }
}

void score(const SketchLayout& layout, const uint32_t* words, const uint16_t* scales, int64_t count, int heads,
           const ScoreRule* rules, int16_t* fixed, ScoreSum* sums) {
  const int64_t block_words = (int64_t)layout.words * kSketchKeys;
  constexpr int kGroup = kScoreHeads;
  for (int h = 0; h < heads; h += kGroup) {
    const int group = heads - h < kGroup ? heads - h : kGroup;
    PowerSum part[kGroup];
    for (int i = 0; i < group; ++i) part[i] = {F{}, -(1 << 24), -(1 << 24)};
    int64_t block = 0;
    for (int64_t first = 0; first < count; first += kSketchKeys, ++block) {
      const int here = count - first < kSketchKeys ? (int)(count - first) : kSketchKeys;
      const uint32_t* from = words + block * block_words;
      const uint32_t* ahead = from + kPrefetchBlocks * block_words;
      const uint16_t* own = scales + first;
      int16_t* to = fixed + (block * heads + h) * kSketchKeys;
      if (group == 4) {
        score_block<4>(layout, from, ahead, own, here, rules + h, to, part);
        continue;
      }
      int i = 0;
      if (group >= 2) {
        score_block<2>(layout, from, ahead, own, here, rules + h, to, part);
        i = 2;
      }
      if (i < group) {
        score_block<1>(layout, from, ahead, own, here, rules + h + i, to + i * kSketchKeys, part + i);
      }
    }
    for (int i = 0; i < group; ++i) sums[h + i] = {part[i].base, (double)sum(part[i].sum)};
  }
}

int64_t weigh(const int16_t* fixed, int64_t count, int heads, const WeightRule* rules, float unit, int32_t floor,
              float certain, uint32_t* weights, uint32_t* sums, uint32_t* large) {
  int64_t found = 0, block = 0;
  for (int64_t first = 0; first < count; first += kSketchKeys, ++block) {
    const int16_t* from = fixed + block * heads * kSketchKeys;
    uint32_t* to = weights + block * kSketchKeys;
    F shares[kSketchVectors] = {};
    for (int h = 0; h < heads; ++h) {
      for (int v = 0; v < kSketchVectors; ++v) {
        shares[v] += power_of_two(load(from + h * kSketchKeys + v * W), rules[h].top, rules[h].fraction_bits);
      }
    }
    uint64_t above = 0;
    for (int v = 0; v < kSketchVectors; ++v) {
      const F share = shares[v] * unit;
      const I weight = truncate(share) + floor;
      above |= positive(share - certain) << (v * W);
      memcpy(to + v * W, &weight, sizeof weight);
    }
    if (count - first < kSketchKeys) {
      for (int64_t i = count - first; i < kSketchKeys; ++i) to[i] = 0;
      above &= ((uint64_t)1 << (count - first)) - 1;
    }
    for (int i = 0; i < kSketchKeys; i += kSumKeys) {
      U part{};
      for (int j = i; j < i + kSumKeys; j += W) part += load(to + j);
      *sums++ = sum(part);
    }
    for (; above != 0; above &= above - 1) large[found++] = (uint32_t)first + lowest_bit(above);
  }
  return found;
}

}  // namespace
