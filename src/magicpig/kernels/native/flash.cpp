#include "flash.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "parallel.h"
#include "plan.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace magicpig {

extern const FlashKernels portable, avx2, avx512, avx512bf16, amx;

namespace {

constexpr int kTaskRows = 512;  // queries of a task: keys are packed for all of them

std::atomic<bool> tiles{true};

#if defined(MAGICPIG_FLASH_AMX)
// Linux gives the memory for tiles to processes that ask for it.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

const FlashKernels& choose(const std::string& level) {
#if defined(MAGICPIG_FLASH_AMX)
  static const bool kAmx = has_amx();
  if (level == "avx512bf16" && kAmx && tiles) return amx;
#endif
#if defined(MAGICPIG_FLASH_AVX512BF16)
  if (level == "avx512bf16") return avx512bf16;
#endif
#if defined(MAGICPIG_FLASH_AVX512)
  if (level == "avx512" || level == "avx512vnni") return avx512;
#endif
#if defined(MAGICPIG_FLASH_AVX2)
  if (level == "avx2") return avx2;
#endif
  return portable;
}

}  // namespace

void use_tiles(bool on) { tiles = on; }

const FlashKernels& flash_kernels() { return choose(kernels().name); }

void attend_many(const ManyQueries& many, float* output, float* lse) {
  const Kernels& run = kernels();
  const FlashKernels& flash = flash_kernels();
  const size_t size = element_size(many.dtype);
  const int group = many.heads / many.kv_heads, dim = many.dim, width = flash.width(dim);
  const int64_t tokens = std::clamp<int64_t>(kTaskRows / group, 1, many.tokens);
  const int64_t pieces = (many.tokens + tokens - 1) / tokens;
  const auto at = [&](const void* base, const int64_t* strides, int64_t head, int64_t token) {
    return static_cast<const char*>(base) + (head * strides[0] + token * strides[1]) * size;
  };
  // The last tokens first: they see most keys.
  parallel(pieces * many.kv_heads, [&](int64_t task) {
    const int64_t piece = pieces - 1 - task / many.kv_heads, head = task % many.kv_heads;
    const int64_t first = piece * tokens, count = std::min(tokens, many.tokens - first);
    const int rows = static_cast<int>(count * group);
    thread_local std::vector<float> query_memory, sum_memory, state_memory;
    thread_local std::vector<int64_t> end_memory;
    thread_local std::vector<char> packed;
    float* const queries = scratch(query_memory, static_cast<size_t>(rows) * dim);
    float* const sums = scratch(sum_memory, static_cast<size_t>(flash.padded(rows)) * width);
    float* const maxima = scratch(state_memory, 2 * static_cast<size_t>(rows));
    float* const totals = maxima + rows;
    int64_t* const ends = scratch(end_memory, rows);
    char* const memory = scratch(packed, flash.scratch_bytes(many.dtype, rows, dim) + 64);
    char* const aligned = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64;
    for (int r = 0; r < group; ++r) {
      for (int64_t t = 0; t < count; ++t) {
        const int64_t row = r * count + t;
        run.to_float(many.dtype, at(many.query, many.query_strides, head * group + r, first + t), dim,
                     queries + row * dim);
        ends[row] = many.causal ? std::min(first + t + 1, many.keys) : many.keys;
      }
    }
    flash.attend({many.dtype, dim, at(many.key, many.key_strides, head, 0), at(many.value, many.value_strides, head, 0),
                  many.key_strides[1], many.value_strides[1], many.keys, queries, ends, rows},
                 many.rule, aligned, sums, maxima, totals);
    for (int r = 0; r < group; ++r) {
      for (int64_t t = 0; t < count; ++t) {
        const int64_t row = r * count + t, to = (head * group + r) * many.tokens + first + t;
        const float total = totals[row], inverse = 1.0f / total;
        for (int d = 0; d < dim; ++d) output[to * dim + d] = sums[row * width + d] * inverse;
        lse[to] = maxima[row] * 0.693147180559945f + std::log(total);
      }
    }
  });
}

}  // namespace magicpig
