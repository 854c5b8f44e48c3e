// A launch: all its fibers, and the scheduler that runs them, block by block and warp by warp, until all have ended or
// none moves any more.
#pragma once

#include <stdlib.h>
#include <sys/mman.h>

#include "report.h"

namespace emulator {

enum Result { kDone, kDeadlock, kFailed };
constexpr size_t kStackBytes = 24 * 1024;
constexpr uint64_t kStackEnd = 0x5ca1ab1edeadbeefull;  // stands at a stack's end as long as nothing has run over it
constexpr int kIdleRounds = 400;                       // far more than any copy or poll takes

static void (*kernel)(const void*);
static const void* kernel_args;
static unsigned char* stacks;
static size_t stack_count;

inline void fiber_main() {
  kernel(kernel_args);
  do_async_copies(~0u);
  ++progress;
  Fiber* me = current;
  me->wait = Wait::kExited;
  me->warp->ready &= ~me->bit, me->warp->live &= ~me->bit;
  leave();
  __builtin_trap();
}

inline void make_stacks(size_t count) {
  if (count > stack_count) {
    if (stacks) munmap(stacks, stack_count * kStackBytes);
    void* room =
        mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) {
      perror("emulator: no room for stacks");
      abort();
    }
    madvise(room, count * kStackBytes, MADV_NOHUGEPAGE);  // a fiber touches a page or two
    stacks = (unsigned char*)room, stack_count = count;
  }
  for (size_t i = 0; i < count; ++i) {
    *(uint64_t*)(stacks + i * kStackBytes) = kStackEnd;
    // The tops are spread over the cache's sets.
    void** top = (void**)((uintptr_t)(stacks + (i + 1) * kStackBytes - i * 7 % 32 * 192) & ~uintptr_t{63});
    *--top = nullptr;  // as if fiber_main had been called
    *--top = (void*)fiber_main;
    fibers[i].stack = top - 6;
  }
}
inline bool stacks_whole() {
  for (size_t i = 0; i < fibers.size(); ++i)
    if (*(uint64_t*)(stacks + i * kStackBytes) != kStackEnd) return false;
  return true;
}

inline void make_blocks(Dim3 grid, Dim3 block, size_t shared_bytes) {
  static std::vector<Meeting> meetings;
  static std::vector<unsigned char> shared;
  grid_dim = grid, block_dim = block;
  const size_t count = (size_t)grid.x * grid.y * grid.z, threads = (size_t)block.x * block.y * block.z;
  const size_t warps = (threads + 31) / 32, each = ((shared_bytes + 1023) / 1024 + 1) * 1024 + kStaticShared;
  fibers.assign(count * threads, Fiber{});
  blocks.assign(count, Block{});
  meetings.assign(count * warps * kMeetings, Meeting{});
  shared.assign(count * each + 1024, 0x7e);  // shared memory begins as garbage
  unsigned char* first = (unsigned char*)(((uintptr_t)shared.data() + 1023) / 1024 * 1024);
  for (size_t b = 0; b < count; ++b) {
    Block& k = blocks[b];
    k.index = {(unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y), (unsigned)(b / grid.x / grid.y)};
    k.shared = first + b * each, k.shared_bytes = (shared_bytes + 127) / 128 * 128, k.shared_room = each;
    k.warps.assign(warps, Warp{});
    for (size_t w = 0; w < warps; ++w) {
      const size_t lanes = std::min<size_t>(32, threads - w * 32);
      k.warps[w].live = k.warps[w].ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
      k.warps[w].index = (int)w, k.warps[w].block = &k, k.warps[w].meetings = &meetings[(b * warps + w) * kMeetings];
    }
    for (size_t t = 0; t < threads; ++t) {
      Fiber& f = fibers[b * threads + t];
      f.warp = &k.warps[t / 32], f.block = &k, f.bit = 1u << t % 32;
      f.index = {(unsigned)(t % block.x), (unsigned)(t / block.x % block.y), (unsigned)(t / block.x / block.y)};
    }
  }
}

// Runs a warp as far as it comes. Once no other lane can run, those that ask in one place are the active ones.
inline void run_warp(Warp* w) {
  for (;;) {
    while (w->ready) {
      current = next_of(w);
      emulator_switch(&scheduler_stack, current->stack);
      current = nullptr;
      if (!failure.empty()) return;
    }
    if (!w->asking) return;
    const Site first = fiber_of(w, __builtin_ctz(w->asking))->site;
    uint32_t active = 0;
    for (int i = 0; i < 32; ++i) {
      if (!(w->asking >> i & 1)) continue;
      const Site site = fiber_of(w, i)->site;
      if (site.line == first.line && site.file == first.file) active |= 1u << i;
    }
    for (int i = 0; i < 32; ++i)
      if (active >> i & 1) fiber_of(w, i)->active_mask = active;
    w->asking &= ~active;
    w->ready |= active;
  }
}
// A block's turn: all its warps but those of `late`, as far as they come. Returns whether it lives.
inline bool run_block(Block& b, const std::vector<int>& order, uint64_t late) {
  do_bulk_copies(&b);
  bool more = false;
  for (Warp& w : b.warps) w.ready |= w.spins, w.spins = 0, more |= w.live != 0;
  const bool lives = more;
  while (more && failure.empty()) {
    more = false;
    for (int i : order) {
      Warp& w = b.warps[i];
      if (late >> i & 1 || !(w.ready | w.asking)) continue;
      run_warp(&w), more = true;
      if (!failure.empty()) break;
    }
  }
  return lives;
}
inline bool lives(const Block& b) {
  return std::any_of(b.warps.begin(), b.warps.end(), [](const Warp& w) { return w.live != 0; });
}

// Seed 0 runs blocks, warps and lanes in their natural order; any other in an order of its own, in which some lag
// behind. A right kernel's results have the same bits for all.
inline Result run(void (*f)(const void*), const void* args, Dim3 grid, Dim3 block, size_t shared_bytes, uint64_t seed) {
  kernel = f, kernel_args = args;
  failure.clear(), report.clear();
  make_blocks(grid, block, shared_bytes);
  make_stacks(fibers.size());
  random_state = 0x9e3779b97f4a7c15ull * (1 + seed);
  reverse_lanes = false;
  std::vector<int> order(blocks.size()), warps(blocks[0].warps.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = (int)i;
  for (size_t i = 0; i < warps.size(); ++i) warps[i] = (int)i;
  const auto shuffle_order = [](std::vector<int>& v) {
    for (size_t i = v.size() - 1; i > 0; --i) std::swap(v[i], v[random_bits() % (i + 1)]);
  };
  uint64_t seen = progress;
  int idle = 0;
  for (bool living = true; living;) {
    living = false;
    if (seed) shuffle_order(order), shuffle_order(warps);
    for (int i : order) {
      if (seed && random_bits() % 8 == 0) {  // not this time
        living |= lives(blocks[i]);
        continue;
      }
      const uint64_t late = seed ? random_bits() & random_bits() & random_bits() : 0;
      if (seed) reverse_lanes = random_bits() & 1;
      living |= run_block(blocks[i], warps, late);
      if (failure.empty()) continue;
      report_failure();
      return kFailed;
    }
    idle = progress == seen ? idle + 1 : 0;
    seen = progress;
    if (living && idle > kIdleRounds) {
      report = "deadlock: nothing moves any more\n";
      report_waits();
      return kDeadlock;
    }
  }
  if (stacks_whole()) return kDone;
  report = "a fiber's stack was too small: raise kStackBytes";
  return kFailed;
}

}  // namespace emulator
