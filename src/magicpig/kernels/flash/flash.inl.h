// Many queries over many keys: exact attention of a prompt. Keys and values come in blocks, are packed once for all queries
// of a task, and meet them as two matrix products with an online softmax between (FlashAttention, arXiv 2205.14135).
#pragma once

namespace {

constexpr int kFlashRows = kRegisters == 32 ? 6 : 4;     // queries of a register tile
constexpr int kFlashColumns = kRegisters == 32 ? 4 : 2;  // vectors of it: keys of scores, coordinates of sums
constexpr int kFlashTile = 32;                           // queries whose scores are there at a time

// What is multiplied: floats, or pairs of bfloat16 where there is an instruction for them and keys are such.
template <class E>
constexpr int kPair = 1;
template <>
constexpr int kPair<bf16> = 2;

// Numbers of a row of a product are padded to this with zeros, and the rows of a tile to that.
#if defined(MAGICPIG_AMX)
template <class E>
constexpr int kDepth = kPair<E> == 2 ? 32 : 1;
constexpr int kRowTile = 16;
#else
template <class E>
constexpr int kDepth = kPair<E>;
constexpr int kRowTile = 1;
#endif
template <class E>
inline int padded_depth(int depth) {
  return (depth + kDepth<E> - 1) / kDepth<E> * kDepth<E>;
}
inline int padded_rows(int rows) { return (rows + kRowTile - 1) / kRowTile * kRowTile; }

// c [m][columns] = or += a [m][depth] times a panel [depth / pair][columns][pair].
// Loops over the register tile are unrolled before the compiler decides what lives in registers: unrolled later, as it
// would by itself, all sums went to memory with every step.
template <class E, int M, int C, bool ADD>
inline void multiply_panel(const E* a, int64_t a_stride, const E* panel, int depth, float* c, int64_t c_stride) {
  F sums[M][C];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int i = 0; i < C; ++i) sums[m][i] = ADD ? load(c + m * c_stride + i * W) : F{};
  }
  if constexpr (kPair<E> == 2) {
#if defined(MAGICPIG_BF16)
    for (int k = 0; k < depth; k += 2) {
      F columns[C];
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i) columns[i] = load((const float*)(panel + ((int64_t)k * C + 2 * i) * W));
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        uint32_t pair;
        memcpy(&pair, a + m * a_stride + k, sizeof pair);
        const __m512bh both = (__m512bh)_mm512_set1_epi32((int)pair);
#pragma GCC unroll 8
        for (int i = 0; i < C; ++i) {
          sums[m][i] = (F)_mm512_dpbf16_ps((__m512)sums[m][i], (__m512bh)columns[i], both);
        }
      }
    }
#endif
  } else {
    for (int k = 0; k < depth; ++k) {
      F columns[C];
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i) columns[i] = load(panel + ((int64_t)k * C + i) * W);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int i = 0; i < C; ++i) sums[m][i] += columns[i] * a[m * a_stride + k];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int i = 0; i < C; ++i) store(c + m * c_stride + i * W, sums[m][i]);
  }
}

template <class E, int M, int C, bool ADD>
inline void multiply_few(int rows, const E* a, int64_t a_stride, const E* panel, int depth, float* c,
                         int64_t c_stride) {
  if constexpr (M > 0) {
    if (rows == M) return multiply_panel<E, M, C, ADD>(a, a_stride, panel, depth, c, c_stride);
    multiply_few<E, M - 1, C, ADD>(rows, a, a_stride, panel, depth, c, c_stride);
  }
}

#if defined(MAGICPIG_AMX)
// The same by tiles of 16 rows of 64 bytes, the last of them smaller: rows of a, pairs of rows of the panel, rows of c.
struct __attribute__((packed)) TileConfig {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// c is tiles 0 to 3 for a (4, 5) and columns (6, 7), two of each.
inline void configure_tiles(int rows_low, int rows_high) {
  TileConfig config = {};
  config.palette = 1;
  const int rows[8] = {rows_low, rows_low, rows_high, rows_high, rows_low, rows_high, 16, 16};
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = (uint8_t)rows[i];
  }
  _tile_loadconfig(&config);
}

