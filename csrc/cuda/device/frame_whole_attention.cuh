// The persistent frame kernel's slow attention in one exchange, at short and middling contexts.
//
// The past's positions are one part up to kWhole of them, kMostParts parts up to kParted. Block 8h + i has of query
// head h part i % kParts and of its 128 elements slice i / kParts, 16 * kParts wide. Of its part every warp but the
// last has sixteen positions: it takes their keys into registers before it waits for the query; a layer ahead the slice
// of their values comes to shared memory, and their keys to L2. The warp leaves its sums of the softmax to the last
// warp, which merges, and in the last part has the frame's own position. So 8 / kParts blocks compute the same scores;
// that is cheaper than a second exchange. A bfloat16 query's norm is applied to its scores, not before it is rounded.
// Passed on: of every part its result, rounded to T, as an operand, [kParts, 16 * 128]; where there are more than one,
// behind these its level, the binary logarithm of its softmax's total, as float32 (level_word()). The projection merges
// its products with the parts (output_of_parts() in frame_slow_attention.cuh).
#pragma once

#include "frame_projections.cuh"
#include "matrices.cuh"
#include "rotary.cuh"

namespace s1 {

template <class T>
struct FrameWholeAttention : FrameProjections<T> {
  using Base = FrameProjections<T>;
  using Base::a;
  using Base::lane;
  using Base::s;
  using Base::waiting;
  using Base::warp;

  static constexpr int kQueryHeads = 16, kKeyHeads = 8;
  static constexpr int kRowWords = kSlowDim * sizeof(T) / 4;   // of a slow query, key or value
  static constexpr int kHeadsWords = kQueryHeads * kRowWords;  // of a part's results
  template <int kParts>
  static constexpr int kSliceDim = kSlowDim / 8 * kParts;
  template <int kParts>
  static constexpr uint32 kLanes = kSliceDim<kParts> / 4;  // that have four elements each of a slice

  // Behind the ring.
  template <int kParts>
  struct Room {
    float2 known[kWorkers];  // total and top of a warp's positions
    float sums[kWorkers][kSliceDim<kParts>];
    struct {
      Vec16 values[kParts][kWarp];  // of a layer, 16 elements in a row, by lane
      uint32 query[2][2][4][4];     // of 64 columns, even or odd words, by t: of 32 and of 32 columns two words each
    } past[kParts == 1 ? kWholeWarps : kPartWarps];
  };
  template <int kParts>
  static __device__ __forceinline__ Room<kParts>& room(Shared<T>& s) {
    static_assert(kSlots * kSlotBytes + sizeof(Room<kParts>) <= kPoolBytes);
    return *reinterpret_cast<Room<kParts>*>(s.pool + kSlots * kSlotBytes);
  }

  static __device__ __forceinline__ int query_head() { return Base::block() / 8; }
  static __device__ __forceinline__ int key_head() { return Base::block() / kSplits; }
  template <int kParts>
  static __device__ __forceinline__ uint32 part() {
    return static_cast<uint32>(Base::block()) % kParts;
  }
  template <int kParts>
  static __device__ __forceinline__ uint32 slice() {
    return static_cast<uint32>(Base::block()) % 8 / kParts;
  }

  // Where behind the results a part's level is. A warp of the projection has heads h and h + 8, which lie side by side;
  // those of others lie in other lines, since every warp of every block asks for its own.
  static __device__ __forceinline__ int level_word(int head, int part) {
    return kMostParts * kHeadsWords + head % 8 * 32 + head / 8 * kMostParts + part;
  }

  // The past's positions in this block's part, and the warps that have them.
  struct Past {
    int begin, count;
    __device__ __forceinline__ int warps() const { return ceil_div(count, kChunkStep); }
  };
  template <int kParts>
  static __device__ __forceinline__ Past past(int position) {
    const uint32 before = part<kParts>() * position, begin = before / kParts, end = (before + position) / kParts;
    return {static_cast<int>(begin), static_cast<int>(end - begin)};
  }

  // One of this warp's sixteen rows of a cache. Rows that are not there are the last one.
  static __device__ __forceinline__ const T* past_row(const PersistentFrameArgs& a, const Past& past, uint64 cache,
                                                      int warp, int place) {
    const int row = past.begin + min(warp * kChunkStep + place, past.count - 1);
    return cached_rows<T>(a, cache) + static_cast<int64>(row) * kSlowDim;
  }

  // In which order warps are taken to attend: those that have added up the queries come late, and last. The last warp
  // stays the last.
  static constexpr int kLate = 4;
  static __device__ __forceinline__ int order(int warp) {
    return warp < kLate ? warp + kWorkers - 1 - kLate : warp < kWorkers - 1 ? warp - kLate : warp;
  }
  __device__ __forceinline__ int order() const { return order(warp()); }

