// The sampled part of a step: look up and attend, or score, weigh, draw and attend.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "parallel.h"
#include "plan.h"
#include "tables.h"

namespace magicpig {
namespace {

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

// What the query heads of a pair look for in its sketch.
std::vector<ScoreRule> score_rules(const Plan& plan, int64_t pair) {
  const SketchQuery* queries = plan.sketched + plan.first_query(pair);
  std::vector<ScoreRule> rules;
  for (int r = 0; r < plan.group; ++r) rules.push_back(queries[r].rule);
  return rules;
}

// The queries of a group as the centres of its sketch meet them.
std::vector<const float*> scored_lanes(const Plan& plan, int64_t pair) {
  std::vector<const float*> lanes;
  for (int r = 0; r < plan.group; ++r) lanes.push_back(plan.scored + (plan.first_query(pair) + r) * plan.dim);
  return lanes;
}

// The sketch of the keys [begin, end) of a pair, segment by segment.
std::vector<SketchPiece> pieces_of(const Plan& plan, int64_t pair, int64_t begin, int64_t end) {
  const StoreView& store = plan.store_of(pair);
  const int64_t g = pair % plan.heads;
  const int words = store.sketch->layout().words;
  std::vector<SketchPiece> pieces;
  for (const StoreView::SketchSegment& segment : store.sketches) {
    const int64_t first = std::max(begin, segment.first), last = std::min(end, segment.first + segment.count);
    if (first >= last) continue;
    const int64_t key = g * segment.blocks * kSketchKeys + first - segment.first;
    const int64_t centre =
        g * centres_of(segment.blocks, store.stride_shift) + ((first - segment.first) >> store.stride_shift);
    pieces.push_back(
        {segment.words + key * words, segment.scales + key, segment.centres + centre * plan.dim, first, last - first});
  }
  return pieces;
}

}  // namespace

void attend_lookup(const Plan& plan, const Unit& unit) {
  const StoreView& store = *plan.stores[unit.sequence];
  const LshSampler& sampler = *store.lsh;
  const HitLaw& hits = *store.policy.law;
  const int64_t h = static_cast<int64_t>(unit.head) * plan.group + unit.query;
  const int64_t q = static_cast<int64_t>(unit.sequence) * plan.step.query_heads + h;
  const int tiles = sampler.tiles();

  thread_local std::vector<uint32_t> id_memory;
  alignas(64) thread_local uint8_t counts[kSegmentRows];  // all zero between uses
  uint32_t* ids = scratch(id_memory, static_cast<size_t>(store.indexed_to + kLookupSlack));

  uint16_t own[kMaxTables];
  const uint16_t* codes = plan.prepared(unit.sequence).codes;
  if (codes == nullptr) {
    codes_of(plan.signs + plan.signs_at[unit.sequence] + h * tiles, 1, tiles, sampler.K, sampler.L, own, 0, 1);
    codes = own;
  } else {
    codes += h * sampler.L;
  }
  const int64_t buckets = (int64_t{1} << sampler.K) + 1;
  int64_t found = 0;
  for (const StoreView::IndexSegment& from : store.segments) {
    const int64_t head = static_cast<int64_t>(unit.head) * sampler.L;
    const Segment segment{from.offsets + head * buckets, from.ids + head * from.count, from.first,
                          static_cast<int32_t>(from.count)};
    found += plan.run.lookup(codes, sampler.K, sampler.L, segment, hits.min_hits, counts, ids + found);
  }
  const int64_t sinks = std::lower_bound(ids, ids + found, static_cast<uint32_t>(store.sinks)) - ids;
  ids += sinks;  // these have been attended to
  found -= sinks;
  plan.counts[q] = found;

  float* log_u_out = nullptr;
  if (plan.step.capture != nullptr) {
    HeadSample& sample = (*plan.step.capture)[q];
    sample.ids.assign(ids, ids + found);
    sample.log_u.resize(found);
    log_u_out = sample.log_u.data();
  }
  const InclusionLaw law{hits.log_u.data(), plan.norms[q]};
  RowCentres centres = store.hashed_from(unit.head);
  thread_local std::vector<float> offset_memory;
  float* offsets = scratch(offset_memory, static_cast<size_t>(store.hashed_from_count()));
  const float* before = nullptr;
  for (int64_t i = 0; i < store.hashed_from_count(); ++i) {
    const float* centre = store.hash_centre(i, unit.head);
    if (centre == nullptr) {
      offsets[i] = 0.0f;
    } else {
      // Blocks of one segment have the same.
      offsets[i] = centre == before ? offsets[i - 1] : plan.offset(plan.natural + q * plan.dim, centre);
    }
    before = centre;
  }
  centres.offsets = offsets;
  plan.run.attend_sample(store.dtype, plan.dim, store.rows_of(unit.head), ids, found, plan.lanes + q * plan.dim,
                         centres, plan.step.rule, law, log_u_out, plan.states + unit.first_state);
}

void make_rules(Plan& plan) {
  struct Part {
    int64_t pair, begin, end;
  };
  std::vector<Part> parts;
  std::vector<std::vector<SketchPiece>> pieces(plan.pair_count);
  const auto pilot = [&](int64_t p) { return Pilot(plan.store_of(p).indexed_to, plan.store_of(p).sinks); };
  for (int64_t p = 0; p < plan.pair_count; ++p) {
    if (!plan.scans(p)) continue;
    pieces[p] = pieces_of(plan, p, 0, plan.store_of(p).indexed_to);
    const int64_t blocks = pilot(p).blocks();
    for (int64_t i = 0; i < blocks; i += kPilotPart) parts.push_back({p, i, std::min(blocks, i + kPilotPart)});
  }
  std::vector<ScoreSum> sums(parts.size() * plan.group);
  std::vector<double> squares(parts.size());
  parallel(static_cast<int64_t>(parts.size()), [&](int64_t i) {
    const Part& part = parts[i];
    const StoreView& store = plan.store_of(part.pair);
    const std::vector<ScoreRule> rules = score_rules(plan, part.pair);
    const std::vector<const float*> lanes = scored_lanes(plan, part.pair);
    sum_pilot({store.sketch->layout(), plan.dim, store.stride_shift, plan.group, rules.data(), lanes.data()},
              pieces[part.pair], pilot(part.pair), part.begin, part.end, sums.data() + i * plan.group);
    if (store.policy.candidates > 0) return;  // whatever the noise is
    squares[i] = sum_scale_squares(pieces[part.pair], pilot(part.pair), part.begin, part.end);
  });
  for (size_t i = 0; i < parts.size();) {
    const int64_t p = parts[i].pair;
    size_t end = i;
    while (end < parts.size() && parts[end].pair == p) ++end;
    plan.pairs[p].rule =
        weight_rule(score_rules(plan, p), sums.data() + i * plan.group, static_cast<int64_t>(end - i), pilot(p));
    plan.pairs[p].scale_square =
        std::accumulate(squares.begin() + i, squares.begin() + end, 0.0) / static_cast<double>(pilot(p).key_count());
    i = end;
  }
}

void scan(const Plan& plan, const Unit& unit) {
  const StoreView& store = *plan.stores[unit.sequence];
  const int64_t index = plan.pair_of(unit);
  Pair& pair = plan.pairs[index];
  {
    std::lock_guard lock(pair.mutex);
    if (pair.memory == nullptr) {
      pair.memory = scan_pool.take();
      pair.memory->weights.reset(store.indexed_to, store.sinks);
      const int64_t blocks = (store.indexed_to + kSketchKeys - 1) / kSketchKeys;
      if (poisoning()) std::fill_n(pair.memory->weights.weights(0), blocks * kSketchKeys, ~0u);
    }
  }
  Weights& weights = pair.memory->weights;
  const std::vector<const float*> lanes = scored_lanes(plan, index);
  const ScoredGroup group{store.sketch->layout(), plan.dim, store.stride_shift, plan.group, nullptr, lanes.data()};
  for (const SketchPiece& piece : pieces_of(plan, index, unit.begin, unit.end)) {
    weigh_piece(group, piece, pair.rule, weights.weights(piece.first), weights.sums(piece.first));
  }
}

namespace {

// How many of `body` keys are meant: below 1 a share of them.
int64_t count_of(double number, int64_t body) {
  const double wanted = number >= 1 ? number : number * static_cast<double>(body);
  return std::clamp<int64_t>(std::llrint(std::min(wanted, static_cast<double>(body))), 1, body);
}

// The queries of a pair and the head whose rows they look at.
struct DrawingGroup {
  const Plan& plan;
  const StoreView& store;
  int head;
  int64_t first_query;
  const float* queries[kMaxGroup];

