// What a block of the persistent frame kernel streams through its ring, phase after phase: its rows of the matrices
// and, beyond kParted positions, its share of the past's keys and values.
#pragma once

#include "frame_state.cuh"

namespace s1 {

// The positions of the past that this block attends to: a part of those of one key/value head. They come in units of
// the ring, keys in the first piece and values in the second, and in groups of kGroupUnits units, whose eight runs of
// kRunRows positions lie 16 bytes out of step with each other: matrices that have a row of each are read without bank
// conflicts. The frame's own position is no part of it; the block with the last part has that.
struct PastShare {
  static constexpr int kGroupUnits = 4, kUnitRuns = 2, kRunRows = 16;
  static constexpr int kUnitPositions = kUnitRuns * kRunRows, kGroupPositions = kGroupUnits * kUnitPositions;
  static constexpr int kGroupWarps = kRunRows / 2;        // with two rows of every run each
  static constexpr int kGroups = kWorkers / kGroupWarps;  // at a time
  static constexpr int kPositionBytes = kSlowDim * 2;     // of a key, or a value
  static_assert(kGroupUnits * kUnitRuns == 8 && kUnitPositions * kPositionBytes + 7 * 16 <= kPiecePitch);

  int head, part, chunk, begin, end;

  __device__ __forceinline__ explicit PastShare(int position) {
    head = own_block() / kSplits;
    part = own_block() % kSplits;
    chunk = ceil_div(ceil_div(position, kSplits), kChunkStep) * kChunkStep;
    begin = min(part * chunk, position);
    end = min(begin + chunk, position);
  }
  // Of the ring, in every block.
  __device__ __forceinline__ int units() const { return ceil_div(chunk, kUnitPositions); }
  __device__ __forceinline__ int warps() const { return min(ceil_div(units(), kGroupUnits) * kGroupWarps, kWorkers); }
  __device__ __forceinline__ bool has_own() const { return part == kSplits - 1; }
  // Where in a piece run `run` of its group begins.
  static __device__ __forceinline__ int run_at(int run) {
    return run % kUnitRuns * (kRunRows * kPositionBytes) + run * 16;
  }
};

// A layer's keys (side 0) or values (side 1) of this block's key/value head, in its cache.
template <class T>
__device__ __forceinline__ T* cached_rows(const PersistentFrameArgs& a, int layer, int side) {
  const int64 first = static_cast<int64>(own_block() / kSplits) * a.capacity;
  return reinterpret_cast<T*>(a.caches[2 * layer + side]) + first * kSlowDim;
}

template <class T>
struct FrameStream {
  // The first phase of the list for a position: there is one for every number of units of the past.
  static __device__ __forceinline__ int first_phase(const PersistentFrameArgs& a, int position) {
    return position <= kParted ? 0 : PastShare(position).units() * a.phase_count;
  }

  // The first kCopyLanes lanes of the warp that streams. They go in step, a unit each, so that none is a turn of the
  // ring ahead of another. Where a unit's chunks lie is asked for a step ahead.
  static __device__ __forceinline__ void run(const PersistentFrameArgs& a, Shared<T>& s) {
    a.near ? stream<true>(a, s) : stream<false>(a, s);
  }
  template <bool kPacked>
  static __device__ __forceinline__ void stream(const PersistentFrameArgs& a, Shared<T>& s) {
    const int lane = lane_id();
    const Phase* phases = a.phases + s.first_phase;
    const auto near_of = [&](int unit) -> uint32 { return kPacked ? a.near[unit * kPairs + own_block() / 2] : 0; };
    Phase next = phases[0];
    uint32 coming = near_of(next.unit + lane);
    for (int p = 0; p < a.phase_count; ++p) {
      const Phase f = next;
      const int under_way = f.kind == kHead     ? kUnderWayHead
                            : f.kind == kAttend ? kUnderWayPast
                            : kPacked           ? kUnderWayNear
                                                : kUnderWay;
      if (p + 1 < a.phase_count) next = phases[p + 1];
      const uint64 policy = f.kept_share > 0.0f ? keep_share(f.kept_share) : pass_through();
      RingCursor at = RingCursor{f.slot, f.parity}.ahead(lane);
      for (int u = lane; u - lane < f.units; u += kCopyLanes) {
        const uint32 near = coming;
        coming = near_of(u + kCopyLanes < f.units ? f.unit + u + kCopyLanes : next.unit + lane);
        if (u < f.units) {
          barrier_wait(s.empty + at.slot, at.parity ^ 1);
          if (p > 0 || u >= under_way) {
            RingCursor before = at;
            before.retreat(under_way);
            barrier_wait(s.full + before.slot, before.parity);
          }
          if (f.kind == kAttend) {
            copy_past(a, s, f, u, at.slot);
          } else if constexpr (kPacked) {
            copy_near(s, f, u, near, at.slot, policy);
          } else {
            copy_unit(s, f, u, at.slot, policy);
          }
        }
        at.advance(kCopyLanes);
        __syncwarp((1u << kCopyLanes) - 1);
      }
    }
  }

