#include "memory.h"

#include <sys/mman.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#include "parallel.h"

namespace magicpig {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;

size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

void* allocate(size_t bytes) {
  const size_t length = round_up(std::max<size_t>(bytes, 1), kPage);
  // A mapping larger by one huge page always holds an aligned stretch; the ends are given back.
  const size_t slack = length >= kHugePage ? kHugePage : 0;
  void* memory = mmap(nullptr, length + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  if (slack == 0) return memory;
  char* const start = static_cast<char*>(memory);
  char* const aligned = reinterpret_cast<char*>(round_up(reinterpret_cast<uintptr_t>(start), kHugePage));
  if (aligned > start) munmap(start, aligned - start);
  char* const end = start + length + slack;
  if (aligned + length < end) munmap(aligned + length, end - (aligned + length));
#if defined(MADV_HUGEPAGE)
  madvise(aligned, length, MADV_HUGEPAGE);
#endif
  interleave(aligned, length, 2);
  return aligned;
}

#if defined(SYS_mbind) && defined(SYS_get_mempolicy)
bool interleave(void* memory, size_t bytes, int least_nodes) {
  // As in <numaif.h>, which would need a library.
  constexpr int kDefault = 0, kInterleave = 3;
  constexpr unsigned long kAllowed = 4, kMaxNodes = 1024;
  unsigned long nodes[kMaxNodes / (8 * sizeof(unsigned long))] = {};
  int policy = kDefault;
  if (syscall(SYS_get_mempolicy, &policy, nullptr, 0, nullptr, 0) != 0 || policy != kDefault) return false;
  if (syscall(SYS_get_mempolicy, nullptr, nodes, kMaxNodes, nullptr, kAllowed) != 0) return false;
  int count = 0;
  for (const unsigned long word : nodes) count += __builtin_popcountl(word);
  return count >= least_nodes && syscall(SYS_mbind, memory, bytes, kInterleave, nodes, kMaxNodes, 0) == 0;
}
#else
bool interleave(void*, size_t, int) { return false; }
#endif

void release(void* memory, size_t bytes) { munmap(memory, round_up(std::max<size_t>(bytes, 1), kPage)); }

size_t stream_read(const void* memory, size_t bytes) {
  constexpr size_t kPiece = size_t{1} << 20;
  const auto* words = static_cast<const uint64_t*>(memory);
  const int64_t pieces = static_cast<int64_t>((bytes + kPiece - 1) / kPiece);
  std::atomic<size_t> total{0};
  parallel(pieces, [&](int64_t piece) {
    const size_t begin = piece * kPiece / 8, end = std::min(bytes, (piece + 1) * kPiece) / 8;
    uint64_t sums[8] = {};
    size_t i = begin;
    for (; i + 8 <= end; i += 8) {
      for (int j = 0; j < 8; ++j) sums[j] ^= words[i + j];
    }
    for (; i < end; ++i) sums[0] ^= words[i];
    for (int j = 1; j < 8; ++j) sums[0] ^= sums[j];
    total ^= sums[0];
  });
  return total;
}

}  // namespace magicpig
