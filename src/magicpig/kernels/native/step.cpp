#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "index.h"
#include "parallel.h"

namespace magicpig {
namespace {

std::atomic<bool> poison{false};

// Grow-only scratch memory of the calling thread, never returned zeroed.
template <class T>
T* scratch(std::vector<T>& memory, size_t count) {
  if (memory.size() < count) memory.resize(count);
  if (poison.load(std::memory_order_relaxed)) std::memset(static_cast<void*>(memory.data()), 0xff, count * sizeof(T));
  return memory.data();
}

// A share of the work of one (sequence, kv head): exact rows for all its query heads, or the sample of one of them.
struct Unit {
  int sequence, head;  // b, g
  int query;           // within the group; -1: exact rows
  int64_t begin, end;  // exact: positions, the gap between the sinks and indexed_to left out
  int first_state;     // one state per query head it serves
  int states;
};

// Everything the tasks of one step share.
struct Plan {
  const std::vector<StoreView*>& stores;
  const LshSampler* sampler;
  const Step& step;
  const Kernels& run = kernels();
  int sequences = static_cast<int>(stores.size());
  int heads = stores[0]->heads, group = step.query_heads / heads, dim = stores[0]->dim, head_dim = stores[0]->head_dim;
  int queries = sequences * step.query_heads;

  float* natural;   // (B H, dim) queries as floats
  float* lanes;     // the same in lane order
  float* offsets;   // (B H) logit offset q . mean * scale
  float* norms;     // (B H) |q|
  uint64_t* signs;  // (B H, tiles)
  float* values;    // (states, dim)
  State* states;
  int64_t* counts;  // (B H) sampled rows
  std::vector<Unit> units;
  std::vector<int> order;       // the large units first: samples, whose size nobody knows, then exact rows
  std::vector<int> first_unit;  // per (b, g), and one past the last

