#include "step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "parallel.h"
#include "plan.h"
#include "rows.h"

namespace magicpig {
namespace {

// The largest number a row of this dtype can hold.
float largest(Dtype dtype) {
  if (dtype == Dtype::i8) return 0x1p127f;  // of larger ones the scale times 127 may be infinite
  return dtype == Dtype::f16 ? 65504.0f : std::numeric_limits<float>::max();
}

// The same of the next row of a store. A row of the tail becomes one of a block.
float largest(const StoreView& store) {
  const float of_block = largest(store.dtype);
  return store.length < store.tail_from ? of_block : std::min(of_block, largest(store.tail_dtype));
}

// Whether entries [begin, begin + count) are finite numbers up to a limit.
bool fits(const void* data, Dtype dtype, int64_t begin, int64_t count, float limit, const Kernels& run) {
  float piece[256];
  bool fits = true;
  for (int64_t i = begin; i < begin + count; i += 256) {
    const int64_t n = std::min<int64_t>(256, begin + count - i);
    run.to_float(dtype, static_cast<const char*>(data) + i * element_size(dtype), n, piece);
    for (int64_t j = 0; j < n; ++j) fits &= std::fabs(piece[j]) <= limit;  // false for NaN
  }
  return fits;
}

Fault fault_of(const Step& step, const StoreView& store, int b) {
  const Kernels& run = kernels();
  const int64_t query = static_cast<int64_t>(step.query_heads) * store.head_dim;
  const int64_t entries = static_cast<int64_t>(store.heads) * store.head_dim;
  if (!fits(step.query, step.dtype, b * query, query, largest(Dtype::f32), run)) return Fault::query;
  if (step.key == nullptr) return Fault::none;
  if (!fits(step.key, step.dtype, b * entries, entries, largest(store), run)) return Fault::keys;
  if (!fits(step.value, step.dtype, b * entries, entries, largest(store), run)) return Fault::values;
  return Fault::none;
}

void append(const Step& step, StoreView& store, int b) {
  const size_t size = element_size(step.dtype);
  alignas(64) float key[kMaxDim] = {}, value[kMaxDim] = {};  // padding stays zero
  const auto load = [&](const void* from, int g, float* to) {
    const int64_t at = static_cast<int64_t>(b) * store.heads + g;
    kernels().to_float(step.dtype, static_cast<const char*>(from) + at * store.head_dim * size, store.head_dim, to);
  };
  const bool to_tail = store.length >= store.tail_from;
  for (int g = 0; g < store.heads; ++g) {
    load(step.key, g, key);
    load(step.value, g, value);
    const float* centre = to_tail ? nullptr : store.row_centre(store.length >> kBlockShift, g);
    for (int d = 0; centre != nullptr && d < store.head_dim; ++d) key[d] -= centre[d];
    char* row = to_tail ? store.tail_row(store.length, g) : store.row(store.length, g);
    const Dtype dtype = to_tail ? store.tail_dtype : store.dtype;
    write_half(dtype, store.dim, Half::key, key, row);
    write_half(dtype, store.dim, Half::value, value, row);
  }
  ++store.length;
}

// The product of two vectors [dim].
double dot(const float* a, const float* b, int dim) {
  double parts[4] = {};  // so that one sum need not wait for the last
  for (int d = 0; d < dim; d += 4) {
    for (int i = 0; i < 4; ++i) parts[i] += static_cast<double>(a[d + i]) * b[d + i];
  }
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

void prepare(const Plan& plan, int64_t q) {
  const int b = static_cast<int>(q / plan.step.query_heads), h = static_cast<int>(q % plan.step.query_heads);
  const StoreView& store = *plan.stores[b];
  float* natural = plan.natural + q * plan.dim;
  const auto* from = static_cast<const char*>(plan.step.query) + q * plan.head_dim * element_size(plan.step.dtype);
  plan.run.to_float(plan.step.dtype, from, plan.head_dim, natural);
  std::fill(natural + plan.head_dim, natural + plan.dim, 0.0f);
  plan.run.to_lane_order(store.dtype, natural, plan.dim, plan.lanes + q * plan.dim);
  if (store.length > store.tail_from) {
    plan.run.to_lane_order(store.tail_dtype, natural, plan.dim, plan.tail_lanes + q * plan.dim);
  }
  if (plan.sketching(b)) plan.run.to_lane_order(Dtype::bf16, natural, plan.dim, plan.scored + q * plan.dim);
  plan.norms[q] = static_cast<float>(std::sqrt(dot(natural, natural, plan.dim)));
  float* offsets = const_cast<float*>(plan.row_offsets_of(q));
  const auto blocks = static_cast<int64_t>(offsets == nullptr ? 0 : store.blocks.size());
  for (int64_t block = 0; block < blocks; ++block) {
    // Rows that hashing finds have an offset of their own.
    const bool looked_up =
        plan.hashing(b) && block << kBlockShift >= store.sinks && (block + 1) << kBlockShift <= store.indexed_to;
    if (!looked_up) offsets[block] = plan.offset(natural, store.row_centre(block, h / plan.group));
  }
}

// Hashes or rotates the queries [first, end) for the samplers of their stores.
void prepare_for_samplers(const Plan& plan, int64_t first, int64_t end) {
  const int64_t H = plan.step.query_heads, dim = plan.dim;
  while (first < end) {
    // Those of neighbours with the same sampler go together: each direction that is read serves several.
    const int64_t b = first / H;
    const StoreView& store = *plan.stores[b];
    const Prepared prepared = plan.prepared(b);
    const auto made = [](const Prepared& queries) { return queries.codes != nullptr || queries.rotated != nullptr; };
    const auto same = [&](int64_t other) {
      return plan.sampling(static_cast<int>(other)) && plan.stores[other]->lsh == store.lsh &&
             plan.stores[other]->sketch == store.sketch && !made(prepared) && !made(plan.prepared(other));
    };
    int64_t last = b + 1;
    const bool sampling = plan.sampling(static_cast<int>(b));
    while (sampling && last * H < end && same(last)) ++last;
    const int64_t to = std::min(end, last * H);
    const float* natural = plan.natural + first * dim;
    if (sampling && store.lsh != nullptr && prepared.codes == nullptr) {
      const int tiles = store.lsh->tiles();
      plan.run.hash(natural, dim, to - first, store.lsh->directions(), 0, tiles,
                    plan.signs + plan.signs_at[b] + first % H * tiles);
    }
    if (sampling && store.sketch != nullptr) {
      if (prepared.rotated == nullptr) {
        plan.run.rotate(natural, dim, to - first, store.sketch->rotation(), plan.rotated + first * dim);
      }
      for (int64_t q = first; prepared.rotated != nullptr && q < to; ++q) {
        float* rotated = plan.rotated + q * dim;
        std::fill(std::copy_n(prepared.rotated + q % H * plan.head_dim, plan.head_dim, rotated), rotated + dim, 0.0f);
      }
      for (int64_t q = first; q < to; ++q) {
        prepare_query(*store.sketch, plan.rotated + q * dim, plan.step.rule, plan.sketched + q);
      }
    }
    first = to;
  }
}

// Does `count` units in `order`, which attend together if they are more than one, and what their pairs are waiting for if
// they are the last ones.
void work(const Plan& plan, int begin, int count) {
  for (int i = begin; i < begin + count; ++i) {
    const Unit& unit = plan.units[plan.order[i]];
    for (int s = unit.first_state; s < unit.first_state + unit.states; ++s) {
      // Certain rows add nothing to the variance.
      float* spread = unit.work == Work::exact ? nullptr : plan.spreads + s * plan.dim;
      plan.states[s] = empty_state(plan.dim, plan.values + s * plan.dim, spread);
    }
  }
  if (count > 1) {
    attend_together(plan, begin, count);
  } else {
    const Unit& unit = plan.units[plan.order[begin]];
    switch (unit.work) {
      case Work::exact:
        attend_exact(plan, unit);
        break;
      case Work::lookup:
        attend_lookup(plan, unit);
        break;
      case Work::scan:
        scan(plan, unit);
    }
  }
  for (int i = begin; i < begin + count; ++i) {
    const int64_t index = plan.pair_of(plan.units[plan.order[i]]);
    Pair& pair = plan.pairs[index];
    if (pair.left.fetch_sub(1, std::memory_order_acq_rel) != 1) continue;
    if (pair.memory != nullptr) draw(plan, index);
    finish(plan, index);
  }
}

void count_rows(const Plan& plan) {
  for (int b = 0; b < plan.sequences; ++b) {
    StoreView& store = *plan.stores[b];
    if (plan.faults[b] != Fault::none) continue;
    ++store.steps;
    if (!plan.sampling(b)) continue;
    const int64_t body = store.body();
    for (int h = 0; h < plan.step.query_heads; ++h) {
      const int64_t count = plan.counts[static_cast<int64_t>(b) * plan.step.query_heads + h];
      const int64_t pair = static_cast<int64_t>(b) * plan.heads + h / plan.group;
      store.sampled_rows += std::min(body, count + plan.pairs[pair].tried);
      store.body_rows += body;
      store.whole_bodies += count == body;
      store.max_share = std::max(store.max_share, static_cast<double>(count) / static_cast<double>(body));
      if (plan.step.half == nullptr) {
        store.predicted.add(plan.predicted[static_cast<int64_t>(b) * plan.step.query_heads + h]);
      }
    }
  }
}

}  // namespace

float Plan::offset(const float* natural, const float* centre) const {
  return static_cast<float>(dot(natural, centre, dim) * step.rule.scale);
}

std::vector<Fault> decode(const std::vector<StoreView*>& stores, const Step& step) {
  if (step.half != nullptr && step.half->exact_output == nullptr) {
    for (const StoreView* store : stores) {
      if (store->sketch == nullptr || store->policy.epsilon <= 0) continue;
      throw std::invalid_argument(
          "exact is missing: a store with an epsilon draws until the whole output is good enough");
    }
  }
  std::vector<Fault> faults;
  for (size_t b = 0; b < stores.size(); ++b) {
    faults.push_back(fault_of(step, *stores[b], static_cast<int>(b)));
    if (step.key != nullptr && faults[b] == Fault::none) append(step, *stores[b], static_cast<int>(b));
  }
  Plan plan{stores, step, faults};
  lay_out(plan);
  make_units(plan);
  make_tasks(plan);

  bool sketching = false, tails = false;
  for (int b = 0; b < plan.sequences; ++b) {
    sketching |= plan.sketching(b);
    tails |= stores[b]->length > stores[b]->tail_from;
    if (plan.hashing(b)) stores[b]->prepare_hashed_from();
  }
  thread_local std::vector<float> floats;
  thread_local std::vector<uint64_t> sign_memory;
  thread_local std::vector<State> state_memory;
  thread_local std::vector<int64_t> count_memory;
  thread_local std::vector<SketchQuery> query_memory;
  const Unit* last = plan.units.empty() ? nullptr : &plan.units.back();
  const int64_t states = last == nullptr ? 0 : last->first_state + last->states;
  const int64_t queries = plan.queries, dim = plan.dim, wide = queries * dim;
  float* memory = scratch(floats, static_cast<size_t>(wide * (2 + tails + 2 * sketching) + 2 * queries +
                                                      plan.row_offsets_at.back() + 2 * states * dim));
  const auto take = [&](int64_t count) {
    float* taken = memory;
    memory += count;
    return taken;
  };
  plan.natural = take(wide);
  plan.lanes = take(wide);
  plan.tail_lanes = take(tails ? wide : 0);
  plan.scored = take(sketching ? wide : 0);
  plan.rotated = take(sketching ? wide : 0);
  plan.values = take(states * dim);
  plan.spreads = take(states * dim);
  plan.row_offsets = take(plan.row_offsets_at.back());
  plan.norms = take(queries);
  plan.predicted = step.predicted_error != nullptr ? step.predicted_error : take(queries);
  plan.signs = scratch(sign_memory, static_cast<size_t>(plan.signs_at.back()));
  plan.states = scratch(state_memory, static_cast<size_t>(states));
  plan.counts = scratch(count_memory, static_cast<size_t>(queries));
  std::fill_n(plan.counts, queries, 0);
  plan.sketched = scratch(query_memory, static_cast<size_t>(sketching ? queries : 0));
  if (step.capture != nullptr) step.capture->assign(queries, {});

  const int64_t piece = std::clamp<int64_t>((queries + threads() - 1) / threads(), 4, 48);
  parallel((queries + piece - 1) / piece, [&](int64_t i) {
    const int64_t first = i * piece, end = std::min(queries, first + piece);
    for (int64_t q = first; q < end; ++q) prepare(plan, q);
    prepare_for_samplers(plan, first, end);
  });
  if (sketching) make_rules(plan);

  parallel(static_cast<int64_t>(plan.tasks.size()) - 1, [&](int64_t task) {
    for (int i = plan.tasks[task], count = 0; i < plan.tasks[task + 1]; i += count) {
      count = together(plan, i, plan.tasks[task + 1]);
      work(plan, i, count);
    }
  });
  for (int64_t p = 0; p < plan.pair_count; ++p) {
    // An empty store: zeros, lse -inf. Or a sequence with a fault.
    if (plan.pairs[p].first_unit == plan.end_unit(p)) finish(plan, p);
  }
  count_rows(plan);
  return faults;
}

}  // namespace magicpig
