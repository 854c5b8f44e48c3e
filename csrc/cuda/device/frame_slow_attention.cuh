// The persistent frame kernel's slow attention at long contexts, its positions shared out among the blocks, and what
// of slow attention depends on the position; the projections behind it.
#pragma once

#include "frame_whole_attention.cuh"

namespace s1 {

template <class T>
struct FrameSlowAttention : FrameWholeAttention<T> {
  using Base = FrameWholeAttention<T>;
  using Base::a;
  using Base::kRowWords;
  using Base::lane;
  using Base::s;
  using Base::thread;
  using Base::waiting;
  using Base::warp;

  static constexpr int kRuns = 8;

  // This block's share of the positions of a slow head. Shared memory holds up to kNear of them, sixteen a warp, for a
  // round: eight runs of them, two of each run a warp's, so that a matrix's rows come from eight runs; these lie 16
  // bytes out of step with each other, so that they are read without bank conflicts.
  struct Share {
    int head, split, length, chunk, begin, end, warps, run, rounds;

    __device__ __forceinline__ explicit Share(int position) {
      const int block = Base::block();
      head = block / kSplits;
      split = block % kSplits;
      length = position + 1;
      chunk = ceil_div(ceil_div(length, kSplits), kChunkStep) * kChunkStep;
      begin = split * chunk;
      end = min(begin + chunk, length);
      warps = min(chunk, kNear) / kChunkStep;
      run = warps * (kChunkStep / kRuns);
      rounds = begin < end ? ceil_div(end - begin, kNear) : 0;
    }
    // From one run to the next in shared memory, in words; from the first to the frame's own row, behind the runs; from
    // keys to values.
    __device__ __forceinline__ int stride() const { return run * kRowWords + 4; }
    __device__ __forceinline__ int fresh_row() const { return kRuns * stride(); }
    __device__ __forceinline__ int side() const { return fresh_row() + kRowWords; }
    // What lies behind the ring: keys and values, then by warp and head its query, then its part of the result with
    // total and top.
    __device__ __forceinline__ uint32* past(Shared<T>& s, int side) const {
      return reinterpret_cast<uint32*>(s.pool + s.ring_slots * kSlotBytes) + side * this->side();
    }
    __device__ __forceinline__ T* query(Shared<T>& s, int warp, int head) const {
      return reinterpret_cast<T*>(past(s, 2)) + (warp * 2 + head) * (kSlowDim + 8);
    }
    __device__ __forceinline__ float* part(Shared<T>& s, int warp, int head) const {
      return reinterpret_cast<float*>(query(s, warps, 0)) + (warp * 2 + head) * (kSlowDim + 2);
    }
  };
  template <int kRing, int kWarps>
  static constexpr bool kFits = kRing * kSlotBytes + 2 * ((kWarps * kChunkStep + 1) * kRowWords + kRuns * 4) * 4 +
                                    kWarps * 2 * ((kSlowDim + 8) * 2 + (kSlowDim + 2) * 4) <=
                                kPoolBytes;
  // The ring that leaves the past its room at a position.
  static __device__ __forceinline__ int ring_at(int position) {
    static_assert(Base::template kRoomFits<1, kSlots, kWorkers - 1> &&
                  Base::template kRoomFits<kMostParts, kSlots, 8> &&
                  Base::template kRoomFits<kMostParts, kSlotsFar, kWorkers - 1>);
    static_assert(kFits<kSlotsFar, 4> && kFits<kSlotsFarther, kNearWarps>);
    if (position <= kMostParts * 8 * kChunkStep) return kSlots;  // eight warps of each part, or one part
    return position <= kParted || Share(position).warps <= 4 ? kSlotsFar : kSlotsFarther;
  }
  // Warps of this block that attend, but for the one that copies the past.
  static __device__ __forceinline__ int attending_warps(int position) {
    return position <= kWhole    ? Base::template past<1>(position).warps() + 1
           : position <= kParted ? Base::template past<kMostParts>(position).warps() + 1
                                 : Share(position).warps;
  }

