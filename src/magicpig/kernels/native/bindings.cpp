// The only file that knows Python. Tensors arrive as addresses: kernels/cpu.py has checked them.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <new>
#include <numeric>
#include <stdexcept>
#include <tuple>

#include "errors.h"
#include "flash.h"
#include "kernels.h"
#include "linear.h"
#include "memory.h"
#include "parallel.h"
#include "rows.h"
#include "step.h"
#include "tables.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace magicpig;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Dtype dtype_of(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("dtype code must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<Dtype>(code);
}

// Of rows, which may also be whole numbers: 3.
Dtype row_dtype_of(int code) { return code == 3 ? Dtype::i8 : dtype_of(code); }

using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>;
using Samples = nb::typed<nb::list, nb::typed<nb::tuple, Bytes, Bytes>>;
using Stepped = nb::typed<nb::tuple, nb::typed<nb::list, int>, Samples>;
Bytes allocate_array(size_t bytes) {
  struct Owner {
    void* memory;
    size_t bytes;
    ~Owner() { release(memory, bytes); }
  };
  auto* owner = new Owner{allocate(bytes), bytes};
  nb::capsule capsule(owner, [](void* p) noexcept { delete static_cast<Owner*>(p); });
  return {static_cast<uint8_t*>(owner->memory), {bytes}, capsule};
}

const char* pool_name() {
  switch (pool()) {
    case Pool::torch:
      return "torch";
    case Pool::std:
      return "std";
    case Pool::serial:
      break;
  }
  return "serial";
}

void use_pool_named(const std::string& name) {
  if (name == "torch") return use_pool(Pool::torch);
  if (name == "std") return use_pool(Pool::std);
  if (name == "serial") return use_pool(Pool::serial);
  throw std::invalid_argument("pool '" + name + "' is not one of torch, std, serial");
}

std::vector<std::string> level_names(bool supported_only) {
  const Level* all = nullptr;
  std::vector<std::string> names;
  for (int i = 0, n = levels(&all); i < n; ++i) {
    if (!supported_only || all[i].supported()) names.emplace_back(all[i].kernels->name);
  }
  return names;
}

// The softmax that a state stands for: output [dim] in natural order, and its lse.
void write_state(Dtype dtype, int dim, const State& state, float* output, float* lse) {
  kernels().from_lane_order(dtype, state.values, dim, output);
  for (int d = 0; d < dim; ++d) output[d] = state.sum > 0 ? static_cast<float>(output[d] / state.sum) : 0.0f;
  *lse = static_cast<float>(state.max + std::log(state.sum));
}

// One head's verbs, for tests and study; a decode step runs them fused.
int64_t lookup(Address query_codes, int K, int L, Address offsets, Address ids, int64_t first, int64_t count,
               int min_hits, Address found) {
  std::vector<uint8_t> counts((count + 63) / 64 * 64, 0);
  const Segment segment{at<const uint32_t>(offsets), at<const uint16_t>(ids), first, static_cast<int32_t>(count)};
  std::vector<uint32_t> positions(count + kLookupSlack);
  const int64_t n =
      kernels().lookup(at<const uint16_t>(query_codes), K, L, segment, min_hits, counts.data(), positions.data());
  std::copy_n(positions.begin(), n, at<uint32_t>(found));
  return n;
}

// offsets: one of each block, or null.
void attend(int dtype, int dim, const std::vector<Address>& blocks, Address ids, int64_t count, Address log_u,
            Address query, Address offsets, float scale, float softcap, Address output, Address lse) {
  std::vector<float> lanes(dim), values(dim);
  const Dtype type = row_dtype_of(dtype);
  State state = empty_state(dim, values.data());
  kernels().to_lane_order(type, at<const float>(query), dim, lanes.data());
  const float* queries[] = {lanes.data()};
  const auto* const* rows = reinterpret_cast<const char* const*>(blocks.data());
  const int64_t per_head = (count + kSketchKeys - 1) / kSketchKeys * kSketchKeys;
  std::vector<float> logits(per_head);
  kernels().score_rows(type, dim, rows, at<const uint32_t>(ids), count, 1, queries,
                       {at<const float>(offsets), static_cast<int64_t>(blocks.size())}, {scale, softcap}, logits.data(),
                       per_head);
  kernels().attend_scored(type, dim, rows, at<const uint32_t>(ids), count, 1, logits.data(), per_head,
                          at<const float>(log_u), &state);
  write_state(type, dim, state, at<float>(output), at<float>(lse));
}

