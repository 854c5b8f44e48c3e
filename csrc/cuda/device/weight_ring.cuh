// A stream of weights through shared memory: one warp copies units in the order in which the others will want them,
// across the borders of phases, and never waits for activations.
//
// A unit is 16 KB in two pieces of four rows of 1024 16-bit weights. Pieces lie 192 bytes further apart than that, so
// that 64 bytes of a row and of another in the next piece lie in different banks, and there is room for other layouts
// (PastShare). sm_90 and later: bulk copies that complete on an mbarrier.
#pragma once

#include "l2_halves.cuh"

namespace s1 {

constexpr int kRowBytes = 1024 * 2;
constexpr int kPieceRows = 4;
constexpr int kPieceBytes = kPieceRows * kRowBytes, kPiecePitch = kPieceBytes + 192;
constexpr int kUnitBytes = 2 * kPieceBytes, kSlotBytes = 2 * kPiecePitch;
constexpr int kUnitChunks = kUnitBytes / kChunkBytes;
constexpr int kSlots = 10;  // units in the ring

__device__ __forceinline__ uint32 shared_address(const void* p) {
  return static_cast<uint32>(__cvta_generic_to_shared(p));
}

#if S1_ARCH >= 900
__device__ __forceinline__ void barrier_init(uint64* b, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64* b) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
// As often as kTimes would.
template <int kTimes>
__device__ __forceinline__ void barrier_arrive(uint64* b) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)), "n"(kTimes) : "memory");
}
// Arrives, and waits for the others.
__device__ __forceinline__ void barrier_meet(uint64* b) {
  uint64 state;
  asm volatile("mbarrier.arrive.shared.b64 %0, [%1];" : "=l"(state) : "r"(shared_address(b)) : "memory");
  for (uint32 done = 0; !done;)
    asm volatile("{ .reg .pred p; mbarrier.test_wait.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(b)), "l"(state)
                 : "memory");
}
__device__ __forceinline__ bool barrier_done(uint64* b, uint32 parity) {
  uint32 done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(shared_address(b)), "r"(parity)
               : "memory");
  return done != 0;
}
// What L2 is to do with what is read once a frame: to give it up first, so that it keeps code, state and small weights.
// With what is read again: to keep a share of it, by address, as long as it can.
__device__ __forceinline__ uint64 pass_through() {
  uint64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64 keep_share(float share) {
  uint64 policy;
  asm volatile("createpolicy.fractional.L2::evict_last.L2::evict_first.b64 %0, %1;" : "=l"(policy) : "f"(share));
  return policy;
}
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, uint64* b, uint64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(b)), "l"(policy)
      : "memory");
}
// 16 bytes of what passes through: into registers, or to shared memory until copies_done().
__device__ __forceinline__ Vec16 load_once(const void* at) {
  Vec16 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(at), "l"(pass_through()));
  return v;
}
__device__ __forceinline__ void copy_once(Vec16* to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "l"(pass_through())
               : "memory");
}
__device__ __forceinline__ void barriers_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
#else  // never launched there
__device__ __forceinline__ void barrier_init(uint64*, int) {}
__device__ __forceinline__ void barrier_expect(uint64*, int) {}
__device__ __forceinline__ void barrier_arrive(uint64*) {}
template <int kTimes>
__device__ __forceinline__ void barrier_arrive(uint64*) {}
__device__ __forceinline__ void barrier_meet(uint64*) {}
__device__ __forceinline__ bool barrier_done(uint64*, uint32) { return true; }
__device__ __forceinline__ void bulk_copy(void*, const void*, int, uint64*, uint64) {}
__device__ __forceinline__ uint64 pass_through() { return 0; }
__device__ __forceinline__ uint64 keep_share(float) { return 0; }
__device__ __forceinline__ Vec16 load_once(const void*) { return {}; }
__device__ __forceinline__ void copy_once(Vec16*, const void*) {}
__device__ __forceinline__ void barriers_visible() {}
#endif

// A copy that does not come within a second or so never will: the kernel ends, and the error surfaces. At 0.6 GHz that
// is 1.8 s, before Windows resets the GPU.
constexpr long long kPatientCycles = 1ll << (S1_RACECHECK ? 42 : 30);
__device__ __forceinline__ void barrier_wait(uint64* b, uint32 parity) {
  if (barrier_done(b, parity)) return;
  const long long start = clock64();
  while (!barrier_done(b, parity))
    if (clock64() - start > kPatientCycles) __trap();
}

// Slot and parity of the unit that comes next.
struct RingCursor {
  int slot;
  uint32 parity;

  __device__ __forceinline__ void advance(int units) {  // no more than there are slots
    slot += units;
    const bool turned = slot >= kSlots;
    slot -= turned ? kSlots : 0;
    parity ^= static_cast<uint32>(turned);
  }
  __device__ __forceinline__ void retreat(int units) {
    slot -= units;
    const bool turned = slot < 0;
    slot += turned ? kSlots : 0;
    parity ^= static_cast<uint32>(turned);
  }
  __device__ __forceinline__ RingCursor ahead(int units) const {
    RingCursor c = *this;
    c.advance(units);
    return c;
  }
};

}  // namespace s1
