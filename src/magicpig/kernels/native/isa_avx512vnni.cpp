// x86-64-v4 with AVX512_VNNI, which multiplies and adds four bytes per instruction and lane: sketches are scored with it.
#define MAGICPIG_VNNI
#define MAGICPIG_LEVEL "avx512vnni"
#include "level.inl.h"

namespace magicpig {
extern const Kernels kAvx512Vnni;
const Kernels kAvx512Vnni = kTable;
}  // namespace magicpig
