#include "tables.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "rows.h"

namespace magicpig {

void pack_directions(const float* directions, int dim, int columns, uint16_t* packed) {
  const int pairs = (dim + 1) / 2, tiles = (columns + kTileDirections - 1) / kTileDirections;
  for (int tile = 0; tile < tiles; ++tile) {
    for (int pair = 0; pair < pairs; ++pair) {
      for (int c = 0; c < kTileDirections; ++c) {
        for (int half = 0; half < 2; ++half, ++packed) {
          const int d = 2 * pair + half, column = tile * kTileDirections + c;
          *packed = 0;
          if (d < dim && column < columns) {
            kernels().from_float(Dtype::bf16, directions + static_cast<int64_t>(d) * columns + column, 1, packed);
          }
        }
      }
    }
  }
}

void codes_of(const uint64_t* bits, int64_t n, int tiles, int K, int L, uint16_t* codes, int64_t key_stride,
              int64_t table_stride) {
  const uint32_t mask = (1u << K) - 1;
  for (int t = 0; t < L; ++t) {
    const int first = t * K, word = first / 64, shift = first % 64;
    const bool split = shift + K > 64;
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t* own = bits + i * tiles + word;
      uint64_t code = own[0] >> shift;
      if (split) code |= own[1] << (64 - shift);
      codes[i * key_stride + t * table_stride] = static_cast<uint16_t>(code & mask);
    }
  }
}

void hash_rows(const HashJob& job, uint16_t* codes) {
  constexpr int64_t kKeys = 192;  // of one task: their floats and signs stay in the second-level cache
  const int64_t pieces = (job.count + kKeys - 1) / kKeys;
  const int tiles = job.directions.tiles;
  const Kernels& run = kernels();
  parallel(job.heads * pieces, [&](int64_t task) {
    const int64_t head = task / pieces, start = task % pieces * kKeys, n = std::min(kKeys, job.count - start);
    thread_local std::vector<float> keys;
    thread_local std::vector<uint64_t> bits;
    keys.resize(kKeys * job.dim);
    bits.resize(kKeys * tiles);
    for (int64_t i = 0; i < n; ++i) {
      float* key = keys.data() + i * job.dim;
      read_key(job.dtype, job.dim, job.rows[head] + (start + i) * job.row_bytes, key);
      if (job.centres == nullptr) continue;
      for (int d = 0; d < job.head_dim; ++d) key[d] -= job.centres[head * job.head_dim + d];
    }
    run.hash(keys.data(), job.dim, n, job.directions, 0, tiles, bits.data());
    codes_of(bits.data(), n, tiles, job.K, job.L, codes + head * job.L * job.code_stride + start, 1, job.code_stride);
  });
}

void build(const uint16_t* codes, int64_t tables, int64_t count, int K, uint32_t* offsets, uint16_t* ids) {
  const int64_t buckets = int64_t{1} << K;
  parallel(tables, [&](int64_t t) {
    const uint16_t* code = codes + t * count;
    uint32_t* offset = offsets + t * (buckets + 1);
    uint16_t* id = ids + t * count;
    // Counted one place late, the running offsets end where the next bucket starts: no second array is needed.
    std::fill(offset, offset + buckets + 1, 0u);
    for (int64_t i = 0; i < count; ++i) ++offset[code[i]];
    uint32_t start = 0;
    for (int64_t b = 0; b <= buckets; ++b) {
      const uint32_t size = offset[b];
      offset[b] = start;
      start += size;
    }
    for (int64_t i = 0; i < count; ++i) id[offset[code[i]]++] = static_cast<uint16_t>(i);
    std::memmove(offset + 1, offset, sizeof(uint32_t) * buckets);
    offset[0] = 0;
  });
}

void extend(const Buckets& a, const Buckets& b, int64_t tables, int K, uint32_t* offsets, uint16_t* ids) {
  const int64_t buckets = int64_t{1} << K;
  parallel(tables, [&](int64_t t) {
    const uint32_t *from_a = a.offsets + t * (buckets + 1), *from_b = b.offsets + t * (buckets + 1);
    const uint16_t *ids_a = a.ids + t * a.count, *ids_b = b.ids + t * b.count;
    uint32_t* offset = offsets + t * (buckets + 1);
    uint16_t* id = ids + t * (a.count + b.count);
    for (int64_t bucket = 0; bucket < buckets; ++bucket) {
      offset[bucket] = from_a[bucket] + from_b[bucket];
      id = std::copy(ids_a + from_a[bucket], ids_a + from_a[bucket + 1], id);
      for (uint32_t i = from_b[bucket]; i < from_b[bucket + 1]; ++i) *id++ = static_cast<uint16_t>(a.count + ids_b[i]);
    }
    offset[buckets] = static_cast<uint32_t>(a.count + b.count);
  });
}

void shorten(const Buckets& a, int64_t count, int64_t tables, int K, uint32_t* offsets, uint16_t* ids) {
  const int64_t buckets = int64_t{1} << K;
  parallel(tables, [&](int64_t t) {
    const uint32_t* from = a.offsets + t * (buckets + 1);
    const uint16_t* all = a.ids + t * a.count;
    uint32_t* offset = offsets + t * (buckets + 1);
    uint16_t *const first = ids + t * count, *id = first;
    for (int64_t bucket = 0; bucket < buckets; ++bucket) {
      offset[bucket] = static_cast<uint32_t>(id - first);
      id = std::copy(all + from[bucket], std::lower_bound(all + from[bucket], all + from[bucket + 1], count), id);
    }
    offset[buckets] = static_cast<uint32_t>(count);
  });
}

}  // namespace magicpig