  // Starts to copy this warp's values of a layer, each lane a matrix's row (device/matrices.cuh). The order of their
  // positions is that of the weights in attend_past().
  template <int kParts>
  static __device__ __forceinline__ void copy_values(const PersistentFrameArgs& a, Shared<T>& s, const Past& past,
                                                     uint64 values, int warp, int lane) {
    const int row = lane % 8, matrix = lane / 8;
    const T* from = past_row(a, past, values, warp, row / 2 * 2 + row % 2 * 8 + matrix / 2) +
                    slice<kParts>() * kSliceDim<kParts> + matrix % 2 * 8;
    Vec16* to = &room<kParts>(s).past[warp].values[0][lane];
#pragma unroll
    for (int i = 0; i < kParts; ++i) copy_once(to + i * kWarp, from + i * 16);
  }

  // Has L2 fetch this warp's keys of a layer, of which every block that reads them asks for some.
  template <int kParts>
  static __device__ __forceinline__ void fetch_keys(const PersistentFrameArgs& a, const Past& past, uint64 keys,
                                                    int warp, int lane) {
    constexpr int kReaders = kSplits / kParts, kRows = kChunkStep / kReaders;
    constexpr int kLine = kLineBytes / sizeof(T), kLinesOfRow = kSlowDim / kLine;
    if (lane >= kRows * kLinesOfRow) return;
    const int place = Base::block() % kSplits / kParts * kRows + lane / kLinesOfRow;
    prefetch(past_row(a, past, keys, warp, place) + lane % kLinesOfRow * kLine);
  }
  // Starts to fetch what this warp will want of a layer.
  template <int kParts>
  static __device__ __forceinline__ void fetch_past(const PersistentFrameArgs& a, Shared<T>& s, const Past& past,
                                                    uint64 keys, uint64 values, int warp, int lane) {
    if (keys == 0 || warp >= past.warps()) return;
    copy_values<kParts>(a, s, past, values, warp, lane);
    fetch_keys<kParts>(a, past, keys, warp, lane);
  }

  // What has to be there before the first layer, whose attention is the list's second phase: what each warp will want,
  // and zeros where no warp will leave sums.
  template <int kParts>
  static __device__ __forceinline__ void begin_parts(const PersistentFrameArgs& a, Shared<T>& s, int warp, int lane) {
    const PhaseCaches& first = a.phases[1].cached;
    if (warp < kWorkers)
      fetch_past<kParts>(a, s, past<kParts>(s.position), first.keys, first.values, order(warp), lane);
    if (warp != kWorkers - 1) return;
    Room<kParts>& left = room<kParts>(s);
    if (lane < kWorkers) left.known[lane] = {0.0f, -infinity()};
    for (int i = lane; i < kWorkers * kSliceDim<kParts>; i += kWarp) (&left.sums[0][0])[i] = 0.0f;
  }

  template <int kParts>
  __device__ __forceinline__ void attend_in_parts(const Phase& f) {
    this->forget_thread();
    const Past past = FrameWholeAttention::past<kParts>(s.position);
    if (order() < past.warps()) {
      attend_past<kParts>(f, past);
      fetch_past<kParts>(a, s, past, f.cached.next_keys, f.cached.next_values, order(), lane());
    } else if (warp() == kWorkers - 1) {
      constexpr int kPairs = kSliceDim<kParts> / 2;
      const int word = query_head() * kRowWords + slice<kParts>() * kPairs + lane();
      const int result_at = this->now(f.out + part<kParts>() * kHeadsWords + this->operand_order(word));
      const int level = f.out + level_word(query_head(), part<kParts>());
      const int level_at = this->now(kParts > 1 && word % kRowWords == 0 ? level : Base::kNowhere);
      const bool own = part<kParts>() == kParts - 1;
      Fresh fresh{};
      if (own) fresh = attend_own<kParts>(f, past.warps());
      sync_attending(past.warps() + 1);
      merge<kParts>(result_at, level_at);
      leave_results();
      if (own) keep<kParts>(f, fresh);
    }
  }

  // What makes queries or keys, which have these norm weights, of a lane's four elements, from 4 * lane on.
  struct Turn {
    bool normed;
    uint2 weights;

