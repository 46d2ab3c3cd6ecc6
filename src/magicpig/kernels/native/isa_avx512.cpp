// x86-64-v4: AVX-512 F, BW, DQ, VL. Compiled a second time with MAGICPIG_EMULATED, for tests on any processor.
#if defined(MAGICPIG_EMULATED)
#define MAGICPIG_LEVEL "avx512-emulated"
#else
#define MAGICPIG_LEVEL "avx512"
#endif
#include "level.inl.h"

namespace magicpig {
#if defined(MAGICPIG_EMULATED)
extern const Kernels kAvx512Emulated;
const Kernels kAvx512Emulated = kTable;
#else
extern const Kernels kAvx512;
const Kernels kAvx512 = kTable;
#endif
}  // namespace magicpig
