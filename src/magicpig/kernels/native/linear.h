// A few vectors times a matrix of weights, on all threads.
#pragma once

#include "kernels.h"

namespace magicpig {

// out (vectors, rows), of `dtype` as x (vectors, columns), = x times the transposed matrix + bias (rows) of that dtype, or
// null. At most kMaxLinear vectors.
void linear(const Matrix& matrix, const void* bias, Dtype dtype, const void* x, int vectors, void* out);

}  // namespace magicpig