    __device__ __forceinline__ Turn(uint64 norm, int lane) {
      const T* from = reinterpret_cast<const T*>(norm);
      const uint32 ones = pack<T>(1.0f, 1.0f);
      normed = from != nullptr;
      weights = normed ? load_pairs(from + lane * 4) : uint2{ones, ones};
    }
    // rotary(x * weights); `square` gets the sum of the squares of x.
    __device__ __forceinline__ void operator()(const uint2& x, const uint2& angles, float2 (&y)[2],
                                               float& square) const {
      const float2 v[2] = {unpack<T>(x.x), unpack<T>(x.y)}, n[2] = {unpack<T>(weights.x), unpack<T>(weights.y)};
      const float2 angle[2] = {unpack<T>(angles.x), unpack<T>(angles.y)};
      square = fmaf(v[0].x, v[0].x, v[0].y * v[0].y) + fmaf(v[1].x, v[1].x, v[1].y * v[1].y);
#pragma unroll
      for (int i = 0; i < 2; ++i) y[i] = rotated({v[i].x * n[i].x, v[i].y * n[i].y}, angle[i]);
    }
    // What y is still to be multiplied by. All lanes call it.
    __device__ __forceinline__ float scale(float square, float eps) const {
      const float mean = warp_sum(square) * (1.0f / kSlowDim);
      return normed ? rsqrt_of(mean + eps) : 1.0f;
    }
  };
  static __device__ __forceinline__ uint2 load_pairs(const T* at) { return *reinterpret_cast<const uint2*>(at); }
  __device__ __forceinline__ uint2 angles() const {
    return load_pairs(static_cast<const T*>(a.cos_sin) + static_cast<int64>(s.position) * kSlowDim + lane() * 4);
  }
  // The lane's four elements of a slow query, key or value.
  __device__ __forceinline__ const uint32* row_words(const Phase& f, int row) const {
    return a.words + (f.in + row * kRowWords + lane() * 2);
  }

