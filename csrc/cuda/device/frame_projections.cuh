// The persistent frame kernel's phases that multiply weights.
//
// A block multiplies its rows of a matrix, 8 of them a tile, on tensor cores. Every warp has a sixteenth of the columns
// of all tiles; the warps' sums meet in shared memory. An mma takes 32 columns of a tile, 16 bytes a lane as they come:
// its operand rows 0 to 7 are the even words of these and rows 8 to 15 the odd words, its eight operand columns are the
// even and the odd words of x, of the high part (x rounded to T) and the low part (what that left), of up to two
// vectors. Half of the results are of no use, in exchange for 16-byte loads that are operands. Eight lanes load from
// two rows, which lie in neighbouring pieces and so in different banks. A warp polls for the words of its own columns,
// lanes for those of their part of the operand, so that no warp waits for another before the sums. Vectors that are
// multiplied are passed on in the operand's order: word 16s + 4t + 2m + h of 32 as word 16h + 4t + 2s + m.
#pragma once

#include "frame_stream.cuh"
#include "rotary.cuh"

namespace s1 {

template <class T>
struct FrameProjections {
  static constexpr uint32 kMinusZeros = 0x80008000u;
  static constexpr int kNowhere = -(1 << 20);  // as a place in shared memory; so are places a little further on

  const PersistentFrameArgs& a;
  Shared<T>& s;
  Waiting waiting;
  int thread;  // threadIdx.x

  __device__ __forceinline__ int lane() const { return static_cast<int>(static_cast<uint32>(thread) % 32); }
  __device__ __forceinline__ int warp() const { return static_cast<int>(static_cast<uint32>(thread) / 32); }

  // Before a phase or a step of it. The compiler must not know that `thread` stays the same: it would keep all that
  // follows from it, in registers that there are not.
  __device__ __forceinline__ void forget_thread() { asm volatile("" : "+r"(thread)); }
  static __device__ __forceinline__ int block() { return own_block(); }

  // x, which the compiler is to work out here and not after the wait for words, where it would first be of use.
  static __device__ __forceinline__ int now(int x) {
    asm volatile("" : "+r"(x));
    return x;
  }

  // Units of the ring in a row; and of these, the one that this lane waits for and gives back.
  struct Units {
    RingCursor first, mine;
    int count;
  };
  __device__ __forceinline__ Units units(const RingCursor& first, int count) const {
    return {first, first.ahead(lane()), count};
  }
  // Calls f for the lane's unit, or every lane for all.
  template <class F>
  __device__ __forceinline__ void each_unit(const Units& units, F f) const {
    if constexpr (kSayers == 1) {
      if (lane() < units.count) f(units.mine);
    } else {
      for (int u = 0; u < units.count; ++u) f(units.first.ahead(u));
    }
  }
  // Waits for units.
  __device__ __forceinline__ void await(const Units& units) const {
    each_unit(units, [&](const RingCursor& u) { barrier_wait(s.full + u.slot, u.parity); });
    __syncwarp();
  }
  // Gives them back: this warp has what it wants from them. They are free when all have said so.
  __device__ __forceinline__ void release(const Units& units) const {
    __syncwarp();
    each_unit(units, [&](const RingCursor& u) { barrier_arrive(s.empty + u.slot); });
  }
  // Gives them back for kWarps warps.
  template <int kWarps>
  __device__ __forceinline__ void release_for(const Units& units) const {
    __syncwarp();
    each_unit(units, [&](const RingCursor& u) { barrier_arrive<kWarps>(s.empty + u.slot); });
  }

  struct Spot {
    int unit, bytes;  // the number of the unit, and how many bytes from the first one's begin on
  };
  // A lane's weights: of kCount tiles, 64 columns each, or of one tile and kCount times 64 columns.
  template <int kCount>
  struct Held {
    Vec16 part[kCount][2];  // 8 of the first 32 columns, and of the other

