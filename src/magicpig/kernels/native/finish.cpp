// The last of a step: what the units of a pair found becomes its output, and what that errs by.
#include <algorithm>
#include <cmath>
#include <limits>

#include "plan.h"

namespace magicpig {
namespace {

// Adds the state of the other half of a step to that of query q.
void merge_other_half(const Plan& plan, int64_t q, State* state) {
  const SampledHalf& half = *plan.step.half;
  if (std::isinf(half.exact_lse[q])) return;  // of no rows
  alignas(64) float natural[kMaxDim] = {}, values[kMaxDim];
  std::copy_n(half.exact_output + q * plan.head_dim, plan.head_dim, natural);
  plan.run.to_lane_order(plan.stores[q / plan.step.query_heads]->dtype, natural, plan.dim, values);
  plan.run.merge(plan.dim, {half.exact_lse[q], 1.0, values, nullptr, 0, 0}, state);
}

// The attention of query head r of a pair over everything that has been attended to, in `values` and `spread` [dim].
State merged(const Plan& plan, int64_t pair, int r, float* values, float* spread) {
  State state = empty_state(plan.dim, values, spread);
  for (int u = plan.pairs[pair].first_unit; u < plan.end_unit(pair); ++u) {
    const Unit& unit = plan.units[u];
    if (unit.work == Work::lookup) {
      if (unit.query == r) plan.run.merge(plan.dim, plan.states[unit.first_state], &state);
    } else if (unit.states > 0) {
      plan.run.merge(plan.dim, plan.states[unit.first_state + r], &state);
    }
  }
  return state;
}

// The denominator of the softmax, a sink logit included, as a multiple of exp(top).
struct Denominator {
  double top, sum;
  double weight;  // turns the sum of values into the output
};
Denominator denominator(const Plan& plan, const State& state, int h) {
  if (plan.step.sink_logits == nullptr) return {state.max, state.sum, state.sum > 0 ? 1.0 / state.sum : 0.0};
  const double logit = plan.step.sink_logits[h], top = std::max(static_cast<double>(state.max), logit);
  const double shrink = std::exp(state.max - top), sum = state.sum * shrink + std::exp(logit - top);
  return {top, sum, state.sum > 0 ? shrink / sum : 0.0};
}

// See predicted_error in kernels/attend/reference.py; there the square is not multiplied out. NaN stays NaN.
float predicted_error(int dim, const State& state, const Denominator& denominator) {
  if (state.spread_sum == 0) return 0;
  double norm = 0, along = 0;
  for (int d = 0; d < dim; ++d) {
    const double output = state.values[d] * denominator.weight;
    norm += output * output;
    along += output * state.spread[d];
  }
  const double away = state.spread_square - 2 * along + norm * state.spread_sum;
  return away < 0 ? 0.0f : static_cast<float>(std::sqrt(away / norm) * denominator.weight);
}

// What is left of `finish` for half of a step.
void finish_half(const Plan& plan, int64_t pair) {
  const int b = static_cast<int>(pair / plan.heads);
  const StoreView& store = *plan.stores[b];
  const bool failed = plan.faults[b] != Fault::none;
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  alignas(64) float total[kMaxDim], spread[kMaxDim], values[kMaxDim], spreads[kMaxDim];
  for (int r = 0; r < plan.group; ++r) {
    const int64_t q = plan.first_query(pair) + r;
    const State state = merged(plan, pair, r, total, spread);
    const double weight = state.sum > 0 ? 1.0 / state.sum : 0.0;
    plan.run.from_lane_order(store.dtype, total, plan.dim, values);
    plan.run.from_lane_order(store.dtype, spread, plan.dim, spreads);
    float* output = static_cast<float*>(plan.step.output) + q * plan.head_dim;
    float* sums = plan.step.half->spread + q * (plan.head_dim + 2);
    for (int d = 0; d < plan.head_dim; ++d) {
      output[d] = failed ? kNaN : static_cast<float>(values[d] * weight);
      sums[d] = static_cast<float>(spreads[d] * weight * weight);
    }
    sums[plan.head_dim] = static_cast<float>(state.spread_square * weight * weight);
    sums[plan.head_dim + 1] = static_cast<float>(state.spread_sum * weight * weight);
    const double lse = state.sum > 0 ? state.max + std::log(state.sum) : -std::numeric_limits<double>::infinity();
    plan.step.lse[q] = failed ? kNaN : static_cast<float>(lse);
  }
}

}  // namespace

State empty_state(int dim, float* values, float* spread) {
  std::fill(values, values + dim, 0.0f);
  if (spread != nullptr) std::fill(spread, spread + dim, 0.0f);
  return {-std::numeric_limits<float>::infinity(), 0, values, spread, 0, 0};
}

float predict_errors(const Plan& plan, int64_t pair, float* errors) {
  alignas(64) float values[kMaxDim], spread[kMaxDim];
  float worst = 0;
  for (int r = 0; r < plan.group; ++r) {
    State state = merged(plan, pair, r, values, spread);
    const int h = static_cast<int>(pair % plan.heads) * plan.group + r;
    if (plan.step.half != nullptr) merge_other_half(plan, plan.first_query(pair) + r, &state);
    errors[r] = predicted_error(plan.dim, state, denominator(plan, state, h));
    worst = std::isfinite(errors[r]) ? std::max(worst, errors[r]) : std::numeric_limits<float>::infinity();
  }
  return worst;
}

void finish(const Plan& plan, int64_t pair) {
  if (plan.step.half != nullptr) return finish_half(plan, pair);
  const int b = static_cast<int>(pair / plan.heads), g = static_cast<int>(pair % plan.heads);
  const StoreView& store = *plan.stores[b];
  const bool failed = plan.faults[b] != Fault::none;
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  alignas(64) float total[kMaxDim], spread[kMaxDim], natural[kMaxDim];
  for (int r = 0; r < plan.group; ++r) {
    const int h = g * plan.group + r;
    const int64_t q = static_cast<int64_t>(b) * plan.step.query_heads + h;
    const State state = merged(plan, pair, r, total, spread);
    const Denominator below = denominator(plan, state, h);
    // Of a body from which nothing was drawn nothing is known.
    const bool unknown = failed || (plan.sampling(b) && plan.counts[q] == 0);
    plan.predicted[q] = unknown ? kNaN : predicted_error(plan.dim, state, below);
    plan.run.from_lane_order(store.dtype, total, plan.dim, natural);
    for (int d = 0; d < plan.head_dim; ++d) natural[d] = failed ? kNaN : static_cast<float>(natural[d] * below.weight);
    auto* to = static_cast<char*>(plan.step.output) + q * plan.head_dim * element_size(plan.step.dtype);
    plan.run.from_float(plan.step.dtype, natural, plan.head_dim, to);
    const double lse = below.sum > 0 ? below.top + std::log(below.sum) : -std::numeric_limits<double>::infinity();
    plan.step.lse[q] = failed ? kNaN : static_cast<float>(lse);
  }
}

}  // namespace magicpig
