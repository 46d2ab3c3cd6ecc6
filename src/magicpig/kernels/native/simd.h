// A vector of W floats that reads like arithmetic. Included by the isa_*.cpp files only, inside their own anonymous
// namespace and without any STL, so that no function compiled with wide instructions is shared with other files.
#pragma once

#include <stdint.h>
#include <string.h>

// Which instructions a file has: its own, or those of AVX-512 spelled out (MAGICPIG_EMULATED).
#if defined(MAGICPIG_EMULATED)
#include "avx512_emulated.h"
#define MAGICPIG_AVX512
#elif defined(__AVX2__)
#include <immintrin.h>
#if defined(__AVX512F__)
#define MAGICPIG_AVX512
#endif
#endif

namespace {

#if defined(MAGICPIG_AVX512)
constexpr int W = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int W = 8, kRegisters = 16;
#else
constexpr int W = 4, kRegisters = 16;  // what SSE2 and NEON have, one as much as the other at least
#endif

typedef float F __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct i8 {
  int8_t number;
};

inline F load(const float* p) {
  F v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, F v) { memcpy(p, &v, sizeof v); }
inline F splat(float x) { return x - F{}; }
#if defined(MAGICPIG_AVX512)
inline F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
inline F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
inline F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
#endif

template <class V>
inline auto sum_halves(V v) {
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  }
  return v[0];
}

inline float sum(F v) {
#if defined(MAGICPIG_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  return sum_halves(v);
#endif
}

inline uint32_t sum(U v) {
#if defined(MAGICPIG_AVX512)
  return (uint32_t)_mm512_reduce_add_epi32((__m512i)v);
#else
  return sum_halves(v);
#endif
}

// out[i] = sum(v[i]) for four vectors: a third of the work of four separate sums.
template <class V, class T>
inline void sum4(const V* v, T* out) {
#if defined(MAGICPIG_AVX512)
  const auto pairs = [](V a, V b) {
    return (V)_mm512_unpacklo_ps((__m512)a, (__m512)b) + (V)_mm512_unpackhi_ps((__m512)a, (__m512)b);
  };
  const __m512d ab = (__m512d)pairs(v[0], v[1]), cd = (__m512d)pairs(v[2], v[3]);
  V abcd = (V)_mm512_unpacklo_pd(ab, cd) + (V)_mm512_unpackhi_pd(ab, cd);
  abcd += (V)_mm512_shuffle_f32x4((__m512)abcd, (__m512)abcd, 0x4e);
  abcd += (V)_mm512_shuffle_f32x4((__m512)abcd, (__m512)abcd, 0xb1);
  memcpy(out, &abcd, 4 * sizeof(T));
#elif defined(__AVX2__)
  const auto pairs = [](V a, V b) {
    return (V)_mm256_unpacklo_ps((__m256)a, (__m256)b) + (V)_mm256_unpackhi_ps((__m256)a, (__m256)b);
  };
  const __m256d ab = (__m256d)pairs(v[0], v[1]), cd = (__m256d)pairs(v[2], v[3]);
  V abcd = (V)_mm256_unpacklo_pd(ab, cd) + (V)_mm256_unpackhi_pd(ab, cd);
  abcd += (V)_mm256_permute2f128_ps((__m256)abcd, (__m256)abcd, 1);
  memcpy(out, &abcd, 4 * sizeof(T));
#else
  for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
#endif
}