    // at(i): where in the ring this lane's row is, from `first` bytes behind unit `unit` on.
    template <class At>
    __device__ __forceinline__ void load(const FrameProjections& frame, const RingCursor& unit, int first, At at) {
      const int slot = unit.slot;
      const unsigned char* here = frame.s.ring + slot * kSlotBytes + first + frame.warp() * 128 + frame.lane() % 4 * 16;
      const unsigned char* wrapped = here - kSlots * kSlotBytes;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const Spot spot = at(i);
        const unsigned char* from = (slot + spot.unit < kSlots ? here : wrapped) + spot.bytes;
        part[i][0] = load_vec(from);
        part[i][1] = load_vec(from + 64);
      }
    }
    __device__ __forceinline__ void multiply(float (&sum)[4], int i, const Vec16& x) const {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Vec16& w = part[i][j];
        Mma<T>::add(sum, w.word[0], w.word[1], w.word[2], w.word[3], x.word[2 * j], x.word[2 * j + 1]);
      }
    }
  };
  // Of this lane's row: in lane % 4 = 2v the product with vector v's high part, in 2v + 1 with its low part.
  static __device__ __forceinline__ float product(const float (&sum)[4]) { return sum[0] + sum[3]; }

  // The row of a tile, kSlices * 1024 columns wide, that this lane has. In lanes 8j to 8j + 3 and the next four it is
  // in pieces that are an odd number apart, whichever slice it is.
  template <int kSlices>
  __device__ __forceinline__ int held_row() const {
    const int g = lane() / 4;
    return kSlices % 2 ? g % 2 * 4 + g / 2 : g % 2 * 2 + g / 2 % 2 + g / 4 * 4;
  }

  // This lane's part of an operand of its warp's 64 columns: of which vector, which four words, high or low part.
  __device__ __forceinline__ int part_vector() const { return lane() / 16; }
  __device__ __forceinline__ int part_word() const { return warp() * 32 + lane() % 8 * 4; }
  __device__ __forceinline__ bool part_is_low() const { return lane() / 8 % 2 != 0; }
  // Lanes of a vector that is not there take the first one's words; nobody asks for their results.
  __device__ __forceinline__ int vector_to_take(int vectors) const {
    return part_vector() < vectors ? part_vector() : 0;
  }
  // Where word `word` of a vector is.
  static __device__ __forceinline__ int operand_order(int word) {
    return (word & ~19) | (word & 1) << 4 | (word >> 4 & 1) << 1 | (word >> 1 & 1);
  }

  // When all warps have left their sums, a warp has the results of eight rows: four lanes each, which have a part of
  // the sums each.
  __device__ __forceinline__ int result_row() const { return lane() / 4; }
  __device__ __forceinline__ bool result_is_here() const { return lane() % 4 == 0; }
  // kTotals times the total of kCount numbers, for all four lanes.
  template <int kCount, int kTotals>
  __device__ __forceinline__ void add_up(const float* const (&numbers)[kTotals], float (&y)[kTotals]) const {
#pragma unroll
    for (int j = 0; j < kTotals; ++j) {
      const float4* mine = reinterpret_cast<const float4*>(numbers[j] + lane() % 4 * (kCount / 4));
      float4 q = mine[0];
#pragma unroll
      for (int i = 1; i < kCount / 16; ++i) q = {q.x + mine[i].x, q.y + mine[i].y, q.z + mine[i].z, q.w + mine[i].w};
      y[j] = (q.x + q.y) + (q.z + q.w);
    }
#pragma unroll
    for (int offset = 2; offset > 0; offset /= 2)
#pragma unroll
      for (int j = 0; j < kTotals; ++j) y[j] += __shfl_xor_sync(kAllLanes, y[j], offset);
  }
  // Results of a phase on normalised vectors: of row `row` and every eighth from it on.
  template <int kRows>
  __device__ __forceinline__ void results(int vector, int row, float (&y)[kRows]) const {
    constexpr bool kScaled = kScaleBeforeRounding<T>;
    const float* numbers[kRows + !kScaled];
    float total[kRows + !kScaled];
#pragma unroll
    for (int i = 0; i < kRows; ++i) numbers[i] = s.partial[vector][row + i * kTileRows];
    if constexpr (!kScaled) numbers[kRows] = s.squares[vector];
    add_up<2 * kWorkers>(numbers, total);
    const float scale = kScaled ? 1.0f : scale_of(total[kRows - kScaled]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) y[i] = total[i] * scale;
  }
  __device__ __forceinline__ float result(int vector, int row) const {
    float y[1];
    results(vector, row, y);
    return y[0];
  }
  // 1/rms, from the sum of squares.
  __device__ __forceinline__ float scale_of(float square) const { return rsqrt_of(square * (1.0f / kWidth) + a.eps); }

  // Loads tiles of 1024 columns.
  template <int kTiles>
  __device__ __forceinline__ void load_tiles(Held<kTiles>& held, const RingCursor& unit) const {
    const int row = lane() / 4 % 2 * kPiecePitch + lane() / 8 * kRowBytes;
    held.load(*this, unit, row, [&](int i) { return Spot{i, i * kSlotBytes}; });
  }

  // Where in s.partial this lane leaves the sums of the first tile; nowhere if its vector is not there.
  __device__ __forceinline__ int sums_place(int vectors) const {
    const int vector = lane() % 4 / 2, at = (vector * kMostRows + held_row<1>()) * kSums + 2 * warp() + lane() % 2;
    return now(vector < vectors ? at : kNowhere);
  }
  // Tiles times normalised vectors; the sums go to `place` and on.
  template <int kTiles>
  __device__ __forceinline__ void multiply_tiles(const Held<kTiles>& held, const Vec16& x, int place) {
    float y[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      held.multiply(sum, i, x);
      y[i] = product(sum);
    }
    if (place < 0) return;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) s.partial[0][0][place + i * kTileRows * kSums] = y[i];
  }

  // A phase of kTiles tiles on normalised vectors, up to its results.
  template <int kTiles>
  __device__ __forceinline__ void project_normed(const Phase& f, int vectors, bool begins = false) {
    Held<kTiles> held;
    const Vec16 weights = norm_weights(f);
    const Units own = units({f.slot, f.parity}, kTiles);
    await(own);
    load_tiles(held, own.first);
    release(own);
    int place;
    const Vec16 x = normed_operand(f, vectors, begins, weights, [](const Vec16&, int) {}, place);
    multiply_tiles(held, x, place);
    sync_workers();
    forget_thread();
  }

  template <int kCount>
  struct SumOf {
    __device__ __forceinline__ float operator()(const float (&y)[kCount]) const {
      float sum = y[0];
#pragma unroll
      for (int i = 1; i < kCount; ++i) sum += y[i];
      return sum;
    }
  };
  // A phase of one tile, kSlices * 1024 columns wide, on vectors as they are: its 8 rows are added to the residual
  // stream. ask(x, vectors) asks for this warp's columns, take(x, vectors) gets them, and sum(y) adds up the slices'
  // products.
  template <int kSlices, class Ask, class Take, class Sum = SumOf<kSlices>>
  __device__ __forceinline__ void project_residual(const Phase& f, Ask ask, Take take, Sum sum = {}) {
    Held<kSlices> held;
    Vec16 x[kSlices];
    const Units own = units({f.slot, f.parity}, kSlices);
    const int first = held_row<kSlices>() * kSlices;  // of this lane's slices
    const int vectors = now(f.vectors);
    await(own);
    held.load(*this, own.first, first * kRowBytes, [&](int i) {
      const int piece = (first + i) / kPieceRows;
      return Spot{piece / 2, i * kRowBytes + piece * (kPiecePitch - kPieceBytes)};
    });
    release(own);
    ask(x, vectors);
    const int place = (lane() % 4 / 2 * kOwnRows + held_row<kSlices>()) * kOwnSums + warp();
    const int to = now(lane() % 2 == 0 && lane() % 4 / 2 < vectors ? place : kNowhere);
    take(x, vectors);
    float products[kSlices];
#pragma unroll
    for (int i = 0; i < kSlices; ++i) {
      float results[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      held.multiply(results, i, x[i]);
      products[i] = product(results);
    }
    float y = sum(products);
    if (to >= 0) s.own_partial[0][0][to] = y;
    sync_workers();
    forget_thread();
    const int vector = warp(), row = result_row();
    if (vector >= vectors) return;
    uint32* out = operand_place(f, vector, row);
    const float before = result_is_here() ? s.own[vector][row] : 0.0f;
    float total[1];
    add_up<kWorkers>({s.own_partial[vector][row]}, total);
    y = rounded<T>(before + total[0]);
    if (result_is_here()) s.own[vector][row] = y;
    put_pair(out, pair_of(y));
  }

  // Where the result of a row of this block goes, and that of the next, which is in this warp as well.
  __device__ __forceinline__ uint32* place_of(const Phase& f, int vector, int row) const {
    return a.words + (f.out + ((vector * f.rows + first_row(f) + row) >> 1));
  }
  __device__ __forceinline__ uint32* operand_place(const Phase& f, int vector, int row) const {
    return a.words + (f.out + (vector * f.rows >> 1) + operand_order((first_row(f) + row) >> 1));
  }
  // The result of an even row, and that of the next.
  __device__ __forceinline__ float2 pair_of(float y) const { return {y, __shfl_down_sync(kAllLanes, y, 4)}; }
  __device__ __forceinline__ void put_pair(uint32* place, const float2& y) const {
    if (lane() % 8 == 0) put_word(place, pack<T>(y.x, y.y));
  }

  // Puts four elements of a vector that a stack begins with where normed_operand() finds them.
  __device__ __forceinline__ void begin_vector(int vector, int column, const uint2& x) const {
    uint32* to = s.begin[vector] + operand_order(column / 2);
    to[0] = x.x;
    to[16] = x.y;
    const int own = column - block() * kOwnRows;
    if (own < 0 || own >= kOwnRows) return;
    const float2 v = unpack<T>(x.x), w = unpack<T>(x.y);
    *reinterpret_cast<float4*>(s.own[vector] + own) = {v.x, v.y, w.x, w.y};
  }
  // Four elements of the embedding of the frame's tokens.
  __device__ __forceinline__ uint2 frame_embedding(int column) const {
    constexpr uint32 kNaN = 0x7fff7fffu;  // two of either 16-bit type
    const int main = a.tokens[0];
    if (main < 0 || main >= a.text_rows) return {kNaN, kNaN};
    const uint2 text = embedding(a.text_embedding, main, column);
    if (main < a.semantic_begin || main > a.semantic_end) return text;
    bool known = true;
    uint2 x[kPlaces];  // all at a time
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const int code = i < a.codebooks ? a.tokens[1 + i] : 0, row = min(max(code, 0), a.codebook_size - 1);
      known &= code == row;
      x[i] = i < a.codebooks ? embedding(a.codebook_embedding, i * a.codebook_size + row, column) : uint2{};
    }
    if (!known) return {kNaN, kNaN};
    float2 v = unpack<T>(text.x), w = unpack<T>(text.y);
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) {
      const float2 p = unpack<T>(x[i].x), q = unpack<T>(x[i].y);
      v = {v.x + p.x, v.y + p.y};
      w = {w.x + q.x, w.y + q.y};
    }
    return {pack<T>(v.x * a.scale, v.y * a.scale), pack<T>(w.x * a.scale, w.y * a.scale)};
  }
  // Four elements of a row of an embedding.
  static __device__ __forceinline__ uint2 embedding(const void* rows, int row, int column) {
    return *reinterpret_cast<const uint2*>(static_cast<const T*>(rows) + (static_cast<int64>(row) * kWidth + column));
  }

  // This lane's norm weights, for this warp's 64 columns.
  __device__ __forceinline__ Vec16 norm_weights(const Phase& f) const {
    const uint32* from =
        reinterpret_cast<const uint32*>(f.norm_weight) + (warp() * 32 + lane() % 4 * 4 + lane() / 4 % 2);
    return {from[0], from[2], from[16], from[18]};
  }
  // This lane's part of x * norm_weight, and the place for its sums; x is in s.begin if a stack begins. taken(x, word)
  // gets a word of a vector and those that follow, as they are.
  template <class Taken>
  __device__ __forceinline__ Vec16 normed_operand(const Phase& f, int vectors, bool begins, const Vec16& weights,
                                                  Taken taken, int& place) {
    const int vector = vector_to_take(vectors), word = part_word();
    const uint32* from = a.words + (f.in + vector * (kWidth / 2) + word);
    Vec16 x[1], part;
    waiting.ask4s(from, 0, x);
    place = sums_place(vectors);
    const int squares = squares_place();
    // What the product of bfloat16 numbers is rounded to is taken away from it in lanes of the low part, else zero.
    Vec16 rounding{};
    if constexpr (!kScaleBeforeRounding<T>)
#pragma unroll
      for (int i = 0; i < 4; ++i) rounding.word[i] = now(part_is_low() ? weights.word[i] ^ kMinusZeros : 0u);
    if (begins) {
      x[0] = load_vec(s.begin[vector] + word);
    } else {
      waiting.insist4s(from, 0, x);
    }
    taken(x[0], word);
    put_squares(x[0], squares);
    if constexpr (kScaleBeforeRounding<T>) {
      sync_workers();
      float square[1];
      add_up<2 * kWorkers>({s.squares[vector]}, square);
      const float scale = scale_of(square[0]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 v = unpack<T>(x[0].word[i]), n = unpack<T>(weights.word[i]);
        const float2 y = {v.x * n.x * scale, v.y * n.y * scale};
        part.word[i] = pack<T>(y.x, y.y);
        const float2 h = unpack<T>(part.word[i]);
        if (part_is_low()) part.word[i] = pack<T>(y.x - h.x, y.y - h.y);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)  // a product of two bfloat16 is a sum of two, exactly
        part.word[i] = fma_pair(x[0].word[i], weights.word[i], fma_pair(x[0].word[i], rounding.word[i], kMinusZeros));
    }
    return part;
  }
  // Leaves the sums of squares of this warp's columns, on tensor cores: row g of x, or row g + 8, which is the other
  // half of it, times column g.
  __device__ __forceinline__ int squares_place() const {
    const int g = lane() / 4, at = part_vector() * 2 * kWorkers + 2 * warp() + g % 2;
    return now(lane() % 4 == g / 2 && !part_is_low() ? at : kNowhere);
  }
  __device__ __forceinline__ void put_squares(const Vec16& x, int place) {
    float even[4] = {0.0f, 0.0f, 0.0f, 0.0f}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    Mma<T>::add(even, x.word[0], x.word[1], x.word[2], x.word[3], x.word[0], x.word[2]);
    Mma<T>::add(odd, x.word[0], x.word[1], x.word[2], x.word[3], x.word[1], x.word[3]);
    if (place >= 0) s.squares[0][place] = place % 2 ? even[1] + odd[3] : even[0] + odd[2];
  }

  // The fast stack's queries and keys leave rotated.
  template <int kTiles>
  __device__ __forceinline__ void qkv(const Phase& f) {
    const int vectors = now(f.vectors);
    project_normed<kTiles>(f, vectors, f.begins != 0);
    const int vector = warp() / kTiles, row = warp() % kTiles * kTileRows + result_row();
    if (vector >= vectors) return;
    uint32* place = place_of(f, vector, row);
    const bool turned = f.kind == kFastQkv && first_row(f) < 24 * kFastDim;
    const uint32 at = static_cast<uint32>(first_row(f) + row) % kFastDim;
    const int angle = now(*reinterpret_cast<const int*>(&s.angles[f.position + vector][at & ~1u]));
    float2 y = pair_of(result(vector, row));
    if (turned) y = rotated({rounded<T>(y.x), rounded<T>(y.y)}, unpack<T>(static_cast<uint32>(angle)));
    put_pair(place, y);
  }
  template <int kTiles>
  __device__ __forceinline__ void swiglu(const Phase& f) {
    constexpr int kPairs = kTiles / 2;
    const int vectors = now(f.vectors);
    project_normed<kTiles>(f, vectors);
    const int vector = warp() / kPairs, tile = warp() % kPairs;
    if (vector >= vectors) return;
    uint32* place = operand_place(f, vector, tile * kTileRows + result_row());
    float y[2];
    results(vector, tile * 2 * kTileRows + result_row(), y);
    put_pair(place, pair_of(y[0] * y[1] * inverse_of(1.0f + exp2_of(-kLog2e * y[0]))));
  }
  __device__ __forceinline__ void swiglu(const Phase& f) {
    switch (f.share) {
      case 8:
        return swiglu<2>(f);
      case 16:
        return swiglu<4>(f);
      default:
        return swiglu<6>(f);
    }
  }
};

}  // namespace s1