// The same where log u follows from the law, by the rows less centre id >> shift of (centres, dim); it is written to log_u.
void attend_hashed(int dtype, int dim, const std::vector<Address>& blocks, Address ids, int64_t count, Address query,
                   Address centres, int64_t centre_count, int shift, Address offsets, const HitLaw& law, float scale,
                   float softcap, Address log_u, Address output, Address lse) {
  std::vector<float> lanes(dim), values(dim), vectors(centre_count * dim);
  const Dtype type = row_dtype_of(dtype);
  State state = empty_state(dim, values.data());
  kernels().to_lane_order(type, at<const float>(query), dim, lanes.data());
  for (int64_t i = 0; i < centre_count; ++i) {
    kernels().to_lane_order(type, at<const float>(centres) + i * dim, dim, vectors.data() + i * dim);
  }
  double norm = 0;
  for (int d = 0; d < dim; ++d) norm += std::pow(static_cast<double>(at<const float>(query)[d]), 2);
  const RowCentres from{centre_count == 0 ? nullptr : vectors.data(), at<const float>(offsets), shift};
  kernels().attend_sample(type, dim, reinterpret_cast<const char* const*>(blocks.data()), at<const uint32_t>(ids),
                          count, lanes.data(), from, {scale, softcap},
                          {law.log_u.data(), static_cast<float>(std::sqrt(norm))}, at<float>(log_u), &state);
  write_state(type, dim, state, at<float>(output), at<float>(lse));
}

void attend_rows(int dtype, int dim, Address rows, int64_t count, int heads, Address queries, Address offsets,
                 float scale, float softcap, Address output, Address lse) {
  const Dtype type = row_dtype_of(dtype);
  std::vector<float> lanes(static_cast<size_t>(heads) * dim), values(static_cast<size_t>(heads) * dim);
  std::vector<const float*> each(heads);
  std::vector<State> states(heads);
  for (int h = 0; h < heads; ++h) {
    kernels().to_lane_order(type, at<const float>(queries) + static_cast<int64_t>(h) * dim, dim,
                            lanes.data() + static_cast<int64_t>(h) * dim);
    each[h] = lanes.data() + static_cast<int64_t>(h) * dim;
    states[h] = empty_state(dim, values.data() + static_cast<int64_t>(h) * dim);
  }
  kernels().attend_rows(type, dim, at<const char>(rows), count, heads, each.data(), at<const float>(offsets),
                        {scale, softcap}, states.data());
  for (int h = 0; h < heads; ++h) {
    write_state(type, dim, states[h], at<float>(output) + static_cast<int64_t>(h) * dim, at<float>(lse) + h);
  }
}

// Merges (parts, heads, dim) outputs and (parts, heads) lse.
void merge_states(int parts, int heads, int dim, Address outputs, Address lses, Address output, Address lse) {
  std::vector<float> values(dim), piece(dim);
  for (int h = 0; h < heads; ++h) {
    State total = empty_state(dim, values.data());
    for (int p = 0; p < parts; ++p) {
      const int64_t i = static_cast<int64_t>(p) * heads + h;
      std::copy_n(at<const float>(outputs) + i * dim, dim, piece.begin());
      kernels().merge(dim, {at<const float>(lses)[i], 1.0, piece.data(), nullptr, 0, 0}, &total);
    }
    // Lane order is natural order for float32.
    write_state(Dtype::f32, dim, total, at<float>(output) + static_cast<int64_t>(h) * dim, at<float>(lse) + h);
  }
}

