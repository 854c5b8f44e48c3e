// The persistent frame kernel's slow attention at long contexts, where the blocks share the past out and stream it, and
// what of slow attention depends on the position; the projections behind it.
#pragma once

#include "frame_whole_attention.cuh"

namespace s1 {

template <class T>
struct FrameSlowAttention : FrameWholeAttention<T> {
  using Base = FrameWholeAttention<T>;
  using Base::a;
  using Base::kRowWords;
  using Base::lane;
  using Base::order;
  using Base::s;
  using Base::waiting;
  using Base::warp;

  // Behind the ring: by warp the query of both heads, then its part of the result with total and top; the last part is
  // that of the frame's own position.
  struct __align__(16) Sums {
    float element[kSlowDim];
    float2 known;  // total and top
  };
  union Room {
    T query[2][kSlowDim + 8];
    Sums sums[2];
  };
  __device__ __forceinline__ Room* room() const { return reinterpret_cast<Room*>(s.pool + kSlots * kSlotBytes); }
  static_assert(kSlots * kSlotBytes + (kWorkers + 1) * sizeof(Room) <= kPoolBytes);

  // Warps that leave sums, of this block.
  static __device__ __forceinline__ int attending_warps(int position) {
    return position <= kWhole    ? Base::template past<1>(position).warps() + 1
           : position <= kParted ? Base::template past<kMostParts>(position).warps() + 1
                                 : sharing_warps(PastShare(position));
  }
  static __device__ __forceinline__ int sharing_warps(const PastShare& mine) {
    return min(mine.warps() + mine.has_own(), kWorkers);
  }

  // Starts to copy what the first layer attends to, if it is not streamed. Every warp calls it.
  static __device__ __forceinline__ void begin_past(const PersistentFrameArgs& a, Shared<T>& s) {
    if (s.position <= kWhole) {
      Base::template begin_parts<1>(a, s, warp_id(), lane_id());
    } else if (s.position <= kParted) {
      Base::template begin_parts<kMostParts>(a, s, warp_id(), lane_id());
    }
  }

  // Slow attention.
  __device__ __forceinline__ void attend(const Phase& f) {
    if (s.position <= kWhole) return this->template attend_in_parts<1>(f);
    if (s.position <= kParted) return this->template attend_in_parts<kMostParts>(f);
    attend_share(f);
    this->forget_thread();
    if (order() >= kCombiners) return;
    combine(f);
    leave_results();
  }

  // First half: this block has a part of the positions of one key/value head, of which a warp has sixteen at a time;
  // the last warp of the last part has the frame's own as well. The first ones, in order(), merge.
  __device__ __forceinline__ void attend_share(const Phase& f) {
    if (order() < PastShare(s.position).warps()) attend_groups(f);
    const PastShare mine(s.position);
    if (mine.begin == mine.end && !mine.has_own()) return;
    const bool own = mine.has_own() && warp() == kWorkers - 1;
    if (own) attend_own_position(f);
    if (order() < kMergers) {
      sync_attending(sharing_warps(mine));
      merge_sums(f);
    } else if (own || order() < mine.warps()) {
      leave_sums(sharing_warps(mine));
    }
  }

  // This lane's elements of a vector of one of two heads.
  __device__ __forceinline__ int side() const { return lane() / 16; }
  __device__ __forceinline__ int column() const { return lane() % 16 * 8; }
  __device__ __forceinline__ const uint32* share_words(const Phase& f, int row) const {
    return a.words + (f.in + row * kRowWords + column() / 2);
  }
  // What makes queries or keys, which have these norm weights, of the lane's eight elements.
  struct WideTurn {
    bool normed;
    Vec16 weights;
    const uint32* angles;  // in L1, since all layers want them

