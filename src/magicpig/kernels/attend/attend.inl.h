// Rows -> AttentionState. Online softmax over batches of kBatch rows; a piece of kBlockRows rows is summed on its own
// and then merged, which keeps float32 accumulation accurate at any length.
#pragma once

namespace {

constexpr int kBatch = 16;
constexpr int kPrefetchRows = 32;  // gathered rows requested ahead, into the second-level cache

constexpr float kLowest = -__builtin_inff();

template <class T, int HEADS>
inline void dots(const T* const* rows, int count, int dim, const float* const* queries, float (*out)[kBatch]) {
  for (int j = 0; j < count; ++j) {
    F even[HEADS] = {}, odd[HEADS] = {};
    for (int d = 0; d < dim; d += 2 * W) {
      F a, b;
      load_pair(rows[j] + d, a, b);
      for (int h = 0; h < HEADS; ++h) {
        even[h] += a * load(queries[h] + d);
        odd[h] += b * load(queries[h] + d + W);
      }
    }
    for (int h = 0; h < HEADS; ++h) out[h][j] = sum(even[h] + odd[h]);
  }
}

// The same for one query, with the squared norm of each key, which is in registers anyway.
template <class T>
inline void dots_and_norms(const T* const* rows, int count, int dim, const float* query, float* out, float* norms) {
  for (int j = 0; j < count; ++j) {
    F even{}, odd{}, even_norm{}, odd_norm{};
    for (int d = 0; d < dim; d += 2 * W) {
      F a, b;
      load_pair(rows[j] + d, a, b);
      even += a * load(query + d);
      odd += b * load(query + d + W);
      even_norm += a * a;
      odd_norm += b * b;
    }
    out[j] = sum(even + odd);
    norms[j] = sum(even_norm + odd_norm);
  }
}

// acc[h] += sum over rows of p[h][j] * value_j, for CHUNKS * 2 W columns starting at `from`.
template <class T, int HEADS, int CHUNKS>
inline void add_values(const T* const* rows, int count, int dim, int from, const float (*p)[kBatch], float* const* acc) {
  F sums[HEADS][2 * CHUNKS];
  for (int h = 0; h < HEADS; ++h) {
    for (int c = 0; c < 2 * CHUNKS; ++c) sums[h][c] = load(acc[h] + from + c * W);
  }
  for (int j = 0; j < count; ++j) {
    for (int c = 0; c < CHUNKS; ++c) {
      F a, b;
      load_pair(rows[j] + dim + from + c * 2 * W, a, b);
      for (int h = 0; h < HEADS; ++h) {
        sums[h][2 * c] += a * p[h][j];
        sums[h][2 * c + 1] += b * p[h][j];
      }
    }
  }
  for (int h = 0; h < HEADS; ++h) {
    for (int c = 0; c < 2 * CHUNKS; ++c) store(acc[h] + from + c * W, sums[h][c]);
  }
}

template <class T, int HEADS>
inline void add_all_values(const T* const* rows, int count, int dim, const float (*p)[kBatch], float* const* acc) {
  // As many accumulators as the register file holds: 16 of 32, or 8 of 16.
  constexpr int kChunks = (W == 16 ? 8 : 4) / HEADS;
  int d = 0;
  for (; d + kChunks * 2 * W <= dim; d += kChunks * 2 * W) add_values<T, HEADS, kChunks>(rows, count, dim, d, p, acc);
  for (; d < dim; d += 2 * W) add_values<T, HEADS, 1>(rows, count, dim, d, p, acc);
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

// Logits in `s` (kBatch of them, `count` valid) become softmax terms relative to the state's maximum.
inline void softmax_terms(float* s, int count, int dim, State* state) {
  for (int j = count; j < kBatch; ++j) s[j] = kLowest;
  F top = load(s);
  for (int j = W; j < kBatch; j += W) top = max(top, load(s + j));
  const float batch_max = largest(top);
  if (batch_max > state->max) {
    const F shrink = exp(splat(state->max - batch_max));
    for (int d = 0; d < dim; d += W) store(state->values + d, load(state->values + d) * shrink);
    state->sum *= shrink[0];
    state->max = batch_max;
  }
  const float base = state->max == kLowest ? 0.0f : state->max;
  F total{};
  for (int j = 0; j < kBatch; j += W) {
    const F p = exp(load(s + j) - base);
    store(s + j, p);
    total += p;
  }
  state->sum += sum(total);
}

template <class T, int HEADS>
inline void attend_batch(const T* const* rows, int count, int dim, const float* const* queries, const float* offsets,
                         LogitRule rule, State* states) {
  alignas(64) float s[HEADS][kBatch];
  float* acc[HEADS];
  dots<T, HEADS>(rows, count, dim, queries, s);
  for (int h = 0; h < HEADS; ++h) {
    for (int j = 0; j < kBatch; j += W) {
      store(s[h] + j, cap_logits(load(s[h] + j) * rule.scale + offsets[h], rule.softcap));
    }
    softmax_terms(s[h], count, dim, &states[h]);
    acc[h] = states[h].values;
  }
  add_all_values<T, HEADS>(rows, count, dim, s, acc);
}

void merge(int dim, const State& from, State* into) {
  if (from.max == kLowest) return;
  const float top = from.max > into->max ? from.max : into->max;
  const F keep = exp(splat(into->max - top)), add = exp(splat(from.max - top));
  for (int d = 0; d < dim; d += W) {
    store(into->values + d, load(into->values + d) * keep + load(from.values + d) * add);
  }
  into->sum = into->sum * keep[0] + from.sum * add[0];
  into->max = top;
}

inline void clear(int dim, State* state) {
  state->max = kLowest;
  state->sum = 0;
  memset(state->values, 0, sizeof(float) * dim);
}

template <class T>
void attend_rows_of(int dim, const T* rows, int64_t count, int heads, const float* const* queries, const float* offsets,
                    LogitRule rule, State* states) {
  constexpr int kGroup = 4;
  alignas(64) float values[kGroup][kMaxDim];
  for (int h0 = 0; h0 < heads; h0 += kGroup) {
    const int group = heads - h0 < kGroup ? heads - h0 : kGroup;
    for (int64_t piece = 0; piece < count; piece += kBlockRows) {
      const int64_t end = count < piece + kBlockRows ? count : piece + kBlockRows;
      State part[kGroup];
      for (int h = 0; h < group; ++h) {
        part[h].values = values[h];
        clear(dim, &part[h]);
      }
      for (int64_t i = piece; i < end; i += kBatch) {
        const int batch = (int)(end - i < kBatch ? end - i : kBatch);
        const T* at[kBatch];
        for (int j = 0; j < batch; ++j) at[j] = rows + (i + j) * 2 * dim;
        if (group == 4) {
          attend_batch<T, 4>(at, batch, dim, queries + h0, offsets + h0, rule, part);
        } else {
          int h = 0;
          if (group >= 2) {
            attend_batch<T, 2>(at, batch, dim, queries + h0, offsets + h0, rule, part);
            h = 2;
          }
          if (h < group) attend_batch<T, 1>(at, batch, dim, queries + h0 + h, offsets + h0 + h, rule, part + h);
        }
      }
      for (int h = 0; h < group; ++h) merge(dim, part[h], &states[h0 + h]);
    }
  }
}

template <class T>
void attend_sample_of(int dim, const char* const* blocks, const uint32_t* ids, int64_t count, const float* query,
                      float offset, LogitRule rule, const float* log_u, const InclusionLaw* law, float* log_u_out,
                      State* state) {
  const int64_t row_bytes = (int64_t)2 * dim * (int64_t)sizeof(T);
  const auto row = [&](uint32_t id) {
    return blocks[id >> kBlockShift] + (int64_t)(id & (kBlockRows - 1)) * row_bytes;
  };
  alignas(64) float values[kMaxDim];
  State part{kLowest, 0, values};
  for (int64_t piece = 0; piece < count; piece += kBlockRows) {
    const int64_t end = count < piece + kBlockRows ? count : piece + kBlockRows;
    clear(dim, &part);
    for (int64_t i = piece; i < end; i += kBatch) {
      const int batch = (int)(end - i < kBatch ? end - i : kBatch);
      const T* at[kBatch];
      for (int j = 0; j < batch; ++j) {
        if (i + j + kPrefetchRows < count) {
          const char* ahead = row(ids[i + j + kPrefetchRows]);
          for (int64_t b = 0; b < row_bytes; b += 64) __builtin_prefetch(ahead + b, 0, 2);
        }
        at[j] = (const T*)row(ids[i + j]);
      }
      alignas(64) float s[1][kBatch], norms[kBatch], logs[kBatch];
      if (log_u == nullptr) {
        dots_and_norms<T>(at, batch, dim, query, s[0], norms);
        for (int j = batch; j < kBatch; ++j) s[0][j] = norms[j] = 0.0f;
        for (int j = 0; j < kBatch; j += W) store(logs + j, log_inclusion(load(s[0] + j), load(norms + j), *law));
        if (log_u_out != nullptr) memcpy(log_u_out + i, logs, sizeof(float) * batch);
      } else {
        dots<T, 1>(at, batch, dim, &query, s);
        for (int j = 0; j < kBatch; ++j) logs[j] = j < batch ? log_u[i + j] : 0.0f;
      }
      for (int j = 0; j < kBatch; j += W) {
        store(s[0] + j, cap_logits(load(s[0] + j) * rule.scale + offset, rule.softcap) - load(logs + j));
      }
      softmax_terms(s[0], batch, dim, &part);
      float* acc[1] = {values};
      add_all_values<T, 1>(at, batch, dim, s, acc);
    }
    merge(dim, part, state);
  }
}

template <class T>
void to_lane_order_of(const float* from, int dim, float* to) {
  for (int d = 0; d < dim; d += 2 * W) {
    for (int i = 0; i < 2 * W; ++i) to[d + lane_of((const T*)nullptr, i)] = from[d + i];
  }
}

template <class T>
void from_lane_order_of(const float* from, int dim, float* to) {
  for (int d = 0; d < dim; d += 2 * W) {
    for (int i = 0; i < 2 * W; ++i) to[d + i] = from[d + lane_of((const T*)nullptr, i)];
  }
}

template <class T>
void to_float_of(const T* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen_one(from[i]);
}

template <class T>
void from_float_of(const float* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) narrow_one(from[i], to + i);
}

// Calls f with a null pointer of the element type.
template <class Function>
inline void with_type(Dtype dtype, const Function& f) {
  switch (dtype) {
    case Dtype::f32:
      return f((const float*)nullptr);
    case Dtype::bf16:
      return f((const bf16*)nullptr);
    case Dtype::f16:
      return f((const f16*)nullptr);
  }
}

}  // namespace
