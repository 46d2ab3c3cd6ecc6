#include "step.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

#include "errors.h"
#include "index.h"
#include "parallel.h"
#include "rows.h"

namespace magicpig {
namespace {

std::atomic<bool> poison{false};

// Grow-only scratch memory of the calling thread, never returned zeroed.
template <class T>
T* scratch(std::vector<T>& memory, size_t count) {
  if (memory.size() < count) memory.resize(count);
  if (count > 0 && poison.load(std::memory_order_relaxed)) {
    std::memset(static_cast<void*>(memory.data()), 0xff, count * sizeof(T));
  }
  return memory.data();
}

// What one kv head's sketch says in the course of a step. Reused from step to step; as many exist as ever were in use at
// a time.
struct ScanMemory {
  Weights weights;
  std::vector<uint32_t> ids;
  std::vector<float> log_u;
};

class ScanPool {
 public:
  std::unique_ptr<ScanMemory> take() {
    std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<ScanMemory>();
    std::unique_ptr<ScanMemory> memory = std::move(free_.back());
    free_.pop_back();
    return memory;
  }
  void give(std::unique_ptr<ScanMemory> memory) {
    std::lock_guard lock(mutex_);
    free_.push_back(std::move(memory));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<ScanMemory>> free_;
};

ScanPool scan_pool;

enum class Work { exact, lookup, scan };

// A share of the work of one (sequence, kv head): exact rows for all its query heads, the hashed sample of one of them,
// or the weights of a stretch of its sketch. Whoever finishes the last unit of a pair draws by the weights and merges.
struct Unit {
  Work work = Work::exact;
  int sequence = 0, head = 0;  // b, g
  int query = 0;               // lookup: within the group
  int64_t begin = 0, end = 0;  // exact: rows, the body left out. scan: keys of a segment
  int first_state = 0;         // one state per query head it serves; of the scans of a pair only the first has any
  int states = 0;
  int segment = 0;          // scan
  int64_t first_block = 0;  // scan: of the pair's weights
};

// One (sequence, kv head).
struct Pair {
  int first_unit, first_scan;          // scans are its last units
  std::atomic<int> left;               // units not finished
  std::mutex mutex;                    // of the next line
  std::unique_ptr<ScanMemory> memory;  // from its first scan to its draw
  WeightRule rule;                     // of its sketch
};

// Everything the tasks of one step share.
struct Plan {
  const std::vector<StoreView*>& stores;
  const LshSampler* lsh;
  const SketchSampler* sketch;
  const Step& step;
  const Kernels& run = kernels();
  int sequences = static_cast<int>(stores.size());
  int heads = stores[0]->heads, group = step.query_heads / heads, dim = stores[0]->dim, head_dim = stores[0]->head_dim;
  int queries = sequences * step.query_heads;

  float* natural;    // (B H, dim) queries as floats
  float* lanes;      // the same in lane order
  float* turned;     // the same, turned, for a sketch
  float* offsets;    // (B H) logit offset q . mean * scale
  float* norms;      // (B H) |q|
  float* predicted;  // (B H) predicted errors
  uint64_t* signs;   // (B H, tiles)
  float* values;     // (states, dim)
  float* spreads;    // (states, dim)
  State* states;
  int64_t* counts;        // (B H) sampled rows
  SketchQuery* sketched;  // (B H)
  std::vector<Unit> units;
  std::vector<int> order;  // in which the units are begun
  std::vector<int> tasks;  // first in `order` of each stretch that one thread does by itself, and the end
  std::unique_ptr<Pair[]> pairs;
  int64_t pair_count;