  // The rows of a block lie side by side. kSwiglu takes tiles of w1 and w3 by turns.
  static __device__ __forceinline__ void copy_unit(Shared<T>& s, const Phase& f, int u, int slot, uint64 policy) {
    const int row_bytes = f.slices * kRowBytes, at = (f.second ? u / 2 : u) * kUnitBytes;
    const int bytes = max(0, min(kUnitBytes, rows_here(f) * row_bytes - at)), first = min(bytes, kPieceBytes);
    const uint64 from = (f.second && u % 2 ? f.second : f.weight) + static_cast<int64>(first_row(f)) * row_bytes + at;
    unsigned char* to = s.ring + slot * kSlotBytes;
    barrier_expect(s.full + slot, bytes);
    if (bytes > 0) bulk_copy(to, reinterpret_cast<const void*>(from), first, s.full + slot, policy);
    if (bytes > first)
      bulk_copy(to + kPiecePitch, reinterpret_cast<const void*>(from + first), bytes - first, s.full + slot, policy);
  }
  // The chunks of a packed unit that are near, each of a pair. `near` says of each pair which is the even block's.
  static __device__ __forceinline__ void copy_near(Shared<T>& s, const Phase& f, int u, uint32 near, int slot,
                                                   uint64 policy) {
    const int left = f.chunks - u * kUnitChunks;
    const int64 unit = static_cast<int64>(own_block() / 2) * ceil_div(f.chunks, kUnitChunks) + u;
    const uint64 pairs = f.weight + unit * (2 * kUnitBytes);
    if (own_block() % 2) near = ~near;
    unsigned char* to = s.ring + slot * kSlotBytes;
    barrier_expect(s.full + slot, max(0, min(left, kUnitChunks)) * kChunkBytes);
#pragma unroll
    for (int i = 0; i < kUnitChunks; ++i)
      if (i < left)
        bulk_copy(to + i / 2 * kPiecePitch + i % 2 * kChunkBytes,
                  reinterpret_cast<const void*>(pairs + (2 * i + (near >> i & 1)) * kChunkBytes), kChunkBytes,
                  s.full + slot, policy);
  }
  // A unit of the past, of the positions that are there.
  static __device__ __forceinline__ void copy_past(const PersistentFrameArgs& a, Shared<T>& s, const Phase& f, int u,
                                                   int slot) {
    using Share = PastShare;
    const Share mine(s.position);
    const int first = mine.begin + u * Share::kUnitPositions;
    const int rows = max(0, min(mine.end - first, Share::kUnitPositions));
    unsigned char* to = s.ring + slot * kSlotBytes;
    barrier_expect(s.full + slot, 2 * rows * Share::kPositionBytes);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const T* from = cached_rows<T>(a, f.layer, side) + static_cast<int64>(first) * kSlowDim;
#pragma unroll
      for (int i = 0; i < Share::kUnitRuns; ++i) {
        const int taken = min(rows - i * Share::kRunRows, Share::kRunRows);
        if (taken > 0)
          bulk_copy(to + side * kPiecePitch + Share::run_at(u % Share::kGroupUnits * Share::kUnitRuns + i),
                    from + i * Share::kRunRows * kSlowDim, taken * Share::kPositionBytes, s.full + slot,
                    pass_through());
      }
    }
  }
};

}  // namespace s1
