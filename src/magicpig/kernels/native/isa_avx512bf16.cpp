// x86-64-v4 with AVX512_VNNI and AVX512_BF16, which hashes two dimensions per instruction. Compiled a second time with
// MAGICPIG_EMULATED, for tests on any processor.
#define MAGICPIG_VNNI
#define MAGICPIG_BF16
#if defined(MAGICPIG_EMULATED)
#define MAGICPIG_LEVEL "avx512bf16-emulated"
#else
#define MAGICPIG_LEVEL "avx512bf16"
#endif
#include "level.inl.h"

namespace magicpig {
#if defined(MAGICPIG_EMULATED)
extern const Kernels kAvx512Bf16Emulated;
const Kernels kAvx512Bf16Emulated = kTable;
#else
extern const Kernels kAvx512Bf16;
const Kernels kAvx512Bf16 = kTable;
#endif
}  // namespace magicpig
