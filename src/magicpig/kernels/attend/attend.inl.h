// Rows -> AttentionState. Online softmax over batches of kBatch rows; a piece of kBlockRows rows is summed on its own
// and then merged, which keeps float32 accumulation accurate at any length.
#pragma once

namespace {

constexpr int kBatch = 32;  // rows between two looks at the maximum
// Rows requested ahead, into the second-level cache; consecutive ones too, which are read 1.6 to 2.3 times as fast then on
// Cascade Lake, Zen 4 and Emerald Rapids (docs/log.md).
constexpr int kPrefetchRows = 32;
constexpr int kLine = 64;     // bytes that one request brings
constexpr int kTileRows = 4;  // rows dotted at once
constexpr int kTileHeads = kRegisters == 32 ? 4 : 2;
constexpr int kAccumulators = kRegisters / 2;

constexpr float kLowest = -__builtin_inff();

// Whether numbers of this type mean something only times the scale of their key or value.
template <class T>
constexpr bool kScaled = false;
template <>
constexpr bool kScaled<i8> = true;

template <class T>
inline int64_t row_bytes(int dim) {
  return (int64_t)2 * dim * (int64_t)sizeof(T) + (kScaled<T> ? 2 * (int64_t)sizeof(float) : 0);
}

// What is read of a row.
enum class Part { row, key, value };

// Row pointers of one batch. The last one is repeated up to a whole tile; `ahead` are rows to request meanwhile.
template <class T, Part PART = Part::row>
struct Batch {
  const T* row[kBatch];
  const T* ahead[kBatch];
  int count;
  int requested;
  float key_scales[kScaled<T> ? kBatch : 1];  // zero past the batch
  float value_scales[kScaled<T> ? kBatch : 1];

  void fill_tile() {
    for (int j = count; j % kTileRows != 0; ++j) row[j] = row[count - 1];
  }
  // Requests a line of a later row while a piece of row j is read, so that misses spread over the arithmetic. Rows of int8,
  // read in half lines, are requested twice as fast as they are read, to their end: they begin anywhere in a line.
  void request(int j, int dim, int element) const {
    if constexpr (kScaled<T> && PART != Part::row) {
      const int first = PART == Part::key ? 0 : dim;
      if ((element - first) % kLine != 0 || j >= requested) return;
      const char* row = (const char*)ahead[j];
      __builtin_prefetch(row + element, 0, 2);
      if (element != first) return;
      __builtin_prefetch(row + first + dim - 1, 0, 2);
      __builtin_prefetch(row + row_bytes<T>(dim) - 1, 0, 2);  // the scales
      return;
    }
    constexpr int kAhead = kScaled<T> ? 2 : 1;
    // Asking this of all rows costs exact attention a third of its speed (docs/log.md).
    if (kScaled<T> && (element > dim || element * kAhead % kLine != 0)) return;
    if (j < requested) __builtin_prefetch((const char*)ahead[j] + element * kAhead * (int)sizeof(T), 0, 2);
  }

