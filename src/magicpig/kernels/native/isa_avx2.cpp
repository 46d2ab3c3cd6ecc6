// x86-64-v3: AVX2, FMA, F16C.
#define MAGICPIG_LEVEL "avx2"
#include "level.inl.h"

namespace magicpig {
extern const Kernels kAvx2;
const Kernels kAvx2 = kTable;
}  // namespace magicpig
