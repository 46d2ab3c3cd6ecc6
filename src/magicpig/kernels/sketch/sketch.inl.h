// Keys -> codes of a few bits -> scores -> integer weights. Lanes are keys: a block of kSketchKeys keys is a row of 32-bit
// words for every 32 / bits coordinates, so that a score needs no sum across lanes and one load serves all query heads.
// A score stays in a register until it is part of a weight.
#pragma once

namespace {

constexpr int kRotateRows = kRegisters == 32 ? 6 : 2;  // vectors rotated at once
constexpr int kRotateColumns = kLane / W;              // of W coordinates each
constexpr int kScoreHeads = 4;                         // heads scored at once
constexpr int kScoreVectors = kRegisters / 8;          // of W keys each
constexpr int kScoreKeys = 1024;                       // keys scored for some heads before the next come
constexpr int kRebaseOctaves = 8;                      // by which scores may exceed the base of their sum
constexpr int kPrefetchBlocks = 6;                     // blocks of codes requested ahead
constexpr int kPilotBlocksAhead = 2;                   // the same where they do not follow each other
constexpr int kMaxFours = kMaxDim / 4;
constexpr float kOctave = 8388608.0f;  // of a score: 2^23, the distance of the exponent from the low end of a float
constexpr float kNoOctaves = 127 * kOctave, kLeastPower = 97 * kOctave;  // the bits of 1 and of 2^-30, as numbers
constexpr float kHighestScore = 1e38f;

template <int M>
inline void rotate_tile(const float* x, int64_t stride, const Rotation& rotation, int column, float* y) {
  F acc[M][kRotateColumns] = {};
  for (int d = 0; d < rotation.head_dim; ++d) {
    const float* row = rotation.rows + (int64_t)d * rotation.dim + column;
    F part[kRotateColumns];
    for (int c = 0; c < kRotateColumns; ++c) part[c] = load(row + c * W);
    for (int m = 0; m < M; ++m) {
      for (int c = 0; c < kRotateColumns; ++c) acc[m][c] += part[c] * x[m * stride + d];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < kRotateColumns; ++c) store(y + (int64_t)m * rotation.dim + column + c * W, acc[m][c]);
  }
}

void rotate(const float* x, int64_t stride, int64_t n, const Rotation& rotation, float* y) {
  int64_t i = 0;
  const auto rotate_rows = [&]<int M>() {
    for (; i + M <= n; i += M) {
      for (int column = 0; column < rotation.dim; column += kRotateColumns * W) {
        rotate_tile<M>(x + i * stride, stride, rotation, column, y + i * rotation.dim);
      }
    }
  };
  rotate_rows.template operator()<kRotateRows>();
  rotate_rows.template operator()<2>();
  rotate_rows.template operator()<1>();
}

// Codes of one rotated key, and the scale that brings its levels nearest to it.
inline float quantise(const float* y, int head_dim, int dim, int bits, float distance, int32_t* codes) {
  F top{};
  for (int d = 0; d < dim; d += W) top = max(top, max(load(y + d), -load(y + d)));
  // Relative to the largest coordinate no square overflows. Of zeros, and of keys that are too large to rotate, all
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

void pack(const float* rotated, const Rotation& rotation, int bits, float distance, int lane, uint32_t* block,
          uint16_t* scale) {
  alignas(64) int32_t codes[kMaxDim];
  float best = quantise(rotated, rotation.head_dim, rotation.dim, bits, distance, codes);
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

// About 2^x of scores x in units of 2^-23 octaves, to which kNoOctaves has been added: see power_of_two in
// kernels/sketch/reference.py.
inline F power(F bits, float most) { return (F)truncate(max(min(bits, splat(most)), splat(kLeastPower))); }

// Some heads of a group, as many as are scored at once: `Four`s of their numbers, and score = scale of the key *
// (slope * dot with codes + level) + offset of the centre, all of it but the offsets in local memory, where no store can
// be thought to change it.
struct ScoredHeads {
  Four query[kScoreHeads][kMaxFours];
  float slope[kScoreHeads], level[kScoreHeads];
  float softcap, octaves;

  ScoredHeads(const ScoreRule* rules, int count, int head_dim) : softcap(rules->softcap), octaves(rules->octaves) {
    for (int h = 0; h < count; ++h) {
      for (int d = 0; d < head_dim; d += 4) query[h][d / 4] = four(rules[h].query + d);
      slope[h] = 2.0f * rules[h].unit;
      level[h] = -rules[h].correction * rules[h].unit;
    }
  }
};

struct BlockAt {
  const uint32_t *words, *ahead;
  const uint16_t* scales;
  const float* offsets;  // of its first key and of the first of all heads
};

inline bool whole_blocks(const ScoreOffsets& offsets) { return 1 << offsets.shift >= kSketchKeys; }

// What the centres of a block add to the scores of HEADS heads. Strides of whole blocks have one number a head, which stays
// in a register; of shorter ones every key has its own.
template <int HEADS, bool WHOLE>
struct CentreOffsets {
  alignas(64) float each[HEADS][WHOLE ? W : kSketchKeys];

  // offsets: of the block's first key and of the first of these heads.
  CentreOffsets(const float* offsets, int64_t per_head, int shift) {
    for (int h = 0; h < HEADS; ++h, offsets += per_head) {
      for (int i = 0; i < (WHOLE ? W : kSketchKeys); ++i) each[h][i] = offsets[WHOLE ? 0 : i >> shift];
    }
  }
  F at(int h, int lane) const { return load(each[h] + (WHOLE ? 0 : lane)); }
};

// Hands the scores of a block, those of HEADS heads from `h` on for W keys at a time, to `use`. offsets: of head `h`.
template <int BITS, int HEADS, bool WHOLE, class Use>
[[gnu::always_inline]] inline void score_block(const SketchLayout& layout, const BlockAt& block, const float* offsets,
                                               int64_t per_head, int shift, const ScoredHeads& heads, int h,
                                               const Use& use) {
  constexpr int kVectors = kScoreVectors, kApart = kSketchKeys / kVectors;
  const CentreOffsets<HEADS, WHOLE> centres(offsets, per_head, shift);
  for (int first = 0; first < kApart; first += W) {
    I acc[HEADS][kVectors] = {};
    code_dots<BITS, HEADS, kVectors>(block.words + first, block.ahead + first * kVectors, layout.head_dim,
                                     heads.query + h, acc);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int lane = first + v * kApart;
      const F scale = widen((const f16*)block.scales + lane);
      F scores[HEADS];
      for (int i = 0; i < HEADS; ++i) {
        scores[i] = scale * (to_f(acc[i][v]) * heads.slope[h + i] + heads.level[h + i]) + centres.at(i, lane);
      }
      if (heads.softcap > 0.0f) {
        for (int i = 0; i < HEADS; ++i) scores[i] = cap_logits(scores[i], heads.softcap) * heads.octaves;
      }
      use(lane, scores);
    }
  }
}

// Hands the scores of `blocks` blocks to use(h, block, lane, scores): of some heads from h on, for W keys. at(block) says
// where its codes, scales and offsets are, and which codes to request meanwhile.
template <int BITS, bool WHOLE, class At, class Use>
[[gnu::always_inline]] inline void score_blocks(const SketchLayout& layout, int blocks, int heads,
                                                const ScoreRule* rules, int64_t per_head, int shift, const At& at,
                                                const Use& use) {
  for (int h = 0; h < heads; h += kScoreHeads) {
    const int group = heads - h < kScoreHeads ? heads - h : kScoreHeads;
    const ScoredHeads own(rules + h, group, layout.head_dim);
    const auto score_all = [&]<int HEADS>(int i) {
      for (int block = 0; block < blocks; ++block) {
        const BlockAt where = at(block);
        const auto own_use = [&](int lane, const F(&scores)[HEADS]) { use(h + i, block, lane, scores); };
        const float* offsets = where.offsets + (h + i) * per_head;
        score_block<BITS, HEADS, WHOLE>(layout, where, offsets, per_head, shift, own, i, own_use);
      }
    };
    if (group == 4) {
      score_all.template operator()<4>(0);
      continue;
    }
    if (group >= 2) score_all.template operator()<2>(0);
    if (group % 2 == 1) score_all.template operator()<1>(group - 1);
  }
}

// The sum of the powers of one head's scores so far, relative to a base that only ever rises, by whole octaves.
struct PowerSum {
  float base = -kHighestScore;
  F sum{};

  void add(F scores) {
    const F near = max(min(scores, splat(kHighestScore)), splat(-kHighestScore));
    if (positive(near - (base + kRebaseOctaves * kOctave)) != 0) {
      const float octave = __builtin_floorf(largest(near) / kOctave) * kOctave, fall = (octave - base) / kOctave;
      sum = sum * (fall > 126.0f ? 0.0f : __builtin_ldexpf(1.0f, -(int)fall));
      base = octave;
    }
    sum += power(near - base + kNoOctaves, 2 * kNoOctaves);
  }
};

template <int BITS, bool WHOLE>
void sum_powers_of(const SketchLayout& layout, const SketchBlock* blocks, int count, int heads, const ScoreRule* rules,
                   const ScoreOffsets& offsets, ScoreSum* sums) {
  for (int h = 0; h < heads; h += kScoreHeads) {
    PowerSum parts[kScoreHeads];
    const int group = heads - h < kScoreHeads ? heads - h : kScoreHeads;
    score_blocks<BITS, WHOLE>(
        layout, count, group, rules + h, offsets.per_head, offsets.shift,
        [&](int block) {
          const SketchBlock& next = blocks[block + kPilotBlocksAhead < count ? block + kPilotBlocksAhead : block];
          for (int key = 0; key < kSketchKeys; key += 32) __builtin_prefetch(next.scales + key, 0, 3);
          return BlockAt{blocks[block].words, next.words, blocks[block].scales,
                         blocks[block].offsets + h * offsets.per_head};
        },
        [&]<int HEADS>(int first, int block, int lane, const F(&scores)[HEADS]) {
          const int begin = blocks[block].begin - lane, end = blocks[block].end - lane;
          for (int i = 0; i < HEADS; ++i) {
            F own = scores[i];
            if (begin > 0 || end < W) {
              alignas(64) float each[W];
              store(each, own);
              for (int j = 0; j < W; ++j) each[j] = j >= begin && j < end ? each[j] : -kHighestScore;
              own = load(each);
            }
            parts[first + i].add(own);
          }
        });
    for (int i = 0; i < group; ++i) sums[h + i] = {parts[i].base / kOctave, (double)sum(parts[i].sum)};
  }
}

void sum_powers(const SketchLayout& layout, const SketchBlock* blocks, int count, int heads, const ScoreRule* rules,
                const ScoreOffsets& offsets, ScoreSum* sums) {
  constexpr decltype(&sum_powers) kByBits[][2] = {{sum_powers_of<1, false>, sum_powers_of<1, true>},
                                                  {sum_powers_of<2, false>, sum_powers_of<2, true>},
                                                  {sum_powers_of<3, false>, sum_powers_of<3, true>},
                                                  {sum_powers_of<4, false>, sum_powers_of<4, true>}};
  kByBits[layout.bits - 1][whole_blocks(offsets)](layout, blocks, count, heads, rules, offsets, sums);
}

// Weights of up to kScoreKeys keys, of which each head's powers have been added to `shares`.
inline void write_weights(float* shares, int count, int32_t floor, uint32_t* weights, uint32_t* sums) {
  const int blocks = (count + kSketchKeys - 1) / kSketchKeys;
  for (int key = 0; key < blocks * kSketchKeys; key += W) {
    store(weights + key, (U)(truncate(load(shares + key)) + floor));
  }
  for (int key = count; key < blocks * kSketchKeys; ++key) weights[key] = 0;
  for (int block = 0; block < blocks; ++block) {
    U parts[kSketchKeys / kSumKeys];
    for (int i = 0; i < kSketchKeys / kSumKeys; ++i) {
      parts[i] = U{};
      for (int j = 0; j < kSumKeys; j += W) parts[i] += load(weights + block * kSketchKeys + i * kSumKeys + j);
    }
    sum4(parts, sums + block * (kSketchKeys / kSumKeys));
  }
}

template <int BITS, bool WHOLE>
void weigh_of(const SketchLayout& layout, const uint32_t* words, const uint16_t* scales, int64_t count, int heads,
              const ScoreRule* rules, const ScoreOffsets& offsets, const float* log_normalisers, int octaves,
              int32_t floor, uint32_t* weights, uint32_t* sums) {
  alignas(64) float shares[kScoreKeys];
  const float most = kNoOctaves + (float)octaves * kOctave;
  const int64_t block_words = (int64_t)layout.words * kSketchKeys;
  for (int64_t first = 0; first < count; first += kScoreKeys) {
    const int here = count - first < kScoreKeys ? (int)(count - first) : kScoreKeys;
    const uint32_t* from = words + first * layout.words;
    score_blocks<BITS, WHOLE>(
        layout, (here + kSketchKeys - 1) / kSketchKeys, heads, rules, offsets.per_head, offsets.shift,
        [&](int block) {
          const uint32_t* own = from + block * block_words;
          const int64_t key = first + block * kSketchKeys;
          return BlockAt{own, own + kPrefetchBlocks * block_words, scales + key,
                         offsets.values + (key >> offsets.shift)};
        },
        [&]<int HEADS>(int h, int block, int lane, const F(&scores)[HEADS]) {
          float* to = shares + block * kSketchKeys + lane;
          F share = h == 0 ? F{} : load(to);
          for (int i = 0; i < HEADS; ++i) share += power(scores[i] + (kNoOctaves - log_normalisers[h + i]), most);
          store(to, share);
        });
    write_weights(shares, here, floor, weights + first, sums + first / kSumKeys);
  }
}

void weigh(const SketchLayout& layout, const uint32_t* words, const uint16_t* scales, int64_t count, int heads,
           const ScoreRule* rules, const ScoreOffsets& offsets, const float* log_normalisers, int octaves,
           int32_t floor, uint32_t* weights, uint32_t* sums) {
  constexpr decltype(&weigh) kByBits[][2] = {{weigh_of<1, false>, weigh_of<1, true>},
                                             {weigh_of<2, false>, weigh_of<2, true>},
                                             {weigh_of<3, false>, weigh_of<3, true>},
                                             {weigh_of<4, false>, weigh_of<4, true>}};
  kByBits[layout.bits - 1][whole_blocks(offsets)](layout, words, scales, count, heads, rules, offsets, log_normalisers,
                                                  octaves, floor, weights, sums);
}

void weigh_logits(int64_t count, int heads, const float* logits, int64_t per_head, const float* log_u, float* shares,
                  uint32_t* weights, uint32_t* sums) {
  constexpr float kWhole = 1 << 30;
  const int64_t end = (count + kSketchKeys - 1) / kSketchKeys * kSketchKeys;
  for (int64_t i = 0; i < end; i += W) store(shares + i, F{});
  for (int h = 0; h < heads; ++h) {
    const float* own = logits + h * per_head;
    // Past the count neither has numbers.
    const auto at = [&](int64_t i) {
      if (i + W <= count) return load(own + i) - load(log_u + i);
      alignas(64) float some[W];
      for (int j = 0; j < W; ++j) some[j] = i + j < count ? own[i + j] - log_u[i + j] : kLowest;
      return load(some);
    };
    F top = splat(kLowest), total{};
    for (int64_t i = 0; i < end; i += W) top = max(top, at(i));
    const float largest_of_all = largest(top);
    for (int64_t i = 0; i < end; i += W) total += exp(at(i) - largest_of_all);
    const float unit = kWhole / ((float)heads * sum(total));
    for (int64_t i = 0; i < end; i += W) store(shares + i, load(shares + i) + exp(at(i) - largest_of_all) * unit);
  }
  // Also where logits were not finite.
  for (int64_t i = 0; i < end; i += W) store(shares + i, min(max(load(shares + i), F{}), splat(kWhole)));
  write_weights(shares, (int)count, 1, weights, sums);
}

}  // namespace