  // Starts to copy what the first layer attends to. Every warp calls it.
  static __device__ __forceinline__ void begin_past(const PersistentFrameArgs& a, Shared<T>& s) {
    if (s.position <= kWhole) {
      Base::template begin_parts<1>(a, s, warp_id(), lane_id());
    } else if (s.position <= kParted) {
      Base::template begin_parts<kMostParts>(a, s, warp_id(), lane_id());
    } else if (warp_id() == 0) {
      copy_past(a, s, 0, 0);
    }
  }

  // Starts to copy a round's keys and values of a layer, the frame's own but for. One warp.
  static __device__ __forceinline__ void copy_past(const PersistentFrameArgs& a, Shared<T>& s, int layer, int round) {
    const Share mine(s.position);
    if (layer >= a.slow_layers || mine.rounds == 0) return;
    const int side = lane_id() / kRuns, first = mine.begin + round * kNear, skipped = lane_id() % kRuns * mine.run;
    const int rows = max(0, min(min(mine.end, s.position) - first, kNear)), taken = min(rows - skipped, mine.run);
    if (lane_id() == 0) barrier_expect(&s.past_full, 2 * rows * kRowWords * 4);
    __syncwarp();
    if (side < 2 && taken > 0)
      bulk_copy(mine.past(s, side) + lane_id() % kRuns * mine.stride(),
                Base::rows(a, layer, side) + static_cast<int64>(first + skipped) * kSlowDim, taken * kRowWords * 4,
                &s.past_full, pass_through());
  }

  // Slow attention.
  __device__ __forceinline__ void attend(const Phase& f) {
    if (s.position <= kWhole) return this->template attend_in_parts<1>(f);
    if (s.position <= kParted) return this->template attend_in_parts<kMostParts>(f);
    attend_share(f);
    this->forget_thread();
    combine(f);
  }

