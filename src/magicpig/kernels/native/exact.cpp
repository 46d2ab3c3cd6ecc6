// Exact attention to the rows that are never drawn, and to those of which all are wanted.
#include <algorithm>

#include "plan.h"

namespace magicpig {
namespace {

// Rows in blocks: positions [begin, end).
void attend_blocks(const Plan& plan, int64_t pair, int64_t begin, int64_t end, State* states) {
  const StoreView& store = plan.store_of(pair);
  const int64_t q0 = plan.first_query(pair);
  const int g = static_cast<int>(pair % plan.heads);
  const float* queries[256];
  float offsets[256] = {};
  for (int r = 0; r < plan.group; ++r) queries[r] = plan.lanes + (q0 + r) * plan.dim;
  for (int64_t at = begin; at < end;) {
    const int64_t n = std::min(end - at, kBlockRows - (at & (kBlockRows - 1)));
    for (int r = 0; !store.row_centres.empty() && r < plan.group; ++r) {
      offsets[r] = plan.row_offsets_of(q0 + r)[at >> kBlockShift];
    }
    plan.run.attend_rows(store.dtype, plan.dim, store.row(at, g), n, plan.group, queries, offsets, plan.step.rule,
                         states);
    at += n;
  }
}

// Rows of the tail, whose lanes have another order.
void attend_tail(const Plan& plan, int64_t pair, int64_t begin, int64_t end, State* states) {
  const StoreView& store = plan.store_of(pair);
  const int64_t q0 = plan.first_query(pair);
  thread_local std::vector<float> memory;
  float* values = scratch(memory, static_cast<size_t>(plan.group) * plan.dim);
  const float* queries[256];
  State own[256];
  float offsets[256] = {};
  for (int r = 0; r < plan.group; ++r) {
    queries[r] = plan.tail_lanes + (q0 + r) * plan.dim;
    own[r] = empty_state(plan.dim, values + static_cast<int64_t>(r) * plan.dim);
  }
  plan.run.attend_rows(store.tail_dtype, plan.dim, store.tail_row(begin, static_cast<int>(pair % plan.heads)),
                       end - begin, plan.group, queries, offsets, plan.step.rule, own);
  alignas(64) float natural[kMaxDim];
  for (int r = 0; r < plan.group; ++r) {
    plan.run.from_lane_order(store.tail_dtype, own[r].values, plan.dim, natural);
    plan.run.to_lane_order(store.dtype, natural, plan.dim, own[r].values);
    plan.run.merge(plan.dim, own[r], states + r);
  }
}

}  // namespace

void attend_positions(const Plan& plan, int64_t pair, int64_t begin, int64_t end, State* states) {
  const int64_t tail = plan.store_of(pair).tail_from;
  if (begin < std::min(end, tail)) attend_blocks(plan, pair, begin, std::min(end, tail), states);
  if (std::max(begin, tail) < end) attend_tail(plan, pair, std::max(begin, tail), end, states);
}

void attend_exact(const Plan& plan, const Unit& unit) {
  const StoreView& store = *plan.stores[unit.sequence];
  const bool sampling = plan.sampling(unit.sequence);
  const int64_t sinks = sampling ? store.sinks : store.length, gap = sampling ? store.body() : 0;
  State* states = plan.states + unit.first_state;
  attend_positions(plan, plan.pair_of(unit), unit.begin, std::min(unit.end, sinks), states);
  attend_positions(plan, plan.pair_of(unit), std::max(unit.begin, sinks) + gap, unit.end + gap, states);
}

}  // namespace magicpig