  bool sampling(int b) const { return stores[b]->indexed_to > stores[b]->sinks && sampler != nullptr; }
};

void append(StoreView& store, const Plan& plan, int b) {
  const Step& step = plan.step;
  const size_t size = element_size(step.dtype);
  float key[kMaxDim], value[kMaxDim];
  const auto load = [&](const void* from, int g, float* to) {
    const int64_t at = static_cast<int64_t>(b) * store.heads + g;
    plan.run.to_float(step.dtype, static_cast<const char*>(from) + at * store.head_dim * size, store.head_dim, to);
  };
  for (int g = 0; g < store.heads; ++g) {
    load(step.key, g, key);
    load(step.value, g, value);
    const float* mean = store.mean.data() + static_cast<int64_t>(g) * store.dim;
    for (int d = 0; d < store.head_dim; ++d) key[d] -= mean[d];
    char* row = store.row(store.length, g);
    const size_t half = store.row_bytes() / 2, used = store.head_dim * element_size(store.dtype);
    plan.run.from_float(store.dtype, key, store.head_dim, row);
    plan.run.from_float(store.dtype, value, store.head_dim, row + half);
    std::memset(row + used, 0, half - used);
    std::memset(row + half + used, 0, half - used);
  }
  ++store.length;
}

// The largest number a row of this dtype can hold.
float largest(Dtype dtype) { return dtype == Dtype::f16 ? 65504.0f : std::numeric_limits<float>::max(); }

void check_range(const void* data, const char* name, Dtype dtype, int64_t count, float limit, const Kernels& run) {
  float piece[256];
  for (int64_t i = 0; i < count; i += 256) {
    const int64_t n = std::min<int64_t>(256, count - i);
    run.to_float(dtype, static_cast<const char*>(data) + i * element_size(dtype), n, piece);
    bool fits = true;
    for (int64_t j = 0; j < n; ++j) fits &= std::fabs(piece[j]) <= limit;  // false for NaN
    if (!fits) {
      throw std::invalid_argument(std::string(name) + " has entries that are not finite, or too large for the store");
    }
  }
}

void prepare_query(const Plan& plan, int64_t q) {
  const int b = static_cast<int>(q / plan.step.query_heads), h = static_cast<int>(q % plan.step.query_heads);
  const StoreView& store = *plan.stores[b];
  float* natural = plan.natural + q * plan.dim;
  const auto* from = static_cast<const char*>(plan.step.query) + q * plan.head_dim * element_size(plan.step.dtype);
  plan.run.to_float(plan.step.dtype, from, plan.head_dim, natural);
  std::fill(natural + plan.head_dim, natural + plan.dim, 0.0f);
  plan.run.to_lane_order(store.dtype, natural, plan.dim, plan.lanes + q * plan.dim);
  const float* mean = store.mean.data() + static_cast<int64_t>(h / plan.group) * plan.dim;
  double along = 0, square = 0;
  for (int d = 0; d < plan.head_dim; ++d) {
    along += static_cast<double>(natural[d]) * mean[d];
    square += static_cast<double>(natural[d]) * natural[d];
  }
  plan.offsets[q] = static_cast<float>(along * plan.step.rule.scale);
  plan.norms[q] = static_cast<float>(std::sqrt(square));
}

// Exact rows are cut into pieces of one size, whatever the threads and the batch, so that neither changes a bit of the
// result; a sample is a piece of its own.
void make_units(Plan& plan) {
  constexpr int64_t kPiece = 2048;
  int states = 0;
  for (int b = 0; b < plan.sequences; ++b) {
    const StoreView& store = *plan.stores[b];
    const bool sampling = plan.sampling(b);
    const int64_t body = sampling ? store.indexed_to - store.sinks : 0, rows = store.length - body;
    for (int g = 0; g < plan.heads; ++g) {
      plan.first_unit.push_back(static_cast<int>(plan.units.size()));
      for (int64_t begin = 0; begin < rows; begin += kPiece) {
        plan.units.push_back({b, g, -1, begin, std::min(rows, begin + kPiece), states, plan.group});
        states += plan.group;
      }
      for (int query = 0; sampling && query < plan.group; ++query) {
        plan.units.push_back({b, g, query, 0, 0, states, 1});
        ++states;
      }
    }
  }
  plan.first_unit.push_back(static_cast<int>(plan.units.size()));
  for (const bool exact : {false, true}) {
    for (int u = 0; u < static_cast<int>(plan.units.size()); ++u) {
      if ((plan.units[u].query < 0) == exact) plan.order.push_back(u);
    }
  }
}

void attend_exact(const Plan& plan, const Unit& unit) {
  const StoreView& store = *plan.stores[unit.sequence];
  const int64_t q0 = static_cast<int64_t>(unit.sequence) * plan.step.query_heads + unit.head * plan.group;
  const float* queries[256];
  for (int r = 0; r < plan.group; ++r) queries[r] = plan.lanes + (q0 + r) * plan.dim;
  const int64_t gap = plan.sampling(unit.sequence) ? store.indexed_to - store.sinks : 0;
  const auto position = [&](int64_t i) { return gap > 0 && i >= store.sinks ? i + gap : i; };
  for (int64_t i = unit.begin; i < unit.end;) {
    const int64_t at = position(i);
    int64_t n = std::min(unit.end - i, kBlockRows - (at & (kBlockRows - 1)));
    if (gap > 0 && i < store.sinks) n = std::min(n, store.sinks - i);
    plan.run.attend_rows(store.dtype, plan.dim, store.row(at, unit.head), n, plan.group, queries, plan.offsets + q0,
                         plan.step.rule, plan.states + unit.first_state);
    i += n;
  }
}

void attend_sampled(const Plan& plan, const Unit& unit) {
  const StoreView& store = *plan.stores[unit.sequence];
  const LshSampler& sampler = *plan.sampler;
  const int64_t q = static_cast<int64_t>(unit.sequence) * plan.step.query_heads + unit.head * plan.group + unit.query;
  const int tiles = sampler.directions().tiles;

  thread_local std::vector<uint32_t> id_memory;
  alignas(64) thread_local uint8_t counters[kSegmentRows];  // all zero between uses: `collect` leaves them so
  uint32_t* ids = scratch(id_memory, static_cast<size_t>(store.indexed_to - store.sinks + kCollectSlack));

  uint16_t codes[kMaxTables];
  codes_of(plan.signs + q * tiles, 1, tiles, sampler.K, sampler.L, codes, 0, 1);
  const int64_t buckets = (int64_t{1} << sampler.K) + 1;
  int64_t found = 0;
  for (const StoreView::IndexSegment& from : store.segments) {
    const int64_t head = static_cast<int64_t>(unit.head) * sampler.L;
    const Segment segment{from.offsets + head * buckets, from.ids + head * from.count, from.first,
                          static_cast<int32_t>(from.count)};
    plan.run.count_hits(codes, sampler.K, sampler.L, segment, sampler.min_hits, counters);
    found += plan.run.collect(counters, from.count, sampler.min_hits, from.first, ids + found);
  }
  plan.counts[q] = found;

  float* log_u_out = nullptr;
  if (plan.step.capture != nullptr) {
    HeadSample& sample = (*plan.step.capture)[q];
    sample.ids.assign(ids, ids + found);
    sample.log_u.resize(found);
    log_u_out = sample.log_u.data();
  }
  const InclusionLaw law{sampler.log_u.data(), plan.norms[q]};
  plan.run.attend_sample(store.dtype, plan.dim,
                         store.row_blocks.data() + static_cast<int64_t>(unit.head) * store.blocks.size(), ids, found,
                         plan.lanes + q * plan.dim, plan.offsets[q], plan.step.rule, nullptr, &law, log_u_out,
                         plan.states + unit.first_state);
}

// Merges what the units of one (sequence, kv head) found into its rows of the output.
void finish(const Plan& plan, int64_t pair) {
  const int b = static_cast<int>(pair / plan.heads), g = static_cast<int>(pair % plan.heads);
  const StoreView& store = *plan.stores[b];
  alignas(64) float total[kMaxDim], natural[kMaxDim];
  for (int r = 0; r < plan.group; ++r) {
    State state = empty_state(plan.dim, total);
    for (int u = plan.first_unit[pair]; u < plan.first_unit[pair + 1]; ++u) {
      const Unit& unit = plan.units[u];
      if (unit.query < 0) plan.run.merge(plan.dim, plan.states[unit.first_state + r], &state);
      if (unit.query == r) plan.run.merge(plan.dim, plan.states[unit.first_state], &state);
    }
    const int h = g * plan.group + r;
    const int64_t q = static_cast<int64_t>(b) * plan.step.query_heads + h;
    double denominator = state.sum, top = state.max;
    double weight = state.sum > 0 ? 1.0 / state.sum : 0.0;
    if (plan.step.sink_logits != nullptr) {
      const double logit = plan.step.sink_logits[h], larger = std::max(top, logit);
      denominator = state.sum * std::exp(top - larger) + std::exp(logit - larger);
      weight = state.sum > 0 ? std::exp(top - larger) / denominator : 0.0;
      top = larger;
    }
    plan.run.from_lane_order(store.dtype, total, plan.dim, natural);
    for (int d = 0; d < plan.head_dim; ++d) natural[d] = static_cast<float>(natural[d] * weight);
    auto* to = static_cast<char*>(plan.step.output) + q * plan.head_dim * element_size(plan.step.dtype);
    plan.run.from_float(plan.step.dtype, natural, plan.head_dim, to);
    plan.step.lse[q] =
        denominator > 0 ? static_cast<float>(top + std::log(denominator)) : -std::numeric_limits<float>::infinity();
  }
}

void count_rows(const Plan& plan) {
  for (int b = 0; b < plan.sequences; ++b) {
    StoreView& store = *plan.stores[b];
    ++store.steps;
    if (!plan.sampling(b)) continue;
    const int64_t body = store.indexed_to - store.sinks;
    for (int h = 0; h < plan.step.query_heads; ++h) {
      const int64_t count = plan.counts[static_cast<int64_t>(b) * plan.step.query_heads + h];
      store.sampled_rows += count;
      store.body_rows += body;
      store.max_share = std::max(store.max_share, static_cast<double>(count) / static_cast<double>(body));
    }
  }
}

}  // namespace

void StoreView::blocks_changed() {
  row_blocks.resize(blocks.size() * heads);
  for (int g = 0; g < heads; ++g) {
    for (size_t b = 0; b < blocks.size(); ++b) {
      row_blocks[g * blocks.size() + b] = blocks[b].rows + g * blocks[b].head_stride;
    }
  }
}

State empty_state(int dim, float* values) {
  std::fill(values, values + dim, 0.0f);
  return {-std::numeric_limits<float>::infinity(), 0, values};
}

void poison_scratch(bool on) { poison = on; }

void decode(const std::vector<StoreView*>& stores, const LshSampler* sampler, const Step& step) {
  Plan plan{stores, sampler, step};
  const int64_t entries = static_cast<int64_t>(plan.sequences) * plan.heads * plan.head_dim;
  check_range(step.query, "query", step.dtype, entries * plan.group, largest(Dtype::f32), plan.run);
  if (step.key != nullptr) {
    const float limit = largest(stores[0]->dtype);
    check_range(step.key, "keys", step.dtype, entries, limit, plan.run);
    check_range(step.value, "values", step.dtype, entries, limit, plan.run);
    for (int b = 0; b < plan.sequences; ++b) append(*stores[b], plan, b);
  }
  make_units(plan);

  thread_local std::vector<float> floats;
  thread_local std::vector<uint64_t> sign_memory;
  thread_local std::vector<State> state_memory;
  thread_local std::vector<int64_t> count_memory;
  const Unit* last = plan.units.empty() ? nullptr : &plan.units.back();
  const int64_t states = last == nullptr ? 0 : last->first_state + last->states;
  const int64_t queries = plan.queries, dim = plan.dim;
  const int tiles = sampler == nullptr ? 0 : sampler->directions().tiles;
  plan.natural = scratch(floats, static_cast<size_t>(queries * (2 * dim + 2) + states * dim));
  plan.lanes = plan.natural + queries * dim;
  plan.values = plan.lanes + queries * dim;
  plan.offsets = plan.values + states * dim;
  plan.norms = plan.offsets + queries;
  plan.signs = scratch(sign_memory, static_cast<size_t>(queries) * tiles);
  plan.states = scratch(state_memory, static_cast<size_t>(states));
  plan.counts = scratch(count_memory, static_cast<size_t>(queries));
  if (step.capture != nullptr) step.capture->assign(queries, {});

  bool any_sampling = false;
  for (int b = 0; b < plan.sequences; ++b) any_sampling |= plan.sampling(b);
  // A few queries at a time, so that each direction read serves several.
  const int64_t piece = std::clamp<int64_t>((queries + threads() - 1) / threads(), 4, 48);
  parallel((queries + piece - 1) / piece, [&](int64_t i) {
    const int64_t first = i * piece, last = std::min(queries, first + piece);
    for (int64_t q = first; q < last; ++q) prepare_query(plan, q);
    if (!any_sampling) return;
    plan.run.hash(plan.natural + first * dim, dim, last - first, sampler->directions(), 0, tiles,
                  plan.signs + first * tiles);
  });

  const int64_t pairs = static_cast<int64_t>(plan.sequences) * plan.heads;
  std::unique_ptr<std::atomic<int>[]> left(new std::atomic<int>[pairs]);
  for (int64_t p = 0; p < pairs; ++p) left[p] = plan.first_unit[p + 1] - plan.first_unit[p];
  parallel(static_cast<int64_t>(plan.units.size()), [&](int64_t i) {
    const Unit& unit = plan.units[plan.order[i]];
    for (int s = unit.first_state; s < unit.first_state + unit.states; ++s) {
      plan.states[s] = empty_state(plan.dim, plan.values + s * dim);
    }
    unit.query < 0 ? attend_exact(plan, unit) : attend_sampled(plan, unit);
    const int64_t pair = static_cast<int64_t>(unit.sequence) * plan.heads + unit.head;
    if (left[pair].fetch_sub(1, std::memory_order_acq_rel) == 1) finish(plan, pair);
  });
  for (int64_t p = 0; p < pairs; ++p) {
    if (plan.first_unit[p] == plan.first_unit[p + 1]) finish(plan, p);  // an empty store: zeros, lse -inf
  }
  count_rows(plan);
}

}  // namespace magicpig
