// Threads that stay, and the barrier between the phases of an op or a frame.
#pragma once

#include <atomic>
#include <cstdint>

namespace s1 {

// All of `threads` threads wait for each other. Waiting spins first: phases are tens of microseconds long. After that
// it yields, which keeps more threads than processors alive. A waiting thread may read ahead instead of idling, see
// wait().
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  // While it waits, the thread asks for `bytes` bytes from `ahead` on into its second-level cache.
  void wait(const void* ahead = nullptr, std::int64_t bytes = 0);

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> generation_{0};
};

// Runs body(context, thread, barrier) for thread = 0 .. threads-1; the caller is thread 0. Returns when all are done.
// Calls from several threads at once run one after the other; after fork() the child starts threads of its own.
// `body` must not throw.
void run_parallel(int threads, void (*body)(void* context, int thread, Barrier& barrier), void* context);

// The same for a callable body(int thread, Barrier& barrier).
template <class Body>
void parallel(int threads, Body body) {
  run_parallel(
      threads, [](void* context, int thread, Barrier& barrier) { (*static_cast<Body*>(context))(thread, barrier); },
      &body);
}

}  // namespace s1
