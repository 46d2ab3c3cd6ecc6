// Which instruction set runs: decided once, from the processor or from MAGICPIG_ISA.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "errors.h"
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace magicpig {

extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAvx512Emulated, kAvx512Bf16Emulated;

namespace {

bool always() { return true; }

#if defined(__x86_64__)
// Clang 14 has no name for it in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#if defined(MAGICPIG_HAVE_AVX512BF16)
bool has_avx512bf16() { return has_avx512vnni() && __builtin_cpu_supports("avx512bf16"); }

// Products of pairs of bfloat16 take half the time of those of floats on Zen 4, and half as much again on Emerald Rapids
// (docs/log.md), so Intel's processors hash as the level below does.
const Kernels kBf16 = [] {
  Kernels own = kAvx512Bf16;
#if defined(MAGICPIG_HAVE_AVX512VNNI)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) own.hash = kAvx512Vnni.hash;
#endif
  return own;
}();
#endif
#endif

const Level kLevels[] = {
#if defined(MAGICPIG_HAVE_AVX512BF16)
    {&kBf16, has_avx512bf16},
#endif
#if defined(MAGICPIG_HAVE_AVX512VNNI)
    {&kAvx512Vnni, has_avx512vnni},
#endif
#if defined(MAGICPIG_HAVE_AVX512)
    {&kAvx512, has_avx512},
#endif
#if defined(MAGICPIG_HAVE_AVX2)
    {&kAvx2, has_avx2},
#endif
    {&kPortable, always},
// Last: only ever chosen by name.
#if defined(MAGICPIG_HAVE_AVX512_EMULATED)
    {&kAvx512Emulated, always},
#endif
#if defined(MAGICPIG_HAVE_AVX512BF16_EMULATED)
    {&kAvx512Bf16Emulated, always},
#endif
};

// Null, with the names of those there are, where there is none of that name.
const Kernels* find(const char* name, std::string& supported) {
  for (const Level& level : kLevels) {
    if (!level.supported()) continue;
    if (std::strcmp(level.kernels->name, name) == 0) return level.kernels;
    supported += (supported.empty() ? "" : ", ") + std::string(level.kernels->name);
  }
  return nullptr;
}

const Kernels* choose() {
  const char* name = std::getenv("MAGICPIG_ISA");
  if (name != nullptr && *name != '\0') {
    std::string supported;
    if (const Kernels* table = find(name, supported)) return table;
    throw EnvironmentError("MAGICPIG_ISA=" + std::string(name) + " cannot run here; this machine and build have " +
                           supported);
  }
  for (const Level& level : kLevels) {
    if (level.supported()) return level.kernels;
  }
  return &kPortable;
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

int levels(const Level** out) {
  *out = kLevels;
  return static_cast<int>(sizeof kLevels / sizeof *kLevels);
}

const Kernels& kernels() {
  const Kernels* table = active.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = choose();
    active.store(table, std::memory_order_release);
  }
  return *table;
}

void use_level(const char* name) {
  std::string supported;
  const Kernels* table = find(name, supported);
  if (table == nullptr) {
    throw std::invalid_argument("level '" + std::string(name) + "' cannot run here; this machine and build have " +
                                supported);
  }
  active.store(table, std::memory_order_release);
}

bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace magicpig