  DrawingGroup(const Plan& plan, int64_t pair)
      : plan(plan),
        store(plan.store_of(pair)),
        head(static_cast<int>(pair % plan.heads)),
        first_query(plan.first_query(pair)) {
    for (int r = 0; r < plan.group; ++r) queries[r] = plan.lanes + (first_query + r) * plan.dim;
  }

  // How far scores are from logits: see score_noise in the reference.
  double noise(double scale_square) const {
    double squares = 0;
    for (int r = 0; r < plan.group; ++r) {
      const double norm = plan.norms[first_query + r];
      squares += norm * norm;
    }
    return plan.step.rule.scale * std::sqrt(squares / plan.group * scale_square * store.sketch->noise);
  }

  uint64_t start(int phase, int64_t rows, uint64_t step) const {
    return start_for(
        {store.policy.seed, static_cast<uint64_t>(store.layer), static_cast<uint64_t>(store.first_head + head),
         static_cast<uint64_t>(store.length), draw_number(phase, rows)},
        step);
  }

  // Logits of the keys that were drawn.
  void score(ScanMemory& memory) const {
    const auto count = static_cast<int64_t>(memory.ids.size());
    memory.per_head = (count + kSketchKeys - 1) / kSketchKeys * kSketchKeys;
    float* logits = scratch(memory.logits, static_cast<size_t>(memory.per_head * plan.group));
    plan.run.score_rows(store.dtype, plan.dim, store.rows_of(head), memory.ids.data(), count, plan.group, queries,
                        {plan.row_offsets_of(first_query), static_cast<int64_t>(store.blocks.size())}, plan.step.rule,
                        logits, memory.per_head);
  }

