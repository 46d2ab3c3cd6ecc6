#include "linear.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "plan.h"

namespace magicpig {
namespace {

constexpr int64_t kTaskBytes = 64 << 10;  // of the matrix, at least: below that it takes longer to share than to read
constexpr int kTasks = 4;                 // of a thread

}  // namespace

void linear(const Matrix& matrix, const void* bias, Dtype dtype, const void* x, int vectors, void* out) {
  const Kernels& run = kernels();
  const size_t size = element_size(dtype), factor_bytes = run.factor_bytes(matrix.dtype, matrix.columns);
  thread_local std::vector<float> wide;
  thread_local std::vector<char> packed;
  float* const floats = scratch(wide, matrix.columns);
  char* const factors = scratch(packed, vectors * factor_bytes);
  for (int v = 0; v < vectors; ++v) {
    run.to_float(dtype, static_cast<const char*>(x) + v * matrix.columns * size, matrix.columns, floats);
    run.to_factors(matrix.dtype, floats, matrix.columns, factors + v * factor_bytes);
  }
  const int64_t row_bytes = std::max<int64_t>(1, matrix.stride * static_cast<int64_t>(element_size(matrix.dtype)));
  const int64_t even = (matrix.rows + kTasks * threads() - 1) / (kTasks * threads());
  const int64_t rows = std::max(even, (kTaskBytes + row_bytes - 1) / row_bytes);
  parallel((matrix.rows + rows - 1) / rows, [&](int64_t task) {
    const int64_t first = task * rows, last = std::min(matrix.rows, first + rows), count = last - first;
    thread_local std::vector<float> memory, biases;
    float* const products = scratch(memory, vectors * count);
    run.multiply(matrix, first, last, factors, vectors, products);
    if (bias != nullptr) {
      float* const own = scratch(biases, count);
      run.to_float(dtype, static_cast<const char*>(bias) + first * size, count, own);
      for (int64_t i = 0; i < vectors * count; ++i) products[i] += own[i % count];
    }
    for (int v = 0; v < vectors; ++v) {
      run.from_float(dtype, products + v * count, count, static_cast<char*>(out) + (v * matrix.rows + first) * size);
    }
  });
}

}  // namespace magicpig