  // First half: this block has a sixteenth of the positions of one key/value head. The first round of them has been
  // copied to shared memory since the layer before; warp kNearWarps copies the next. Every other warp takes the two
  // query heads for itself.
  __device__ __forceinline__ void attend_share(const Phase& f) {
    constexpr int kHeads = 2 * (kBlocks / kSplits);
    const float scale = rsqrtf(static_cast<float>(kSlowDim)) * kLog2e;
    const int warp = this->warp(), lane = this->lane(), here = s.position;
    const Share mine(here);
    if (mine.rounds == 0 || (warp >= mine.warps && warp != kNearWarps)) return;
    if (warp == kNearWarps) {
      for (int round = 1; round <= mine.rounds; ++round) {
        sync_past(mine.warps);
        copy_past(a, s, f.layer + round / mine.rounds, round % mine.rounds);
      }
      return;
    }
    const int g = mine.head, side = lane / 16, column = lane % 16 * 8;
    // Whether the frame's own position is this warp's.
    const bool last = mine.end == mine.length && (here - mine.begin) % kNear % mine.run / 2 == warp;
    const auto norm_weight = [&](int of) { return reinterpret_cast<const T*>(a.norms[2 * f.layer + of]); };
    const T *q_weight = norm_weight(0), *k_weight = norm_weight(1);
    const Vec16 angles = load_vec(static_cast<const T*>(a.cos_sin) + static_cast<int64>(here) * kSlowDim + column);
    const Vec16 q_weights = q_weight ? load_vec(q_weight + column) : Vec16{};
    const Vec16 k_weights = last && k_weight ? load_vec(k_weight + column) : Vec16{};
    const int query_row = 2 * g + side, fresh_row = kHeads + side * (kHeads / 2) + g;
    const uint32* from = a.words + f.in + query_row * kRowWords + column / 2;
    Vec16 x[2];
    if (last) {
      waiting.take4s(from, (fresh_row - query_row) * kRowWords, x);
    } else {
      x[0] = waiting.take4(from);
    }
    __syncwarp();
    x[0] = norm_rotary<T, kSlowDim>(x[0], q_weight != nullptr, q_weights, angles, a.eps);
    store_vec(mine.query(s, warp, side) + column, x[0]);
    if (last) {
      const Vec16 key = norm_rotary<T, kSlowDim>(x[1], k_weight != nullptr, k_weights, angles, a.eps);
      const Vec16 fresh = side == 0 ? key : x[1];
      store_vec(mine.past(s, side) + mine.fresh_row() + column / 2, fresh);
    }
    __syncwarp();
    // Operand rows g and g + 8 of all products belong to head g / 4 and columns 32 * (g % 4) on. Scores: rows g have
    // the even pieces of the query, rows g + 8 the odd ones. Values: rows g have the high part of the weights, rows g +
    // 8 the low part; each product has half of its inner indices for 32 of the columns and half for 32 others, with
    // zeros in the rows whose columns they are not.
    const int row = lane % 8, matrix = lane / 8, t = lane % 4, group = lane / 4 % 4;
    const uint32 query_at = shared_address(mine.query(s, warp, row / 4) + matrix * 8);
    const uint32 past = shared_address(mine.past(s, 0));
    float top = -infinity(), total = 0.0f, sum[4][4] = {};
#pragma unroll 1
    for (int round = 0; round < mine.rounds; ++round) {
      // The warp's first position, and how many there are from it on in the round.
      const int before = mine.begin + round * kNear + 2 * warp, near = min(mine.end - before, kNear - 2 * warp);
      barrier_wait(&s.past_full, (f.layer * mine.rounds + round) & 1);
      __syncwarp();
      if (near > 0) {
        float score[2][2], higher = -infinity();
        uint32 at[2];
        Vec16 query[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) query[j] = load_matrices(query_at + j * 64);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int place = row * mine.run + i;  // if it is not there, the warp's first instead
          const uint32 kept =
              past + (place < near ? row * mine.stride() + (2 * warp + i) * kRowWords : 2 * warp * kRowWords) * 4;
          at[i] = before + (place < near ? place : 0) == here ? past + mine.fresh_row() * 4 : kept;
          float even[4] = {}, odd[4] = {};
          Vec16 key[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) key[j] = load_matrices(at[i] + (matrix % 2 * 2 + matrix / 2) * 16 + j * 64);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const Vec16 &q = query[j], &k = key[j];
            Mma<T>::add(even, q.word[0], q.word[1], q.word[2], q.word[3], k.word[0], k.word[1]);
            Mma<T>::add(odd, q.word[0], q.word[1], q.word[2], q.word[3], k.word[2], k.word[3]);
          }
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            score[i][e] = (2 * t + e) * mine.run + i < near ? even[e] + odd[2 + e] : -infinity();
            higher = fmaxf(higher, score[i][e]);
          }
        }
        higher = fmaxf(top, warp_max<4>(higher) * scale);
        if (round > 0) {
          const float keep = exp2_of(top - higher);
          total *= keep;
#pragma unroll
          for (int e = 0; e < 16; ++e) sum[e / 4][e % 4] *= keep;
        }
        top = higher;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Vec16 value[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) value[j] = load_transposed(at[i] + mine.side() * 4 + matrix * 64 + j * 16);
          const float p = exp2_of(fmaf(score[i][0], scale, -top)), q = exp2_of(fmaf(score[i][1], scale, -top));
          total += p + q;
          const uint32 high = pack<T>(p, q);
          const float2 taken = unpack<T>(high);
          const uint32 rest = pack<T>(p - taken.x, q - taken.y);
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            const bool low = group == 2 * pair, up = group == 2 * pair + 1;
            const uint32 w[4] = {low ? high : 0, low ? rest : 0, up ? high : 0, up ? rest : 0};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const Vec16& v = value[j];
              Mma<T>::add(sum[j], w[0], w[1], w[2], w[3], v.word[2 * pair], v.word[2 * pair + 1]);
            }
          }
        }
      }
      __syncwarp();
      leave_past(mine.warps);
    }
    put_parts(f, mine, sum, warp_sum<4>(total), top);
    if (last) {
      const Vec16 fresh = load_vec(mine.past(s, side) + mine.fresh_row() + column / 2);
      store_vec(Base::rows(a, f.layer, side) + static_cast<int64>(here) * kSlowDim + column, fresh);
    }
  }

  // Puts what the block found where the blocks that combine look for it. A lane has of head lane / 16, as sums of two,
  // columns 32 * group + 8j + 2t and the next.
  __device__ __forceinline__ void put_parts(const Phase& f, const Share& mine, const float (&sum)[4][4], float total,
                                            float top) {
    const int head = lane() / 16, group = lane() / 4 % 4, t = lane() % 4;
    float* to = mine.part(s, warp(), head);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      *reinterpret_cast<float2*>(to + group * 32 + j * 8 + 2 * t) = {sum[j][0] + sum[j][2], sum[j][1] + sum[j][3]};
    if (lane() % 16 == 0) *reinterpret_cast<float2*>(to + kSlowDim) = {total, top};
    sync_attending(mine.warps);
#pragma unroll 1
    for (int i = thread; i < kSlowDim; i += mine.warps * 32) {  // two elements each
      const int h = i / (kSlowDim / 2), d = i % (kSlowDim / 2) * 2;
      float2 known[kNearWarps], y{0.0f, 0.0f};  // total and top
      float most = -infinity(), all = 0.0f;
#pragma unroll
      for (int w = 0; w < kNearWarps; ++w) {
        known[w] = {0.0f, -infinity()};
        if (w < mine.warps) known[w] = *reinterpret_cast<const float2*>(mine.part(s, w, h) + kSlowDim);
        most = fmaxf(most, known[w].y);
      }
#pragma unroll
      for (int w = 0; w < kNearWarps; ++w) {
        if (w >= mine.warps) break;
        const float weight = exp2_of(known[w].y - most);
        const float2 v = *reinterpret_cast<const float2*>(mine.part(s, w, h) + d);
        all = fmaf(weight, known[w].x, all);
        y = {fmaf(weight, v.x, y.x), fmaf(weight, v.y, y.y)};
      }
      uint32* out = part_for(mine, h * 8 + d / 16);
      put_tagged2(out + d % 16 * 2, y.x, y.y, tag(f));
      if (d % 16 == 0) put_tagged2(out + 32, all, most, tag(f));
    }
  }
  __device__ __forceinline__ uint32 tag(const Phase& f) const {
    return s.turn * static_cast<uint32>(a.slow_layers) + static_cast<uint32>(f.layer) + 1u;
  }
  // This block's part of what the reader'th block of its head combines: 16 elements, the total and the top.
  __device__ __forceinline__ uint32* part_for(const Share& mine, int reader) const {
    return a.parts + ((mine.head * kSplits + reader) * kSplits + mine.split) * kPartWords;
  }

  // Second half: this block merges the parts of sixteen elements of one query head: four a lane of half a warp, whose
  // lanes have a part each. No other block reads these words.
  __device__ __forceinline__ void combine(const Phase& f) {
    if (warp() >= 2) return;
    const Share mine(s.position);
    const int first = warp() * 8 + lane() / kSplits * 4, part = lane() % kSplits;
    float2 x[3] = {{0.0f, -infinity()}, {0.0f, 0.0f}, {0.0f, 0.0f}};
    if (part * mine.chunk < mine.length) {
      const uint32* from = a.parts + (Base::block() * kSplits + part) * kPartWords;
      waiting.take_tagged2s({from + 32, from + first * 2, from + first * 2 + 4}, tag(f), x);
    }
    __syncwarp();
    const float weight = exp2_of(x[0].y - warp_max<kSplits>(x[0].y));
    const float inverse = inverse_of(warp_sum<kSplits>(weight * x[0].x));
    float y[4] = {x[1].x, x[1].y, x[2].x, x[2].y};
#pragma unroll
    for (int e = 0; e < 4; ++e) y[e] = warp_sum<kSplits>(weight * y[e]) * inverse;
    const int row = (2 * mine.head + mine.split / 8) * kSlowDim + mine.split % 8 * 16 + first;
    uint32* to = a.words + f.out + this->operand_order(row / 2 + part);
    if (part < 2) put_word(to, part == 0 ? pack<T>(y[0], y[1]) : pack<T>(y[2], y[3]));
  }

  // The projection behind slow attention.
  __device__ __forceinline__ void slow_output(const Phase& f) {
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
