// How a step is cut into units of work, and the memory that these share.
#pragma once

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "outlook.h"
#include "step.h"

namespace magicpig {

// Whether scratch memory is to be poisoned.
bool poisoning();

// Grow-only scratch memory of the calling thread, never returned zeroed.
template <class T>
T* scratch(std::vector<T>& memory, size_t count) {
  if (memory.size() < count) memory.resize(count);
  if (count > 0 && poisoning()) std::memset(static_cast<void*>(memory.data()), 0xff, count * sizeof(T));
  return memory.data();
}

// What one kv head's sketch says in the course of a step. Reused from step to step; as many exist as ever were in use at
// a time.
struct ScanMemory {
  Weights weights;
  std::vector<uint32_t> ids;  // of what was drawn, as the next two lines: in phase 1, and when it is over in phase 2
  std::vector<float> log_u;
  std::vector<float> logits;  // [query head of the group][per_head]
  int64_t per_head;
  Weights exact;  // of the candidates
  std::vector<float> shares;
  std::vector<uint32_t> again;  // numbers of candidates, drawn again with log u
  std::vector<float> log_u_again;
  Outlook outlook;  // with an epsilon
};

enum class Work { exact, lookup, scan };

// A share of the work of one (sequence, kv head): exact rows for all its query heads, the hashed sample of one of them,
// or the weights of a stretch of its sketch. Whoever finishes the last unit of a pair draws by the weights and merges.
struct Unit {
  Work work = Work::exact;
  int sequence = 0, head = 0;  // b, g
  int query = 0;               // lookup: within the group
  int64_t begin = 0, end = 0;  // exact: rows, the body left out. scan: keys, a multiple of a full block of the store
  int first_state = 0;         // one state per query head it serves; of the scans of a pair only the first has any
  int states = 0;
};

// One (sequence, kv head).
struct Pair {
  int first_unit, first_scan;          // scans are its last units
  std::atomic<int> left;               // units not finished
  std::mutex mutex;                    // of the next line
  std::unique_ptr<ScanMemory> memory;  // from its first scan to its draw
  WeightRule rule;                     // of its sketch
  double scale_square;                 // of its keys in the sketch, the mean over a pilot
  int64_t tried = 0;                   // rows of draws that were not good enough
};

// Everything the tasks of one step share.
struct Plan {
  const std::vector<StoreView*>& stores;
  const Step& step;
  const std::vector<Fault>& faults;
  const Kernels& run = kernels();
  int sequences = static_cast<int>(stores.size());
  int heads = stores[0]->heads, group = step.query_heads / heads, dim = stores[0]->dim, head_dim = stores[0]->head_dim;
  int queries = sequences * step.query_heads;

  float* natural;      // (B H, dim) queries as floats
  float* lanes;        // the same in lane order of the rows
  float* tail_lanes;   // the same in that of the tail's rows, where there is one
  float* scored;       // the same in that of bfloat16, for the centres of a sketch
  float* rotated;      // the same, rotated, for a sketch
  float* norms;        // (B H) |q|
  float* predicted;    // (B H) predicted errors
  uint64_t* signs;     // of each sequence that hashes (H, tiles)
  float* row_offsets;  // of each sequence whose rows have centres (H, blocks): scale * q . centre
  float* values;       // (states, dim)
  float* spreads;      // (states, dim)
  State* states;
  int64_t* counts;                                // (B H) sampled rows
  SketchQuery* sketched;                          // (B H)
  std::vector<int64_t> signs_at, row_offsets_at;  // of each sequence, and the end
  std::vector<Unit> units;
  std::vector<int> order;  // in which the units are begun
  std::vector<int> tasks;  // first in `order` of each stretch that one thread does by itself, and the end
  std::unique_ptr<Pair[]> pairs;
  int64_t pair_count;

  bool sampling(int b) const { return faults[b] == Fault::none && stores[b]->sampling(); }
  bool hashing(int b) const { return sampling(b) && stores[b]->lsh != nullptr; }
  bool sketching(int b) const { return sampling(b) && stores[b]->sketch != nullptr; }
  // One past the last unit of a pair.
  int end_unit(int64_t pair) const {
    return pair + 1 < pair_count ? pairs[pair + 1].first_unit : static_cast<int>(units.size());
  }
  int64_t pair_of(const Unit& unit) const { return static_cast<int64_t>(unit.sequence) * heads + unit.head; }
  StoreView& store_of(int64_t pair) const { return *stores[pair / heads]; }
  bool scans(int64_t pair) const { return pairs[pair].first_scan < end_unit(pair); }
  int64_t first_query(int64_t pair) const { return pair / heads * step.query_heads + pair % heads * group; }
  Prepared prepared(int64_t b) const { return step.prepared == nullptr ? Prepared{} : step.prepared[b]; }
  // What a centre [dim] adds to the logits of a query.
  float offset(const float* natural, const float* centre) const;
  // Where the rows of a unit begin, of exact ones of sequences that attend to all rows; else null.
  const char* first_row(const Unit& unit) const;
  // Of query q, what joins its logits of the rows of each block, or null: nothing.
  const float* row_offsets_of(int64_t q) const;
};

void make_units(Plan& plan);
void make_tasks(Plan& plan);
// Where things are that sequences have different numbers of.
void lay_out(Plan& plan);

// Exact attention of a group over the rows of positions [begin, end), added to `states`.
void attend_positions(const Plan& plan, int64_t pair, int64_t begin, int64_t end, State* states);
// The units' work: see Work.
void attend_exact(const Plan& plan, const Unit& unit);
// How many units in `order`, from number `begin` on and before `end`, are exact and begin with the same rows in blocks, and
// end with the same: the tokens of a draft, or copies of one prompt.
int together(const Plan& plan, int begin, int end);
// `attend_exact` of such units: each batch of rows meets the queries of all of them, to the bit as it meets them one by one.
void attend_together(const Plan& plan, int begin, int count);
void attend_lookup(const Plan& plan, const Unit& unit);
void scan(const Plan& plan, const Unit& unit);
// Finds out, for each pair with a sketch, which scores weigh how much.
void make_rules(Plan& plan);
// Draws by the weights of a pair and attends to what was drawn; with an epsilon again to more, until that is enough.
void draw(const Plan& plan, int64_t pair);
// The predicted errors of the query heads of a pair; returns the largest, or infinity where one is not finite.
float predict_errors(const Plan& plan, int64_t pair, float* errors);
// Merges what the units of one pair found into its rows of the output; for a sequence with a fault that is NaN.
void finish(const Plan& plan, int64_t pair);

}  // namespace magicpig
