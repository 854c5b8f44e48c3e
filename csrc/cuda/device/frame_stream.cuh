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

// The rows of this block's key/value head in a cache of keys, or of values.
template <class T>
__device__ __forceinline__ T* cached_rows(const PersistentFrameArgs& a, uint64 cache) {
  const int64 first = static_cast<int64>(own_block() / kSplits) * a.capacity;
  return reinterpret_cast<T*>(cache) + first * kSlowDim;
}

template <class T>
struct FrameStream {
  // What a unit is made of: `bytes` of each, from global memory to so many bytes behind the slot's begin.
  struct Copies {
    static constexpr int kMost = 4;
    uint64 from[kMost];
    int to[kMost], bytes[kMost];

    // To be worked out here, not after the waits that come next.
    __device__ __forceinline__ void settle() {
#pragma unroll
      for (int i = 0; i < kMost; ++i) asm volatile("" : "+l"(from[i]), "+r"(to[i]), "+r"(bytes[i]));
    }
    __device__ __forceinline__ int all_bytes() const {
      int sum = 0;
#pragma unroll
      for (int i = 0; i < kMost; ++i) sum += bytes[i];
      return sum;
    }
  };

  // The first phase of the list for a position: there is one for every number of units of the past.
  static __device__ __forceinline__ int first_phase(const PersistentFrameArgs& a, int position) {
    return position <= kParted ? 0 : PastShare(position).units() * a.phase_count;
  }

  static __device__ __forceinline__ void run(const PersistentFrameArgs& a, Shared<T>& s) {
    a.near ? stream<true>(a, s) : stream<false>(a, s);
  }

 private:
  // The first kCopyLanes lanes of the warp that streams. They go in step, a unit each, so that none is a turn of the
  // ring ahead of another. Where a unit's chunks lie is asked for a step ahead.
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
                            : kPacked           ? a.under_way_near
                                                : kUnderWay;
      if (p + 1 < a.phase_count) next = phases[p + 1];
      const uint64 policy = f.kept_share > 0.0f ? keep_share(f.kept_share) : pass_through();
      RingCursor at = RingCursor{f.slot, f.parity}.ahead(lane);
      for (int u = lane; u - lane < f.units; u += kCopyLanes) {
        Copies unit = f.kind == kAttend ? past_unit(a, s.position, f, u)
                      : kPacked         ? near_unit(f, u, coming)
                                        : plain_unit(f, u);
        unit.settle();
        coming = near_of(u + kCopyLanes < f.units ? f.unit + u + kCopyLanes : next.unit + lane);
        if (u < f.units) {
          barrier_wait(s.empty + at.slot, at.parity ^ 1);
          barrier_expect(s.full + at.slot, unit.all_bytes());
          if (p > 0 || u >= under_way) {
            RingCursor before = at;
            before.retreat(under_way);
            barrier_wait(s.full + before.slot, before.parity);
          }
#pragma unroll
          for (int i = 0; i < Copies::kMost; ++i)
            if (unit.bytes[i] > 0)
              bulk_copy(s.ring + at.slot * kSlotBytes + unit.to[i], reinterpret_cast<const void*>(unit.from[i]),
                        unit.bytes[i], s.full + at.slot, policy);
        }
        at.advance(kCopyLanes);
        __syncwarp((1u << kCopyLanes) - 1);
      }
    }
  }

  // The rows of a block lie side by side. kSwiglu takes tiles of w1 and w3 by turns.
  static __device__ __forceinline__ Copies plain_unit(const Phase& f, int u) {
    const int row_bytes = f.slices * kRowBytes, at = (f.second ? u / 2 : u) * kUnitBytes;
    const int left = rows_here(f) * row_bytes - at;
    const uint64 from = (f.second && u % 2 ? f.second : f.weight) + static_cast<int64>(first_row(f)) * row_bytes + at;
    const int first = max(0, min(left, kPieceBytes)), second = max(0, min(left - kPieceBytes, kPieceBytes));
    return {{from, from + kPieceBytes}, {0, kPiecePitch}, {first, second}};
  }
  // The chunks of a packed unit that are near, each of a pair. `near` says of each pair which is the even block's.
  static __device__ __forceinline__ Copies near_unit(const Phase& f, int u, uint32 near) {
    static_assert(kUnitChunks == Copies::kMost);
    const int left = f.chunks - u * kUnitChunks;
    const int64 unit = static_cast<int64>(own_block() / 2) * ceil_div(f.chunks, kUnitChunks) + u;
    const uint64 pairs = f.weight + unit * (2 * kUnitBytes);
    if (own_block() % 2) near = ~near;
    Copies c;
#pragma unroll
    for (int i = 0; i < kUnitChunks; ++i) {
      c.from[i] = pairs + (2 * i + (near >> i & 1)) * kChunkBytes;
      c.to[i] = i / 2 * kPiecePitch + i % 2 * kChunkBytes;
      c.bytes[i] = i < left ? kChunkBytes : 0;
    }
    return c;
  }
  // The runs of a unit of the past, as far as its positions are there.
  static __device__ __forceinline__ Copies past_unit(const PersistentFrameArgs& a, int position, const Phase& f,
                                                     int u) {
    using Share = PastShare;
    static_assert(2 * Share::kUnitRuns == Copies::kMost);
    const Share mine(position);
    Copies c;
#pragma unroll
    for (int i = 0; i < Copies::kMost; ++i) {
      const int side = i / Share::kUnitRuns, run = i % Share::kUnitRuns;
      const int first = mine.begin + u * Share::kUnitPositions + run * Share::kRunRows;
      const T* rows = cached_rows<T>(a, side == 0 ? f.cached.keys : f.cached.values);
      c.from[i] = reinterpret_cast<uint64>(rows + static_cast<int64>(first) * kSlowDim);
      c.to[i] = side * kPiecePitch + Share::run_at(u % Share::kGroupUnits * Share::kUnitRuns + run);
      c.bytes[i] = max(0, min(mine.end - first, Share::kRunRows)) * Share::kPositionBytes;
    }
    return c;
  }
};

}  // namespace s1