// Weights of the keys of one kv head, (blocks, kSketchKeys) uint32, as the queries (heads, dim) of its group see them. The
// keys are in pieces, all but the last of whole blocks.
// Also the whole numbers of these queries, (heads, dim) int8, and what centres add to scores in octaves, (heads, strides)
// float; returns the score, in octaves, that weighs 1 for each of them.
std::vector<double> weigh_sketch(const SketchSampler& sampler, Address queries, int heads, float scale, float softcap,
                                 const std::vector<Address>& words, const std::vector<Address>& scales,
                                 const std::vector<Address>& centres, const std::vector<int64_t>& counts, int64_t sinks,
                                 int stride_shift, Address weights, Address whole, Address offsets) {
  std::vector<SketchQuery> prepared(heads);
  std::vector<ScoreRule> rules;
  const int dim = sampler.dim();
  std::vector<float> rotated(static_cast<size_t>(heads) * dim), lanes(static_cast<size_t>(heads) * dim);
  std::vector<const float*> each;
  kernels().rotate(at<const float>(queries), dim, heads, sampler.rotation(), rotated.data());
  for (int h = 0; h < heads; ++h) {
    const int64_t first = static_cast<int64_t>(h) * dim;
    prepare_query(sampler, rotated.data() + first, {scale, softcap}, &prepared[h]);
    rules.push_back(prepared[h].rule);
    std::copy_n(prepared[h].values, dim, at<int8_t>(whole) + first);
    kernels().to_lane_order(Dtype::bf16, at<const float>(queries) + first, dim, lanes.data() + first);
    each.push_back(lanes.data() + first);
  }
  std::vector<SketchPiece> pieces;
  std::vector<const void*> vectors;
  int64_t count = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    pieces.push_back({at<const uint32_t>(words[i]), at<const uint16_t>(scales[i]), at<const uint16_t>(centres[i]),
                      count, counts[i]});
    for (int64_t key = 0; key < counts[i]; key += int64_t{1} << stride_shift) {
      vectors.push_back(pieces[i].centres + (key >> stride_shift) * dim);
    }
    count += counts[i];
  }
  const ScoredGroup group{sampler.layout(), dim, stride_shift, heads, rules.data(), each.data()};
  const Pilot pilot(count, sinks);
  const int64_t parts = (pilot.blocks() + kPilotPart - 1) / kPilotPart;
  std::vector<ScoreSum> sums(parts * heads);
  for (int64_t i = 0; i < parts; ++i) {  // as a step does
    sum_pilot(group, pieces, pilot, i * kPilotPart, std::min(pilot.blocks(), (i + 1) * kPilotPart),
              sums.data() + i * heads);
  }
  const WeightRule rule = weight_rule(rules, sums.data(), parts, pilot);
  std::vector<uint32_t> unused((count + kSumKeys - 1) / kSumKeys + kSketchKeys);
  for (const SketchPiece& piece : pieces) {
    weigh_piece(group, piece, rule, at<uint32_t>(weights) + piece.first, unused.data());
  }
  std::fill_n(at<uint32_t>(weights), sinks, 0u);
  const auto strides = static_cast<int64_t>(vectors.size());
  score_offsets(group, vectors.data(), strides, at<float>(offsets), strides);
  std::vector<double> log_normalisers;
  for (const float each : rule.log_normalisers) log_normalisers.push_back(each / (1 << 23));
  return log_normalisers;
}

// Weights (count) uint32 of rows drawn with log u, as the queries (heads, dim) of a group see them. offsets: (heads,
// blocks), or null.
void weigh_rows(int dtype, int dim, const std::vector<Address>& blocks, Address ids, int64_t count, Address log_u,
                Address queries, int heads, Address offsets, float scale, float softcap, Address weights) {
  const Dtype type = row_dtype_of(dtype);
  std::vector<float> lanes(static_cast<size_t>(heads) * dim);
  std::vector<const float*> each;
  for (int64_t h = 0; h < heads; ++h) {
    kernels().to_lane_order(type, at<const float>(queries) + h * dim, dim, lanes.data() + h * dim);
    each.push_back(lanes.data() + h * dim);
  }
  const int64_t per_head = (count + kSketchKeys - 1) / kSketchKeys * kSketchKeys;
  std::vector<float> logits(heads * per_head), shares(per_head);
  std::vector<uint32_t> padded(per_head), sums(per_head / kSumKeys);
  kernels().score_rows(type, dim, reinterpret_cast<const char* const*>(blocks.data()), at<const uint32_t>(ids), count,
                       heads, each.data(), {at<const float>(offsets), static_cast<int64_t>(blocks.size())},
                       {scale, softcap}, logits.data(), per_head);
  kernels().weigh_logits(count, heads, logits.data(), per_head, at<const float>(log_u), shares.data(), padded.data(),
                         sums.data());
  std::copy_n(padded.begin(), count, at<uint32_t>(weights));
}

// The draw of `budget` of the `count` keys of one kv head by their weights, in phase 1 or 2: the step, the start, the indices of the keys
// that were drawn, and their log u.
std::tuple<uint64_t, uint64_t, std::vector<uint32_t>, std::vector<float>> draw_sketch(Address weights, int64_t count,
                                                                                      int64_t sinks, int64_t budget,
                                                                                      uint64_t seed, int layer,
                                                                                      int head, int64_t position,
                                                                                      int phase) {
  Weights own;
  const int64_t blocks = (count + kSketchKeys - 1) / kSketchKeys;
  own.reset(count, sinks);
  std::fill_n(own.weights(0), blocks * kSketchKeys, 0);
  std::copy_n(at<const uint32_t>(weights), count, own.weights(0));
  for (int64_t i = 0; i < blocks * (kSketchKeys / kSumKeys); ++i) {
    *(own.sums(0) + i) = std::accumulate(own.weights(0) + i * kSumKeys, own.weights(0) + (i + 1) * kSumKeys, 0u);
  }
  own.settle_step(budget);
  const uint64_t start = start_for({seed, static_cast<uint64_t>(layer), static_cast<uint64_t>(head),
                                    static_cast<uint64_t>(position), draw_number(phase, budget)},
                                   own.step());
  std::vector<uint32_t> indices;
  std::vector<float> log_u;
  own.pick(start, &indices, &log_u);
  return {own.step(), start, indices, log_u};
}

