// The verbs as plain C++ on raw pointers: no Python, no torch, no allocation. One `Kernels` table per instruction set.
//
// Axes: B sequences, H query heads, G key/value heads, R = H / G, N tokens, D head dim, K bits, L tables.
// Rows: one token of one key/value head is [key | value], each padded with zeros to `dim` elements, a multiple of kLane.
// Rows of whole numbers end with two floats, the scales of the key and of the value.
// Lane order: kernels hold a query or an accumulator of `dim` floats in the order in which they unpack a row of that
// dtype; `to_lane_order` and `from_lane_order` convert. Nothing else may look inside.
#pragma once

#include <cstddef>
#include <cstdint>

namespace magicpig {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };  // i8: of rows only

constexpr size_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : dtype == Dtype::i8 ? 1 : 2; }

// Of a row whose key and value are `dim` elements wide.
constexpr size_t row_size(Dtype dtype, int dim) {
  return 2 * static_cast<size_t>(dim) * element_size(dtype) + (dtype == Dtype::i8 ? 2 * sizeof(float) : 0);
}

constexpr int kLane = 32;            // row padding, in elements: one unpacked pair of AVX-512 registers
constexpr int kMaxDim = 512;         // largest padded head dimension
constexpr int kBlockRows = 4096;     // rows of one block of the store
constexpr int kBlockShift = 12;      // log2(kBlockRows)
constexpr int kSegmentRows = 65536;  // keys of one index segment: ids have 16 bits
constexpr int kSegmentShift = 16;    // log2(kSegmentRows)
constexpr int kTileDirections = 64;  // hash directions of one packed tile: one 64-bit word of signs
constexpr int kLawSize = 4096;       // intervals of the table of log inclusion probabilities
constexpr int kMaxTables = 1024;
constexpr int kSketchKeys = 64;  // keys of one block of a sketch
constexpr int kSumKeys = 16;     // keys whose weights are summed, so that a walk along them can skip these
constexpr int kLookupSlack = 4;  // ids that `lookup` may write past those it returns
constexpr int kNearGroups = 16;  // of such keys, that a walk looks at together
constexpr int kPickSlack = 16;   // ids and log u that `pick` may write past those it returns
constexpr int kLeastStride = 8;  // keys of a sketch that have a centre in common, at least; a power of two
constexpr int kMaxLinear = 16;   // vectors that are multiplied by a matrix of weights at a time
constexpr int kByteLane = 64;    // a row of weights in bytes takes a multiple of this many
constexpr int kByteBlock = 256;  // numbers of a vector that have a scale in common where bytes are multiplied

// The hash directions, packed: [tile][pair of dims][64 directions][2] bfloat16.
struct Directions {
  const uint16_t* packed;
  int dim;    // D
  int tiles;  // ceil(K * L / 64)
};

// One head's part of an index segment: keys `first` .. `first + count`, sorted into buckets table by table.
struct Segment {
  const uint32_t* offsets;  // [L][2^K + 1]
  const uint16_t* ids;      // [L][count], relative to `first`, ascending inside a bucket
  int64_t first;
  int32_t count;
};

// Logits are softcap(scale * q.k + offset) - log u.
struct LogitRule {
  float scale;
  float softcap;  // 0: none
};

// An unnormalised attention state of one head: sum of x = exp(logit - max), and of x * value in lane order.
// For rows that were drawn, what the error of the output can be estimated from: with c = (1 - u) x^2, the sums of c, of
// c |value|^2 and of c * value (kernels/attend/reference.py: predicted_error).
struct State {
  float max;
  double sum;
  float* values;  // [dim]
  float* spread;  // [dim] or null: nobody asks
  double spread_sum;
  double spread_square;
};

// Rows of a sample as a hash sees them: minus a vector, row id minus number id >> shift of `vectors` [..][dim], in lane
// order, or as they are if there are none. offsets[id >> shift] joins the logit of a row: what that vector adds to it.
struct RowCentres {
  const float* vectors;
  const float* offsets;
  int shift;
};

// What joins the logits of rows of a sample that are kept minus a vector: of head h and row id, values[h * per_head +
// (id >> kBlockShift)], or nothing if there are no values.
struct BlockOffsets {
  const float* values;
  int64_t per_head;
};

// log u as a function of the cosine: kLawSize + 1 values on x = sign(c) * (1 - sqrt(1 - |c|)) in [-1, 1].
struct InclusionLaw {
  const float* log_u;
  float query_norm;
};

