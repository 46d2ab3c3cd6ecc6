#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "errors.h"

namespace magicpig {
namespace {

// One parallel loop: workers take the next index until none is left.
struct Loop {
  int64_t count;
  Task task;
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      try {
        task(context, i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
};

struct TorchPool {
  int32_t (*parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*) = nullptr;
  int32_t (*get_num_threads)(uint32_t*) = nullptr;

  TorchPool() {
#if defined(__APPLE__)
    void* library = dlopen("libtorch_cpu.dylib", RTLD_NOLOAD | RTLD_LAZY);
#else
    void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
#endif
    if (library == nullptr) return;
    parallel_for = reinterpret_cast<decltype(parallel_for)>(dlsym(library, "torch_parallel_for"));
    get_num_threads = reinterpret_cast<decltype(get_num_threads)>(dlsym(library, "torch_get_num_threads"));
  }
  bool available() const { return parallel_for != nullptr && get_num_threads != nullptr; }
};

const TorchPool& torch_pool() {
  static const TorchPool pool;
  return pool;
}

int processors() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

int wanted_threads() {
  const char* text = std::getenv("MAGICPIG_THREADS");
  if (text == nullptr || *text == '\0') return std::min(processors(), kMaxThreads);
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  if (*end != '\0' || n < 1 || n > kMaxThreads) {
    throw EnvironmentError("MAGICPIG_THREADS=" + std::string(text) + " is not a number from 1 to " +
                           std::to_string(kMaxThreads));
  }
  return static_cast<int>(n);
}

// Workers sleep between loops; the calling thread works too. Never destroyed: a process may end while they sleep, and a
// forked child has none of its parent's.
class StdPool {
 public:
  StdPool() {
    const int wanted = wanted_threads();
    try {
      while (static_cast<int>(workers_.size()) + 1 < wanted) workers_.emplace_back([this] { serve(); });
    } catch (const std::system_error&) {
      // The system allows no more: those that there are do the work.
    }
  }
  int size() const { return static_cast<int>(workers_.size()) + 1; }

  void run(Loop& loop) {
    std::lock_guard one_at_a_time(callers_);
    {
      std::lock_guard lock(mutex_);
      loop_ = &loop;
      busy_ = static_cast<int>(workers_.size());
      ++generation_;
    }
    wake_.notify_all();
    loop.work();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void serve() {
    uint64_t seen = 0;
    for (;;) {
      Loop* loop;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        loop = loop_;
      }
      loop->work();
      std::lock_guard lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex callers_, mutex_;
  std::condition_variable wake_, done_;
  Loop* loop_ = nullptr;
  int busy_ = 0;
  uint64_t generation_ = 0;
};

std::atomic<StdPool*> own_pool{nullptr};
std::atomic<bool> forked{false};

// Of a forked child: the threads are gone, and whoever held a lock with them. What the pool was stays behind.
void leave_pool() {
  own_pool.store(nullptr, std::memory_order_relaxed);
  forked.store(true, std::memory_order_relaxed);
}

[[maybe_unused]] const int watching_forks = pthread_atfork(nullptr, nullptr, leave_pool);

StdPool& std_pool() {
  StdPool* pool = own_pool.load(std::memory_order_acquire);
  if (pool == nullptr) {
    auto* made = new StdPool;
    // Of two that were made at once, one sleeps for ever.
    if (own_pool.compare_exchange_strong(pool, made, std::memory_order_acq_rel)) pool = made;
  }
  return *pool;
}

Pool first_choice() {
  const char* name = std::getenv("MAGICPIG_POOL");
  if (name == nullptr || *name == '\0') return torch_pool().available() ? Pool::torch : Pool::std;
  if (std::strcmp(name, "std") == 0) return Pool::std;
  if (std::strcmp(name, "serial") == 0) return Pool::serial;
  if (std::strcmp(name, "torch") == 0 && torch_pool().available()) return Pool::torch;
  throw EnvironmentError("MAGICPIG_POOL=" + std::string(name) +
                         " is not available; allowed: torch (2.10 or newer, imported first), std, serial");
}

std::atomic<int> active{-1};

int torch_threads() {
  uint32_t n = 1;
  torch_pool().get_num_threads(&n);
  return static_cast<int>(std::clamp<uint32_t>(n, 1, std::numeric_limits<int>::max()));
}

// The pool that runs a loop now. torch's threads do not outlive a fork, and OpenMP waits for them for ever; and it ends
// the process where it is told to start far more threads than there can be.
Pool working_pool() {
  const Pool chosen = pool();
  if (chosen != Pool::torch) return chosen;
  const int n = torch_threads();
  return n > 1 && (forked.load(std::memory_order_relaxed) || n > kMaxThreads) ? Pool::std : Pool::torch;
}

}  // namespace

Pool pool() {
  int chosen = active.load(std::memory_order_acquire);
  if (chosen < 0) {
    chosen = static_cast<int>(first_choice());
    active.store(chosen, std::memory_order_release);
  }
  return static_cast<Pool>(chosen);
}

void use_pool(Pool pool) {
  if (pool == Pool::torch && !torch_pool().available()) {
    throw std::runtime_error("torch's thread pool is not available: torch 2.10 or newer must be imported first");
  }
  active.store(static_cast<int>(pool), std::memory_order_release);
}

int threads() {
  switch (working_pool()) {
    case Pool::torch:
      return torch_threads();
    case Pool::std:
      return std_pool().size();
    case Pool::serial:
      break;
  }
  return 1;
}

void parallel_for(int64_t count, Task task, void* context) {
  Loop loop{count, task, context};
  const int workers = count < 2 ? 1 : static_cast<int>(std::min<int64_t>(threads(), count));
  if (workers == 1) {
    loop.work();
  } else if (working_pool() == Pool::torch) {
    const auto work = [](int64_t begin, int64_t end, void* loop) {
      for (int64_t i = begin; i < end; ++i) static_cast<Loop*>(loop)->work();
    };
    if (torch_pool().parallel_for(0, workers, 1, work, &loop) != 0) loop.work();
  } else {
    std_pool().run(loop);
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace magicpig
