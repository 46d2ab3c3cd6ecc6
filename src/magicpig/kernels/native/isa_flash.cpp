// Attention of many queries, compiled for each form: MAGICPIG_FLASH is the name of its table.
#if defined(__AMX_BF16__)
#define MAGICPIG_AMX
#endif
#if defined(__AVX512BF16__)
#define MAGICPIG_BF16
#endif
#include "flash.h"
#include "simd.h"

namespace {
using namespace magicpig;
}

#include "attend/attend.inl.h"
#include "flash/flash.inl.h"

#define MAGICPIG_TEXT_OF(x) #x
#define MAGICPIG_TEXT(x) MAGICPIG_TEXT_OF(x)

namespace magicpig {
extern const FlashKernels MAGICPIG_FLASH;
const FlashKernels MAGICPIG_FLASH{MAGICPIG_TEXT(MAGICPIG_FLASH), flash_bytes, flash_width, padded_rows, flash};
}  // namespace magicpig