// A random orthogonal matrix, one row of `dim` floats per coordinate of a vector: [head_dim][dim], zero padded.
struct Rotation {
  const float* rows;
  int head_dim;  // D
  int dim;       // D padded
};

// The sketch of one kv head's keys is [block of kSketchKeys keys][word][key] of 32-bit words, and a scale per key, a half.
// A word has the codes of 32 / bits coordinates: that of coordinate 4 k + j at bit 8 j + bits * k. Codes of three bits
// are two such planes, of the lower two bits and of the highest one.
struct SketchLayout {
  int bits;
  int head_dim;
  int words;  // of a key
};

// What the centres of keys add to their scores, before a softcap to their logits: of head h and the i-th key,
// values[h * per_head + (i >> shift)], with 2^shift keys to a centre.
struct ScoreOffsets {
  const float* values;
  int64_t per_head;
  int shift;
};

// One block of a sketch, of whose keys those from `begin` to `end` count. offsets: of its first key and the first head.
struct SketchBlock {
  const uint32_t* words;
  const uint16_t* scales;
  const float* offsets;
  int begin, end;
};

// A query head as it meets a sketch: score = unit * scale of the key * dot of `query` and the key's odd levels + offset,
// which is the logit they stand for in units of 2^-23 octaves.
struct ScoreRule {
  const int8_t* query;     // head_dim numbers, zero padded to kLane
  float correction;        // turns twice a dot with codes into one with levels: (2^bits - 1) * sum of the numbers
  float unit;              // of a score; before a softcap, of a logit
  float offset_unit;       // turns a dot of the query and a centre into an offset
  float softcap, octaves;  // with a softcap: the cap; the score of a logit of 1
};

// The sum of 2^(score - base) of one head, the base in octaves.
struct ScoreSum {
  double base, sum;
};

// A walk along groups of kSumKeys keys (kernels/sketch/reference.py: walk_order): a power of two of them in this order,
// those from `groups` on without keys. In group g it comes to the second half of a node's keys first where that node's bit
// of swaps[g] is set; of the n nodes of a level, node i has bit n - 1 + i.
struct Walk {
  const uint32_t* order;
  const uint16_t* swaps;
  int64_t count, groups;
};

// Weights [rows][columns], `stride` elements from one row to the next. In bytes, row r counts scales[r] times, and its
// stride is a multiple of kByteLane.
struct Matrix {
  Dtype dtype;
  const void* numbers;
  const float* scales;  // null: not in bytes
  int64_t rows, columns, stride;
};

struct Kernels {
  const char* name;

  // Signs of n vectors (each `stride` floats apart, zero padded to an even dim), rounded to bfloat16, against every
  // direction: bits[i * tiles + t], bit j set when x_i . direction_(64 t + j) > 0.
  void (*hash)(const float* x, int64_t stride, int64_t n, const Directions& directions, int first_tile, int last_tile,
               uint64_t* bits);

  // Writes the positions, ascending, of the keys in `segment` that collide with the query in min_hits tables or more;
  // returns how many. `ids` has room for kLookupSlack more. `counts` has a byte for each key, rounded up to 64, all zero
  // before and after.
  int64_t (*lookup)(const uint16_t* query_codes, int bits, int tables, const Segment& segment, int min_hits,
                    uint8_t* counts, uint32_t* ids);

  void (*to_float)(Dtype dtype, const void* from, int64_t n, float* to);
  void (*from_float)(Dtype dtype, const float* from, int64_t n, void* to);
  // The whole numbers in -127 .. 127 that times one scale, which is returned, come nearest to `dim` floats.
  float (*to_bytes)(const float* from, int dim, int8_t* to);
  void (*to_lane_order)(Dtype dtype, const float* from, int dim, float* to);
  void (*from_lane_order)(Dtype dtype, const float* from, int dim, float* to);