  void attend(const ScanMemory& memory, State* states) const {
    plan.run.attend_scored(store.dtype, plan.dim, store.rows_of(head), memory.ids.data(),
                           static_cast<int64_t>(memory.ids.size()), plan.group, memory.logits.data(), memory.per_head,
                           memory.log_u.data(), states);
  }
};

// Draws `rows` of the candidates that are in `memory`: see draw in kernels/sketch/reference.py. looking: for its outlook.
void draw_again(const DrawingGroup& group, int64_t rows, ScanMemory& memory, bool looking) {
  const auto count = static_cast<int64_t>(memory.ids.size());
  memory.exact.reset(count, 0);
  float* shares = scratch(memory.shares, static_cast<size_t>(memory.per_head));
  if (poisoning()) std::fill_n(memory.exact.weights(0), memory.per_head, ~0u);
  group.plan.run.weigh_logits(count, group.plan.group, memory.logits.data(), memory.per_head, memory.log_u.data(),
                              shares, memory.exact.weights(0), memory.exact.sums(0));
  memory.exact.settle_step(rows);
  if (looking) {
    memory.outlook.look(count, group.plan.group, memory.logits.data(), memory.per_head, memory.log_u.data(),
                        memory.exact.weights(0), memory.exact.step());
  }
  memory.exact.pick(group.start(2, rows, memory.exact.step()), &memory.again, &memory.log_u_again);
  for (size_t i = 0; i < memory.again.size(); ++i) {  // never before where it is read from
    const uint32_t from = memory.again[i];
    memory.ids[i] = memory.ids[from];
    memory.log_u[i] = memory.log_u[from] + memory.log_u_again[i];
    for (int r = 0; r < group.plan.group; ++r) {
      float* logits = memory.logits.data() + r * memory.per_head;
      logits[i] = logits[from];
    }
  }
  memory.ids.resize(memory.again.size());
  memory.log_u.resize(memory.again.size());
}

}  // namespace

void draw(const Plan& plan, int64_t index) {
  Pair& pair = plan.pairs[index];
  const DrawingGroup group(plan, index);
  const StoreView& store = group.store;
  const DrawPolicy& policy = store.policy;
  const int64_t body = store.body();
  ScanMemory& memory = *pair.memory;
  const int64_t budget = count_of(policy.budget, body);
  const double noise = group.noise(pair.scale_square);
  const auto candidates_of = [&](int64_t rows) {
    if (policy.candidates <= 0) return candidates_by_noise(rows, noise);
    return (rows * count_of(policy.candidates, body) + budget - 1) / budget;
  };
  const int first_state = plan.units[pair.first_scan].first_state;
  State* states = plan.states + first_state;
  const double most = policy.limit * static_cast<double>(body);
  const int64_t first_rows = policy.epsilon > 0 ? std::min(budget, kFirstRows) : budget;
  for (int64_t rows = first_rows;;) {
    for (int r = 0; r < plan.group; ++r) {
      const int64_t s = first_state + r;
      states[r] = empty_state(plan.dim, plan.values + s * plan.dim, plan.spreads + s * plan.dim);
    }
    if (rows > first_rows && static_cast<double>(rows) > most) {
      memory.ids.resize(body);
      for (int64_t i = 0; i < body; ++i) memory.ids[i] = static_cast<uint32_t>(store.sinks + i);
      memory.log_u.assign(body, 0.0f);
      attend_positions(plan, index, store.sinks, store.indexed_to, states);
      break;
    }
    const bool first_draw = rows == first_rows, looking = policy.epsilon > 0;
    const int64_t least = looking && first_draw ? kFirstCandidates * rows : rows;
    const int64_t candidates = std::max(candidates_of(rows), least);
    memory.weights.settle_step(candidates);
    memory.weights.pick(group.start(1, candidates, memory.weights.step()), &memory.ids, &memory.log_u);
    group.score(memory);
    memory.outlook.rows = rows;
    memory.outlook.heads = plan.group;
    memory.outlook.step = 0;
    if (candidates > rows) draw_again(group, rows, memory, looking);
    group.attend(memory, states);
    if (!looking) break;
    float errors[kMaxGroup];
    const float worst = predict_errors(plan, index, errors);
    if (is_enough(worst, policy.epsilon, first_draw)) break;
    pair.tried += static_cast<int64_t>(memory.ids.size());
    rows = memory.outlook.more_rows(errors, policy.epsilon);
  }
  for (int r = 0; r < plan.group; ++r) {
    const int64_t q = group.first_query + r;
    plan.counts[q] = static_cast<int64_t>(memory.ids.size());
    if (plan.step.capture != nullptr) (*plan.step.capture)[q] = {memory.ids, memory.log_u};
  }
  scan_pool.give(std::move(pair.memory));
}

}  // namespace magicpig