  void read_scales(int dim) {
    for (int j = 0; j < kBatch; ++j) {
      float scales[2] = {};
      if (j < count) memcpy(scales, row[j] + 2 * dim, sizeof scales);
      key_scales[j] = scales[0];
      value_scales[j] = scales[1];
    }
  }
};

// What each row of a batch adds to the state of one head: its softmax term times the scale of its value and, of drawn
// rows whose error somebody asks for, how uncertain it is (see State).
struct Shares {
  alignas(64) float p[kBatch];
  alignas(64) float c[kBatch];          // (1 - u) p^2 times the scale of the value
  alignas(64) float c_squared[kBatch];  // and times its square
};

// Of rows j.. of one tile, less their centres. ONE: they have the same centre, which is read once then.
template <bool ONE, class T>
inline void centred_tile(const Batch<T>& batch, int j, int dim, const float* query, const float* const* centres,
                         Shares* shares, float* norms) {
  F dot[kTileRows] = {}, norm[kTileRows] = {};
  for (int d = 0; d < dim; d += 2 * W) {
    const F qa = load(query + d), qb = load(query + d + W);
    F ca = load(centres[j] + d), cb = load(centres[j] + d + W);
    for (int r = 0; r < kTileRows; ++r) {
      F a, b;
      load_pair(batch.row[j + r] + d, a, b);
      batch.request(j + r, dim, d);
      if constexpr (!ONE) {
        ca = load(centres[j + r] + d);
        cb = load(centres[j + r] + d + W);
      }
      if constexpr (kScaled<T>) {
        a = a * batch.key_scales[j + r] - ca;
        b = b * batch.key_scales[j + r] - cb;
      } else {
        a -= ca;
        b -= cb;
      }
      dot[r] += a * qa;
      dot[r] += b * qb;
      norm[r] += a * a;
      norm[r] += b * b;
    }
  }
  sum4(dot, shares->p + j);
  sum4(norm, norms + j);
}

// The same products of one query with rows less centres[j], [dim] in lane order, and the squares of their lengths. Of keys
// that are far from zero together, products and squares of the differences keep digits that differences would lose.
template <class T>
inline void centred_dots(const Batch<T>& batch, int dim, const float* query, const float* const* centres,
                         Shares* shares, float* norms) {
  for (int j = 0; j < batch.count; j += kTileRows) {
    if (centres[j] == centres[j + kTileRows - 1]) {  // ids ascend
      centred_tile<true>(batch, j, dim, query, centres, shares, norms);
    } else {
      centred_tile<false>(batch, j, dim, query, centres, shares, norms);
    }
  }
}

// shares[h].p[j] = q_h . key_j and, if asked, norms[j] = |key_j|^2.
template <class T, int HEADS, bool NORMS, bool PREFETCH, Part PART = Part::row>
inline void dots(const Batch<T, PART>& batch, int dim, const float* const* queries, Shares* shares, float* norms) {
  for (int j = 0; j < batch.count; j += kTileRows) {
    F dot[HEADS][kTileRows] = {}, norm[kTileRows] = {};
    for (int d = 0; d < dim; d += 2 * W) {
      for (int r = 0; r < kTileRows; ++r) {
        F a, b;
        load_pair(batch.row[j + r] + d, a, b);
        if constexpr (PREFETCH) batch.request(j + r, dim, d);
        for (int h = 0; h < HEADS; ++h) {
          dot[h][r] += a * load(queries[h] + d);
          dot[h][r] += b * load(queries[h] + d + W);
        }
        if constexpr (NORMS) {
          norm[r] += a * a;
          norm[r] += b * b;
        }
      }
    }
    for (int h = 0; h < HEADS; ++h) sum4(dot[h], shares[h].p + j);
    if constexpr (NORMS) sum4(norm, norms + j);
  }
  if constexpr (kScaled<T>) {
    for (int j = 0; j < kBatch; j += W) {
      const F scale = load(batch.key_scales + j);
      for (int h = 0; h < HEADS; ++h) store(shares[h].p + j, load(shares[h].p + j) * scale);
      if constexpr (NORMS) store(norms + j, load(norms + j) * scale * scale);
    }
  }
}

// The products alone, of as many heads at once as the registers have room for.
template <class T, int HEADS, bool PREFETCH, Part PART>
inline void group_dots(const Batch<T, PART>& batch, int dim, const float* const* queries, Shares* shares) {
  constexpr int kHeads = HEADS < kTileHeads ? HEADS : kTileHeads;
  dots<T, kHeads, false, PREFETCH>(batch, dim, queries, shares, nullptr);
  for (int h = kHeads; h < HEADS; h += kHeads) {
    dots<T, kHeads, false, false>(batch, dim, queries + h, shares + h, nullptr);
  }
}

// Adds p[h][j] * value_j to the states of HEADS heads, for CHUNKS * 2 W columns starting at `from`; with SPREAD also
// c[h][j] * value_j and, over all columns, c_squared[h][j] * value_j^2.
template <class T, int HEADS, int CHUNKS, bool PREFETCH, bool SPREAD, Part PART>
inline void add_columns(const Batch<T, PART>& batch, int dim, int from, const Shares* shares, State* states) {
  F sums[HEADS][2 * CHUNKS], spread[SPREAD ? HEADS : 1][2 * CHUNKS], squares[SPREAD ? HEADS : 1] = {};
  for (int h = 0; h < HEADS; ++h) {
    for (int c = 0; c < 2 * CHUNKS; ++c) {
      sums[h][c] = load(states[h].values + from + c * W);
      if constexpr (SPREAD) spread[h][c] = load(states[h].spread + from + c * W);
    }
  }
  for (int j = 0; j < batch.count; ++j) {
    for (int c = 0; c < CHUNKS; ++c) {
      F a, b;
      if constexpr (PREFETCH) batch.request(j, dim, dim + from + c * 2 * W);
      load_pair(batch.row[j] + dim + from + c * 2 * W, a, b);
      for (int h = 0; h < HEADS; ++h) {
        sums[h][2 * c] += a * shares[h].p[j];
        sums[h][2 * c + 1] += b * shares[h].p[j];
      }
      if constexpr (SPREAD) {
        const F square = a * a + b * b;
        for (int h = 0; h < HEADS; ++h) {
          spread[h][2 * c] += a * shares[h].c[j];
          spread[h][2 * c + 1] += b * shares[h].c[j];
          squares[h] += square * shares[h].c_squared[j];
        }
      }
    }
  }
  for (int h = 0; h < HEADS; ++h) {
    for (int c = 0; c < 2 * CHUNKS; ++c) {
      store(states[h].values + from + c * W, sums[h][c]);
      if constexpr (SPREAD) store(states[h].spread + from + c * W, spread[h][c]);
    }
    if constexpr (SPREAD) states[h].spread_square += sum(squares[h]);
  }
}

template <class T, int HEADS, int CHUNKS, bool PREFETCH, bool SPREAD, Part PART>
inline void add_from(const Batch<T, PART>& batch, int dim, int from, const Shares* shares, State* states) {
  for (; from + CHUNKS * 2 * W <= dim; from += CHUNKS * 2 * W) {
    add_columns<T, HEADS, CHUNKS, PREFETCH, SPREAD>(batch, dim, from, shares, states);
  }
  if constexpr (CHUNKS > 1) add_from<T, HEADS, CHUNKS / 2, PREFETCH, SPREAD>(batch, dim, from, shares, states);
}

// The same for all columns, of as many heads at once as the registers have sums for.
template <class T, int HEADS, bool SPREAD, bool PREFETCH = true, Part PART>
inline void add_values(const Batch<T, PART>& batch, int dim, const Shares* shares, State* states) {
  constexpr int kSums = SPREAD ? 4 : 2, kHeads = HEADS * kSums > kAccumulators ? kAccumulators / kSums : HEADS;
  constexpr int kChunks = kAccumulators / (kSums * kHeads);
  add_from<T, kHeads, kChunks, PREFETCH, SPREAD>(batch, dim, 0, shares, states);
  for (int h = kHeads; h < HEADS; h += kHeads) {
    add_from<T, kHeads, kChunks, false, SPREAD>(batch, dim, 0, shares + h, states + h);
  }
}

inline F cap_logits(F logits, float softcap) {
  return softcap > 0.0f ? tanh(logits * (1.0f / softcap)) * softcap : logits;
}

// log u by linear interpolation, on an axis that is fine where the angle changes fast with the cosine.
inline F log_inclusion(F dots, F norms, const InclusionLaw& law) {
  const F length = sqrt(norms) * law.query_norm;
  const F cosine = length > 0.0f ? dots / length : F{};
  const F magnitude = min(cosine < 0.0f ? -cosine : cosine, splat(1.0f));
  const F bent = 1.0f - sqrt(1.0f - magnitude);
  const F at = (1.0f + (cosine < 0.0f ? -bent : bent)) * (0.5f * kLawSize);
  const I low = truncate(min(at, splat((float)(kLawSize - 1))));
  const F weight = at - to_f(low);
  const F left = gather(law.log_u, low);
  return left + weight * (gather(law.log_u, low + 1) - left);
}

inline void scale_spread(int dim, F by, State* state) {
  for (int d = 0; d < dim; d += W) store(state->spread + d, load(state->spread + d) * by);
  state->spread_sum *= by[0];
  state->spread_square *= by[0];
}

// Logits in `s` (kBatch of them, `count` valid) become softmax terms relative to the state's maximum, whose sum joins the
// lanes of `total`; what the state has summed so far shrinks where that rises.
inline void lane_terms(float* s, int count, int dim, State* state, F* total) {
  for (int j = count; j < kBatch; ++j) s[j] = kLowest;
  F top = load(s);
  for (int j = W; j < kBatch; j += W) top = max(top, load(s + j));
  if (positive(top - state->max)) {
    const float batch_max = largest(top);
    const F shrink = exp(splat(state->max - batch_max));
    for (int d = 0; d < dim; d += W) store(state->values + d, load(state->values + d) * shrink);
    *total *= shrink;
    state->sum *= shrink[0];
    state->max = batch_max;
    if (state->spread != nullptr) scale_spread(dim, shrink * shrink, state);
  }
  const float base = state->max == kLowest ? 0.0f : state->max;
  for (int j = 0; j < kBatch; j += W) {
    const F p = exp(load(s + j) - base);
    store(s + j, p);
    *total += p;
  }
}

// The same, and the sum is the state's own.
inline void softmax_terms(float* s, int count, int dim, State* state) {
  F total{};
  lane_terms(s, count, dim, state, &total);
  state->sum += sum(total);
}

// Adds the values of a batch with softmax terms `shares[h].p`, and, of drawn rows, what the variance of the output can be
// estimated from. `log_u` is null or has kBatch numbers, of which those past the batch are zero.
template <class T, int HEADS, Part PART>
inline void add_batch(const Batch<T, PART>& batch, int dim, const float* log_u, Shares* shares, State* states) {
  const bool spreads = log_u != nullptr && states->spread != nullptr;
  for (int h = 0; h < HEADS; ++h) {
    F total{};
    for (int j = 0; j < kBatch; j += W) {
      const F p = load(shares[h].p + j);
      const F scale = kScaled<T> ? load(batch.value_scales + j) : splat(1.0f);
      if constexpr (kScaled<T>) store(shares[h].p + j, p * scale);
      if (!spreads) continue;
      const F uncertain = (1.0f - exp(load(log_u + j))) * p * p;
      total += uncertain;
      store(shares[h].c + j, uncertain * scale);
      store(shares[h].c_squared + j, uncertain * scale * scale);
    }
    if (spreads) states[h].spread_sum += sum(total);
  }
  if (spreads) {
    add_values<T, HEADS, true>(batch, dim, shares, states);
  } else {
    add_values<T, HEADS, false>(batch, dim, shares, states);
  }
}

// Whether queries and keys of this type are dotted as pairs of bfloat16.
template <class T>
constexpr bool kPairRows = false;

// The keys of a batch for that, as columns: [dim / 2][kBatch] pairs.
template <class T, bool PAIRS>
struct Columns {};

// Whether a query in lane order is one of bfloat16 numbers, of which it becomes pairs then; never where nobody dots them.
template <class T>
inline bool as_pairs(const float*, int, float*) {
  return false;
}

#if defined(MAGICPIG_BF16)
template <>
constexpr bool kPairRows<bf16> = true;

// Sixteen rows of sixteen words become columns, `stride` words apart.
inline void transpose(const bf16* const* rows, int at, float* to, int stride) {
  __m512 low[W], high[W];
  for (int r = 0; r < W; r += 2) {
    __m512 a, b;
    memcpy(&a, rows[r] + at, sizeof a);
    memcpy(&b, rows[r + 1] + at, sizeof b);
    low[r] = _mm512_unpacklo_ps(a, b);
    low[r + 1] = _mm512_unpackhi_ps(a, b);
  }
  for (int r = 0; r < W; r += 4) {  // high[r + i] has the words i, i + 4, .. of rows r to r + 3
    for (int i = 0; i < 2; ++i) {
      const __m512d a = (__m512d)low[r + i], b = (__m512d)low[r + i + 2];
      high[r + 2 * i] = (__m512)_mm512_unpacklo_pd(a, b);
      high[r + 2 * i + 1] = (__m512)_mm512_unpackhi_pd(a, b);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 even = _mm512_shuffle_f32x4(high[i], high[i + 4], 0x88);
    const __m512 odd = _mm512_shuffle_f32x4(high[i], high[i + 4], 0xdd);
    const __m512 later_even = _mm512_shuffle_f32x4(high[i + 8], high[i + 12], 0x88);
    const __m512 later_odd = _mm512_shuffle_f32x4(high[i + 8], high[i + 12], 0xdd);
    store(to + i * stride, (F)_mm512_shuffle_f32x4(even, later_even, 0x88));
    store(to + (i + 4) * stride, (F)_mm512_shuffle_f32x4(odd, later_odd, 0x88));
    store(to + (i + 8) * stride, (F)_mm512_shuffle_f32x4(even, later_even, 0xdd));
    store(to + (i + 12) * stride, (F)_mm512_shuffle_f32x4(odd, later_odd, 0xdd));
  }
}

template <>
struct Columns<bf16, true> {
  alignas(64) float pairs[kMaxDim / 2 * kBatch];

  void fill(const Batch<bf16>& batch, int dim) {
    const bf16* rows[kBatch];
    for (int j = 0; j < kBatch; ++j) rows[j] = batch.row[j < batch.count ? j : batch.count - 1];
    for (int j = 0; j < kBatch; j += W) {
      for (int d = 0; d < dim; d += 2 * W) {
        transpose(rows + j, d, pairs + d / 2 * kBatch + j, kBatch);
      }
    }
  }

  // shares[h].p[j] = q_h . key_j. queries: pairs of bfloat16.
  template <int HEADS, bool PREFETCH>
  void dots(const Batch<bf16>& batch, int dim, const float* const* queries, Shares* shares) const {
    F dot[HEADS][kBatch / W] = {};
    for (int d = 0; d < dim / 2; ++d) {
      if constexpr (PREFETCH) {  // a line of each row in W steps
        for (int j = 0; j < kBatch; j += W) batch.request(j + d % W, dim, d / W * 2 * W);
      }
      F key[kBatch / W];
      for (int i = 0; i < kBatch / W; ++i) key[i] = load(pairs + d * kBatch + i * W);
      for (int h = 0; h < HEADS; ++h) {
        int32_t both;
        memcpy(&both, queries[h] + d, sizeof both);
        const I query = splat(both);
        for (int i = 0; i < kBatch / W; ++i) {
          dot[h][i] = (F)_mm512_dpbf16_ps((__m512)dot[h][i], (__m512bh)key[i], (__m512bh)query);
        }
      }
    }
    for (int h = 0; h < HEADS; ++h) {
      for (int i = 0; i < kBatch / W; ++i) store(shares[h].p + i * W, dot[h][i]);
    }
  }
};

template <>
inline bool as_pairs<bf16>(const float* query, int dim, float* pairs) {
  U rest{};
  for (int d = 0; d < dim; d += 2 * W) {
    const U even = (U)load(query + d), odd = (U)load(query + d + W);
    rest |= even | odd;
    store(pairs + d / 2, (F)((even >> 16) | (odd & 0xffff0000u)));
  }
  return sum(rest & 0xffffu) == 0;
}
#endif

void merge(int dim, const State& from, State* into) {
  if (from.max == kLowest) return;
  const float top = from.max > into->max ? from.max : into->max;
  const F keep = exp(splat(into->max - top)), add = exp(splat(from.max - top));
  for (int d = 0; d < dim; d += W) {
    store(into->values + d, load(into->values + d) * keep + load(from.values + d) * add);
  }
  into->sum = into->sum * keep[0] + from.sum * add[0];
  into->max = top;
  if (into->spread == nullptr) return;
  scale_spread(dim, keep * keep, into);
  if (from.spread == nullptr) return;
  const F square = add * add;
  for (int d = 0; d < dim; d += W) store(into->spread + d, load(into->spread + d) + load(from.spread + d) * square);
  into->spread_sum += from.spread_sum * square[0];
  into->spread_square += from.spread_square * square[0];
}

// An empty state in `values` [dim] and, for rows drawn by chance, `spread` [dim].
inline State empty(int dim, float* values, float* spread) {
  memset(values, 0, sizeof(float) * dim);
  if (spread != nullptr) memset(spread, 0, sizeof(float) * dim);
  return {kLowest, 0, values, spread, 0, 0};
}

// Rows that follow one another, and their batches.
template <class T>
struct ConsecutiveRows {
  using Element = T;
  const char* first;
  int64_t count;
  int dim;

  const T* row(int64_t i) const { return (const T*)(first + i * row_bytes<T>(dim)); }
};

// The rows of a sample.
template <class T>
struct SampledRows {
  using Element = T;
  const char* const* blocks;
  const uint32_t* ids;
  int64_t count;
  int dim;

  const T* row(int64_t i) const {
    return (const T*)(blocks[ids[i] >> kBlockShift] + (int64_t)(ids[i] & (kBlockRows - 1)) * row_bytes<T>(dim));
  }
};

// Rows [i, end), as many as fit.
template <Part PART = Part::row, class Rows>
inline auto batch_of(const Rows& rows, int64_t i, int64_t end) {
  using T = typename Rows::Element;
  Batch<T, PART> batch;
  batch.count = (int)(end - i < kBatch ? end - i : kBatch);
  const int64_t later = rows.count - i - kPrefetchRows;
  batch.requested = later < 0 ? 0 : later < kBatch ? (int)later : kBatch;
  for (int j = 0; j < batch.count; ++j) batch.row[j] = rows.row(i + j);
  for (int j = 0; j < batch.requested; ++j) batch.ahead[j] = rows.row(i + j + kPrefetchRows);
  batch.fill_tile();
  if constexpr (kScaled<T>) batch.read_scales(rows.dim);
  return batch;
}

template <class T>
void attend_sample_of(const SampledRows<T>& rows, const float* query, const RowCentres& centres, LogitRule rule,
                      const InclusionLaw& law, float* log_u_out, State* state) {
  const int64_t count = rows.count;
  const int dim = rows.dim;
  alignas(64) float values[kMaxDim], spread[kMaxDim];
  for (int64_t piece = 0; piece < count; piece += kBlockRows) {
    const int64_t end = count < piece + kBlockRows ? count : piece + kBlockRows;
    State part = empty(dim, values, state->spread == nullptr ? nullptr : spread);
    for (int64_t i = piece; i < end; i += kBatch) {
      const Batch<T> batch = batch_of(rows, i, end);
      alignas(64) float norms[kBatch], logs[kBatch], offsets[kBatch] = {};
      Shares shares;
      float* s = shares.p;
      if (centres.vectors != nullptr) {
        const float* own[kBatch];
        for (int j = 0; j < batch.count; ++j) {
          const int64_t centre = rows.ids[i + j] >> centres.shift;
          own[j] = centres.vectors + centre * dim;
          offsets[j] = centres.offsets[centre];
        }
        for (int j = batch.count; j % kTileRows != 0; ++j) own[j] = own[batch.count - 1];
        centred_dots(batch, dim, query, own, &shares, norms);
      } else {
        dots<T, 1, true, true>(batch, dim, &query, &shares, norms);
      }
      for (int j = batch.count; j < kBatch; ++j) s[j] = norms[j] = 0.0f;
      for (int j = 0; j < kBatch; j += W) store(logs + j, log_inclusion(load(s + j), load(norms + j), law));
      if (log_u_out != nullptr) memcpy(log_u_out + i, logs, sizeof(float) * batch.count);
      for (int j = 0; j < kBatch; j += W) {
        store(s + j, cap_logits(load(s + j) * rule.scale + load(offsets + j), rule.softcap) - load(logs + j));
      }
      softmax_terms(s, batch.count, dim, &part);
      add_batch<T, 1>(batch, dim, logs, &shares, &part);
    }
    merge(dim, part, state);
  }
}

// Calls each<HEADS>(first) for groups of at most four of `heads` heads.
template <class Each>
inline void in_groups(int heads, const Each& each) {
  int first = 0;
  for (; heads - first >= 4; first += 4) each.template operator()<4>(first);
  if (heads - first >= 2) {
    each.template operator()<2>(first);
    first += 2;
  }
  if (heads > first) each.template operator()<1>(first);
}

constexpr int kManyHeads = 32;  // that meet a batch of rows while it is in the nearest cache

// Attention of at most kManyHeads queries over the same rows. PAIRS: the queries are pairs of bfloat16. What is computed
// for one of them does not depend on the others.
template <class T, bool PAIRS>
void attend_many(const ConsecutiveRows<T>& rows, int heads, const float* const* queries, const float* offsets,
                 LogitRule rule, State* const* states) {
  const int dim = rows.dim;
  alignas(64) float values[kManyHeads * kMaxDim];
  State part[kManyHeads];
  F totals[kManyHeads];
  [[maybe_unused]] Columns<T, PAIRS> columns;
  for (int64_t piece = 0; piece < rows.count; piece += kBlockRows) {
    const int64_t end = rows.count < piece + kBlockRows ? rows.count : piece + kBlockRows;
    for (int h = 0; h < heads; ++h) {
      part[h] = empty(dim, values + h * dim, nullptr);
      totals[h] = F{};
    }
    for (int64_t i = piece; i < end; i += kBatch) {
      const Batch<T> batch = batch_of(rows, i, end);
      if constexpr (PAIRS) columns.fill(batch, dim);
      const auto attend = [&]<int HEADS, bool PREFETCH>(int first) {
        Shares shares[HEADS];
        if constexpr (PAIRS) {
          columns.template dots<HEADS, PREFETCH>(batch, dim, queries + first, shares);
        } else {
          group_dots<T, HEADS, PREFETCH>(batch, dim, queries + first, shares);
        }
        for (int h = 0; h < HEADS; ++h) {
          float* const p = shares[h].p;
          for (int j = 0; j < kBatch; j += W) {
            store(p + j, cap_logits(load(p + j) * rule.scale + offsets[first + h], rule.softcap));
          }
          lane_terms(p, batch.count, dim, &part[first + h], &totals[first + h]);
          if constexpr (kScaled<T>) {
            for (int j = 0; j < kBatch; j += W) store(p + j, load(p + j) * load(batch.value_scales + j));
          }
        }
        add_values<T, HEADS, false, PREFETCH>(batch, dim, shares, &part[first]);
      };
      in_groups(heads, [&]<int HEADS>(int first) {
        if (first == 0) {
          attend.template operator()<HEADS, true>(first);
        } else {
          attend.template operator()<HEADS, false>(first);
        }
      });
    }
    for (int h = 0; h < heads; ++h) {
      part[h].sum = sum(totals[h]);
      merge(dim, part[h], states[h]);
    }
  }
}

// Attention of `heads` queries over the same rows, all of them certain.
template <class T>
void attend_group(const ConsecutiveRows<T>& rows, int heads, const float* const* queries, const float* offsets,
                  LogitRule rule, State* states) {
  alignas(64) float pairs[kManyHeads * kMaxDim / 2];
  const auto attend = [&]<bool PAIRS>() {
    const float* own[kManyHeads];
    float own_offsets[kManyHeads];
    State* own_states[kManyHeads];
    int count = 0;
    for (int h = 0; h < heads; ++h) {
      float* const here = pairs + count * (rows.dim / 2);
      if (as_pairs<T>(queries[h], rows.dim, here) == PAIRS) {
        own[count] = PAIRS ? here : queries[h];
        own_offsets[count] = offsets[h];
        own_states[count++] = states + h;
      }
      if (count == kManyHeads || (count > 0 && h + 1 == heads)) {
        attend_many<T, PAIRS>(rows, count, own, own_offsets, rule, own_states);
        count = 0;
      }
    }
  };
  if constexpr (kPairRows<T>) attend.template operator()<true>();
  attend.template operator()<false>();
}

// Logits of `heads` queries and the keys of a sample; of the keys that fill the last batch they are -inf.
template <class T>
void score_rows_of(const SampledRows<T>& rows, int heads, const float* const* queries, const BlockOffsets& offsets,
                   LogitRule rule, float* logits, int64_t per_head) {
  const int dim = rows.dim;
  for (int64_t i = 0; i < rows.count; i += kBatch) {
    const Batch<T, Part::key> batch = batch_of<Part::key>(rows, i, rows.count);
    in_groups(heads, [&]<int HEADS>(int first) {
      Shares shares[HEADS];
      if (first == 0) {
        group_dots<T, HEADS, true>(batch, dim, queries, shares);
      } else {
        group_dots<T, HEADS, false>(batch, dim, queries + first, shares);
      }
      for (int h = 0; h < HEADS; ++h) {
        float *p = shares[h].p, *to = logits + (first + h) * per_head + i;
        alignas(64) float joined[kBatch] = {};
        if (offsets.values != nullptr) {
          const float* own = offsets.values + (first + h) * offsets.per_head;
          for (int j = 0; j < batch.count; ++j) joined[j] = own[rows.ids[i + j] >> kBlockShift];
        }
        for (int j = 0; j < kBatch; j += W) {
          store(p + j, cap_logits(load(p + j) * rule.scale + load(joined + j), rule.softcap));
        }
        for (int j = 0; j < kBatch; ++j) to[j] = j < batch.count ? p[j] : kLowest;
      }
    });
  }
}

// Attention of `heads` queries over the rows of a sample, whose logits and log u are known.
template <class T>
void attend_scored_of(const SampledRows<T>& rows, int heads, const float* logits, int64_t per_head, const float* log_u,
                      State* states) {
  const int dim = rows.dim;
  alignas(64) float values[4][kMaxDim], spread[4][kMaxDim], logs[kBatch];
  const bool spreads = states->spread != nullptr;
  in_groups(heads, [&]<int HEADS>(int first) {
    for (int64_t piece = 0; piece < rows.count; piece += kBlockRows) {
      const int64_t end = rows.count < piece + kBlockRows ? rows.count : piece + kBlockRows;
      State part[HEADS];
      for (int h = 0; h < HEADS; ++h) part[h] = empty(dim, values[h], spreads ? spread[h] : nullptr);
      for (int64_t i = piece; i < end; i += kBatch) {
        const Batch<T, Part::value> batch = batch_of<Part::value>(rows, i, end);
        for (int j = 0; j < kBatch; ++j) logs[j] = j < batch.count ? log_u[i + j] : 0.0f;
        Shares shares[HEADS];
        for (int h = 0; h < HEADS; ++h) {
          const float* own = logits + (first + h) * per_head + i;
          for (int j = 0; j < kBatch; ++j) shares[h].p[j] = j < batch.count ? own[j] - logs[j] : kLowest;
          softmax_terms(shares[h].p, batch.count, dim, &part[h]);
        }
        add_batch<T, HEADS>(batch, dim, logs, shares, part);
      }
      for (int h = 0; h < HEADS; ++h) merge(dim, part[h], &states[first + h]);
    }
  });
}

template <class T>
void dot_vectors_of(const T* const* vectors, int dim, int64_t count, int heads, const float* const* queries, float* out,
                    int64_t per_head) {
  for (int64_t i = 0; i < count; i += kBatch) {
    Batch<T> batch;
    batch.count = (int)(count - i < kBatch ? count - i : kBatch);
    const int64_t later = count - i - kPrefetchRows;
    batch.requested = later < 0 ? 0 : later < kBatch ? (int)later : kBatch;
    for (int j = 0; j < batch.count; ++j) batch.row[j] = vectors[i + j];
    for (int j = 0; j < batch.requested; ++j) batch.ahead[j] = vectors[i + j + kPrefetchRows];
    batch.fill_tile();
    Shares shares[kTileHeads];
    for (int h = 0; h < heads;) {
      const int here = heads - h < kTileHeads ? 1 : kTileHeads;
      if (here == kTileHeads) {
        dots<T, kTileHeads, false, true>(batch, dim, queries + h, shares, nullptr);
      } else {
        dots<T, 1, false, false>(batch, dim, queries + h, shares, nullptr);
      }
      for (int r = 0; r < here; ++r) memcpy(out + (h + r) * per_head + i, shares[r].p, sizeof(float) * batch.count);
      h += here;
    }
  }
}

// Two loops, which compilers turn into vectors where one with `lane_of` of every number stays as it is.
template <class T>
void to_lane_order_of(const float* from, int dim, float* to) {
  const int even = lane_of((const T*)nullptr, 0), apart = lane_of((const T*)nullptr, 2) - even;
  const int odd = lane_of((const T*)nullptr, 1);
  for (int d = 0; d < dim; d += 2 * W) {
    for (int i = 0; i < W; ++i) to[d + even + apart * i] = from[d + 2 * i];
    for (int i = 0; i < W; ++i) to[d + odd + apart * i] = from[d + 2 * i + 1];
  }
}

template <class T>
void from_lane_order_of(const float* from, int dim, float* to) {
  const int even = lane_of((const T*)nullptr, 0), apart = lane_of((const T*)nullptr, 2) - even;
  const int odd = lane_of((const T*)nullptr, 1);
  for (int d = 0; d < dim; d += 2 * W) {
    for (int i = 0; i < W; ++i) {
      to[d + 2 * i] = from[d + even + apart * i];
      to[d + 2 * i + 1] = from[d + odd + apart * i];
    }
  }
}

template <class T>
void to_float_of(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen_one(from[i]);
}
// No compiler turns these by one into vectors.
inline void to_float_of(const f16* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, widen(from + i));
  for (; i < n; ++i) to[i] = widen_one(from[i]);
}

template <class T>
void from_float_of(const float* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) narrow_one(from[i], to + i);
}

// Calls f with a null pointer of the element type, which is a floating-point one.
template <class Function>
inline void with_float(Dtype dtype, const Function& f) {
  switch (dtype) {
    case Dtype::bf16:
      return f((const bf16*)nullptr);
    case Dtype::f16:
      return f((const f16*)nullptr);
    default:
      return f((const float*)nullptr);
  }
}

// The same for any element of a row.
template <class Function>
inline void with_type(Dtype dtype, const Function& f) {
  dtype == Dtype::i8 ? f((const i8*)nullptr) : with_float(dtype, f);
}

}  // namespace
