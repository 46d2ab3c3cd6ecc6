#include "plan.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "parallel.h"

namespace magicpig {
namespace {

std::atomic<bool> poison{false};

// Sequences that have rows in common, as copies of one prompt or the tokens of a draft, read them one after the other,
// while they are in a cache. Only where all is exact: sketches stay pair by pair.
void share_rows(Plan& plan) {
  const auto exact = [&](const Unit& unit) { return unit.work == Work::exact && !plan.sampling(unit.sequence); };
  if (plan.sequences == 1 || !std::all_of(plan.units.begin(), plan.units.end(), exact)) return;
  std::stable_sort(plan.order.begin(), plan.order.end(), [&](int a, int b) {
    return std::less<>{}(plan.first_row(plan.units[a]), plan.first_row(plan.units[b]));
  });
}

}  // namespace

bool poisoning() { return poison.load(std::memory_order_relaxed); }

void poison_scratch(bool on) { poison = on; }

const float* Plan::row_offsets_of(int64_t q) const {
  const int64_t b = q / step.query_heads;
  if (stores[b]->row_centres.empty()) return nullptr;
  return row_offsets + row_offsets_at[b] + q % step.query_heads * static_cast<int64_t>(stores[b]->blocks.size());
}

const char* Plan::first_row(const Unit& unit) const {
  const StoreView& store = *stores[unit.sequence];
  if (unit.work != Work::exact || sampling(unit.sequence)) return nullptr;
  return unit.begin < store.tail_from ? store.row(unit.begin, unit.head) : store.tail_row(unit.begin, unit.head);
}

void lay_out(Plan& plan) {
  plan.signs_at.assign(1, 0);
  plan.row_offsets_at.assign(1, 0);
  const int64_t H = plan.step.query_heads;
  for (int b = 0; b < plan.sequences; ++b) {
    const StoreView& store = *plan.stores[b];
    plan.signs_at.push_back(plan.signs_at[b] + (plan.hashing(b) ? H * store.lsh->tiles() : 0));
    const int64_t blocks = store.row_centres.empty() ? 0 : static_cast<int64_t>(store.blocks.size());
    plan.row_offsets_at.push_back(plan.row_offsets_at[b] + H * blocks);
  }
}

// Exact rows and sketches are cut into pieces of one size, whatever the threads and the batch, so that neither changes a
// bit of the result; a hashed sample is a piece of its own.
void make_units(Plan& plan) {
  constexpr int64_t kRows = 2048, kKeys = 8192;
  int states = 0;
  plan.pair_count = static_cast<int64_t>(plan.sequences) * plan.heads;
  plan.pairs = std::make_unique<Pair[]>(plan.pair_count);
  for (int64_t p = 0; p < plan.pair_count; ++p) {
    Unit unit;
    unit.sequence = static_cast<int>(p / plan.heads);
    unit.head = static_cast<int>(p % plan.heads);
    const StoreView& store = *plan.stores[unit.sequence];
    const int64_t body = plan.sampling(unit.sequence) ? store.body() : 0;
    const bool exact = plan.faults[unit.sequence] == Fault::none && plan.step.half == nullptr;
    const int64_t rows = exact ? store.length - body : 0;
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
    for (unit.query = 0; plan.hashing(unit.sequence) && unit.query < plan.group; ++unit.query) add(1);
    plan.pairs[p].first_scan = static_cast<int>(plan.units.size());
    unit.work = Work::scan;
    for (int64_t begin = 0; plan.sketching(unit.sequence) && begin < store.indexed_to; begin += kKeys) {
      unit.begin = begin;
      unit.end = std::min(store.indexed_to, begin + kKeys);
      add(begin == 0 ? plan.group : 0);
    }
    plan.pairs[p].left = static_cast<int>(plan.units.size()) - first;
  }
  plan.order.resize(plan.units.size());
  std::iota(plan.order.begin(), plan.order.end(), 0);
  // Looked-up samples, whose size nobody knows, before the rest. That stays pair by pair, so that the weights of few
  // sketches are in memory at a time.
  std::stable_partition(plan.order.begin(), plan.order.end(),
                        [&](int u) { return plan.units[u].work == Work::lookup; });
  share_rows(plan);
}

// A pair with a sketch is best left to one thread, in whose caches its weights then are, as long as there are pairs for
// all threads: the last are shared. So are the units that read the same rows.
void make_tasks(Plan& plan) {
  const int count = static_cast<int>(plan.units.size());
  for (int i = 0; i < count;) {
    plan.tasks.push_back(i);
    const Unit& unit = plan.units[plan.order[i]];
    const int64_t pair = plan.pair_of(unit);
    int units = plan.end_unit(pair) - plan.pairs[pair].first_unit;
    if (!plan.scans(pair)) {
      units = 1;
      while (i + units < count && plan.first_row(unit) != nullptr &&
             plan.first_row(unit) == plan.first_row(plan.units[plan.order[i + units]])) {
        ++units;
      }
    }
    i += units * threads() <= count - i ? units : 1;
  }
  plan.tasks.push_back(count);
}

}  // namespace magicpig
