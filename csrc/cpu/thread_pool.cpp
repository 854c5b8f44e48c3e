#include "cpu/thread_pool.h"

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/compiler.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace s1 {
namespace {

// How often a waiting thread looks before it gives up its processor: some 100 us where a pause takes 140 cycles. That
// is longer than two phases differ, and than Python takes from one op to the next.
constexpr int kSpins = 2000;

class Pool {
 public:
  explicit Pool(long long process) : process_(process) {}
  long long process() const { return process_; }

  void run(int threads, void (*body)(void*, int, Barrier&), void* context) {
    std::lock_guard<std::mutex> one_caller(callers_);
    while (static_cast<int>(workers_.size()) < threads - 1) {
      workers_.push_back(std::make_unique<Worker>());
      Worker* worker = workers_.back().get();
      worker->thread = static_cast<int>(workers_.size());
      std::thread([this, worker] { serve(*worker); }).detach();
    }
    Barrier barrier(threads);
    body_ = body;
    context_ = context;
    barrier_ = &barrier;
    running_.store(threads - 1, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      for (int i = 0; i < threads - 1; ++i) workers_[i]->called.store(true, std::memory_order_release);
    }
    wake_.notify_all();
    body(context, 0, barrier);
    for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < kSpins) {
        cpu_relax();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  struct Worker {
    int thread;
    alignas(64) std::atomic<bool> called{false};
  };

  void serve(Worker& worker) {
    for (;;) {
      for (int spins = 0; spins < kSpins && !worker.called.load(std::memory_order_acquire); ++spins) cpu_relax();
      if (!worker.called.load(std::memory_order_acquire)) {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, [&] { return worker.called.load(std::memory_order_acquire); });
      }
      worker.called.store(false, std::memory_order_relaxed);
      body_(context_, worker.thread, *barrier_);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  const long long process_;
  std::mutex callers_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::mutex sleep_;
  std::condition_variable wake_;
  void (*body_)(void*, int, Barrier&) = nullptr;
  void* context_ = nullptr;
  Barrier* barrier_ = nullptr;
  std::atomic<int> running_{0};
};

long long current_process() {
#if defined(_WIN32)
  return 0;  // there is no fork
#else
  return static_cast<long long>(getpid());
#endif
}

// Never destroyed: its threads may outlive static destructors, and a forked child's copy has none.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  const long long process = current_process();
  Pool* known = the_pool.load(std::memory_order_acquire);
  while (known == nullptr || known->process() != process) {
    Pool* fresh = new Pool(process);
    if (the_pool.compare_exchange_strong(known, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
  }
  return *known;
}

}  // namespace

void Barrier::wait(const void* ahead, std::int64_t bytes) {
  const unsigned generation = generation_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  const char* next = static_cast<const char*>(ahead);
  const char* end = next + bytes;
  for (int spins = 0; generation_.load(std::memory_order_acquire) == generation;) {
    if (next < end) {
      prefetch_far(next);
      next += 64;
    } else if (spins < kSpins) {
      cpu_relax();
      ++spins;
    } else {
      std::this_thread::yield();
    }
  }
}

void run_parallel(int threads, void (*body)(void*, int, Barrier&), void* context) {
  if (threads > 1) return pool().run(threads, body, context);
  Barrier alone(1);
  body(context, 0, alone);
}

}  // namespace s1
