// How fibers meet: the collectives of a warp, and the named barriers of a block.
#pragma once

#include "fibers.h"

namespace emulator {

enum Kind { kSync = 1, kShuffle, kVote, kReduce, kMatrix };

template <class T>
inline uint64_t bits_of(T x) {
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T>
inline T of_bits(uint64_t bits) {
  T x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The meeting of the lanes of `mask` that the caller comes to: it may run ahead of the one before it by a lane or so.
__noinline__ inline Meeting* join(uint32_t mask, Kind kind, Site site) {
  Warp* w = current->warp;
  const uint32_t bit = current->bit;
  if (!(mask & bit)) fail(site, "a warp collective whose mask %08x lacks the caller", mask);
  Meeting *m = nullptr, *unused = nullptr;
  for (Meeting* x = w->meetings; x < w->meetings + kMeetings && !m; ++x) {
    if (x->mask == mask && x->arrived != mask && !(x->arrived & bit)) m = x;
    if (!x->mask && !unused) unused = x;
  }
  if (!m) {
    if (!unused) fail(site, "too many warp collectives at once");
    m = unused;
    m->mask = mask, m->arrived = 0, m->left = 0, m->kind = kind;
  }
  if (m->kind != kind) fail(site, "lanes of a warp meet in different collectives (mask %08x)", mask);
  m->arrived |= bit;
  return m;
}
inline bool complete(const Meeting* m) { return m->arrived == m->mask; }
__noinline__ inline void meet(Meeting* m, Site site) {
  if (complete(m)) {
    ++progress;
    current->warp->ready |= m->mask;
  } else {
    wait(Wait::kCollective, m->mask, 0, site);
  }
}
inline void part(Meeting* m) {
  m->left |= current->bit;
  if (m->left == m->mask) m->mask = 0;
}

inline void sync_warp(uint32_t mask, Site site) {
  Meeting* m = join(mask, kSync, site);
  meet(m, site);
  part(m);
}
// Every lane brings x, and has f of the meeting.
template <class T, class F>
__noinline__ T collect(uint32_t mask, Kind kind, T x, F f, Site site) {
  Meeting* m = join(mask, kind, site);
  m->value[lane()] = bits_of(x);
  meet(m, site);
  const T y = f(*m);
  part(m);
  return y;
}
template <class T>
inline T shuffle(uint32_t mask, T x, int from, Site site) {
  return collect(
      mask, kShuffle, x, [&](const Meeting& m) { return m.mask >> from & 1 ? of_bits<T>(m.value[from]) : x; }, site);
}
template <class T, class F>
inline T reduce(uint32_t mask, T x, F f, Site site) {
  return collect(
      mask, kReduce, x,
      [&](const Meeting& m) {
        T y = x;
        bool first = true;
        for (int i = 0; i < 32; ++i) {
          if (!(m.mask >> i & 1)) continue;
          const T other = of_bits<T>(m.value[i]);
          y = first ? other : f(y, other), first = false;
        }
        return y;
      },
      site);
}
// The lanes that ask in one place, once no other of the warp can run.
__noinline__ inline uint32_t active_mask(Site site) {
  current->warp->asking |= current->bit;
  wait(Wait::kActivemask, 0, 0, site);
  return current->active_mask;
}

// Arrives at a barrier of the block, and waits there if asked to. Returns whether any came with a `value`.
__noinline__ inline int barrier(int number, int count, bool waits, int value, Site site) {
  Block* b = current->block;
  if (number < 0 || number > 15) fail(site, "there is no barrier %d", number);
  NamedBarrier& n = b->barriers[number];
  if (n.arrived == 0) n.expected = count, n.any = 0;
  if (n.expected != count) fail(site, "barrier %d is met with counts %d and %d", number, n.expected, count);
  n.any |= value != 0;
  if (++n.arrived == count) {
    ++progress;
    n.arrived = 0, n.result = n.any;
    for (size_t i = 0; i < b->warps.size(); ++i) b->warps[i].ready |= n.waiting[i], n.waiting[i] = 0;
    return n.result;
  }
  if (!waits) return 0;
  n.waiting[current->warp->index] |= current->bit;
  wait(Wait::kBarrier, number, count, site);
  return n.result;
}
inline int barrier_of_all(int value, Site site) {
  return barrier(0, (int)(block_dim.x * block_dim.y * block_dim.z), true, value, site);
}

}  // namespace emulator
