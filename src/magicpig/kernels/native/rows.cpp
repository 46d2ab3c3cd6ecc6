#include "rows.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace magicpig {
namespace {

int padded(int head_dim) { return (head_dim + kLane - 1) / kLane * kLane; }

int64_t scale_at(int dim, Half half) { return 2 * int64_t{dim} + static_cast<int64_t>(half) * sizeof(float); }

}  // namespace

void write_half(Dtype dtype, int dim, Half half, const float* from, char* row) {
  char* to = row + static_cast<int64_t>(half) * dim * element_size(dtype);
  if (dtype != Dtype::i8) return kernels().from_float(dtype, from, dim, to);
  const float scale = kernels().to_bytes(from, dim, reinterpret_cast<int8_t*>(to));
  std::memcpy(row + scale_at(dim, half), &scale, sizeof scale);
}

void read_key(Dtype dtype, int dim, const char* row, float* to) {
  kernels().to_float(dtype, row, dim, to);
  if (dtype != Dtype::i8) return;
  float scale;
  std::memcpy(&scale, row + scale_at(dim, Half::key), sizeof scale);
  for (int d = 0; d < dim; ++d) to[d] *= scale;
}

void Keys::read(int64_t i, float* to) const {
  read_key(dtype, padded(head_dim), rows + i * row_bytes, to);
  for (int d = 0; centre != nullptr && d < head_dim; ++d) to[d] += centre[d];
}

void mean_key(const Keys& keys, int64_t count, float* mean) {
  const int dim = padded(keys.head_dim);
  const float share = 1.0f / static_cast<float>(count);  // exact, and no sum of shares of large numbers is infinite
  alignas(64) float key[kMaxDim];
  std::fill_n(mean, dim, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    keys.read(i, key);
    for (int d = 0; d < dim; ++d) mean[d] += key[d] * share;
  }
}

void write_bytes(const BytesJob& job) {
  constexpr int64_t kRows = 256;  // of one task
  const int64_t pieces = (job.count + kRows - 1) / kRows;
  const int dim = padded(job.head_dim);
  parallel(job.heads * pieces, [&](int64_t task) {
    const int64_t head = task / pieces, begin = task % pieces * kRows, end = std::min(job.count, begin + kRows);
    alignas(64) float wide[kMaxDim] = {};
    for (int64_t i = begin; i < end; ++i) {
      std::copy_n(job.from + (head * job.count + i) * job.head_dim, job.head_dim, wide);
      write_half(Dtype::i8, dim, job.half, wide, job.rows[head] + i * job.row_bytes);
    }
  });
}

}  // namespace magicpig