    __device__ __forceinline__ WideTurn(const PersistentFrameArgs& a, uint64 norm, int position, int column) {
      const T* from = reinterpret_cast<const T*>(norm);
      normed = from != nullptr;
      const uint32 ones = pack<T>(1.0f, 1.0f);
      weights = normed ? load_vec(from + column) : Vec16{{ones, ones, ones, ones}};
      angles = static_cast<const uint32*>(a.cos_sin) + (static_cast<int64>(position) * kSlowDim + column) / 2;
    }
    // rotary(norm(x)), rounded. All lanes call it. Two elements at a time, since there are few registers.
    __device__ __forceinline__ Vec16 operator()(Vec16 x, float eps) const {
      float square = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 v = unpack<T>(x.word[i]);
        square = fmaf(v.x, v.x, fmaf(v.y, v.y, square));
        asm volatile("" : "+r"(x.word[i]));
      }
      const float scale = normed ? rsqrtf(warp_sum<16>(square) / kSlowDim + eps) : 1.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 v = unpack<T>(x.word[i]), n = unpack<T>(weights.word[i]);
        const float2 y = rotated({v.x * (scale * n.x), v.y * (scale * n.y)}, unpack<T>(angles[i]));
        x.word[i] = pack<T>(y.x, y.y);
      }
      return x;
    }
  };

  // What a warp has of the softmax. A lane has of head side(), as sums of two, columns 32 * (lane / 4 % 4) + 8j + 2t
  // and the next.
  struct Running {
    float top = -infinity(), total = 0.0f, sum[4][4] = {};
  };
  // Every second group. A warp waits for its own groups alone, and must not wait for a slot's next unit, whose parity
  // is that of the one before the last, until the last has come: up to the next barrier no slot comes twice.
  __device__ __forceinline__ void attend_groups(const Phase& f) {
    using Share = PastShare;
    static_assert(Share::kGroups * Share::kGroupUnits + 2 <= kSlots, "of these groups, and of slow_output()");
    Running found;
    attend_group<true>(f, order() / Share::kGroupWarps, found);
#pragma unroll 1
    for (int before = Share::kGroups; before * Share::kGroupUnits < f.units; before += Share::kGroups) {
      sync_workers();
      this->forget_thread();
      const int group = before + order() / Share::kGroupWarps;
      if (group * Share::kGroupUnits < f.units) attend_group<false>(f, group, found);
    }
    const float total = warp_sum<4>(found.total);
    __syncwarp();
    Sums& to = room()[order()].sums[side()];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      *reinterpret_cast<float2*>(to.element + lane() / 4 % 4 * 32 + j * 8 + lane() % 4 * 2) = {
          found.sum[j][0] + found.sum[j][2], found.sum[j][1] + found.sum[j][3]};
    if (column() == 0) to.known = {total, found.top};
  }

  // The rows of a group that this warp has: `first` and the next of every run, those that are among the first `left`
  // positions from there on.
  struct GroupRows {
    int first, left;

    __device__ __forceinline__ GroupRows(const FrameSlowAttention& frame, int group) {
      const PastShare mine(frame.s.position);
      first = frame.order() % PastShare::kGroupWarps * 2;
      left = mine.end - mine.begin - group * PastShare::kGroupPositions - first;
    }
    __device__ __forceinline__ bool has(int run, int i) const { return run * PastShare::kRunRows + i < left; }
    // Where a matrix's row, of run lane % 8, is in shared memory; if it is not there, the warp's first instead.
    __device__ __forceinline__ uint32 place(const FrameSlowAttention& frame, const RingCursor& unit, int i) const {
      using Share = PastShare;
      const bool here = has(frame.lane() % 8, i);
      const int run = here ? frame.lane() % 8 : 0, slot = unit.ahead(run / Share::kUnitRuns).slot;
      return shared_address(frame.s.ring) + slot * kSlotBytes + Share::run_at(run) +
             (first + (here ? i : 0)) * Share::kPositionBytes;
    }
  };
  // Of matrix lane / 8, for row i: 32 of the keys' columns, by turns their even and odd pieces; of the values'.
  __device__ __forceinline__ Vec16 load_key(uint32 place, int j) const {
    const int matrix = lane() / 8;
    return load_matrices(place + (matrix % 2 * 2 + matrix / 2) * 16 + j * 64);
  }
  __device__ __forceinline__ Vec16 load_value(uint32 place, int j) const {
    return load_transposed(place + kPiecePitch + lane() / 8 * 64 + j * 16);
  }

  // Two rows of every run of a group, which is given back before the query is waited for. Operand rows g and g + 8 of
  // all products belong to head g / 4 and columns 32 * (g % 4) on. Scores: rows g have the even pieces of the query,
  // rows g + 8 the odd ones. Values: rows g have the high part of the weights, rows g + 8 the low part; each product
  // has half of its inner indices for 32 of the columns and half for 32 others, with zeros in the rows whose columns
  // they are not.
  template <bool kFirst>
  __device__ __forceinline__ void attend_group(const Phase& f, int number, Running& found) {
    using Share = PastShare;
    constexpr int kTimes = kWorkers / Share::kGroupWarps;  // that a warp gives a unit back
    const float scale = rsqrtf(static_cast<float>(kSlowDim)) * kLog2e;
    const int before = number * Share::kGroupUnits;
    const uint32 slot = static_cast<uint32>(f.slot + before), turns = slot / kSlots;
    const typename Base::Units units = this->units({static_cast<int>(slot % kSlots), f.parity ^ (turns & 1)},
                                                   min(f.units - before, Share::kGroupUnits));
    Vec16 key[2][4], value[2][4];
    uint32 at[2];
    {
      const GroupRows rows(*this, number);
#pragma unroll
      for (int i = 0; i < 2; ++i) at[i] = rows.place(*this, units.first, i);
      this->await(units);
      if (rows.left <= 0) return this->template release_for<kTimes>(units);
    }
    if constexpr (kFirst) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        key[i / 4][i % 4] = load_key(at[i / 4], i % 4);
        value[i / 4][i % 4] = load_value(at[i / 4], i % 4);
      }
      this->template release_for<kTimes>(units);
      this->forget_thread();
      const WideTurn turn(a, f.cached.query_norm, s.position, column());
      const Vec16 query = turn(waiting.take4(share_words(f, Base::key_head() * 2 + side())), a.eps);
      __syncwarp();
      store_vec(room()[order()].query[side()] + column(), query);
      __syncwarp();
    }
    const GroupRows rows(*this, number);
    const int lane = this->lane(), t = lane % 4, group = lane / 4 % 4;
    const uint32 query_at = shared_address(room()[order()].query[lane % 8 / 4]) + lane / 8 * 16;
    float score[2][2], top = found.top;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float even[4] = {}, odd[4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Vec16 q = load_matrices(query_at + j * 64), k = kFirst ? key[i][j] : load_key(at[i], j);
        Mma<T>::add(even, q.word[0], q.word[1], q.word[2], q.word[3], k.word[0], k.word[1]);
        Mma<T>::add(odd, q.word[0], q.word[1], q.word[2], q.word[3], k.word[2], k.word[3]);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) score[i][e] = rows.has(2 * t + e, i) ? even[e] + odd[2 + e] : -infinity();
    }
    const float most = warp_max<4>(fmaxf(fmaxf(score[0][0], score[0][1]), fmaxf(score[1][0], score[1][1])));
    top = fmaxf(top, most * scale);
    if constexpr (!kFirst) {
      const float keep = exp2_of(found.top - top);
      found.total *= keep;
#pragma unroll
      for (int e = 0; e < 16; ++e) found.sum[e / 4][e % 4] *= keep;
    }
    found.top = top;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float p = exp2_of(fmaf(score[i][0], scale, -top)), q = exp2_of(fmaf(score[i][1], scale, -top));
      found.total += p + q;
      const uint32 high = pack<T>(p, q);
      const float2 taken = unpack<T>(high);
      const uint32 rest = pack<T>(p - taken.x, q - taken.y);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Vec16 v = kFirst ? value[i][j] : load_value(at[i], j);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const bool low = group == 2 * pair, up = group == 2 * pair + 1;
          Mma<T>::add(found.sum[j], low ? high : 0, low ? rest : 0, up ? high : 0, up ? rest : 0, v.word[2 * pair],
                      v.word[2 * pair + 1]);
        }
      }
    }
    if constexpr (!kFirst) this->template release_for<kTimes>(units);
  }

  // The frame's own position, whose key and value this block keeps.
  __device__ __forceinline__ void attend_own_position(const Phase& f) {
    const WideTurn q_turn(a, f.cached.query_norm, s.position, column());
    const WideTurn k_turn(a, f.cached.key_norm, s.position, column());
    const int head = Base::key_head(), query_row = 2 * head + side();
    const int fresh_row = Base::kQueryHeads + side() * Base::kKeyHeads + head;
    Vec16 x[2], key, value;
    waiting.take4s(share_words(f, query_row), (fresh_row - query_row) * kRowWords, x);
    __syncwarp();
    const Vec16 turned = k_turn(x[1], a.eps);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      key.word[i] = __shfl_sync(kAllLanes, turned.word[i], lane() % 16);
      value.word[i] = __shfl_sync(kAllLanes, x[1].word[i], lane() % 16 + 16);
    }
    float q[8], v[8];
    unpack8<T>(q_turn(x[0], a.eps), q);
    const float score = head_dot<T, kSlowDim>(q, key);
    unpack8<T>(value, v);
    Sums& to = room()[kWorkers].sums[side()];
    *reinterpret_cast<float4*>(to.element + column()) = {v[0], v[1], v[2], v[3]};
    *reinterpret_cast<float4*>(to.element + column() + 4) = {v[4], v[5], v[6], v[7]};
    if (column() == 0) to.known = {1.0f, score * (rsqrtf(static_cast<float>(kSlowDim)) * kLog2e)};
    if (side() != 0) return;
    const int64 at = static_cast<int64>(s.position) * kSlowDim + column();
    store_vec(cached_rows<T>(a, f.cached.keys) + at, key);
    store_vec(cached_rows<T>(a, f.cached.values) + at, value);
  }

  // Puts what the block found where the blocks that combine look for it: a warp half of a head's elements, two a lane.
  static constexpr int kMergers = 4;
  __device__ __forceinline__ void merge_sums(const Phase& f) {
    const PastShare mine(s.position);
    const int head = order() / 2, d = (order() % 2 * kWarp + lane()) * 2;
    const bool left = lane() < mine.warps() || (lane() == kWorkers && mine.has_own());
    const float2 known = left ? room()[lane()].sums[head].known : float2{0.0f, -infinity()};
    const float top = warp_max(known.y), weight = exp2_of(known.y - top), total = warp_sum(weight * known.x);
    float2 y{0.0f, 0.0f};
    const auto add = [&](int part) {
      const float by = __shfl_sync(kAllLanes, weight, part);
      const float2 v = *reinterpret_cast<const float2*>(room()[part].sums[head].element + d);
      y = {fmaf(by, v.x, y.x), fmaf(by, v.y, y.y)};
    };
#pragma unroll 4
    for (int w = 0; w < mine.warps(); ++w) add(w);
    if (mine.has_own()) add(kWorkers);
    uint32* to = part_for(mine, head * 8 + d / 16);
    put_tagged2(to + d % 16 * 2, y.x, y.y, tag(f));
    if (d % 16 == 0) put_tagged2(to + 32, total, top, tag(f));
  }
  __device__ __forceinline__ uint32 tag(const Phase& f) const {
    return s.turn * static_cast<uint32>(a.slow_layers) + static_cast<uint32>(f.layer) + 1u;
  }
  // This block's part of what the reader'th block of its head combines: 16 elements, the total and the top.
  __device__ __forceinline__ uint32* part_for(const PastShare& mine, int reader) const {
    return a.parts + ((mine.head * kSplits + reader) * kSplits + mine.part) * kPartWords;
  }

  // Second half: this block merges the parts of sixteen elements of one query head: four a lane of half a warp, whose
  // lanes have a part each. No other block reads these words.
  static constexpr int kCombiners = 2;
  __device__ __forceinline__ void combine(const Phase& f) {
    const PastShare mine(s.position);
    const int first = order() * 8 + lane() / kSplits * 4, part = lane() % kSplits;
    float2 x[3] = {{0.0f, -infinity()}, {0.0f, 0.0f}, {0.0f, 0.0f}};
    if (part * mine.chunk < s.position || part == kSplits - 1) {
      const uint32* from = a.parts + (Base::block() * kSplits + part) * kPartWords;
      waiting.take_tagged2s({from + 32, from + first * 2, from + first * 2 + 4}, tag(f), x);
    }
    __syncwarp();
    const float weight = exp2_of(x[0].y - warp_max<kSplits>(x[0].y));
    const float inverse = inverse_of(warp_sum<kSplits>(weight * x[0].x));
    float y[4] = {x[1].x, x[1].y, x[2].x, x[2].y};
#pragma unroll
    for (int e = 0; e < 4; ++e) y[e] = warp_sum<kSplits>(weight * y[e]) * inverse;
    const int row = (2 * mine.head + mine.part / 8) * kSlowDim + mine.part % 8 * 16 + first;
    uint32* to = a.words + f.out + this->operand_order(row / 2 + part);
    if (part < 2) put_word(to, part == 0 ? pack<T>(y[0], y[1]) : pack<T>(y[2], y[3]));
  }

  // The projection behind slow attention. Warps that are done, or had nothing to attend to, do not ask for its words
  // before this block has passed on its own: others' are not there yet either, and polls stand in the way.
  __device__ __forceinline__ void slow_output(const Phase& f) {
    const bool passed_on = s.position <= kParted ? warp() == kWorkers - 1 : order() < kCombiners;
    if (!passed_on) sync_results();
    if (s.position > kWhole && s.position <= kParted) return output_of_parts(f);
    output<2>(f);
  }
  // Any other back into the residual stream.
  __device__ __forceinline__ void output(const Phase& f) {
    if (f.kept != 0) copies_done();  // copy_kept()'s, which the barrier of this phase shows to all
    switch (f.slices) {
      case 1:
        return output<1>(f);
      case 2:
        return output<2>(f);
      default:
        return output<3>(f);
    }
  }

  template <int kSlices>
  __device__ __forceinline__ void output(const Phase& f) {
    constexpr int kStep = kWidth / 2;
    const auto from = [&](int vectors) {
      return a.words + (f.in + this->vector_to_take(vectors) * (kSlices * kStep) + this->part_word());
    };
    this->template project_residual<kSlices>(
        f, [&](Vec16(&x)[kSlices], int vectors) { waiting.ask4s(from(vectors), kStep, x); },
        [&](Vec16(&x)[kSlices], int vectors) { waiting.insist4s(from(vectors), kStep, x); });
  }

  // The projection behind slow attention in parts. Operand columns 2q and 2q + 1 are what part q passed on, so that its
  // product is in lanes 4g + q. Every product counts as much as its part weighs among those of its warp's head, of
  // which a warp has one in each slice: lanes with an even g work it out for the first slice, the others for the
  // second.
  __device__ __forceinline__ void output_of_parts(const Phase& f) {
    constexpr int kStep = kWidth / 2;
    const auto from = [&] { return a.words + (f.in + lane() / 8 * Base::kHeadsWords + this->part_word()); };
    const auto level_at = [&] {
      return a.words + (f.in + Base::level_word(lane() / 4 % 2 * 8 + warp() / 2, lane() % 4));
    };
    uint32 level;
    this->template project_residual<2>(
        f,
        [&](Vec16(&x)[2], int) {
          waiting.ask4s(from(), kStep, x);
          level = peek(level_at());
        },
        [&](Vec16(&x)[2], int) {
          waiting.insist4s(from(), kStep, x);
          waiting.insist(level_at(), level);
        },
        [&](const float (&y)[2]) {
          const float own = __uint_as_float(level);
          float all = 1.0f;
#pragma unroll
          for (int i = 1; i < kMostParts; ++i) all += exp2_of(__shfl_xor_sync(kAllLanes, own, i) - own);
          const float weight = inverse_of(all);
          const float first = __shfl_sync(kAllLanes, weight, lane() & ~4),
                      second = __shfl_sync(kAllLanes, weight, lane() | 4);
          return warp_sum<kMostParts>(fmaf(y[0], first, y[1] * second));
        });
  }
};

}  // namespace s1