  // Exact attention of `heads` queries over `count` consecutive rows, added to `states`.
  void (*attend_rows)(Dtype dtype, int dim, const char* rows, int64_t count, int heads, const float* const* queries,
                      const float* offsets, LogitRule rule, State* states);
  // Attention of one query over sampled rows. Row id is at blocks[id >> kBlockShift] + (id & mask) rows.
  // log u comes from `law`; it is also written to `log_u_out` unless null.
  void (*attend_sample)(Dtype dtype, int dim, const char* const* blocks, const uint32_t* ids, int64_t count,
                        const float* query, const RowCentres& centres, LogitRule rule, const InclusionLaw& law,
                        float* log_u_out, State* state);
  // Logits [h * per_head + i] of `heads` queries and the same sampled keys; no value is looked at. per_head is a multiple
  // of kSketchKeys.
  void (*score_rows)(Dtype dtype, int dim, const char* const* blocks, const uint32_t* ids, int64_t count, int heads,
                     const float* const* queries, const BlockOffsets& offsets, LogitRule rule, float* logits,
                     int64_t per_head);
  // Attention of these heads over sampled rows whose logits and log u are known; no key is looked at.
  void (*attend_scored)(Dtype dtype, int dim, const char* const* blocks, const uint32_t* ids, int64_t count, int heads,
                        const float* logits, int64_t per_head, const float* log_u, State* states);
  // Products dots[h * per_head + i] of `heads` queries, in lane order of `dtype`, a float one, with `count` vectors [dim].
  void (*dot_vectors)(Dtype dtype, int dim, const void* const* vectors, int64_t count, int heads,
                      const float* const* queries, float* dots, int64_t per_head);
  void (*merge)(int dim, const State& from, State* into);

  // n vectors (each `stride` floats apart) times the rotation: y [n][dim].
  void (*rotate)(const float* x, int64_t stride, int64_t n, const Rotation& rotation, float* y);
  // Codes of one rotated key, into lane `lane` of a block, and its scale. distance: between levels, relative to the
  // length of the key.
  void (*pack)(const float* rotated, const Rotation& rotation, int bits, float distance, int lane, uint32_t* block,
               uint16_t* scale);
  // Sums of the powers of the scores of `count` blocks, one a head. Of `offsets` it takes all but the values.
  void (*sum_powers)(const SketchLayout& layout, const SketchBlock* blocks, int count, int heads,
                     const ScoreRule* rules, const ScoreOffsets& offsets, ScoreSum* sums);
  // Weights [block][kSketchKeys] of such keys: sum over heads of the powers of scores less `log_normalisers`, none above
  // 2^octaves, + floor; zero past `count`. Also the sum of every kSumKeys weights.
  void (*weigh)(const SketchLayout& layout, const uint32_t* words, const uint16_t* scales, int64_t count, int heads,
                const ScoreRule* rules, const ScoreOffsets& offsets, const float* log_normalisers, int octaves,
                int32_t floor, uint32_t* weights, uint32_t* sums);
  // The same of keys drawn with log u, by their logits: the mean of the heads' softmax over 1 / u, 2^30 in all. `shares`
  // has room for as many floats.
  void (*weigh_logits)(int64_t count, int heads, const float* logits, int64_t per_head, const float* log_u,
                       float* shares, uint32_t* weights, uint32_t* sums);
  // Systematic sampling (kernels/sketch/reference.py: pick): writes the keys in which a step ends, ascending, of a walk
  // that begins `start` into a step, and log u; returns how many. Weights above a step count as one. sums: of the weights
  // of each group that do, in whole kNearGroups groups. `taken` has a bit for each key; `ids` and `log_u` have room for
  // kPickSlack more.
  int64_t (*pick)(const uint32_t* weights, const uint32_t* sums, const Walk& walk, uint64_t step, uint64_t start,
                  uint64_t* taken, uint32_t* ids, float* log_u);
  // Writes the keys, of `groups` groups, that weigh `bound` or more; returns how many. `keys` has room for all.
  int64_t (*heavy_keys)(const uint32_t* weights, const uint32_t* sums, int64_t groups, uint32_t bound, uint32_t* keys);

  // A vector as `multiply` takes it for matrices of that dtype, and what that takes: a multiple of four bytes.
  size_t (*factor_bytes)(Dtype dtype, int64_t columns);
  void (*to_factors)(Dtype dtype, const float* x, int64_t columns, void* factors);
  // Products [vector][last - first] of the rows `first` to `last` with at most kMaxLinear vectors.
  void (*multiply)(const Matrix& matrix, int64_t first, int64_t last, const void* factors, int vectors,
                   float* products);
};

// The levels this build holds, best first, and whether this machine can run each.
struct Level {
  const Kernels* kernels;
  bool (*supported)();
};
int levels(const Level** out);

// The table in use: the best supported one, or what MAGICPIG_ISA or `use_level` names. Throws EnvironmentError, or
// std::invalid_argument.
const Kernels& kernels();
void use_level(const char* name);

// Whether the processor is one of AMD's: some libraries choose slower code there.
bool is_amd();

}  // namespace magicpig
