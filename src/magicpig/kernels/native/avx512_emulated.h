// The AVX-512 instructions that the kernels use, spelled out: under their own names, so that the code written for them
// runs as it stands on any processor, for tests. Included by simd.h instead of <immintrin.h>; slow.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

typedef float __m512 __attribute__((vector_size(64)));
typedef double __m512d __attribute__((vector_size(64)));
typedef long long __m512i __attribute__((vector_size(64)));
typedef short __m512bh __attribute__((vector_size(64)));
typedef long long __m256i __attribute__((vector_size(32)));
typedef long long __m128i __attribute__((vector_size(16)));
typedef uint16_t __mmask16;
typedef uint64_t __mmask64;

constexpr int _CMP_GT_OQ = 0x1e;

// The lanes of a vector as an array, and back.
template <class T, class V>
struct Lanes {
  T at[sizeof(V) / sizeof(T)];
  Lanes() = default;
  explicit Lanes(V v) { memcpy(at, &v, sizeof v); }
  V vector() const {
    V v;
    memcpy(&v, at, sizeof v);
    return v;
  }
};
template <class V>
using Floats = Lanes<float, V>;

template <class T, class V, class F>
inline V each(V a, V b, const F& of) {
  Lanes<T, V> x(a), y(b);
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i) x.at[i] = of(x.at[i], y.at[i]);
  return x.vector();
}

// The second operand where neither is larger, as the instructions do.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return each<float>(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return each<float>(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline __m512 _mm512_sqrt_ps(__m512 a) {
  return each<float>(a, a, [](float x, float) { return __builtin_sqrtf(x); });
}

template <class T, class F>
inline T fold(const T* at, const F& of) {  // halves onto each other
  T part[16];
  memcpy(part, at, sizeof part);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] = of(part[i], part[i + half]);
  }
  return part[0];
}
inline float _mm512_reduce_add_ps(__m512 a) {
  return fold(Floats<__m512>(a).at, [](float x, float y) { return x + y; });
}
inline float _mm512_reduce_max_ps(__m512 a) {
  return fold(Floats<__m512>(a).at, [](float x, float y) { return x > y ? x : y; });
}
inline int _mm512_reduce_add_epi32(__m512i a) {
  return (int)fold(Lanes<uint32_t, __m512i>(a).at, [](uint32_t x, uint32_t y) { return x + y; });
}

// Element `first`, `first` + 1 ... of a and b in turn, in every lane of 128 bits.
template <class T, class V>
inline V unpack(V a, V b, int first) {
  constexpr int kLaneSize = 16 / sizeof(T);
  const Lanes<T, V> x(a), y(b);
  Lanes<T, V> out;
  for (int lane = 0; lane < 4; ++lane) {
    for (int i = 0; i < kLaneSize / 2; ++i) {
      out.at[lane * kLaneSize + 2 * i] = x.at[lane * kLaneSize + first + i];
      out.at[lane * kLaneSize + 2 * i + 1] = y.at[lane * kLaneSize + first + i];
    }
  }
  return out.vector();
}
inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) { return unpack<float>(a, b, 0); }
inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) { return unpack<float>(a, b, 2); }
inline __m512d _mm512_unpacklo_pd(__m512d a, __m512d b) { return unpack<double>(a, b, 0); }
inline __m512d _mm512_unpackhi_pd(__m512d a, __m512d b) { return unpack<double>(a, b, 1); }

// Lanes of 128 bits: two of a, then two of b, by two bits each.
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int lanes) {
  const Floats<__m512> x(a), y(b);
  Floats<__m512> out;
  for (int i = 0; i < 4; ++i) memcpy(out.at + 4 * i, (i < 2 ? x : y).at + 4 * (lanes >> (2 * i) & 3), 16);
  return out.vector();
}

// In every lane of 128 bits the numbers that `order` names, by two bits each.
constexpr int _MM_PERM_CDAB = 0xb1, _MM_PERM_BADC = 0x4e;
inline __m512i _mm512_shuffle_epi32(__m512i a, int order) {
  const Lanes<uint32_t, __m512i> x(a);
  Lanes<uint32_t, __m512i> out;
  for (int i = 0; i < 16; ++i) out.at[i] = x.at[(i & ~3) + (order >> (2 * (i & 3)) & 3)];
  return out.vector();
}

inline __m512 _mm512_i32gather_ps(__m512i at, const float* table, int scale) {
  const Lanes<int32_t, __m512i> index(at);
  Floats<__m512> out;
  for (int i = 0; i < 16; ++i) memcpy(out.at + i, (const char*)table + (int64_t)index.at[i] * scale, 4);
  return out.vector();
}

inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_setzero_si512() { return __m512i{}; }
template <class T>
inline __m512i same(T x) {
  Lanes<T, __m512i> out;
  for (T& lane : out.at) lane = x;
  return out.vector();
}
inline __m512i _mm512_set1_epi8(char x) { return same((int8_t)x); }
inline __m512i _mm512_set1_epi16(short x) { return same((int16_t)x); }
inline __m512i _mm512_set1_epi32(int x) { return same((int32_t)x); }

template <class V>
inline V loaded(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}
inline __m512i _mm512_loadu_si512(const void* from) { return loaded<__m512i>(from); }
inline void _mm512_storeu_si512(void* to, __m512i v) { memcpy(to, &v, sizeof v); }
inline __m256i _mm256_loadu_si256(const __m256i* from) { return loaded<__m256i>(from); }
inline __m128i _mm_loadu_si128(const __m128i* from) { return loaded<__m128i>(from); }

inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int) {  // _CMP_GT_OQ, the only one in use
  const Floats<__m512> x(a), y(b);
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask = (__mmask16)(mask | (x.at[i] > y.at[i]) << i);
  return mask;
}
inline __mmask16 _mm512_cmplt_epu32_mask(__m512i a, __m512i b) {
  const Lanes<uint32_t, __m512i> x(a), y(b);
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask = (__mmask16)(mask | (x.at[i] < y.at[i]) << i);
  return mask;
}
inline __mmask64 _mm512_cmpge_epu8_mask(__m512i a, __m512i b) {
  const Lanes<uint8_t, __m512i> x(a), y(b);
  __mmask64 mask = 0;
  for (int i = 0; i < 64; ++i) mask |= (__mmask64)(x.at[i] >= y.at[i]) << i;
  return mask;
}

inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
  const Lanes<int8_t, __m128i> x(a);
  Lanes<int32_t, __m512i> out;
  for (int i = 0; i < 16; ++i) out.at[i] = x.at[i];
  return out.vector();
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  const Lanes<int32_t, __m512i> x(a);
  Floats<__m512> out;
  for (int i = 0; i < 16; ++i) out.at[i] = (float)x.at[i];
  return out.vector();
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  const Lanes<uint16_t, __m256i> x(a);
  Floats<__m512> out;
  for (int i = 0; i < 16; ++i) {
    const uint32_t half = x.at[i], magnitude = (half & 0x7fffu) << 13;
    float value;
    memcpy(&value, &magnitude, 4);
    value *= 5.192296858534828e33f;  // 2^112: the bias of a float's exponent for that of a half's
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits |= ((half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0) | (half & 0x8000u) << 16;
    memcpy(out.at + i, &bits, 4);
  }
  return out.vector();
}

// Unsigned bytes of a times signed ones of b: sums of two in 16 bits that saturate; of two 16-bit ones in 32 bits; and of
// four bytes at once, which VNNI adds.
inline __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) {
  const Lanes<uint8_t, __m512i> x(a);
  const Lanes<int8_t, __m512i> y(b);
  Lanes<int16_t, __m512i> out;
  for (int i = 0; i < 32; ++i) {
    const int sum = x.at[2 * i] * y.at[2 * i] + x.at[2 * i + 1] * y.at[2 * i + 1];
    out.at[i] = (int16_t)(sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum);
  }
  return out.vector();
}
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  const Lanes<int16_t, __m512i> x(a), y(b);
  Lanes<int32_t, __m512i> out;
  for (int i = 0; i < 16; ++i) out.at[i] = x.at[2 * i] * y.at[2 * i] + x.at[2 * i + 1] * y.at[2 * i + 1];
  return out.vector();
}
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  const Lanes<uint8_t, __m512i> x(a);
  const Lanes<int8_t, __m512i> y(b);
  Lanes<int32_t, __m512i> out(sum);
  for (int i = 0; i < 64; ++i) out.at[i / 4] += x.at[i] * y.at[i];
  return out.vector();
}

// Pairs of bfloat16 of a times those of b, added to float sums.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const Lanes<uint32_t, __m512bh> x(a), y(b);
  const auto wide = [](uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
  };
  Floats<__m512> out(sum);
  for (int i = 0; i < 16; ++i) {
    out.at[i] += wide(x.at[i] << 16) * wide(y.at[i] << 16);
    out.at[i] += wide(x.at[i] & 0xffff0000u) * wide(y.at[i] & 0xffff0000u);
  }
  return out.vector();
}

}  // namespace
