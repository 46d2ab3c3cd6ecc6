// Large, lazily touched, huge-page-friendly memory straight from the system.
#pragma once

#include <cstddef>

namespace magicpig {

// At least `bytes`, zeroed, aligned to a huge page and spread over the memory nodes when larger than one. Throws
// std::bad_alloc.
void* allocate(size_t bytes);
void release(void* memory, size_t bytes);

// Lets the pages of memory that nobody has touched take turns on the memory nodes this process may use, if these are at
// least so many: threads of all nodes read every row. Whether it did so; a policy that is set already (numactl) stays.
bool interleave(void* memory, size_t bytes, int least_nodes);

// Asks for every cache line of [memory, memory + bytes) once, on all threads; returns a checksum so that it is not
// optimised away. The time it takes is the floor of any exact attention over as many bytes.
size_t stream_read(const void* memory, size_t bytes);

}  // namespace magicpig