// Runs a step. Returns the faults of the sequences, or nothing if there are none; and their samples.
Stepped run_step(const std::vector<StoreView*>& stores, Step step, bool capture) {
  std::vector<HeadSample> samples;
  std::vector<Fault> faults;
  step.capture = capture ? &samples : nullptr;
  {
    nb::gil_scoped_release release;
    faults = decode(stores, step);
  }
  nb::list out;
  for (const HeadSample& sample : samples) {
    auto ids = allocate_array(sample.ids.size() * 4), log_u = allocate_array(sample.log_u.size() * 4);
    // Not memcpy: of an empty sample there is no address.
    std::copy(sample.ids.begin(), sample.ids.end(), reinterpret_cast<uint32_t*>(ids.data()));
    std::copy(sample.log_u.begin(), sample.log_u.end(), reinterpret_cast<float*>(log_u.data()));
    out.append(nb::make_tuple(ids, log_u));
  }
  nb::list found;
  if (std::any_of(faults.begin(), faults.end(), [](Fault fault) { return fault != Fault::none; })) {
    for (const Fault fault : faults) found.append(static_cast<int>(fault));
  }
  return nb::make_tuple(found, out);
}

Stepped decode_step(const std::vector<StoreView*>& stores, int dtype, int query_heads, Address query, Address key,
                    Address value, float scale, float softcap, Address sink_logits, Address output, Address lse,
                    Address predicted_error, bool capture) {
  return run_step(stores,
                  {.dtype = dtype_of(dtype),
                   .query_heads = query_heads,
                   .query = at<const void>(query),
                   .key = at<const void>(key),
                   .value = at<const void>(value),
                   .rule = {scale, softcap},
                   .sink_logits = at<const float>(sink_logits),
                   .output = at<void>(output),
                   .lse = at<float>(lse),
                   .predicted_error = at<float>(predicted_error)},
                  capture);
}

// The half of a step that attends to what is drawn. codes, rotated: what was prepared elsewhere for each sequence, or 0.
Stepped sampled_half(const std::vector<StoreView*>& stores, int dtype, int query_heads, Address query, Address key,
                     Address value, float scale, float softcap, Address sink_logits, const std::vector<Address>& codes,
                     const std::vector<Address>& rotated, Address exact_output, Address exact_lse, Address output,
                     Address lse, Address spread, bool capture) {
  const SampledHalf half{at<float>(spread), at<const float>(exact_output), at<const float>(exact_lse)};
  std::vector<Prepared> prepared;
  for (size_t b = 0; b < stores.size(); ++b) {
    prepared.push_back({at<const uint16_t>(codes[b]), at<const float>(rotated[b])});
  }
  return run_step(stores,
                  {.dtype = dtype_of(dtype),
                   .query_heads = query_heads,
                   .query = at<const void>(query),
                   .key = at<const void>(key),
                   .value = at<const void>(value),
                   .rule = {scale, softcap},
                   .sink_logits = at<const float>(sink_logits),
                   .output = at<void>(output),
                   .lse = at<float>(lse),
                   .predicted_error = nullptr,
                   .prepared = prepared.data(),
                   .half = &half},
                  capture);
}

std::vector<const float*> floats_at(const std::vector<Address>& addresses) {
  std::vector<const float*> out;
  for (const Address address : addresses) out.push_back(at<const float>(address));
  return out;
}

// Raises an error of magicpig/errors.py.
void raise(const char* name, const char* message) {
  PyErr_SetString(nb::module_::import_("magicpig.errors").attr(name).ptr(), message);
}

void translate(const std::exception_ptr& thrown, void*) {
  try {
    std::rethrow_exception(thrown);
  } catch (const EnvironmentError& error) {
    raise("EnvironmentVariableError", error.what());
  } catch (const std::invalid_argument& error) {
    raise("ArgumentError", error.what());
  }
}

}  // namespace

