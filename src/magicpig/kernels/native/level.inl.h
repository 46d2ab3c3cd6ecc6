// One instruction set: the loops of every verb, compiled with this file's flags, behind one table.
// An isa_*.cpp file defines MAGICPIG_LEVEL (its name as a string) and includes this.
#pragma once

#include "kernels.h"

// simd.h first: the verbs are written in its terms.
#include "simd.h"

namespace {
using namespace magicpig;
}

#include "attend/attend.inl.h"
#include "hash/hash.inl.h"
#include "linear/linear.inl.h"
#include "rows/rows.inl.h"
#include "tables/lookup.inl.h"
// After those whose helpers it shares.
#include "sketch/draw.inl.h"
#include "sketch/sketch.inl.h"

namespace {

void to_float(Dtype dtype, const void* from, int64_t n, float* to) {
  with_type(dtype, [&]<class T>(const T*) { to_float_of((const T*)from, n, to); });
}

void from_float(Dtype dtype, const float* from, int64_t n, void* to) {
  with_float(dtype, [&]<class T>(const T*) { from_float_of(from, n, (T*)to); });
}

void to_lane_order(Dtype dtype, const float* from, int dim, float* to) {
  with_type(dtype, [&]<class T>(const T*) { to_lane_order_of<T>(from, dim, to); });
}

void from_lane_order(Dtype dtype, const float* from, int dim, float* to) {
  with_type(dtype, [&]<class T>(const T*) { from_lane_order_of<T>(from, dim, to); });
}

void attend_rows(Dtype dtype, int dim, const char* rows, int64_t count, int heads, const float* const* queries,
                 const float* offsets, LogitRule rule, State* states) {
  with_type(dtype, [&]<class T>(const T*) {
    attend_group(ConsecutiveRows<T>{rows, count, dim}, heads, queries, offsets, rule, states);
  });
}

void attend_sample(Dtype dtype, int dim, const char* const* blocks, const uint32_t* ids, int64_t count,
                   const float* query, const RowCentres& centres, LogitRule rule, const InclusionLaw& law,
                   float* log_u_out, State* state) {
  with_type(dtype, [&]<class T>(const T*) {
    attend_sample_of(SampledRows<T>{blocks, ids, count, dim}, query, centres, rule, law, log_u_out, state);
  });
}

void score_rows(Dtype dtype, int dim, const char* const* blocks, const uint32_t* ids, int64_t count, int heads,
                const float* const* queries, const BlockOffsets& offsets, LogitRule rule, float* logits,
                int64_t per_head) {
  with_type(dtype, [&]<class T>(const T*) {
    score_rows_of(SampledRows<T>{blocks, ids, count, dim}, heads, queries, offsets, rule, logits, per_head);
  });
}

void attend_scored(Dtype dtype, int dim, const char* const* blocks, const uint32_t* ids, int64_t count, int heads,
                   const float* logits, int64_t per_head, const float* log_u, State* states) {
  with_type(dtype, [&]<class T>(const T*) {
    attend_scored_of(SampledRows<T>{blocks, ids, count, dim}, heads, logits, per_head, log_u, states);
  });
}

void dot_vectors(Dtype dtype, int dim, const void* const* vectors, int64_t count, int heads,
                 const float* const* queries, float* dots, int64_t per_head) {
  with_float(dtype, [&]<class T>(const T*) {
    dot_vectors_of((const T* const*)vectors, dim, count, heads, queries, dots, per_head);
  });
}

constexpr Kernels kTable{MAGICPIG_LEVEL, hash,          lookup,          to_float,     from_float,
                         to_bytes,       to_lane_order, from_lane_order, attend_rows,  attend_sample,
                         score_rows,     attend_scored, dot_vectors,     merge,        rotate,
                         pack,           sum_powers,    weigh,           weigh_logits, pick,
                         heavy_keys,     factor_bytes,  to_factors,      multiply};

}  // namespace
