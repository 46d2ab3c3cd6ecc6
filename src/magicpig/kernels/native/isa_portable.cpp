// GCC and Clang vector extensions only: any processor, NEON included.
#define MAGICPIG_LEVEL "portable"
#include "level.inl.h"

namespace magicpig {
extern const Kernels kPortable;
const Kernels kPortable = kTable;
}  // namespace magicpig