NB_MODULE(_native, m) {
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;

  // store.py caches samplers for the life of the process; at exit nanobind would report them as leaks.
  nb::set_leak_warnings(false);
  nb::register_exception_translator(translate);

  m.attr("LANE") = kLane;
  m.attr("MAX_DIM") = kMaxDim;
  m.attr("BLOCK_ROWS") = kBlockRows;
  m.attr("SEGMENT_ROWS") = kSegmentRows;
  m.attr("LAW_SIZE") = kLawSize;
  m.attr("TILE") = kTileDirections;
  m.attr("SKETCH_KEYS") = kSketchKeys;
  m.attr("MAX_THREADS") = kMaxThreads;
  m.attr("LEAST_STRIDE") = kLeastStride;
  m.attr("MAX_LINEAR") = kMaxLinear;
  m.attr("BYTE_LANE") = kByteLane;
  m.attr("MAX_GROUP") = kMaxGroup;

  m.def("isa", [] { return kernels().name; });
  m.def("use_isa", [](const std::string& name) { use_level(name.c_str()); }, "name"_a);
  m.def("isa_levels", &level_names, "supported_only"_a);
  m.def("pool", &pool_name);
  m.def("use_pool", &use_pool_named, "name"_a);
  m.def("threads", &threads);
  m.def("poison_scratch", &poison_scratch, "on"_a);
  m.def("allocate", &allocate_array, "bytes"_a);
  m.def(
      "interleave",
      [](Address memory, size_t bytes, int least_nodes) { return interleave(at<void>(memory), bytes, least_nodes); },
      "memory"_a, "bytes"_a, "least_nodes"_a);
  m.def(
      "stream_read", [](Address memory, size_t bytes) { return stream_read(at<const void>(memory), bytes); },
      "memory"_a, "bytes"_a, Unlocked());

  m.def(
      "hash",
      [](int dtype, int dim, const std::vector<Address>& rows, int64_t count, int64_t row_bytes, Address centres,
         const LshSampler& sampler, Address codes, int64_t code_stride) {
        hash_rows({.dtype = row_dtype_of(dtype),
                   .dim = dim,
                   .heads = static_cast<int>(rows.size()),
                   .count = count,
                   .row_bytes = row_bytes,
                   .rows = reinterpret_cast<const char* const*>(rows.data()),
                   .centres = at<const float>(centres),
                   .head_dim = sampler.head_dim,
                   .directions = sampler.directions(),
                   .K = sampler.K,
                   .L = sampler.L,
                   .code_stride = code_stride},
                  at<uint16_t>(codes));
      },
      "dtype"_a, "dim"_a, "rows"_a, "count"_a, "row_bytes"_a, "centres"_a, "sampler"_a, "codes"_a, "code_stride"_a,
      Unlocked());
  m.def(
      "mean_keys",
      [](int dtype, const std::vector<Address>& rows, int head_dim, int64_t count, int64_t row_bytes,
         Address row_centres, Address means) {
        parallel(static_cast<int64_t>(rows.size()), [&](int64_t head) {
          const float* centre = row_centres == 0 ? nullptr : at<const float>(row_centres) + head * head_dim;
          alignas(64) float mean[kMaxDim];
          mean_key({row_dtype_of(dtype), head_dim, at<const char>(rows[head]), row_bytes, centre}, count, mean);
          std::copy_n(mean, head_dim, at<float>(means) + head * head_dim);
        });
      },
      "dtype"_a, "rows"_a, "head_dim"_a, "count"_a, "row_bytes"_a, "row_centres"_a, "means"_a, Unlocked());
  m.def(
      "build",
      [](Address codes, int64_t tables, int64_t count, int K, Address offsets, Address ids) {
        build(at<const uint16_t>(codes), tables, count, K, at<uint32_t>(offsets), at<uint16_t>(ids));
      },
      "codes"_a, "tables"_a, "count"_a, "K"_a, "offsets"_a, "ids"_a, Unlocked());
  m.def(
      "extend",
      [](Address a_offsets, Address a_ids, int64_t a_count, Address b_offsets, Address b_ids, int64_t b_count,
         int64_t tables, int K, Address offsets, Address ids) {
        extend({at<const uint32_t>(a_offsets), at<const uint16_t>(a_ids), a_count},
               {at<const uint32_t>(b_offsets), at<const uint16_t>(b_ids), b_count}, tables, K, at<uint32_t>(offsets),
               at<uint16_t>(ids));
      },
      "a_offsets"_a, "a_ids"_a, "a_count"_a, "b_offsets"_a, "b_ids"_a, "b_count"_a, "tables"_a, "K"_a, "offsets"_a,
      "ids"_a, Unlocked());
  m.def(
      "shorten",
      [](Address a_offsets, Address a_ids, int64_t a_count, int64_t count, int64_t tables, int K, Address offsets,
         Address ids) {
        shorten({at<const uint32_t>(a_offsets), at<const uint16_t>(a_ids), a_count}, count, tables, K,
                at<uint32_t>(offsets), at<uint16_t>(ids));
      },
      "a_offsets"_a, "a_ids"_a, "a_count"_a, "count"_a, "tables"_a, "K"_a, "offsets"_a, "ids"_a, Unlocked());
  m.def("lookup", &lookup, "query_codes"_a, "K"_a, "L"_a, "offsets"_a, "ids"_a, "first"_a, "count"_a, "min_hits"_a,
        "found"_a, Unlocked());
  m.def("attend", &attend, "dtype"_a, "dim"_a, "blocks"_a, "ids"_a, "count"_a, "log_u"_a, "query"_a, "offsets"_a,
        "scale"_a, "softcap"_a, "output"_a, "lse"_a, Unlocked());
  m.def("attend_hashed", &attend_hashed, "dtype"_a, "dim"_a, "blocks"_a, "ids"_a, "count"_a, "query"_a, "centres"_a,
        "centre_count"_a, "shift"_a, "offsets"_a, "law"_a, "scale"_a, "softcap"_a, "log_u"_a, "output"_a, "lse"_a,
        Unlocked());
  m.def("attend_rows", &attend_rows, "dtype"_a, "dim"_a, "rows"_a, "count"_a, "heads"_a, "queries"_a, "offsets"_a,
        "scale"_a, "softcap"_a, "output"_a, "lse"_a, Unlocked());
  m.def("merge", &merge_states, "parts"_a, "heads"_a, "dim"_a, "outputs"_a, "lses"_a, "output"_a, "lse"_a, Unlocked());
  m.def(
      "write_bytes",
      [](Address from, int64_t count, int head_dim, const std::vector<Address>& rows, int64_t row_bytes, int half) {
        write_bytes({.from = at<const float>(from),
                     .heads = static_cast<int>(rows.size()),
                     .count = count,
                     .head_dim = head_dim,
                     .rows = reinterpret_cast<char* const*>(rows.data()),
                     .row_bytes = row_bytes,
                     .half = static_cast<Half>(half)});
      },
      "source"_a, "count"_a, "head_dim"_a, "rows"_a, "row_bytes"_a, "half"_a, Unlocked());
  m.def(
      "convert",
      [](int from_dtype, Address source, int64_t count, int to_dtype, Address to) {
        std::vector<float> wide(count);
        kernels().to_float(dtype_of(from_dtype), at<const void>(source), count, wide.data());
        kernels().from_float(dtype_of(to_dtype), wide.data(), count, at<void>(to));
      },
      "from_dtype"_a, "source"_a, "count"_a, "to_dtype"_a, "to"_a, Unlocked());
  m.def("decode_step", &decode_step, "stores"_a, "dtype"_a, "query_heads"_a, "query"_a, "key"_a, "value"_a, "scale"_a,
        "softcap"_a, "sink_logits"_a, "output"_a, "lse"_a, "predicted_error"_a, "capture"_a);
  m.def("sampled_half", &sampled_half, "stores"_a, "dtype"_a, "query_heads"_a, "query"_a, "key"_a, "value"_a, "scale"_a,
        "softcap"_a, "sink_logits"_a, "codes"_a, "rotated"_a, "exact_output"_a, "exact_lse"_a, "output"_a, "lse"_a,
        "spread"_a, "capture"_a);
  m.def(
      "rotate",
      [](const SketchSampler& sampler, Address vectors, int64_t count, Address rotated) {
        kernels().rotate(at<const float>(vectors), sampler.dim(), count, sampler.rotation(), at<float>(rotated));
      },
      "sampler"_a, "vectors"_a, "count"_a, "rotated"_a, Unlocked());
  m.def(
      "sketch",
      [](int dtype, const std::vector<Address>& rows, int64_t count, int64_t row_bytes, Address row_centres,
         const SketchSampler& sampler, int64_t first, int64_t blocks, int stride_shift, bool centred, Address words,
         Address scales, Address centres) {
        sketch_rows({.dtype = row_dtype_of(dtype),
                     .heads = static_cast<int>(rows.size()),
                     .count = count,
                     .row_bytes = row_bytes,
                     .rows = reinterpret_cast<const char* const*>(rows.data()),
                     .row_centres = at<const float>(row_centres),
                     .sampler = sampler,
                     .first = first,
                     .blocks = blocks,
                     .stride_shift = stride_shift,
                     .centred = centred},
                    at<uint32_t>(words), at<uint16_t>(scales), at<uint16_t>(centres));
      },
      "dtype"_a, "rows"_a, "count"_a, "row_bytes"_a, "row_centres"_a, "sampler"_a, "first"_a, "blocks"_a,
      "stride_shift"_a, "centred"_a, "words"_a, "scales"_a, "centres"_a, Unlocked());
  m.def("weigh", &weigh_sketch, "sampler"_a, "queries"_a, "heads"_a, "scale"_a, "softcap"_a, "words"_a, "scales"_a,
        "centres"_a, "counts"_a, "sinks"_a, "stride_shift"_a, "weights"_a, "whole"_a, "offsets"_a, Unlocked());
  m.def("draw", &draw_sketch, "weights"_a, "count"_a, "sinks"_a, "budget"_a, "seed"_a, "layer"_a, "head"_a,
        "position"_a, "phase"_a, Unlocked());
  m.def("weigh_rows", &weigh_rows, "dtype"_a, "dim"_a, "blocks"_a, "ids"_a, "count"_a, "log_u"_a, "queries"_a,
        "heads"_a, "offsets"_a, "scale"_a, "softcap"_a, "weights"_a, Unlocked());

  m.def("flash_form", [] { return flash_kernels().name; });
  m.def("is_amd", is_amd);
  m.def("use_tiles", &use_tiles, "on"_a);
  m.def(
      "attend_many",
      [](int dtype, int heads, int kv_heads, int dim, int64_t tokens, int64_t keys, Address query,
         std::tuple<int64_t, int64_t> query_strides, Address key, std::tuple<int64_t, int64_t> key_strides,
         Address value, std::tuple<int64_t, int64_t> value_strides, bool causal, float scale, float softcap,
         Address output, Address lse) {
        const auto& [q0, q1] = query_strides;
        const auto& [k0, k1] = key_strides;
        const auto& [v0, v1] = value_strides;
        attend_many({dtype_of(dtype),
                     heads,
                     kv_heads,
                     dim,
                     tokens,
                     keys,
                     at<const void>(query),
                     at<const void>(key),
                     at<const void>(value),
                     {q0, q1},
                     {k0, k1},
                     {v0, v1},
                     causal,
                     {scale, softcap}},
                    at<float>(output), at<float>(lse));
      },
      "dtype"_a, "heads"_a, "kv_heads"_a, "dim"_a, "tokens"_a, "keys"_a, "query"_a, "query_strides"_a, "key"_a,
      "key_strides"_a, "value"_a, "value_strides"_a, "causal"_a, "scale"_a, "softcap"_a, "output"_a, "lse"_a,
      Unlocked());
  m.def(
      "linear",
      [](int dtype, Address numbers, Address scales, int64_t rows, int64_t columns, int64_t stride, Address bias,
         int x_dtype, Address x, int vectors, Address out) {
        linear({row_dtype_of(dtype), at<const void>(numbers), at<const float>(scales), rows, columns, stride},
               at<const void>(bias), dtype_of(x_dtype), at<const void>(x), vectors, at<void>(out));
      },
      "dtype"_a, "numbers"_a, "scales"_a, "rows"_a, "columns"_a, "stride"_a, "bias"_a, "x_dtype"_a, "x"_a, "vectors"_a,
      "out"_a, Unlocked());

  nb::class_<LshSampler>(m, "LshSampler")
      .def(
          "__init__",
          [](LshSampler* self, int head_dim, int K, int L, Address directions) {
            new (self) LshSampler{head_dim, K, L, {}};
            const int64_t pairs = (head_dim + 1) / 2;
            self->packed.resize(static_cast<size_t>(self->tiles()) * pairs * kTileDirections * 2);
            pack_directions(at<const float>(directions), head_dim, K * L, self->packed.data());
          },
          "head_dim"_a, "K"_a, "L"_a, "directions"_a)
      .def_ro("head_dim", &LshSampler::head_dim)
      .def_ro("K", &LshSampler::K)
      .def_ro("L", &LshSampler::L);

  nb::class_<HitLaw>(m, "HitLaw")
      .def(
          "__init__",
          [](HitLaw* self, int min_hits, Address log_u) {
            new (self) HitLaw{min_hits, {}};
            self->log_u.assign(at<const float>(log_u), at<const float>(log_u) + kLawSize + 1);
          },
          "min_hits"_a, "log_u"_a);

  nb::class_<SketchSampler>(m, "SketchSampler")
      .def_prop_ro("words", [](const SketchSampler& self) { return self.layout().words; })
      .def_ro("bits", &SketchSampler::bits)
      .def_ro("head_dim", &SketchSampler::head_dim)
      .def(
          "__init__",
          [](SketchSampler* self, int head_dim, int bits, float distance, double noise, Address rotation) {
            new (self) SketchSampler{head_dim, bits, distance, noise, {}};
            self->rows.assign(static_cast<size_t>(head_dim) * self->dim(), 0.0f);
            for (int d = 0; d < head_dim; ++d) {
              std::copy_n(at<const float>(rotation) + static_cast<int64_t>(d) * head_dim, head_dim,
                          self->rows.begin() + static_cast<int64_t>(d) * self->dim());
            }
          },
          "head_dim"_a, "bits"_a, "distance"_a, "noise"_a, "rotation"_a);

  nb::class_<StoreView>(m, "StoreView")
      .def(
          "__init__",
          [](StoreView* self, int dtype, int heads, int head_dim, int64_t sinks, int stride_shift, int layer,
             int first_head) {
            new (self) StoreView;
            self->dtype = row_dtype_of(dtype);
            self->heads = heads;
            self->head_dim = head_dim;
            self->dim = (head_dim + kLane - 1) / kLane * kLane;
            self->sinks = sinks;
            self->stride_shift = stride_shift;
            self->layer = layer;
            self->first_head = first_head;
          },
          "dtype"_a, "heads"_a, "head_dim"_a, "sinks"_a, "stride_shift"_a, "layer"_a, "first_head"_a)
      .def_rw("length", &StoreView::length)
      .def_rw("indexed_to", &StoreView::indexed_to)
      .def_ro("dim", &StoreView::dim)
      .def_rw("steps", &StoreView::steps)
      .def_rw("sampled_rows", &StoreView::sampled_rows)
      .def_rw("body_rows", &StoreView::body_rows)
      .def_rw("max_share", &StoreView::max_share)
      .def_rw("whole_bodies", &StoreView::whole_bodies)
      .def_prop_ro("predicted",
                   [](const StoreView& self) {
                     const PredictedErrors& all = self.predicted;
                     return std::make_tuple(all.count, all.unknown, all.sum, all.largest,
                                            std::vector<int64_t>(all.bins.begin(), all.bins.end()));
                   })
      .def(
          "count_predicted",
          [](StoreView& self, const std::vector<double>& errors) {
            for (const double error : errors) self.predicted.add(error);
          },
          "errors"_a)
      .def(
          "set_sampler",
          [](StoreView& self, std::shared_ptr<const LshSampler> lsh, std::shared_ptr<const SketchSampler> sketch) {
            self.lsh = std::move(lsh);
            self.sketch = std::move(sketch);
          },
          "lsh"_a.none(), "sketch"_a.none())
      .def(
          "set_policy",
          [](StoreView& self, double budget, double candidates, float epsilon, double limit, uint64_t seed,
             std::shared_ptr<const HitLaw> law) {
            self.policy = {budget, candidates, epsilon, limit, seed, std::move(law)};
          },
          "budget"_a, "candidates"_a, "epsilon"_a, "limit"_a, "seed"_a, "law"_a.none())
      .def(
          "set_blocks",
          [](StoreView& self, const std::vector<Address>& rows, const std::vector<int64_t>& head_strides) {
            std::vector<StoreView::Block> blocks;
            for (size_t i = 0; i < rows.size(); ++i) blocks.push_back({at<char>(rows[i]), head_strides[i]});
            self.set_blocks(std::move(blocks));
          },
          "rows"_a, "head_strides"_a)
      .def(
          "set_row_centres",
          [](StoreView& self, const std::vector<Address>& centres) { self.set_row_centres(floats_at(centres)); },
          "centres"_a)
      .def(
          "set_tail",
          [](StoreView& self, int dtype, Address rows, int64_t head_stride, int64_t first) {
            self.tail_dtype = dtype_of(dtype);
            self.tail = {at<char>(rows), head_stride};
            self.tail_from = first;
          },
          "dtype"_a, "rows"_a, "head_stride"_a, "first"_a)
      .def(
          "set_segments",
          [](StoreView& self, const std::vector<Address>& offsets, const std::vector<Address>& ids,
             const std::vector<int64_t>& firsts, const std::vector<int64_t>& counts,
             const std::vector<Address>& centres) {
            std::vector<StoreView::IndexSegment> segments;
            for (size_t i = 0; i < offsets.size(); ++i) {
              segments.push_back({at<const uint32_t>(offsets[i]), at<const uint16_t>(ids[i]), firsts[i], counts[i]});
            }
            self.set_segments(std::move(segments), floats_at(centres));
          },
          "offsets"_a, "ids"_a, "firsts"_a, "counts"_a, "centres"_a)
      .def(
          "set_sketches",
          [](StoreView& self, const std::vector<Address>& words, const std::vector<Address>& scales,
             const std::vector<Address>& centres, const std::vector<int64_t>& firsts,
             const std::vector<int64_t>& counts, const std::vector<int64_t>& blocks) {
            self.sketches.clear();
            for (size_t i = 0; i < words.size(); ++i) {
              self.sketches.push_back({at<const uint32_t>(words[i]), at<const uint16_t>(scales[i]),
                                       at<const uint16_t>(centres[i]), firsts[i], counts[i], blocks[i]});
            }
          },
          "words"_a, "scales"_a, "centres"_a, "firsts"_a, "counts"_a, "blocks"_a);
}
