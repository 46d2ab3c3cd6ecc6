// A key or value of a row in bytes: whole numbers and the one scale that they have in common.
#pragma once

namespace {

float to_bytes(const float* from, int dim, int8_t* to) {
  F top{};
  for (int d = 0; d < dim; d += W) top = max(top, max(load(from + d), -load(from + d)));
  const float scale = largest(top) / 127.0f;
  // Of a scale below the normal floats there is no inverse; all numbers are zero then.
  const float inverse = scale >= __FLT_MIN__ && scale <= __FLT_MAX__ ? 1.0f / scale : 0.0f;
  for (int d = 0; d < dim; d += W) store(to + d, inverse > 0.0f ? nearest(load(from + d) * inverse) : I{});
  return inverse > 0.0f ? scale : 0.0f;
}

}  // namespace
