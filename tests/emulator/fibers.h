// CUDA threads as fibers of one CPU thread: what a fiber, a warp and a block are, and how a fiber yields.
//
// All threads of a launch exist at once, as those of a cooperative launch do. A fiber runs until it has to wait for
// others, then hands over to another of its warp or to the scheduler (launch.h). Where and for what it waits is kept,
// for reports (report.h). Nothing in runtime headers knows of the project. Linux on x86-64, g++ or clang.
#pragma once

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <map>
#include <string>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __CUDA_ARCH__ 900
#define __CUDACC_RTC__ 1  // no host pass

struct Dim3 {
  unsigned x, y, z;
};

namespace emulator {

// A place in the sources: the default argument of what waits or checks.
struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

enum class Wait { kNone, kCollective, kBarrier, kMbarrier, kPoll, kActivemask, kSleep, kExited };
constexpr const char* kWaits[] = {"running", "warp collective", "barrier", "mbarrier",
                                  "poll",    "activemask",      "sleep",   "exited"};

// One meeting of a warp's lanes, with what they bring.
struct Meeting {
  uint32_t mask, arrived, left;  // no mask: free
  int kind;
  uint64_t value[32];
  uint32_t fragment[6][32];
  float sum[4][32];
};
constexpr int kMeetings = 12;  // of a warp at once

struct Block;
struct Warp {
  uint32_t ready;   // lanes that can run
  uint32_t spins;   // that run again in the block's next turn
  uint32_t live;    // that have not ended
  uint32_t asking;  // that wait for __activemask
  int index;
  Block* block;
  Meeting* meetings;
};
struct NamedBarrier {
  int expected, arrived;
  uint32_t waiting[32];  // lanes, by warp
  int any, result;
};
struct BulkCopy {
  void* to;
  const void* from;
  int bytes;
  uint64_t* mbarrier;
  int due;  // turns of its block
};
struct Block {
  Dim3 index;
  unsigned char* shared;
  size_t shared_bytes, shared_room;
  NamedBarrier barriers[16];
  std::vector<BulkCopy> copies;
  std::vector<Warp> warps;
  std::map<const void*, size_t> statics;  // where static shared memory is
};
struct AsyncCopy {
  void* to;
  const void* from;
  uint32_t bytes, group;
};
constexpr uint32_t kAsyncCopies = 24;  // of a fiber at once; older ones are done early
struct Fiber {
  void* stack;
  Warp* warp;
  Block* block;
  Dim3 index;
  uint32_t bit, active_mask;
  const void* polled[4];  // the addresses asked last, and how many since the last wait
  int polled_at, polls;
  uint64_t clock;
  Wait wait;
  uint64_t subject;  // mask, barrier or address
  uint32_t detail;   // count or parity
  Site site;
  void* caller;
  uint32_t group, async_count;
  AsyncCopy async[kAsyncCopies];
};

static Fiber* current;  // none: the scheduler
static std::vector<Fiber> fibers;
static std::vector<Block> blocks;
static Dim3 grid_dim, block_dim;
static void* scheduler_stack;
static uint64_t progress;   // whatever another thread may wait for adds to it
static bool reverse_lanes;  // the order in which a warp's lanes run
static std::string failure;
static std::vector<void*> failure_frames;

extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.local emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");

inline int lane() { return __builtin_ctz(current->bit); }

inline Fiber* fiber_of(Warp* w, int lane) {
  const size_t threads = (size_t)block_dim.x * block_dim.y * block_dim.z;
  return &fibers[(w->block - blocks.data()) * threads + w->index * 32 + lane];
}
inline Fiber* next_of(Warp* w) {
  return fiber_of(w, reverse_lanes ? 31 - __builtin_clz(w->ready) : __builtin_ctz(w->ready));
}

// Leaves this fiber for another of its warp, or for the scheduler.
__noinline__ inline void leave() {
  Fiber* me = current;
  Warp* w = me->warp;
  if (w->ready) {
    Fiber* next = next_of(w);
    if (next == me) return;
    current = next;
    emulator_switch(&me->stack, next->stack);
  } else {
    emulator_switch(&me->stack, scheduler_stack);
  }
  asm volatile("" ::: "memory");
}

// The fiber, which has said whom it waits for, is not ready any more.
__forceinline__ void wait(Wait kind, uint64_t subject, uint32_t detail, Site site) {
  Fiber* me = current;
  me->wait = kind, me->subject = subject, me->detail = detail, me->site = site;
  me->caller = __builtin_return_address(0);
  me->warp->ready &= ~me->bit;
  leave();
  me->wait = Wait::kNone;
}

// Yields until the block's next turn.
__noinline__ inline void spin(Wait kind, uint64_t subject, uint32_t detail, Site site) {
  current->warp->spins |= current->bit;
  wait(kind, subject, detail, site);
}

[[noreturn]] void fail(Site site, const char* format, ...);

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::current->block->index)
#define blockDim (emulator::block_dim)
#define gridDim (emulator::grid_dim)
