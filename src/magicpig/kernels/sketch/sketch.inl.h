// Keys -> codes of a few bits -> scores -> integer weights. Lanes are keys: a block of kSketchKeys keys is a row of 32-bit
// words for every 32 / bits coordinates, so that a score needs no sum across lanes and one load serves all query heads.
#pragma once

namespace {

constexpr int kTurnRows = kRegisters == 32 ? 6 : 2;  // vectors turned at once
constexpr int kTurnColumns = kLane / W;              // of W coordinates each
constexpr int kScoreHeads = 4;                       // heads scored at once
constexpr int kScoreVectors = kRegisters / 8;        // of W keys each
constexpr int kRebaseOctaves = 8;                    // by which scores may exceed the base of their sum
constexpr int kPrefetchBlocks = 4;                   // blocks of codes requested ahead
constexpr int kLowestScore = -32768;
constexpr int kMaxFours = kMaxDim / 4;

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

// Adds to sums[h][v] the products of WIDTH-bit codes with the heads' whole numbers, times 2^SHIFT, from `words` to `last`, for
// VECTORS vectors of W keys that are evenly spread over the block.
template <int WIDTH, int SHIFT, int HEADS, int VECTORS, class Sum>
[[gnu::always_inline]] inline void add_words(const uint32_t* words, const uint32_t* ahead, int first, int last,
                                             const Four (*query)[kMaxFours], Sum (*sums)[VECTORS]) {
  constexpr int kGroups = 8 / WIDTH, kApart = kSketchKeys / VECTORS;
  for (int word = first; word < last; ++word) {
    U packed[VECTORS];
    for (int v = 0; v < VECTORS; ++v) packed[v] = load(words + (int64_t)word * kSketchKeys + v * kApart);
    for (int v = 0; v < VECTORS * W; v += 16) __builtin_prefetch(ahead + (int64_t)word * kSketchKeys + v, 0, 3);
#pragma GCC unroll 8
    for (int k = 0; k < kGroups; ++k) {
      U codes[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        const int right = WIDTH * k - SHIFT;
        codes[v] =
            (right >= 0 ? packed[v] >> right : packed[v] << -right) & (0x01010101u * (((1 << WIDTH) - 1) << SHIFT));
      }
      for (int h = 0; h < HEADS; ++h) {
        const Four& numbers = query[h][word * kGroups + k];
        for (int v = 0; v < VECTORS; ++v) sums[h][v] = add_dot(sums[h][v], codes[v], numbers);
      }
    }
  }
}

// The same for all words of a plane. Returns how many there are.
template <int WIDTH, int SHIFT, int HEADS, int VECTORS>
[[gnu::always_inline]] inline int add_plane(const uint32_t* words, const uint32_t* ahead, int head_dim,
                                            const Four (*query)[kMaxFours], I (*acc)[VECTORS]) {
  constexpr int kPerWord = 32 / WIDTH;
  const int count = (head_dim + kPerWord - 1) / kPerWord;
  if constexpr (sizeof(ByteSum{}[0]) == sizeof(int32_t)) {
    add_words<WIDTH, SHIFT, HEADS, VECTORS>(words, ahead, 0, count, query, acc);
  } else {
    constexpr int kWords = kByteDots / ((((1 << WIDTH) - 1) << SHIFT) * (8 / WIDTH));  // whose products fit a sum
    static_assert(kWords >= 1);
    for (int first = 0; first < count; first += kWords) {
      ByteSum sums[HEADS][VECTORS] = {};
      const int last = count < first + kWords ? count : first + kWords;
      add_words<WIDTH, SHIFT, HEADS, VECTORS>(words, ahead, first, last, query, sums);
      for (int h = 0; h < HEADS; ++h) {
        for (int v = 0; v < VECTORS; ++v) acc[h][v] += total(sums[h][v]);
      }
    }
  }
  return count;
}

template <int BITS, int HEADS, int VECTORS>
[[gnu::always_inline]] inline void code_dots(const uint32_t* words, const uint32_t* ahead, int head_dim,
                                             const Four (*query)[kMaxFours], I (*acc)[VECTORS]) {
  if constexpr (BITS == 3) {
    const int64_t rest = add_plane<2, 0, HEADS, VECTORS>(words, ahead, head_dim, query, acc) * (int64_t)kSketchKeys;
    add_plane<1, 2, HEADS, VECTORS>(words + rest, ahead + rest, head_dim, query, acc);
  } else {
    add_plane<BITS, 0, HEADS, VECTORS>(words, ahead, head_dim, query, acc);
  }
}

// About 2^x of scores, relative to a base: see power_of_two in kernels/sketch/reference.py. With as many fraction bits as a
// bfloat16 has, a score is the pattern of such a number.
struct Powers {
  S lowest, bias, factor;