  bool sampling(int b) const {
    return stores[b]->indexed_to > stores[b]->sinks && (lsh != nullptr || sketch != nullptr);
  }
  // One past the last unit of a pair.
  int end_unit(int64_t pair) const {
    return pair + 1 < pair_count ? pairs[pair + 1].first_unit : static_cast<int>(units.size());
  }
  int64_t first_query(int64_t pair) const { return pair / heads * step.query_heads + pair % heads * group; }
};

void append(StoreView& store, const Plan& plan, int b) {
  const Step& step = plan.step;
  const size_t size = element_size(step.dtype);
  alignas(64) float key[kMaxDim] = {}, value[kMaxDim] = {};  // padding stays zero
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
    write_half(store.dtype, store.dim, Half::key, key, row);
    write_half(store.dtype, store.dim, Half::value, value, row);
  }
  ++store.length;
}

// The largest number a row of this dtype can hold.
float largest(Dtype dtype) {
  if (dtype == Dtype::i8) return 0x1p127f;  // of larger ones the scale times 127 may be infinite
  return dtype == Dtype::f16 ? 65504.0f : std::numeric_limits<float>::max();
}

void check_range(const void* data, const char* name, Dtype dtype, int64_t count, float limit, const Kernels& run) {
  float piece[256];
  for (int64_t i = 0; i < count; i += 256) {
    const int64_t n = std::min<int64_t>(256, count - i);
    run.to_float(dtype, static_cast<const char*>(data) + i * element_size(dtype), n, piece);
    bool fits = true;
    for (int64_t j = 0; j < n; ++j) fits &= std::fabs(piece[j]) <= limit;  // false for NaN
    if (!fits) {
      throw RangeError(std::string(name) + " has entries that are not finite, or too large for the store");
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
  double along[4] = {}, square[4] = {};  // so that one sum need not wait for the last
  for (int d = 0; d < plan.dim; d += 4) {
    for (int i = 0; i < 4; ++i) {
      along[i] += static_cast<double>(natural[d + i]) * mean[d + i];
      square[i] += static_cast<double>(natural[d + i]) * natural[d + i];
    }
  }
  const auto sum = [](const double* parts) { return (parts[0] + parts[1]) + (parts[2] + parts[3]); };
  plan.offsets[q] = static_cast<float>(sum(along) * plan.step.rule.scale);
  plan.norms[q] = static_cast<float>(std::sqrt(sum(square)));
}

void sketch_query(const Plan& plan, int64_t q) {
  prepare_query(*plan.sketch, plan.turned + q * plan.dim, plan.offsets[q], plan.step.rule, plan.sketched + q);
}

// Exact rows and sketches are cut into pieces of one size, whatever the threads and the batch, so that neither changes a
// bit of the result; a hashed sample is a piece of its own.
void make_units(Plan& plan) {
  constexpr int64_t kRows = 2048, kKeys = 8192;
  int states = 0;
  plan.pair_count = static_cast<int64_t>(plan.sequences) * plan.heads;
  plan.pairs = std::make_unique<Pair[]>(plan.pair_count);
  for (int64_t p = 0; p < plan.pair_count; ++p) {
    const int b = static_cast<int>(p / plan.heads), g = static_cast<int>(p % plan.heads);
    const StoreView& store = *plan.stores[b];
    const bool sampling = plan.sampling(b);
    const int64_t body = sampling ? store.indexed_to - store.sinks : 0, rows = store.length - body;
    Unit unit;
    unit.sequence = b;
    unit.head = g;
    const auto add = [&](int own_states) {
      unit.first_state = states;
      unit.states = own_states;
      states += own_states;
      plan.units.push_back(unit);
    };
    const int first = static_cast<int>(plan.units.size());
    plan.pairs[p].first_unit = first;
    for (int64_t begin = 0; begin < rows; begin += kRows) {
      unit.begin = begin;
      unit.end = std::min(rows, begin + kRows);
      add(plan.group);
    }
    unit.work = Work::lookup;
    for (unit.query = 0; sampling && plan.lsh != nullptr && unit.query < plan.group; ++unit.query) add(1);
    plan.pairs[p].first_scan = static_cast<int>(plan.units.size());
    unit.work = Work::scan;
    unit.first_block = 0;
    for (size_t i = 0; sampling && plan.sketch != nullptr && i < store.sketches.size(); ++i) {
      unit.segment = static_cast<int>(i);
      for (int64_t begin = 0; begin < store.sketches[i].count; begin += kKeys) {
        unit.begin = begin;
        unit.end = std::min(store.sketches[i].count, begin + kKeys);
        add(unit.first_block == 0 ? plan.group : 0);
        unit.first_block += (unit.end - begin + kSketchKeys - 1) / kSketchKeys;
      }
    }
    plan.pairs[p].left = static_cast<int>(plan.units.size()) - first;
  }
  plan.order.resize(plan.units.size());
  std::iota(plan.order.begin(), plan.order.end(), 0);
  if (plan.sketch != nullptr) return;  // pair by pair, so that the weights of few are in memory at a time
  // Looked-up samples, whose size nobody knows, before exact rows.
  std::stable_partition(plan.order.begin(), plan.order.end(), [&](int u) { return plan.units[u].work != Work::exact; });
}

// A pair with a sketch is best left to one thread, in whose caches its weights then are, as long as there are pairs for
// all threads: the last are shared.
void make_tasks(Plan& plan) {
  const int count = static_cast<int>(plan.units.size());
  int u = 0;
  for (int64_t p = 0; plan.sketch != nullptr && p < plan.pair_count; ++p) {
    const int end = plan.end_unit(p);
    if ((end - u) * threads() > count - u) break;
    plan.tasks.push_back(u);
    u = end;
  }
  for (; u <= count; ++u) plan.tasks.push_back(u);
}

// Exact attention of a group over the rows of positions [begin, end).
void attend_positions(const Plan& plan, int b, int g, int64_t begin, int64_t end, State* states) {
  const StoreView& store = *plan.stores[b];
  const int64_t q0 = plan.first_query(static_cast<int64_t>(b) * plan.heads + g);
  const float* queries[256];
  for (int r = 0; r < plan.group; ++r) queries[r] = plan.lanes + (q0 + r) * plan.dim;
  for (int64_t at = begin; at < end;) {
    const int64_t n = std::min(end - at, kBlockRows - (at & (kBlockRows - 1)));
    plan.run.attend_rows(store.dtype, plan.dim, store.row(at, g), n, plan.group, queries, plan.offsets + q0,
                         plan.step.rule, states);
    at += n;
  }
}

void attend_exact(const Plan& plan, const Unit& unit) {
  const StoreView& store = *plan.stores[unit.sequence];
  const int64_t sinks = plan.sampling(unit.sequence) ? store.sinks : store.length;
  const int64_t gap = plan.sampling(unit.sequence) ? store.indexed_to - store.sinks : 0;
  State* states = plan.states + unit.first_state;
  attend_positions(plan, unit.sequence, unit.head, unit.begin, std::min(unit.end, sinks), states);
  attend_positions(plan, unit.sequence, unit.head, std::max(unit.begin, sinks) + gap, unit.end + gap, states);
}

const char* const* row_blocks(const StoreView& store, int head) {
  return store.row_blocks.data() + static_cast<int64_t>(head) * store.blocks.size();
}

void attend_lookup(const Plan& plan, const Unit& unit) {
  const StoreView& store = *plan.stores[unit.sequence];
  const LshSampler& sampler = *plan.lsh;
  const int64_t q = static_cast<int64_t>(unit.sequence) * plan.step.query_heads + unit.head * plan.group + unit.query;
  const int tiles = sampler.directions().tiles;

  thread_local std::vector<uint32_t> id_memory;
  alignas(64) thread_local uint8_t counts[kSegmentRows];  // all zero between uses
  uint32_t* ids = scratch(id_memory, static_cast<size_t>(store.indexed_to - store.sinks + kLookupSlack));

  uint16_t codes[kMaxTables];
  codes_of(plan.signs + q * tiles, 1, tiles, sampler.K, sampler.L, codes, 0, 1);
  const int64_t buckets = (int64_t{1} << sampler.K) + 1;
  int64_t found = 0;
  for (const StoreView::IndexSegment& from : store.segments) {
    const int64_t head = static_cast<int64_t>(unit.head) * sampler.L;
    const Segment segment{from.offsets + head * buckets, from.ids + head * from.count, from.first,
                          static_cast<int32_t>(from.count)};
    found += plan.run.lookup(codes, sampler.K, sampler.L, segment, sampler.min_hits, counts, ids + found);
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
  plan.run.attend_sample(store.dtype, plan.dim, row_blocks(store, unit.head), ids, found, plan.lanes + q * plan.dim,
                         plan.offsets[q], plan.step.rule, law, log_u_out, plan.states + unit.first_state);
}

// What the query heads of a pair look for in its sketch.
std::vector<ScoreRule> score_rules(const Plan& plan, int64_t pair) {
  const SketchQuery* queries = plan.sketched + plan.first_query(pair);
  std::vector<ScoreRule> rules;
  for (int r = 0; r < plan.group; ++r) rules.push_back(queries[r].rule);
  return rules;
}

SketchPiece piece_of(const Plan& plan, const Unit& unit) {
  const StoreView::SketchSegment& segment = plan.stores[unit.sequence]->sketches[unit.segment];
  const int64_t first = unit.head * segment.blocks * kSketchKeys + unit.begin;
  return {segment.words + first * plan.sketch->layout().words, segment.scales + first, unit.end - unit.begin};
}

// Finds out, for each pair with a sketch, which scores weigh how much.
void make_rules(Plan& plan) {
  constexpr int64_t kBlocks = 64;  // of a pilot, for one task
  struct Part {
    int64_t pair, begin, end;
  };
  std::vector<Part> parts;
  std::vector<std::vector<SketchPiece>> pieces(plan.pair_count);
  const auto pilot = [&](int64_t p) {
    const StoreView& store = *plan.stores[p / plan.heads];
    return Pilot(store.indexed_to - store.sinks);
  };
  for (int64_t p = 0; p < plan.pair_count; ++p) {
    for (int u = plan.pairs[p].first_scan; u < plan.end_unit(p); ++u)
      pieces[p].push_back(piece_of(plan, plan.units[u]));
    if (pieces[p].empty()) continue;
    const int64_t blocks = pilot(p).blocks();
    for (int64_t i = 0; i < blocks; i += kBlocks) parts.push_back({p, i, std::min(blocks, i + kBlocks)});
  }
  std::vector<ScoreSum> sums(parts.size() * plan.group);
  parallel(static_cast<int64_t>(parts.size()), [&](int64_t i) {
    const Part& part = parts[i];
    sum_pilot(plan.sketch->layout(), pieces[part.pair], pilot(part.pair), part.begin, part.end, plan.group,
              score_rules(plan, part.pair).data(), sums.data() + i * plan.group);
  });
  for (size_t i = 0; i < parts.size();) {
    const int64_t p = parts[i].pair;
    size_t end = i;
    while (end < parts.size() && parts[end].pair == p) ++end;
    plan.pairs[p].rule =
        weight_rule(score_rules(plan, p), sums.data() + i * plan.group, static_cast<int64_t>(end - i), pilot(p));
    i = end;
  }
}

void scan(const Plan& plan, const Unit& unit) {
  const StoreView& store = *plan.stores[unit.sequence];
  const int64_t index = static_cast<int64_t>(unit.sequence) * plan.heads + unit.head;
  Pair& pair = plan.pairs[index];
  {
    std::lock_guard lock(pair.mutex);
    if (pair.memory == nullptr) {
      pair.memory = scan_pool.take();
      const Unit& last = plan.units[plan.end_unit(index) - 1];
      const int64_t blocks = last.first_block + (last.end - last.begin + kSketchKeys - 1) / kSketchKeys;
      Weights& weights = pair.memory->weights;
      weights.reset(store.indexed_to - store.sinks, blocks);
      if (poison.load(std::memory_order_relaxed)) std::fill_n(weights.weights(0), blocks * kSketchKeys, ~0u);
    }
  }
  Weights& weights = pair.memory->weights;
  const SketchPiece piece = piece_of(plan, unit);
  plan.run.weigh(plan.sketch->layout(), piece.words, piece.scales, piece.count, plan.group, pair.rule.heads.data(),
                 pair.rule.ones.data(), pair.rule.octaves, pair.rule.floor, weights.weights(unit.first_block),
                 weights.sums(unit.first_block));
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

// The largest predicted error of the query heads of a pair.
float worst_error(const Plan& plan, int64_t pair) {
  alignas(64) float values[kMaxDim], spread[kMaxDim];
  float worst = 0;
  for (int r = 0; r < plan.group; ++r) {
    const State state = merged(plan, pair, r, values, spread);
    const int h = static_cast<int>(pair % plan.heads) * plan.group + r;
    const float error = predicted_error(plan.dim, state, denominator(plan, state, h));
    if (!std::isfinite(error)) return std::numeric_limits<float>::infinity();
    worst = std::max(worst, error);
  }
  return worst;
}

// Draws by the weights of a pair and attends to what was drawn; with an epsilon again to more, until that is enough.
void draw(const Plan& plan, int64_t index) {
  Pair& pair = plan.pairs[index];
  const Unit& first = plan.units[pair.first_scan];
  const int last = plan.end_unit(index);
  const SketchSampler& sampler = *plan.sketch;
  const StoreView& store = *plan.stores[first.sequence];
  const int64_t q0 = plan.first_query(index), body = store.indexed_to - store.sinks;
  ScanMemory& memory = *pair.memory;

  const double wanted = sampler.budget >= 1 ? sampler.budget : sampler.budget * static_cast<double>(body);
  const int64_t budget = std::clamp<int64_t>(std::llrint(std::min(wanted, static_cast<double>(body))), 1, body);
  for (int u = pair.first_scan; u < last; ++u) memory.weights.add(plan.units[u].end - plan.units[u].begin);
  memory.weights.settle_step(budget);
  const uint64_t start = start_for(sampler.seed, first.head, store.length, memory.weights.step());

  const float* queries[256];
  for (int r = 0; r < plan.group; ++r) queries[r] = plan.lanes + (q0 + r) * plan.dim;
  State* states = plan.states + first.first_state;
  const double most = sampler.limit * static_cast<double>(body);
  for (int doublings = 0;;) {
    const bool all = doublings > 0 && std::ldexp(static_cast<double>(budget), doublings) > most;
    for (int r = 0; r < plan.group; ++r) {
      const int64_t s = first.first_state + r;
      states[r] = empty_state(plan.dim, plan.values + s * plan.dim, plan.spreads + s * plan.dim);
    }
    if (all) {
      memory.ids.resize(body);
      for (int64_t i = 0; i < body; ++i) memory.ids[i] = static_cast<uint32_t>(store.sinks + i);
      memory.log_u.assign(body, 0.0f);
      attend_positions(plan, first.sequence, first.head, store.sinks, store.indexed_to, states);
      break;
    }
    memory.weights.pick(start, doublings, &memory.ids, &memory.log_u);
    for (uint32_t& id : memory.ids) id += static_cast<uint32_t>(store.sinks);
    plan.run.attend_shared(store.dtype, plan.dim, row_blocks(store, first.head), memory.ids.data(),
                           static_cast<int64_t>(memory.ids.size()), memory.log_u.data(), plan.group, queries,
                           plan.offsets + q0, plan.step.rule, states);
    if (sampler.epsilon <= 0) break;
    const float worst = worst_error(plan, index);
    if (worst <= sampler.epsilon) break;
    // The error falls with the square root of the rows.
    doublings += static_cast<int>(std::clamp(std::ceil(2 * std::log2(worst / sampler.epsilon)), 1.0f, 20.0f));
  }
  for (int r = 0; r < plan.group; ++r) {
    plan.counts[q0 + r] = static_cast<int64_t>(memory.ids.size());
    if (plan.step.capture != nullptr) (*plan.step.capture)[q0 + r] = {memory.ids, memory.log_u};
  }
  scan_pool.give(std::move(pair.memory));
}

// Merges what the units of one pair found into its rows of the output.
void finish(const Plan& plan, int64_t pair) {
  const int b = static_cast<int>(pair / plan.heads), g = static_cast<int>(pair % plan.heads);
  const StoreView& store = *plan.stores[b];
  alignas(64) float total[kMaxDim], spread[kMaxDim], natural[kMaxDim];
  for (int r = 0; r < plan.group; ++r) {
    const int h = g * plan.group + r;
    const int64_t q = static_cast<int64_t>(b) * plan.step.query_heads + h;
    const State state = merged(plan, pair, r, total, spread);
    const Denominator below = denominator(plan, state, h);
    // Of a body from which nothing was drawn nothing is known.
    plan.predicted[q] = plan.sampling(b) && plan.counts[q] == 0 ? std::numeric_limits<float>::quiet_NaN()
                                                                : predicted_error(plan.dim, state, below);
    plan.run.from_lane_order(store.dtype, total, plan.dim, natural);
    for (int d = 0; d < plan.head_dim; ++d) natural[d] = static_cast<float>(natural[d] * below.weight);
    auto* to = static_cast<char*>(plan.step.output) + q * plan.head_dim * element_size(plan.step.dtype);
    plan.run.from_float(plan.step.dtype, natural, plan.head_dim, to);
    plan.step.lse[q] =
        below.sum > 0 ? static_cast<float>(below.top + std::log(below.sum)) : -std::numeric_limits<float>::infinity();
  }
}

// Does one unit, and what its pair is waiting for if it is the last one.
void work(const Plan& plan, const Unit& unit) {
  for (int s = unit.first_state; s < unit.first_state + unit.states; ++s) {
    // Certain rows add nothing to the variance.
    float* spread = unit.work == Work::exact ? nullptr : plan.spreads + s * plan.dim;
    plan.states[s] = empty_state(plan.dim, plan.values + s * plan.dim, spread);
  }
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
  const int64_t index = static_cast<int64_t>(unit.sequence) * plan.heads + unit.head;
  Pair& pair = plan.pairs[index];
  if (pair.left.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  if (pair.memory != nullptr) draw(plan, index);
  finish(plan, index);
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
      store.predicted.add(plan.predicted[static_cast<int64_t>(b) * plan.step.query_heads + h]);
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

void PredictedErrors::add(double error) {
  if (!std::isfinite(error)) {
    ++unknown;
    return;
  }
  ++count;
  sum += error;
  largest = std::max(largest, error);
  const double bin = std::ceil(kBinsPerOctave * (std::log2(std::max(error, 1e-9)) + 12)) - 1;
  ++bins[static_cast<size_t>(std::clamp(bin, 0.0, kBins - 1.0))];
}

State empty_state(int dim, float* values, float* spread) {
  std::fill(values, values + dim, 0.0f);
  if (spread != nullptr) std::fill(spread, spread + dim, 0.0f);
  return {-std::numeric_limits<float>::infinity(), 0, values, spread, 0, 0};
}

void poison_scratch(bool on) { poison = on; }

void decode(const std::vector<StoreView*>& stores, const LshSampler* lsh, const SketchSampler* sketch,
            const Step& step) {
  Plan plan{stores, lsh, sketch, step};
  const int64_t entries = static_cast<int64_t>(plan.sequences) * plan.heads * plan.head_dim;
  check_range(step.query, "query", step.dtype, entries * plan.group, largest(Dtype::f32), plan.run);
  if (step.key != nullptr) {
    const float limit = largest(stores[0]->dtype);
    check_range(step.key, "keys", step.dtype, entries, limit, plan.run);
    check_range(step.value, "values", step.dtype, entries, limit, plan.run);
    for (int b = 0; b < plan.sequences; ++b) append(*stores[b], plan, b);
  }
  make_units(plan);
  make_tasks(plan);

  thread_local std::vector<float> floats;
  thread_local std::vector<uint64_t> sign_memory;
  thread_local std::vector<State> state_memory;
  thread_local std::vector<int64_t> count_memory;
  thread_local std::vector<SketchQuery> query_memory;
  const Unit* last = plan.units.empty() ? nullptr : &plan.units.back();
  const int64_t states = last == nullptr ? 0 : last->first_state + last->states;
  const int64_t queries = plan.queries, dim = plan.dim;
  const int tiles = lsh == nullptr ? 0 : lsh->directions().tiles;
  plan.natural = scratch(floats, static_cast<size_t>(queries * (3 * dim + 3) + 2 * states * dim));
  plan.lanes = plan.natural + queries * dim;
  plan.turned = plan.lanes + queries * dim;
  plan.values = plan.turned + queries * dim;
  plan.spreads = plan.values + states * dim;
  plan.offsets = plan.spreads + states * dim;
  plan.norms = plan.offsets + queries;
  plan.predicted = step.predicted_error != nullptr ? step.predicted_error : plan.norms + queries;
  plan.signs = scratch(sign_memory, static_cast<size_t>(queries) * tiles);
  plan.states = scratch(state_memory, static_cast<size_t>(states));
  plan.counts = scratch(count_memory, static_cast<size_t>(queries));
  plan.sketched = scratch(query_memory, static_cast<size_t>(sketch == nullptr ? 0 : queries));
  if (step.capture != nullptr) step.capture->assign(queries, {});

  bool any_sampling = false;
  for (int b = 0; b < plan.sequences; ++b) any_sampling |= plan.sampling(b);
  // A few queries at a time, so that each direction read serves several.
  const int64_t piece = std::clamp<int64_t>((queries + threads() - 1) / threads(), 4, 48);
  parallel((queries + piece - 1) / piece, [&](int64_t i) {
    const int64_t first = i * piece, end = std::min(queries, first + piece);
    for (int64_t q = first; q < end; ++q) prepare_query(plan, q);
    if (!any_sampling) return;
    const float* natural = plan.natural + first * dim;
    if (lsh != nullptr)
      plan.run.hash(natural, dim, end - first, lsh->directions(), 0, tiles, plan.signs + first * tiles);
    if (sketch == nullptr) return;
    plan.run.turn(natural, dim, end - first, sketch->rotation(), plan.turned + first * dim);
    for (int64_t q = first; q < end; ++q) sketch_query(plan, q);
  });
  if (sketch != nullptr && any_sampling) make_rules(plan);

  parallel(static_cast<int64_t>(plan.tasks.size()) - 1, [&](int64_t task) {
    for (int i = plan.tasks[task]; i < plan.tasks[task + 1]; ++i) work(plan, plan.units[plan.order[i]]);
  });
  for (int64_t p = 0; p < plan.pair_count; ++p) {
    if (plan.pairs[p].first_unit == plan.end_unit(p)) finish(plan, p);  // an empty store: zeros, lse -inf
  }
  count_rows(plan);
}

}  // namespace magicpig
