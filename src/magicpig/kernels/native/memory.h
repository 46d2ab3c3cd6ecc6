// Large, lazily touched, huge-page-friendly memory straight from the system.
#pragma once

#include <cstddef>

namespace magicpig {

// At least `bytes`, zeroed, aligned to a huge page when larger than one. Throws std::bad_alloc.
void* allocate(size_t bytes);
void release(void* memory, size_t bytes);

// Asks for every cache line of [memory, memory + bytes) once, on all threads; returns a checksum so that it is not
// optimised away. The time it takes is the floor of any exact attention over as many bytes.
size_t stream_read(const void* memory, size_t bytes);

}  // namespace magicpig
