// x86-64-v4 with AVX512_BF16, which hashes two dimensions per instruction. Compiled a second time with
// MAGICPIG_EMULATE_BF16 for tests, that instruction spelled out in plain AVX-512.
#define MAGICPIG_BF16
#if defined(MAGICPIG_EMULATE_BF16)
#define MAGICPIG_LEVEL "avx512bf16-emulated"
#else
#define MAGICPIG_LEVEL "avx512bf16"
#endif
#include "level.inl.h"

namespace magicpig {
#if defined(MAGICPIG_EMULATE_BF16)
extern const Kernels kAvx512Bf16Emulated;
const Kernels kAvx512Bf16Emulated = kTable;
#else
extern const Kernels kAvx512Bf16;
const Kernels kAvx512Bf16 = kTable;
#endif
}  // namespace magicpig
