// Memory as a block sees it: shared addresses, mbarriers, copies that land late, and polls.
//
// Loads and stores are sequentially consistent: fences order nothing here.
#pragma once

#include <type_traits>

#include "meetings.h"

namespace emulator {

constexpr size_t kStaticShared = 16 * 1024;  // room behind the dynamic part

inline uint32_t to_shared(const void* p, Site site = here()) {
  const size_t at = (const unsigned char*)p - current->block->shared;
  if (at >= current->block->shared_bytes) fail(site, "an address is not in this block's shared memory");
  return (uint32_t)at;
}
template <class A>
inline void* from_shared(A a, Site site) {
  if constexpr (std::is_pointer<A>::value) {
    return (void*)a;
  } else {
    if (a >= current->block->shared_bytes) fail(site, "shared address %llx is out of bounds", (unsigned long long)a);
    return current->block->shared + a;
  }
}
// A __shared__ variable, known by the address of its key.
template <class T>
inline T& static_shared(const void* key) {
  Block* b = current->block;
  const auto [found, added] = b->statics.try_emplace(key, b->shared_bytes);
  if (added) b->shared_bytes += (sizeof(T) + 127) / 128 * 128;
  if (b->shared_bytes > b->shared_room) fail(here(), "too little room for static shared memory: raise kStaticShared");
  return *(T*)(b->shared + found->second);
}

// ---- mbarriers
struct Mbarrier {
  uint32_t phase : 1, expected : 15, pending : 15, made : 1;
  int32_t bytes;  // still to come
};
static_assert(sizeof(Mbarrier) == 8, "an mbarrier is a word of 64 bits");

inline Mbarrier* mbarrier_at(uint64_t* p, Site site) {
  Mbarrier* m = (Mbarrier*)p;
  if (!m->made) fail(site, "an mbarrier is not initialised (shared address %x)", to_shared(p));
  return m;
}
inline void mbarrier_check(Mbarrier* m) {
  if (m->pending == 0 && m->bytes == 0) m->phase ^= 1, m->pending = m->expected, ++progress;
}
inline void mbarrier_init(uint64_t* p, int arrivals) {
  const Mbarrier m{0, (uint32_t)arrivals, (uint32_t)arrivals, 1, 0};
  memcpy(p, &m, sizeof m);
}
// Returns the phase that it arrives in.
inline uint32_t mbarrier_arrive(uint64_t* p, int bytes, Site site) {
  Mbarrier* m = mbarrier_at(p, site);
  const uint32_t phase = m->phase;
  if (m->pending == 0) fail(site, "more arrive at an mbarrier than it expects (shared address %x)", to_shared(p));
  m->bytes += bytes;
  m->pending -= 1;
  mbarrier_check(m);
  return phase;
}
// Whether that phase is over; a fiber that has to hear no yields before.
inline bool mbarrier_over(uint64_t* p, uint32_t phase, Site site) {
  const Mbarrier* m = mbarrier_at(p, site);
  if (m->phase == (phase & 1)) spin(Wait::kMbarrier, to_shared(p), phase & 1, site);
  return m->phase != (phase & 1);
}

// ---- copies
constexpr int kCopyDelay = 3;  // a bulk copy takes up to so many turns of its block
static uint64_t random_state;
inline uint64_t random_bits() {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return random_state;
}

inline void bulk_copy(void* to, const void* from, int bytes, uint64_t* mbarrier, Site site) {
  if (((uintptr_t)to | (uintptr_t)from | bytes) & 15 || bytes <= 0)
    fail(site, "a bulk copy of %d bytes from %p to %p: no multiples of 16", bytes, from, to);
  to_shared(to, site), to_shared((char*)to + bytes - 1, site), mbarrier_at(mbarrier, site);
  current->block->copies.push_back({to, from, bytes, mbarrier, (int)(random_bits() % kCopyDelay)});
}
// Those that are due.
inline void do_bulk_copies(Block* b) {
  for (size_t i = 0; i < b->copies.size();) {
    BulkCopy& waiting = b->copies[i];
    if (waiting.due-- > 0) {
      ++i;
      continue;
    }
    const BulkCopy c = waiting;
    waiting = b->copies.back();
    b->copies.pop_back();
    memcpy(c.to, c.from, c.bytes);
    ++progress;
    Mbarrier* m = (Mbarrier*)c.mbarrier;
    m->bytes -= c.bytes;
    mbarrier_check(m);
  }
}

// cp.async of groups before this one: done as late as the waits for them allow.
inline void do_async_copies(uint32_t before_group) {
  Fiber* f = current;
  uint32_t kept = 0;
  for (uint32_t i = 0; i < f->async_count; ++i) {
    const AsyncCopy& c = f->async[i];
    if (c.group < before_group)
      memcpy(c.to, c.from, c.bytes);
    else
      f->async[kept++] = c;
  }
  f->async_count = kept;
}
inline void async_copy(void* to, const void* from, int bytes, Site site) {
  if (((uintptr_t)to | (uintptr_t)from) & (bytes - 1))
    fail(site, "cp.async of %d bytes is not aligned: %p %p", bytes, to, from);
  Fiber* f = current;
  if (f->async_count == kAsyncCopies) do_async_copies(~0u);
  f->async[f->async_count++] = {to, from, (uint32_t)bytes, f->group};
}

// ---- polls
inline void forget_polls() {
  for (const void*& p : current->polled) p = nullptr;
  current->polls = 0;
}
// Before a load that may be one of a loop's: a fiber that asks again, or for very much, yields first.
inline void before_poll(const void* at, Site site) {
  Fiber* f = current;
  bool again = ++f->polls >= 32;
  for (const void* p : f->polled) again |= p == at;
  if (again) {
    forget_polls();
    spin(Wait::kPoll, (uint64_t)at, 0, site);
  }
  f->polled[f->polled_at++ % 4] = at;
}
template <class T, class F>
inline T atomic(T* p, F f, Site site) {
  before_poll(p, site);
  const T old = *p, now = f(old);
  progress += now != old;
  *p = now;
  return old;
}

}  // namespace emulator
