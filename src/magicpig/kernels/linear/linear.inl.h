// A few vectors times a matrix of weights. The matrix is read once, row by row, at the speed of memory; the vectors stay in
// the caches, in the form that the rows are multiplied by: their factors.
#pragma once

namespace {

// Vectors at once, so that a tile of rows and sums fits the registers.
constexpr int kLinearVectors = kRegisters == 32 ? 4 : 2;

// Of a matrix of floats, and of one in bytes where those become floats: floats, in the order in which whole pieces of 2 W
// numbers of a row are unpacked, then the rest.
inline int64_t unpacked(int64_t columns) { return columns / (2 * W) * (2 * W); }

template <class T>
void to_float_factors(const float* x, int64_t columns, float* factors) {
  const int64_t whole = unpacked(columns);
  for (int64_t d = 0; d < whole; d += 2 * W) {
    for (int i = 0; i < 2 * W; ++i) factors[d + lane_of((const T*)nullptr, i)] = x[d + i];
  }
  for (int64_t d = whole; d < columns; ++d) factors[d] = x[d];
}

// Requests the line of a row that the next tile begins with while this one is read.
inline void request_next(const void* now, int64_t ahead) { __builtin_prefetch((const char*)now + ahead, 0, 2); }

// sums[v * per_vector + r] = row r . factors v.
template <class T, int V>
inline void multiply_floats(const T* const* rows, int64_t ahead, int64_t columns, const float* factors, float* sums,
                            int64_t per_vector) {
  const int64_t whole = unpacked(columns);
  F dot[V][kTileRows] = {};
  for (int64_t d = 0; d < whole; d += 2 * W) {
    for (int r = 0; r < kTileRows; ++r) {
      F a, b;
      load_pair(rows[r] + d, a, b);
      request_next(rows[r] + d, ahead);
      for (int v = 0; v < V; ++v) {
        dot[v][r] += a * load(factors + v * columns + d);
        dot[v][r] += b * load(factors + v * columns + d + W);
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    float* to = sums + v * per_vector;
    sum4(dot[v], to);
    for (int64_t d = whole; d < columns; ++d) {
      for (int r = 0; r < kTileRows; ++r) to[r] += widen_one(rows[r][d]) * factors[v * columns + d];
    }
  }
}

#if defined(MAGICPIG_VNNI) || defined(MAGICPIG_AVX512) || defined(__AVX2__)
#define MAGICPIG_WHOLE_NUMBERS

inline int64_t byte_blocks(int64_t columns) { return (columns + kByteBlock - 1) / kByteBlock; }

// Where bytes of a matrix are multiplied as whole numbers, so are vectors: numbers of sixteen bits times one scale for
// every kByteBlock of them. `numbers`: of such a block, of which `count` are there. Returns the scale.
inline float whole_numbers(const float* x, int64_t count, int32_t* numbers) {
  alignas(64) float own[kByteBlock] = {};
  memcpy(own, x, sizeof(float) * (size_t)(count < kByteBlock ? count : kByteBlock));
  F top{}, sound{};
  for (int d = 0; d < kByteBlock; d += W) {
    const F each = load(own + d);
    top = max(top, max(each, -each));
    sound += each - each;  // not zero where a number is not finite
  }
  const float largest_one = largest(top), zero = sum(sound);
  // Below the normal floats there is no inverse; all numbers are zero then.
  const float step = largest_one / 32512.0f;
  const bool counts = step >= __FLT_MIN__;
  const F inverse = splat(counts ? 1.0f / step : 0.0f);
  for (int d = 0; d < kByteBlock; d += W) {
    const I each = nearest(load(own + d) * inverse);
    memcpy(numbers + d, &each, sizeof each);
  }
  return zero == 0.0f ? (counts ? step : 0.0f) : __builtin_nanf("");
}
#endif

#if defined(MAGICPIG_VNNI)
// Numbers as high * 256 + low: bytes are multiplied.
struct ByteFactors {
  int8_t high[kByteBlock], low[kByteBlock];
  int32_t start[W];  // what undoes that bytes of a row count from -128
  float scale;
  int32_t unused[W - 1];
};

void to_byte_factors(const float* x, int64_t columns, ByteFactors* factors) {
  for (int64_t block = 0; block < byte_blocks(columns); ++block) {
    ByteFactors& to = factors[block];
    alignas(64) int32_t numbers[kByteBlock];
    to.scale = whole_numbers(x + block * kByteBlock, columns - block * kByteBlock, numbers);
    I sums{};
    for (int d = 0; d < kByteBlock; d += W) {
      const I number = (I)load((const float*)(numbers + d)), high = (number + 128) >> 8;
      store(to.high + d, high);
      store(to.low + d, number - (high << 8));
      // Four neighbours are multiplied in one lane.
      I own_sums{};
      for (int i = 0; i < W; ++i) own_sums[d % (4 * W) / 4 + i / 4] += numbers[d + i];
      sums += own_sums;
    }
    for (int i = 0; i < W; ++i) to.start[i] = -128 * sums[i];
  }
}

template <int V>
inline void multiply_bytes(const i8* const* rows, int64_t ahead, int64_t columns, const ByteFactors* factors,
                           float* sums, int64_t per_vector) {
  const int64_t blocks = byte_blocks(columns);
  const U sign = (U)splat((int32_t)0x80808080);
  F dot[V][kTileRows] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    I high[V][kTileRows], low[V][kTileRows];
    for (int v = 0; v < V; ++v) {
      I start;
      memcpy(&start, factors[v * blocks + block].start, sizeof start);
      for (int r = 0; r < kTileRows; ++r) high[v][r] = I{}, low[v][r] = start;
    }
    const int64_t first = block * kByteBlock, left = columns - first;
    const int here = (int)(left < kByteBlock ? left : kByteBlock);
    for (int d = 0; d < here; d += 4 * W) {
      for (int r = 0; r < kTileRows; ++r) {
        const U bytes = load((const uint32_t*)(rows[r] + first + d)) ^ sign;
        request_next(rows[r] + first + d, ahead);
        for (int v = 0; v < V; ++v) {
          const ByteFactors& own = factors[v * blocks + block];
          high[v][r] = add_dot(high[v][r], bytes, (Four)load((const uint32_t*)(own.high + d)));
          low[v][r] = add_dot(low[v][r], bytes, (Four)load((const uint32_t*)(own.low + d)));
        }
      }
    }
    for (int v = 0; v < V; ++v) {
      const F scale = splat(factors[v * blocks + block].scale);
      for (int r = 0; r < kTileRows; ++r) dot[v][r] += to_f((high[v][r] << 8) + low[v][r]) * scale;
    }
  }
  for (int v = 0; v < V; ++v) sum4(dot[v], sums + v * per_vector);
}

#elif defined(MAGICPIG_WHOLE_NUMBERS)
// Numbers as they are: bytes of a row become words. A block's products, 127 * 32512 each, fit a sum of 32 bits.
struct ByteFactors {
  int16_t numbers[kByteBlock];
  float scale;
  int32_t unused[W - 1];
};

void to_byte_factors(const float* x, int64_t columns, ByteFactors* factors) {
  for (int64_t block = 0; block < byte_blocks(columns); ++block) {
    alignas(64) int32_t numbers[kByteBlock];
    factors[block].scale = whole_numbers(x + block * kByteBlock, columns - block * kByteBlock, numbers);
    for (int d = 0; d < kByteBlock; ++d) factors[block].numbers[d] = (int16_t)numbers[d];
  }
}

template <int V>
inline void multiply_bytes(const i8* const* rows, int64_t ahead, int64_t columns, const ByteFactors* factors,
                           float* sums, int64_t per_vector) {
  const int64_t blocks = byte_blocks(columns);
  F dot[V][kTileRows] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    I whole[V][kTileRows] = {};
    const int64_t first = block * kByteBlock, left = columns - first;
    const int here = (int)(left < kByteBlock ? left : kByteBlock);
    for (int d = 0; d < here; d += 2 * W) {
      for (int r = 0; r < kTileRows; ++r) {
        const S words = widen_to_words(rows[r] + first + d);
        if (d % kLine == 0) request_next(rows[r] + first + d, ahead);
        for (int v = 0; v < V; ++v) {
          S own;
          memcpy(&own, factors[v * blocks + block].numbers + d, sizeof own);
          whole[v][r] += dot_words(words, own);
        }
      }
    }
    for (int v = 0; v < V; ++v) {
      const F scale = splat(factors[v * blocks + block].scale);
      for (int r = 0; r < kTileRows; ++r) dot[v][r] += to_f(whole[v][r]) * scale;
    }
  }
  for (int v = 0; v < V; ++v) sum4(dot[v], sums + v * per_vector);
}
#endif

// Calls tile(rows, ahead, r) for every kTileRows rows from r on; the last row stands for those that are missing.
template <class T, class Tile>
inline void over_tiles(const Matrix& matrix, int64_t first, int64_t last, const Tile& tile) {
  const int64_t row_bytes = matrix.stride * (int64_t)sizeof(T);
  for (int64_t r = first; r < last; r += kTileRows) {
    const T* rows[kTileRows];
    for (int j = 0; j < kTileRows; ++j) {
      rows[j] = (const T*)((const char*)matrix.numbers + (r + j < last ? r + j : last - 1) * row_bytes);
    }
    tile(rows, r + 2 * kTileRows <= last ? kTileRows * row_bytes : 0, r);
  }
}

// The products of one tile, `sums` [vector][kTileRows], become products of the rows that there are.
inline void keep_products(const Matrix& matrix, int64_t r, int64_t first, int64_t last, int vectors, const float* sums,
                          float* products) {
  for (int v = 0; v < vectors; ++v) {
    for (int64_t j = r; j < last && j < r + kTileRows; ++j) {
      const float sum = sums[v * kTileRows + j - r];
      products[v * (last - first) + j - first] = matrix.scales == nullptr ? sum : sum * matrix.scales[j];
    }
  }
}

template <class T, int V, class Factor, class Multiply>
inline void multiply_rest(int left, const T* const* rows, const Factor* factors, float* sums,
                          const Multiply& multiply) {
  if constexpr (V > 0) {
    if (left == V) return multiply.template operator()<V>(rows, factors, sums);
    multiply_rest<T, V - 1>(left, rows, factors, sums, multiply);
  }
}

template <class T, int MOST, class Factor, class Multiply>
inline void multiply_of(const Matrix& matrix, int64_t first, int64_t last, const Factor* factors, int64_t factor_size,
                        int vectors, float* products, const Multiply& multiply) {
  float sums[kMaxLinear * kTileRows];
  over_tiles<T>(matrix, first, last, [&](const T* const* rows, int64_t ahead, int64_t r) {
    const auto one = [&]<int V>(const T* const* tile, const Factor* from, float* to) {
      multiply.template operator()<V>(tile, ahead, from, to);
    };
    for (int v = 0; v < vectors; v += MOST) {
      multiply_rest<T, MOST>(vectors - v < MOST ? vectors - v : MOST, rows, factors + v * factor_size,
                             sums + v * kTileRows, one);
    }
    keep_products(matrix, r, first, last, vectors, sums, products);
  });
}

size_t factor_bytes([[maybe_unused]] Dtype dtype, int64_t columns) {
#if defined(MAGICPIG_WHOLE_NUMBERS)
  if (dtype == Dtype::i8) return (size_t)byte_blocks(columns) * sizeof(ByteFactors);
#endif
  return (size_t)columns * sizeof(float);
}

void to_factors(Dtype dtype, const float* x, int64_t columns, void* factors) {
#if defined(MAGICPIG_WHOLE_NUMBERS)
  if (dtype == Dtype::i8) return to_byte_factors(x, columns, (ByteFactors*)factors);
#endif
  with_type(dtype, [&]<class T>(const T*) { to_float_factors<T>(x, columns, (float*)factors); });
}

void multiply(const Matrix& matrix, int64_t first, int64_t last, const void* factors, int vectors, float* products) {
  const int64_t columns = matrix.columns;
#if defined(MAGICPIG_WHOLE_NUMBERS)
#if defined(MAGICPIG_VNNI)
  constexpr int kMost = kLinearVectors / 2;  // each has two sums
#else
  constexpr int kMost = kLinearVectors;
#endif
  if (matrix.dtype == Dtype::i8) {
    return multiply_of<i8, kMost>(
        matrix, first, last, (const ByteFactors*)factors, byte_blocks(columns), vectors, products,
        [&]<int V>(const i8* const* rows, int64_t ahead, const ByteFactors* from, float* sums) {
          multiply_bytes<V>(rows, ahead, columns, from, sums, kTileRows);
        });
  }
#endif
  with_type(matrix.dtype, [&]<class T>(const T*) {
    multiply_of<T, kLinearVectors>(matrix, first, last, (const float*)factors, columns, vectors, products,
                                   [&]<int V>(const T* const* rows, int64_t ahead, const float* from, float* sums) {
                                     multiply_floats<T, V>(rows, ahead, columns, from, sums, kTileRows);
                                   });
  });
}

}  // namespace