  Powers() = default;
  Powers(int32_t base, int fraction_bits) {
    const int32_t farthest = base - (kFarthest << fraction_bits);
    lowest = splat((int16_t)(farthest > kLowestScore ? farthest : kLowestScore));
    bias = splat((int16_t)((127 << fraction_bits) - base));  // may wrap, and then does so back
    factor = splat((int16_t)(1 << (kScoreBits - fraction_bits)));
  }
  // Of the keys of the lower and of the upper half of a block.
  void of(S scores, F& lower, F& upper) const {
    const U pattern = (U)((max(scores, lowest) + bias) * factor);
    lower = (F)(pattern << 16);
    upper = (F)(pattern & 0xffff0000u);
  }
};

// The sum of the powers of one head's scores so far, whose base only ever rises.
struct PowerSum {
  int fraction_bits;
  F sum{};
  int32_t base = kLowestScore;
  S limit;  // of a score; a higher one raises the base
  Powers powers;

  PowerSum() = default;
  explicit PowerSum(int fraction_bits) : fraction_bits(fraction_bits), powers(base, fraction_bits) { set_limit(); }

  void set_limit() {
    const int32_t highest = base + (kRebaseOctaves << fraction_bits);
    limit = splat((int16_t)(highest < 32767 ? highest : 32767));
  }
  void raise(int16_t top) {
    const int32_t octave = top >> fraction_bits, fall = octave - (base >> fraction_bits);
    sum = sum * (fall > 126 ? 0.0f : __builtin_ldexpf(1.0f, -fall));
    base = octave << fraction_bits;
    powers = Powers(base, fraction_bits);
    set_limit();
  }
  // The scores of a block.
  void add(const int16_t* fixed) {
    S scores[kSketchKeys / (2 * W)], top = load(fixed);
    for (int i = 0; i < kSketchKeys / (2 * W); ++i) {
      scores[i] = load(fixed + i * 2 * W);
      top = max(top, scores[i]);
    }
    if (any(top > limit)) raise(largest(top));
    for (int i = 0; i < kSketchKeys / (2 * W); ++i) {
      F lower, upper;
      powers.of(scores[i], lower, upper);
      sum += lower + upper;
    }
  }
};

// Scores of one block for HEADS heads: written to `fixed` [HEADS][kSketchKeys], their powers added to `sums`.
template <int BITS, int HEADS>
inline void score_block(const SketchLayout& layout, const uint32_t* words, const uint32_t* ahead,
                        const uint16_t* scales, int count, const ScoreRule* rules, const Four (*query)[kMaxFours],
                        int16_t* fixed, PowerSum* sums) {
  constexpr int kHalf = kSketchKeys / 2, kVectors = kScoreVectors, kApart = kSketchKeys / kVectors;
  for (int first = 0; first < kApart; first += W) {
    I acc[HEADS][kVectors] = {};
    code_dots<BITS, HEADS, kVectors>(words + first, ahead + first * kVectors, layout.head_dim, query, acc);
    F scale[kVectors];
    for (int v = 0; v < kVectors; ++v) scale[v] = widen((const f16*)scales + first + v * kApart);
    for (int h = 0; h < HEADS; ++h) {
      const ScoreRule& rule = rules[h];
      U rounded[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const F dot = 2.0f * to_f(acc[h][v]) - (float)rule.correction;
        F score = scale[v] * dot * rule.unit;
        if (rule.softcap > 0.0f) score = cap_logits(score + rule.offset, rule.softcap) * rule.octaves;
        rounded[v] = (U)(score + kRounding);
      }
      for (int v = 0; v < kVectors / 2; ++v) {
        const U pair = (rounded[v] & 0xffffu) | (rounded[v + kVectors / 2] << 16);
        store(fixed + h * kSketchKeys + 2 * (first + v * kApart), (S)pair);
      }
    }
  }
  for (int h = 0; h < HEADS; ++h, fixed += kSketchKeys) {
    for (int i = count; i < kSketchKeys; ++i) fixed[2 * (i % kHalf) + i / kHalf] = kLowestScore;
    sums[h].add(fixed);
  }
}

template <int BITS>
void score_bits(const SketchLayout& layout, const uint32_t* words, const uint16_t* scales, int64_t count, int heads,
                const ScoreRule* rules, int16_t* fixed, ScoreSum* sums) {
  const int64_t block_words = (int64_t)layout.words * kSketchKeys;
  constexpr int kGroup = kScoreHeads;
  for (int h = 0; h < heads; h += kGroup) {
    const int group = heads - h < kGroup ? heads - h : kGroup;
    PowerSum part[kGroup];
    Four query[kGroup][kMaxFours];
    for (int i = 0; i < group; ++i) {
      part[i] = PowerSum(rules[h + i].fraction_bits);
      for (int d = 0; d < (layout.head_dim + kLane - 1) / kLane * kLane; d += 4)
        query[i][d / 4] = four(rules[h + i].query + d);
    }
    int64_t block = 0;
    for (int64_t first = 0; first < count; first += kSketchKeys, ++block) {
      const int here = count - first < kSketchKeys ? (int)(count - first) : kSketchKeys;
      const uint32_t* from = words + block * block_words;
      const uint32_t* ahead = from + kPrefetchBlocks * block_words;
      const uint16_t* own = scales + first;
      int16_t* to = fixed + (block * heads + h) * kSketchKeys;
      if (group == 4) {
        score_block<BITS, 4>(layout, from, ahead, own, here, rules + h, query, to, part);
        continue;
      }
      int i = 0;
      if (group >= 2) {
        score_block<BITS, 2>(layout, from, ahead, own, here, rules + h, query, to, part);
        i = 2;
      }
      if (i < group) {
        score_block<BITS, 1>(layout, from, ahead, own, here, rules + h + i, query + i, to + i * kSketchKeys, part + i);
      }
    }
    for (int i = 0; i < group; ++i) sums[h + i] = {part[i].base, (double)sum(part[i].sum)};
  }
}

void score(const SketchLayout& layout, const uint32_t* words, const uint16_t* scales, int64_t count, int heads,
           const ScoreRule* rules, int16_t* fixed, ScoreSum* sums) {
  constexpr decltype(&score) kByBits[] = {score_bits<1>, score_bits<2>, score_bits<3>, score_bits<4>};
  kByBits[layout.bits - 1](layout, words, scales, count, heads, rules, fixed, sums);
}

int64_t weigh(const int16_t* fixed, int64_t count, int heads, const WeightRule* rules, float unit, int32_t floor,
              float certain, uint32_t* weights, uint32_t* sums, uint32_t* large) {
  constexpr int kHalf = kSketchKeys / 2;
  int64_t found = 0;
  for (int64_t first = 0; first < count; first += kSketchKeys) {
    F shares[2][kHalf / W] = {};
    for (int h = 0; h < heads; ++h, fixed += kSketchKeys) {
      const Powers powers(rules[h].top, rules[h].fraction_bits);
      for (int v = 0; v < kHalf / W; ++v) {
        F lower, upper;
        powers.of(load(fixed + v * 2 * W), lower, upper);
        shares[0][v] += lower;
        shares[1][v] += upper;
      }
    }
    uint64_t above = 0;
    for (int key = 0; key < kSketchKeys; key += W) {
      const F share = shares[key / kHalf][key % kHalf / W] * unit;
      store(weights + key, (U)(truncate(share) + floor));
      above |= positive(share - certain) << key;
    }
    if (count - first < kSketchKeys) {
      for (int64_t i = count - first; i < kSketchKeys; ++i) weights[i] = 0;
      above &= ((uint64_t)1 << (count - first)) - 1;
    }
    U parts[kSketchKeys / kSumKeys];
    for (int i = 0; i < kSketchKeys / kSumKeys; ++i) {
      parts[i] = U{};
      for (int j = 0; j < kSumKeys; j += W) parts[i] += load(weights + i * kSumKeys + j);
    }
    sum4(parts, sums);
    weights += kSketchKeys;
    sums += kSketchKeys / kSumKeys;
    for (; above != 0; above &= above - 1) large[found++] = (uint32_t)first + lowest_bit(above);
  }
  return found;
}

}  // namespace