  // Sixteen positions of the past.
  template <int kParts>
  __device__ __forceinline__ void attend_past(const Phase& f, const Past& past) {
    const int warp = order(), lane = this->lane(), g = lane / 4, t = lane % 4, place = warp * kChunkStep + g;
    auto& mine = room<kParts>(s).past[warp];
    uint32* query_at = &mine.query[lane / 16][0][lane / 2 % 4][lane / 8 % 2 * 2 + lane % 2];
    const Turn turn(f.cached.query_norm, lane);
    const uint2 angles = this->angles();
    const uint32* const words[1] = {row_words(f, query_head())};
    uint2 x[1];
    waiting.ask2s(words, x);  // behind the keys, the answer would be late
    Vec16 key[2][4];          // positions g and g + 8 of the sixteen, columns 8t on of every 32
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T* from = past_row(a, past, f.cached.keys, warp, i * 8 + g) + t * 8;
#pragma unroll
      for (int j = 0; j < 4; ++j) key[i][j] = load_once(from + j * 32);
    }
    float* const sums = room<kParts>(s).sums[warp] + t * 16 + g;
    float2* const known = room<kParts>(s).known + warp;
    waiting.insist2s(words, x);
    __syncwarp();
    float scale = rsqrtf(static_cast<float>(kSlowDim)) * kLog2e, square;
    float2 y[2];
    turn(x[0], angles, y, square);
    if constexpr (kScaleBeforeRounding<T>) {
      const float by = turn.scale(square, a.eps);
      y[0] = {y[0].x * by, y[0].y * by};
      y[1] = {y[1].x * by, y[1].y * by};
    }
    query_at[0] = pack<T>(y[0].x, y[0].y);
    query_at[16] = pack<T>(y[1].x, y[1].y);
    __syncwarp();
    // Scores, of 32 columns a product: operand rows g are the even words of position g's key, rows g + 8 the odd words;
    // so are, by turns, the operand columns of the query.
    float sum[2][4] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Vec16 q = load_vec(mine.query[j][g % 2][t]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Vec16& k = key[i % 2][2 * j + i / 2];
        Mma<T>::add(sum[i % 2], k.word[0], k.word[1], k.word[2], k.word[3], q.word[i / 2 * 2], q.word[i / 2 * 2 + 1]);
      }
    }
    copies_done();
    __syncwarp();
    Vec16 value[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) value[i] = load_transposed(shared_address(&mine.values[i][lane]));
    if constexpr (!kScaleBeforeRounding<T>) scale *= turn.scale(square, a.eps);
    const float score[2] = {place < past.count ? sum[0][0] + sum[0][3] : -infinity(),
                            place + 8 < past.count ? sum[1][0] + sum[1][3] : -infinity()};
    const float top = from_ordered(largest(ordered(fmaxf(score[0], score[1])))) * scale;
    const float p = exp2_of(fmaf(score[0], scale, -top)), q = exp2_of(fmaf(score[1], scale, -top));
    const uint32 high = pack<T>(p, q);
    const float2 taken = unpack<T>(high);
    const uint32 rest = pack<T>(p - taken.x, q - taken.y);
    // Values: operand rows are elements, operand columns by turns the high and the low part of the weights, of
    // positions 2t and 2t + 8, then of 2t + 1 and 2t + 9.
    const uint32 said = t % 2 == 0 ? high : rest, ones = pack<T>(1.0f, 1.0f);
    const uint32 w[2] = {__shfl_sync(kAllLanes, said, t * 8 + g % 2), __shfl_sync(kAllLanes, said, t * 8 + 4 + g % 2)};
    float total[4] = {}, left[2];  // elements g and g + 8 of 16
    Mma<T>::add(total, ones, ones, ones, ones, w[0], w[1]);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      float sum[4] = {};
      const Vec16& v = value[i];
      Mma<T>::add(sum, v.word[0], v.word[1], v.word[2], v.word[3], w[0], w[1]);
      if (i > 0 && t != i) continue;
      left[0] = sum[0] + sum[1];
      left[1] = sum[2] + sum[3];
    }
    if (t < kParts) {
      sums[0] = left[0];
      sums[8] = left[1];
    }
    if (lane == 0) *known = {total[0] + total[1], top};
    leave_sums(past.warps() + 1);
  }

  // The frame's own position, whose key and value are on their way.
  struct Fresh {
    uint2 key, value;  // the lane's four elements, rounded
  };
  template <int kParts>
  __device__ __forceinline__ Fresh attend_own(const Phase& f, int place) {
    const int lane = this->lane(), key_row = kQueryHeads + key_head();
    const Turn q_turn(f.cached.query_norm, lane), k_turn(f.cached.key_norm, lane);
    const uint2 angles = this->angles();
    float* const sums = room<kParts>(s).sums[place] + lane % kLanes<kParts> * 4;
    float2* const known = room<kParts>(s).known + place;
    uint2 x[3];
    waiting.take2s({row_words(f, query_head()), row_words(f, key_row), row_words(f, key_row + kKeyHeads)}, x);
    __syncwarp();
    float2 q[2], k[2];
    float q_square, k_square;
    q_turn(x[0], angles, q, q_square);
    k_turn(x[1], angles, k, k_square);
    const float dot = fmaf(q[0].x, k[0].x, q[0].y * k[0].y) + fmaf(q[1].x, k[1].x, q[1].y * k[1].y);
    const float k_scale = k_turn.scale(k_square, a.eps), q_scale = q_turn.scale(q_square, a.eps);
    const float score = warp_sum(dot) * q_scale * k_scale * (rsqrtf(static_cast<float>(kSlowDim)) * kLog2e);
    if (lane / kLanes<kParts> == slice<kParts>()) {
      const float2 low = unpack<T>(x[2].x), high = unpack<T>(x[2].y);
      *reinterpret_cast<float4*>(sums) = {low.x, low.y, high.x, high.y};
    }
    if (lane == 0) *known = {1.0f, score};
    return {{pack<T>(k[0].x * k_scale, k[0].y * k_scale), pack<T>(k[1].x * k_scale, k[1].y * k_scale)}, x[2]};
  }
  // One block of a key/value head keeps its key and value.
  template <int kParts>
  __device__ __forceinline__ void keep(const Phase& f, const Fresh& fresh) {
    if (query_head() % 2 != 0 || slice<kParts>() != 0) return;
    const int64 at = static_cast<int64>(s.position) * kSlowDim + lane() * 4;
    *reinterpret_cast<uint2*>(cached_rows<T>(a, f.cached.keys) + at) = fresh.key;
    *reinterpret_cast<uint2*>(cached_rows<T>(a, f.cached.values) + at) = fresh.value;
  }

  // Merges what the warps have left: of those that leave nothing, begin_parts() left zeros. A lane has two elements, of
  // every kAtOnce'th warp.
  template <int kParts>
  __device__ __forceinline__ void merge(int result_at, int level_at) {
    constexpr int kPairs = kSliceDim<kParts> / 2, kAtOnce = kWarp / kPairs;
    const int lane = this->lane();
    const Room<kParts>& left = room<kParts>(s);
    const float2 known = left.known[lane % kWorkers];
    const float top = from_ordered(largest(ordered(known.y))), weight = exp2_of(known.y - top);
    const float total = warp_sum<kWorkers>(weight * known.x), inverse = inverse_of(total);
    if (level_at >= 0) put_float(a.words + level_at, top + log2_of(total));
    float2 y{0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kWorkers / kAtOnce; ++i) {
      const int from = i * kAtOnce + lane / kPairs;
      const float by = __shfl_sync(kAllLanes, weight, from);
      const float2 v = *reinterpret_cast<const float2*>(left.sums[from] + lane % kPairs * 2);
      y = {fmaf(by, v.x, y.x), fmaf(by, v.y, y.y)};
    }
    y = {warp_sum<kAtOnce, kPairs>(y.x) * inverse, warp_sum<kAtOnce, kPairs>(y.y) * inverse};
    if (lane < kPairs) put_word(a.words + result_at, pack<T>(y.x, y.y));
  }
};

}  // namespace s1
