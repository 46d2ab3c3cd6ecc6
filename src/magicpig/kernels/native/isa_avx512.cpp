// x86-64-v4: AVX-512 F, BW, DQ, VL.
#define MAGICPIG_LEVEL "avx512"
#include "level.inl.h"

namespace magicpig {
extern const Kernels kAvx512;
const Kernels kAvx512 = kTable;
}  // namespace magicpig