template <int ROWS, int COLUMNS, bool ADD>
inline void multiply_tiles(const bf16* a, int64_t a_stride, const bf16* panel, int64_t panel_bytes, int depth, float* c,
                           int64_t c_stride) {
  const int64_t a_bytes = a_stride * 2, c_bytes = c_stride * 4;
  if constexpr (ADD) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (COLUMNS > 1) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (ROWS > 1) _tile_loadd(2, c + 16 * c_stride, c_bytes);
    if constexpr (ROWS > 1 && COLUMNS > 1) _tile_loadd(3, c + 16 * c_stride + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (COLUMNS > 1) _tile_zero(1);
    if constexpr (ROWS > 1) _tile_zero(2);
    if constexpr (ROWS > 1 && COLUMNS > 1) _tile_zero(3);
  }
  for (int k = 0; k < depth; k += 32) {
    const char* const columns = (const char*)panel + k / 2 * panel_bytes;
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, columns, panel_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (COLUMNS > 1) {
      _tile_loadd(7, columns + 64, panel_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (ROWS > 1) {
      _tile_loadd(5, a + 16 * a_stride + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (COLUMNS > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (COLUMNS > 1) _tile_stored(1, c + 16, c_bytes);
  if constexpr (ROWS > 1) _tile_stored(2, c + 16 * c_stride, c_bytes);
  if constexpr (ROWS > 1 && COLUMNS > 1) _tile_stored(3, c + 16 * c_stride + 16, c_bytes);
}

// Of whole tiles of rows, and depths of whole tiles.
template <bool ADD>
inline void multiply_by_tiles(int rows, const bf16* a, int64_t a_stride, const bf16* panels, int depth, int vectors,
                              float* c, int64_t c_stride) {
  for (; vectors > 0; vectors -= kFlashColumns) {
    const int here = vectors < kFlashColumns ? vectors : kFlashColumns;
    for (int i = 0; i < here; i += 2) {
      const bf16* const panel = panels + i * 32;
      for (int m = 0; m < rows; m += 32) {
        const bf16* const from = a + m * a_stride;
        float* const to = c + m * c_stride + i * 16;
        if (rows - m >= 32) {
          if (here - i > 1)
            multiply_tiles<2, 2, ADD>(from, a_stride, panel, here * 64, depth, to, c_stride);
          else
            multiply_tiles<2, 1, ADD>(from, a_stride, panel, here * 64, depth, to, c_stride);
        } else {
          if (here - i > 1)
            multiply_tiles<1, 2, ADD>(from, a_stride, panel, here * 64, depth, to, c_stride);
          else
            multiply_tiles<1, 1, ADD>(from, a_stride, panel, here * 64, depth, to, c_stride);
        }
      }
    }
    panels += (int64_t)here * 16 * depth;
    c += here * 16;
  }
}
#endif

// The same for any number of rows, and of vectors of columns, whose panels follow one another.
template <class E, int C, bool ADD>
inline void multiply_panels(int rows, const E* a, int64_t a_stride, const E* panels, int depth, int vectors, float* c,
                            int64_t c_stride) {
  for (; vectors >= C; vectors -= C) {
    int m = 0;
    for (; m + kFlashRows <= rows; m += kFlashRows) {
      multiply_panel<E, kFlashRows, C, ADD>(a + m * a_stride, a_stride, panels, depth, c + m * c_stride, c_stride);
    }
    multiply_few<E, kFlashRows - 1, C, ADD>(rows - m, a + m * a_stride, a_stride, panels, depth, c + m * c_stride,
                                            c_stride);
    panels += (int64_t)C * W * depth;
    c += C * W;
  }
  if constexpr (C > 1) multiply_panels<E, C - 1, ADD>(rows, a, a_stride, panels, depth, vectors, c, c_stride);
}

template <class E, bool ADD>
inline void multiply_all(int rows, const E* a, int64_t a_stride, const E* panels, int depth, int vectors, float* c,
                         int64_t c_stride) {
#if defined(MAGICPIG_AMX)
  if constexpr (kPair<E> == 2) return multiply_by_tiles<ADD>(rows, a, a_stride, panels, depth, vectors, c, c_stride);
#endif
  multiply_panels<E, kFlashColumns, ADD>(rows, a, a_stride, panels, depth, vectors, c, c_stride);
}

// Where column `column` of `vectors` vectors of them begins in panels of a depth.
template <class E>
inline E* panel_column(E* panels, int column, int vectors, int depth, int* width) {
  const int vector = column / W, first = vector / kFlashColumns * kFlashColumns;
  *width = (vectors - first < kFlashColumns ? vectors - first : kFlashColumns) * W;
  return panels + (int64_t)first * W * depth + (column - first * W) * kPair<E>;
}

inline void as_factor(float x, float* to) { *to = x; }
inline void as_factor(float x, bf16* to) { narrow_one(x, to); }

// The numbers of a row as what they are multiplied as; `memory` is for those that have to become floats.
inline const bf16* factors_of(const bf16* row, int, bf16*) { return row; }
inline const float* factors_of(const float* row, int, float*) { return row; }
template <class T>
inline const float* factors_of(const T* row, int count, float* memory) {
  to_float_of(row, count, memory);
  return memory;
}

// Keys become columns: of `count` of them, the others zero.
template <class E, class T>
inline void pack_keys(const T* keys, int64_t stride, int count, int dim, int depth, E* panels) {
  constexpr int kVectors = kFlashKeys / W, kWord = (int)(4 / sizeof(T));
  if (count < kFlashKeys || depth != dim) memset((void*)panels, 0, sizeof(E) * kFlashKeys * depth);
  int done = 0;
  if constexpr (sizeof(E) == sizeof(T)) {  // words of W keys at a time
    if (stride % kWord == 0 && dim % kWord == 0 && stride < (1 << 20)) {
      int32_t rows[W];
      for (int i = 0; i < W; ++i) rows[i] = (int32_t)(i * stride / kWord);
      I at;
      memcpy(&at, rows, sizeof at);
      for (; done + W <= count; done += W) {
        int width;
        E* const to = panel_column(panels, done, kVectors, depth, &width);
        const float* const from = (const float*)(keys + done * stride);
        for (int d = 0; d < dim / kWord; ++d) store((float*)(to + (int64_t)d * width * kWord), gather(from + d, at));
      }
    }
  }
  for (int j = done; j < count; ++j) {
    int width;
    E* const to = panel_column(panels, j, kVectors, depth, &width);
    alignas(64) E memory[kMaxDim];
    const E* const from = factors_of(keys + j * stride, dim, memory);
    for (int d = 0; d < dim; ++d) to[(int64_t)(d / kPair<E>)*width * kPair<E> + d % kPair<E>] = from[d];
  }
}

// Values are rows: their coordinates are columns already.
template <class E, class T>
inline void pack_values(const T* values, int64_t stride, int count, int dim, int vectors, E* panels) {
  if (count < kFlashKeys || dim % W != 0) memset((void*)panels, 0, sizeof(E) * kFlashKeys * vectors * W);
  for (int first = 0; first < dim; first += kFlashColumns * W) {
    int width;
    E* const to = panel_column(panels, first, vectors, kFlashKeys, &width);
    const int here = dim - first < width ? dim - first : width;
    int done = 0;
    if constexpr (sizeof(E) == sizeof(T) && sizeof(T) == 2) {  // two rows at a time
      typedef uint16_t Half __attribute__((vector_size(W * 2)));
      for (; done + 2 <= count && here % W == 0; done += 2) {
        const T *const low = values + done * stride + first, *const high = low + stride;
        uint32_t* const row = (uint32_t*)(to + (int64_t)done * width);
        for (int d = 0; d < here; d += W) {
          Half a, b;
          memcpy(&a, low + d, sizeof a);
          memcpy(&b, high + d, sizeof b);
          store(row + d, __builtin_convertvector(a, U) | (__builtin_convertvector(b, U) << 16));
        }
      }
    }
    for (int j = done; j < count; ++j) {
      alignas(64) E memory[kMaxDim];
      const E* const from = factors_of(values + j * stride + first, here, memory);
      E* const row = to + (int64_t)(j / kPair<E>)*width * kPair<E> + j % kPair<E>;
      for (int d = 0; d < here; ++d) row[d * kPair<E>] = from[d];
    }
  }
}

inline void store_factors(float* to, F p) { store(to, p); }
inline void store_factors(bf16* to, F p) {
#if defined(MAGICPIG_BF16)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)p);
#else
  typedef uint16_t Half __attribute__((vector_size(W * 2)));
  const U bits = (U)p;
  const Half rounded = __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Half);
#endif
  memcpy(to, &rounded, sizeof rounded);
}

// 2^x for x <= 0; 0 or almost below -126. Cephes' exp2f: a polynomial of degree 6 on [-0.5, 0.5], about 1 ulp.
inline F power_of_two(F x) {
#if defined(__AVX512F__)
  const __m512 least = _mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);  // in this order it keeps what is no number
  const __m512 whole = _mm512_roundscale_ps(least, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F r = (F)_mm512_sub_ps(least, whole);
#else
  const F n = max(x, splat(-126.0f)) + kRounding;
  const F r = max(x, splat(-126.0f)) - (n - kRounding);
#endif
  F p = r * 1.535336188e-4f + 1.339887440e-3f;
  p = p * r + 9.618437358e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472029e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (F)_mm512_scalef_ps((__m512)p, whole);
#else
  const F power = (F)((I)p + ((I)n << 23));
  return x < -126.0f ? F{} : (x == x ? power : x);
#endif
}

// Scores of one query with the first `end` keys of a block become softmax terms; what it has summed shrinks where there
// is a new maximum. Maxima are logits in octaves.
template <class E>
inline void softmax_row(float* scores, int end, LogitRule rule, E* terms, float* sums, int vectors, float* largest_one,
                        float* total) {
  constexpr float kOctaves = 1.44269504088896341f;
  F scale = splat(rule.scale * kOctaves);
  if (rule.softcap > 0.0f || end < kFlashKeys) {  // what is hidden is so whatever the scale
    for (int j = 0; j < kFlashKeys; j += W) {
      store(scores + j, cap_logits(load(scores + j) * rule.scale, rule.softcap) * kOctaves);
    }
    scale = splat(1.0f);
  }
  for (int j = end; j < kFlashKeys; ++j) scores[j] = kLowest;
  F top = load(scores) * scale;
  for (int j = W; j < kFlashKeys; j += W) top = max(top, load(scores + j) * scale);
  const float block_max = largest(top);
  if (!(block_max <= *largest_one)) {
    const F shrink = power_of_two(splat(*largest_one - block_max));
    for (int i = 0; i < vectors; ++i) store(sums + i * W, load(sums + i * W) * shrink);
    *total *= shrink[0];
    *largest_one = block_max;
  }
  const F base = splat(*largest_one);
  F added{};
  for (int j = 0; j < kFlashKeys; j += W) {
    const F p = power_of_two(load(scores + j) * scale - base);
    added += p;
    store_factors(terms + j, p);
  }
  *total += sum(added);
}

template <class E>
struct FlashMemory {
  E *queries, *keys, *values, *terms;
  float* scores;
};

template <class E>
inline size_t flash_layout(int rows, int dim, char* memory, FlashMemory<E>* out) {
  size_t at = 0;
  const auto take = [&](size_t bytes) {
    char* const here = memory + at;
    at += (bytes + 63) / 64 * 64;
    return here;
  };
  const int depth = padded_depth<E>(dim), width = (dim + W - 1) / W * W;
  out->queries = (E*)take(sizeof(E) * (size_t)padded_rows(rows) * depth);
  out->keys = (E*)take(sizeof(E) * (size_t)kFlashKeys * depth);
  out->values = (E*)take(sizeof(E) * (size_t)kFlashKeys * width);
  out->terms = (E*)take(sizeof(E) * (size_t)kFlashTile * kFlashKeys);
  out->scores = (float*)take(sizeof(float) * kFlashTile * kFlashKeys);
  return at;
}

// Calls f with null pointers of what is multiplied and of what keys are.
template <class Function>
inline auto with_factor(Dtype dtype, const Function& f) {
#if defined(MAGICPIG_BF16)
  if (dtype == Dtype::bf16) return f((bf16*)nullptr, (const bf16*)nullptr);
#else
  if (dtype == Dtype::bf16) return f((float*)nullptr, (const bf16*)nullptr);
#endif
  if (dtype == Dtype::f16) return f((float*)nullptr, (const f16*)nullptr);
  return f((float*)nullptr, (const float*)nullptr);
}

size_t flash_bytes(Dtype dtype, int rows, int dim) {
  return with_factor(dtype, [&]<class E, class T>(E*, const T*) {
    FlashMemory<E> memory;
    return flash_layout<E>(rows, dim, nullptr, &memory);
  });
}

int flash_width(int dim) { return (dim + W - 1) / W * W; }

void flash(const FlashTask& task, LogitRule rule, char* scratch, float* sums, float* maxima, float* totals) {
  with_factor(task.dtype, [&]<class E, class T>(E*, const T*) {
    FlashMemory<E> memory;
    flash_layout<E>(task.rows, task.dim, scratch, &memory);
    const int depth = padded_depth<E>(task.dim), width = flash_width(task.dim), vectors = width / W;
    memset((void*)memory.queries, 0, sizeof(E) * (size_t)padded_rows(task.rows) * depth);
    memset((void*)memory.terms, 0, sizeof(E) * (size_t)kFlashTile * kFlashKeys);
#if defined(MAGICPIG_AMX)
    configure_tiles(16, 16);
#endif
    int64_t last = 0;
    for (int i = 0; i < task.rows; ++i) {
      for (int d = 0; d < task.dim; ++d)
        as_factor(task.queries[(int64_t)i * task.dim + d], memory.queries + (int64_t)i * depth + d);
      maxima[i] = kLowest;
      totals[i] = 0;
      if (task.ends[i] > last) last = task.ends[i];
    }
    memset(sums, 0, sizeof(float) * (size_t)padded_rows(task.rows) * width);
    for (int64_t block = 0; block < last; block += kFlashKeys) {
      const int count = (int)(task.keys - block < kFlashKeys ? task.keys - block : kFlashKeys);
      pack_keys<E>((const T*)task.key + block * task.key_stride, task.key_stride, count, task.dim, depth, memory.keys);
      pack_values<E>((const T*)task.value + block * task.value_stride, task.value_stride, count, task.dim, vectors,
                     memory.values);
      for (int row = 0; row < task.rows; row += kFlashTile) {
        const int rows = task.rows - row < kFlashTile ? task.rows - row : kFlashTile;
        bool sees = false;
        for (int i = row; i < row + rows; ++i) sees |= task.ends[i] > block;
        if (!sees) continue;
        multiply_all<E, false>(padded_rows(rows), memory.queries + (int64_t)row * depth, depth, memory.keys, depth,
                               kFlashKeys / W, memory.scores, kFlashKeys);
        for (int i = 0; i < rows; ++i) {
          const int64_t end = task.ends[row + i] - block;
          E* const terms = memory.terms + (int64_t)i * kFlashKeys;
          if (end <= 0) {
            memset((void*)terms, 0, sizeof(E) * kFlashKeys);
            continue;
          }
          softmax_row(memory.scores + (int64_t)i * kFlashKeys, (int)(end < count ? end : count), rule, terms,
                      sums + (int64_t)(row + i) * width, vectors, maxima + row + i, totals + row + i);
        }
        multiply_all<E, true>(padded_rows(rows), memory.terms, kFlashKeys, memory.values, kFlashKeys, vectors,
                              sums + (int64_t)row * width, width);
      }
    }
#if defined(MAGICPIG_AMX)
    _tile_release();
#endif
  });
}

}  // namespace