inline float largest(F v) {
#if defined(MAGICPIG_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

inline F sqrt(F v) {
#if defined(MAGICPIG_AVX512)
  return (F)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (F)_mm256_sqrt_ps((__m256)v);
#else
  F r;
  for (int i = 0; i < W; ++i) r[i] = __builtin_sqrtf(v[i]);
  return r;
#endif
}

inline F gather(const float* table, I at) {
#if defined(MAGICPIG_AVX512)
  return (F)_mm512_i32gather_ps((__m512i)at, table, 4);
#elif defined(__AVX2__)
  return (F)_mm256_i32gather_ps(table, (__m256i)at, 4);
#else
  F r;
  for (int i = 0; i < W; ++i) r[i] = table[at[i]];
  return r;
#endif
}

inline U load(const uint32_t* p) {
  U v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(uint32_t* p, U v) { memcpy(p, &v, sizeof v); }
inline I splat(int32_t x) { return x - I{}; }

// Lane i of the result: lane i ^ DISTANCE, a power of two.
template <int DISTANCE>
inline U across(U v) {
#if defined(MAGICPIG_AVX512)
  if constexpr (DISTANCE < 4) return (U)_mm512_shuffle_epi32((__m512i)v, DISTANCE == 1 ? _MM_PERM_CDAB : _MM_PERM_BADC);
  return (U)_mm512_shuffle_f32x4((__m512)v, (__m512)v, DISTANCE == 4 ? 0xb1 : 0x4e);
#elif defined(__AVX2__)
  if constexpr (DISTANCE < 4) return (U)_mm256_shuffle_epi32((__m256i)v, DISTANCE == 1 ? 0xb1 : 0x4e);
  return (U)_mm256_permute2x128_si256((__m256i)v, (__m256i)v, 1);
#else
  U r;
  for (int i = 0; i < W; ++i) r[i] = v[i ^ DISTANCE];
  return r;
#endif
}

// Bit i of the result: a[i] < b[i].
inline uint64_t below(U a, U b) {
#if defined(MAGICPIG_AVX512)
  return _mm512_cmplt_epu32_mask((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (uint64_t)(unsigned)_mm256_movemask_ps((__m256)(a < b));
#else
  uint64_t mask = 0;
  for (int i = 0; i < W; ++i) mask |= (uint64_t)(a[i] < b[i]) << i;
  return mask;
#endif
}

// Sixteen-bit numbers, two in each lane.
typedef int16_t S __attribute__((vector_size(W * 4)));

#if defined(MAGICPIG_AVX512) || defined(__AVX2__)
// 2 W bytes as words.
inline S widen_to_words(const i8* p) {
#if defined(__AVX512BW__)
  return (S)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (S)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
  typedef int8_t Bytes __attribute__((vector_size(2 * W)));
  Bytes bytes;
  memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, S);
#endif
}

// Products of words, neighbours added up.
inline I dot_words(S a, S b) {
#if defined(MAGICPIG_AVX512)
  return (I)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return (I)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}
#endif

// Numbers of eight bits of W lanes in memory.
typedef int8_t Byte __attribute__((vector_size(W)));
inline void store(int8_t* p, I v) {
  const Byte narrow = __builtin_convertvector(v, Byte);
  memcpy(p, &narrow, sizeof narrow);
}

// Keeps sums in the order in which they are written: products that wait to be added need more registers than there are.
template <class V>
inline void in_order([[maybe_unused]] V& sum) {
#if defined(MAGICPIG_EMULATED)
  // No register is as wide.
#elif defined(MAGICPIG_AVX512)
  __asm__("" : "+v"(sum));
#elif defined(__SSE2__)
  __asm__("" : "+x"(sum));
#elif defined(__aarch64__)
  __asm__("" : "+w"(sum));
#endif
}

// Four signed bytes in every lane, the way `add_dot` wants them.
#if defined(MAGICPIG_AVX512) || defined(__AVX2__)
typedef I Four;
inline Four four(const int8_t* p) {
  int32_t bytes;
  memcpy(&bytes, p, sizeof bytes);
  return splat(bytes);
}
#else
struct Four {
  S even, odd;
};
inline Four four(const int8_t* p) {
  int32_t bytes;
  memcpy(&bytes, p, sizeof bytes);
  const S both = (S)splat(bytes);
  return {(both << 8) >> 8, both >> 8};
}
#endif

// Products of four small unsigned bytes with four signed ones, added up per lane. Without VNNI the sums have 16 bits, which
// hold kByteDots / (largest unsigned byte) of them before `total` has to be taken.
#if defined(MAGICPIG_VNNI)
constexpr int kByteDots = 1 << 20;
typedef I ByteSum;
inline ByteSum add_dot(ByteSum sum, U bytes, const Four& other) {
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, (__m512i)other);
}
inline I total(ByteSum sum) { return sum; }
#else
constexpr int kByteDots = 32767 / (2 * 127);
typedef S ByteSum;
inline ByteSum add_dot(ByteSum sum, U bytes, const Four& other) {
#if defined(MAGICPIG_AVX512)
  sum += (ByteSum)_mm512_maddubs_epi16((__m512i)bytes, (__m512i)other);
#elif defined(__AVX2__)
  sum += (ByteSum)_mm256_maddubs_epi16((__m256i)bytes, (__m256i)other);
#else
  sum += ((S)bytes & 255) * other.even;
  in_order(sum);
  sum += ((S)bytes >> 8) * other.odd;
#endif
  in_order(sum);
  return sum;
}
inline I total(ByteSum sum) {
#if defined(MAGICPIG_AVX512) || defined(__AVX2__)
  return dot_words(sum, S{} + 1);
#else
  return (((I)sum << 16) >> 16) + ((I)sum >> 16);
#endif
}
#endif

inline F to_f(I v) { return __builtin_convertvector(v, F); }
inline I truncate(F v) { return __builtin_convertvector(v, I); }

// The nearest whole number, ties to even, of |x| < 2^22.
constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23 leaves the rounded number in the low bits of a sum
inline I nearest(F x) { return (I)(x + kRounding) - 0x4b400000; }

// Bit i of the result: v[i] > 0.
inline uint64_t positive(F v) {
#if defined(MAGICPIG_AVX512)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return (uint64_t)(unsigned)_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_GT_OQ));
#else
  uint64_t mask = 0;
  for (int i = 0; i < W; ++i) mask |= (uint64_t)(v[i] > 0.0f) << i;
  return mask;
#endif
}

// e^x for x <= 88; 0 below -87; NaN stays NaN. Cephes' expf: argument reduction and a degree-5 polynomial, about 1 ulp.
inline F exp(F x) {
  const F tiny = splat(-87.0f);
  const F y = min(max(x, tiny), splat(88.0f));
  const F shifted = y * 1.44269504088896341f + kRounding;
  const F n = shifted - kRounding;
  const F r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const F e = (F)((I)p + (truncate(n) << 23));
  return x < tiny ? F{} : (x == x ? e : x);
}

// tanh through exp: absolute error about 1e-7, which is what a capped logit needs.
inline F tanh(F x) { return 1.0f - 2.0f / (exp(min(x + x, splat(80.0f))) + 1.0f); }

// Unpacks 2 W consecutive elements. This order is the "lane order" of the dtype.
inline void load_pair(const float* p, F& a, F& b) {
  a = load(p);
  b = load(p + W);
}
inline void load_pair(const bf16* p, F& a, F& b) {  // even elements, odd elements: a shift and a mask
  U bits;
  memcpy(&bits, p, sizeof bits);
  a = (F)(bits << 16);
  b = (F)(bits & 0xffff0000u);
}
inline F widen(const f16* p) {
#if defined(MAGICPIG_AVX512)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  U h;
  for (int i = 0; i < W; ++i) h[i] = p[i].bits;
  const U sign = (h & 0x8000u) << 16, magnitude = (h & 0x7fffu) << 13;
  // Multiplying by 2^112 corrects the exponent bias, denormals included; infinity and NaN keep a full exponent.
  const F value = (F)magnitude * 5.192296858534828e33f;
  const U special = (U)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (F)((U)value | special | sign);
#endif
}
inline void load_pair(const f16* p, F& a, F& b) {
  a = widen(p);
  b = widen(p + W);
}

inline F widen(const i8* p) {
#if defined(MAGICPIG_AVX512)
  return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (F)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  Byte bytes;
  memcpy(&bytes, p, sizeof bytes);
  return to_f(__builtin_convertvector(bytes, I));
#endif
}
inline void load_pair(const i8* p, F& a, F& b) {
  a = widen(p);
  b = widen(p + W);
}

// Where element i of a 2 W chunk of a row lands in lane order.
inline int lane_of(const float*, int i) { return i; }
inline int lane_of(const f16*, int i) { return i; }
inline int lane_of(const i8*, int i) { return i; }
inline int lane_of(const bf16*, int i) { return (i >> 1) + (i & 1) * W; }

inline float widen_one(float x) { return x; }
inline float widen_one(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float r;
  memcpy(&r, &bits, 4);
  return r;
}
inline float widen_one(i8 x) { return x.number; }
inline float widen_one(f16 x) {
  f16 lanes[W] = {x};
  return widen(lanes)[0];
}

// Round to nearest, ties to even.
inline void narrow_one(float x, float* to) { *to = x; }
inline void narrow_one(float x, bf16* to) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    to->bits = (uint16_t)((bits >> 16) | 0x40);
  } else {
    to->bits = (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
  }
}
inline void narrow_one(float x, f16* to) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) {  // infinity or NaN
    to->bits = (uint16_t)(sign | 0x7c00u | (magnitude > 0x7f800000u ? 0x200u : 0));
  } else if (magnitude >= 0x477ff000u) {  // rounds past the largest half
    to->bits = (uint16_t)(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // denormal half: let the float adder round at 2^-24
    float m;
    memcpy(&m, &magnitude, 4);
    m += 0.5f;
    uint32_t r;
    memcpy(&r, &m, 4);
    to->bits = (uint16_t)(sign | (r - 0x3f000000u));
  } else {
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1);
    to->bits = (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
  }
}

}  // namespace
