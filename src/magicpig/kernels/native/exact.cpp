// Exact attention to the rows that are never drawn, and to those of which all are wanted.
#include <algorithm>

#include "plan.h"

namespace magicpig {
namespace {

// Rows in blocks: positions [begin, end) of all these pairs, whose states are `states[pair]`.
void attend_blocks(const Plan& plan, const int64_t* pairs, State* const* states, int count, int64_t begin,
                   int64_t end) {
  const StoreView& store = plan.store_of(pairs[0]);
  const int g = static_cast<int>(pairs[0] % plan.heads), queries = count * plan.group;
  const float* lanes[kMaxGroup];
  State own[kMaxGroup];
  float offsets[kMaxGroup] = {};
  const auto query = [&](int i) { return plan.first_query(pairs[i / plan.group]) + i % plan.group; };
  for (int i = 0; i < queries; ++i) {
    lanes[i] = plan.lanes + query(i) * plan.dim;
    own[i] = states[i / plan.group][i % plan.group];
  }
  for (int64_t at = begin; at < end;) {
    const int64_t n = std::min(end - at, kBlockRows - (at & (kBlockRows - 1)));
    for (int i = 0; !store.row_centres.empty() && i < queries; ++i) {
      offsets[i] = plan.row_offsets_of(query(i))[at >> kBlockShift];
    }
    plan.run.attend_rows(store.dtype, plan.dim, store.row(at, g), n, queries, lanes, offsets, plan.step.rule, own);
    at += n;
  }
  for (int i = 0; i < queries; ++i) states[i / plan.group][i % plan.group] = own[i];
}

// Rows of the tail, whose lanes have another order.
void attend_tail(const Plan& plan, int64_t pair, int64_t begin, int64_t end, State* states) {
  const StoreView& store = plan.store_of(pair);
  const int64_t q0 = plan.first_query(pair);
  thread_local std::vector<float> memory;
  float* values = scratch(memory, static_cast<size_t>(plan.group) * plan.dim);
  const float* queries[kMaxGroup];
  State own[kMaxGroup];
  float offsets[kMaxGroup] = {};
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
  if (begin < std::min(end, tail)) attend_blocks(plan, &pair, &states, 1, begin, std::min(end, tail));
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

int together(const Plan& plan, int begin, int end) {
  const Unit& first = plan.units[plan.order[begin]];
  const auto in_blocks = [&](const Unit& unit) { return std::min(unit.end, plan.stores[unit.sequence]->tail_from); };
  const char* row = plan.first_row(first);
  if (row == nullptr || in_blocks(first) <= first.begin) return 1;
  const auto same = [&](const Unit& unit) {
    return unit.begin == first.begin && plan.first_row(unit) == row && in_blocks(unit) == in_blocks(first) &&
           plan.stores[unit.sequence]->dtype == plan.stores[first.sequence]->dtype;
  };
  const int most = std::min(end - begin, kMaxGroup / plan.group);
  int count = 1;
  while (count < most && same(plan.units[plan.order[begin + count]])) ++count;
  return count;
}

void attend_together(const Plan& plan, int begin, int count) {
  int64_t pairs[kMaxGroup];
  State* states[kMaxGroup];
  for (int i = 0; i < count; ++i) {
    const Unit& unit = plan.units[plan.order[begin + i]];
    pairs[i] = plan.pair_of(unit);
    states[i] = plan.states + unit.first_state;
  }
  const Unit& first = plan.units[plan.order[begin]];
  attend_blocks(plan, pairs, states, count, first.begin, std::min(first.end, plan.store_of(pairs[0]).tail_from));
  for (int i = 0; i < count; ++i) {
    const Unit& unit = plan.units[plan.order[begin + i]];
    attend_positions(plan, pairs[i], std::max(unit.begin, plan.store_of(pairs[i]).tail_from), unit.end, states[i]);
  }
}

}  // namespace magicpig
