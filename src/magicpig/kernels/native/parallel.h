// Parallel loops on torch's own thread pool when torch is loaded, else on a small pool of ours.
//
// torch's OpenMP workers keep spinning after each of its operations, so a second pool beside it loses; its
// `torch_parallel_for` is a stable C symbol (since torch 2.10) which needs neither libtorch nor OpenMP at link time.
#pragma once

#include <cstdint>

namespace magicpig {

enum class Pool : int { torch, std, serial };

constexpr int kMaxThreads = 1024;

Pool pool();
void use_pool(Pool pool);  // throws std::runtime_error when torch's pool is asked for and torch is not loaded
int threads();             // that a loop has: those of the pool in use, or of `std` where torch's cannot run

using Task = void (*)(void* context, int64_t index);

// Runs task(context, 0 .. count - 1), in any order, each index once; returns when all are done.
// The first exception of a task is rethrown here, after the others have finished.
void parallel_for(int64_t count, Task task, void* context);

template <class Body>
void parallel(int64_t count, const Body& body) {
  parallel_for(
      count, [](void* context, int64_t index) { (*static_cast<const Body*>(context))(index); },
      const_cast<Body*>(&body));
}

}  // namespace magicpig
