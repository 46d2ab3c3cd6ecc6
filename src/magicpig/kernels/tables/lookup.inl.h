// Buckets -> the keys that collide with the query in at least min_hits tables: one byte counter per key of a segment,
// then one scan that collects and clears. 16-bit ids halve the bucket reads; 64K counters stay in the L2 cache.
#pragma once

namespace {

constexpr int kPrefetchOffsets = 16;  // tables ahead
constexpr int kPrefetchIds = 6;

inline void saturate(uint8_t* counts, int64_t count, int min_hits) {
  for (int64_t i = 0; i < count; ++i) counts[i] = counts[i] < min_hits ? counts[i] : (uint8_t)min_hits;
}

inline void count_hits(const uint16_t* query_codes, int bits, int tables, const Segment& segment, int min_hits,
                       uint8_t* counts) {
  const int64_t buckets = ((int64_t)1 << bits) + 1;
  uint32_t begin[kMaxTables], end[kMaxTables];
  for (int t = 0; t < tables; ++t) {
    if (t + kPrefetchOffsets < tables) {
      __builtin_prefetch(segment.offsets + (t + kPrefetchOffsets) * buckets + query_codes[t + kPrefetchOffsets]);
    }
    const uint32_t* bucket = segment.offsets + t * buckets + query_codes[t];
    begin[t] = bucket[0];
    end[t] = bucket[1];
  }
  // A byte holds 255: with more tables the counters are capped at min_hits often enough never to wrap.
  const int stretch = 255 - min_hits;
  for (int t = 0; t < tables; ++t) {
    if (t > 0 && t % stretch == 0) saturate(counts, segment.count, min_hits);
    if (t + kPrefetchIds < tables) {
      const uint16_t* ahead = segment.ids + (int64_t)(t + kPrefetchIds) * segment.count;
      const char* line = (const char*)((uintptr_t)(ahead + begin[t + kPrefetchIds]) & ~(uintptr_t)63);
      for (; line < (const char*)(ahead + end[t + kPrefetchIds]); line += 64) __builtin_prefetch(line);
    }
    const uint16_t* ids = segment.ids + (int64_t)t * segment.count;
    uint32_t i = begin[t];
    for (; i + 4 <= end[t]; i += 4) {
      ++counts[ids[i]];
      ++counts[ids[i + 1]];
      ++counts[ids[i + 2]];
      ++counts[ids[i + 3]];
    }
    for (; i < end[t]; ++i) ++counts[ids[i]];
  }
}

// Bit i of the result: counts[i] >= min_hits, for 64 counters, which are cleared.
inline uint64_t take_hits(uint8_t* counts, int min_hits) {
#if defined(MAGICPIG_AVX512)
  const __m512i v = _mm512_loadu_si512(counts);
  _mm512_storeu_si512(counts, _mm512_setzero_si512());
  return _mm512_cmpge_epu8_mask(v, _mm512_set1_epi8((char)min_hits));
#elif defined(__AVX2__)
  uint64_t mask = 0;
  for (int half = 0; half < 2; ++half) {
    __m256i* p = (__m256i*)(counts + 32 * half);
    const __m256i v = _mm256_loadu_si256(p);
    _mm256_storeu_si256(p, _mm256_setzero_si256());
    const __m256i enough = _mm256_cmpeq_epi8(_mm256_max_epu8(v, _mm256_set1_epi8((char)min_hits)), v);
    mask |= (uint64_t)(uint32_t)_mm256_movemask_epi8(enough) << (32 * half);
  }
  return mask;
#else
  constexpr uint64_t kOnes = 0x0101010101010101u, kHigh = 0x80 * kOnes;
  const uint64_t missing = (uint64_t)(0x80 - min_hits) * kOnes;  // min_hits <= 0x7f
  uint64_t mask = 0;
  for (int byte = 0; byte < 8; ++byte) {
    uint64_t v;
    memcpy(&v, counts + 8 * byte, sizeof v);
    const uint64_t enough = (((v & ~kHigh) + missing) | v) & kHigh;  // the high bit of each byte that is
    mask |= ((enough >> 7) * 0x0102040810204080u >> 56) << (8 * byte);
  }
  memset(counts, 0, 64);
  return mask;
#endif
}

// Of an empty mask: any number. The empty asm keeps four of these scalar: packed into a vector they take twice as long.
inline uint32_t lowest_bit(uint64_t mask) {
#if defined(__BMI__) && !defined(MAGICPIG_EMULATED)
  uint32_t bit = (uint32_t)_tzcnt_u64(mask);
#else
  uint32_t bit = (uint32_t)__builtin_ctzll(mask | (uint64_t)1 << 63);
#endif
  __asm__("" : "+r"(bit));
  return bit;
}

inline int64_t collect(uint8_t* counts, const Segment& segment, int min_hits, uint32_t* ids) {
  // Hits are few and random: writing four candidates each time costs less than a branch per hit guessed wrong.
  constexpr int kUsual = 4;
  static_assert(kUsual <= kLookupSlack);
  int64_t found = 0;
  for (int64_t i = 0; i < segment.count; i += 64) {
    uint64_t mask = take_hits(counts + i, min_hits);
    const int hits = __builtin_popcountll(mask);
    const uint32_t base = (uint32_t)(segment.first + i);
    uint32_t* to = ids + found;
    for (int j = 0; j < kUsual; ++j, mask &= mask - 1) to[j] = base + lowest_bit(mask);
    for (int j = kUsual; j < hits; ++j, mask &= mask - 1) to[j] = base + lowest_bit(mask);
    found += hits;
  }
  return found;
}

int64_t lookup(const uint16_t* query_codes, int bits, int tables, const Segment& segment, int min_hits, uint8_t* counts,
               uint32_t* ids) {
  count_hits(query_codes, bits, tables, segment, min_hits, counts);
  return collect(counts, segment, min_hits, ids);
}

}  // namespace
