// persistent_frame: decode_frame in one launch, for one sequence of a model of S1-mini's proportions.
//
// What it computes is what s1kernels/backends/cuda/decode_frame.py computes with the ops' kernels; a list of phases
// (persistent_frame.py writes it) says in which order. Every block owns an equal share of the rows of every matrix.
// Grid/block: kBlocks blocks, one an SM, all resident at once (cooperative launch). One warp streams the block's share
//   of the weights through a ring in shared memory, phase after phase, without ever waiting for activations; 12 warps
//   consume it, a unit of two rows x 1024 columns at a time. Activations go from block to block as words that are their
//   own flags (device/exchange.cuh). What is small is computed by all blocks alike instead of being passed on: norms,
//   the frame's embedding, the fast stack's attention, the fast codes' draws.
// Memory: every weight once a frame, the fast stack's N-1 times; bound by it.
// Numerics: as the ops': results are rounded to T where the ops' are. Norms multiply x in float32, so products are
//   those of the plain kernels. The same bits in every call: all sums have a fixed order.
// Requires: sm_90 or later, kBlocks SMs, 16-bit T, both stacks 1024 wide, all of a block's shares whole; slow D 128 and
//   H/G 2 with G*16 = kBlocks, fast D 64 and H/G 2 without norms, no biases, no projection, no repetition-aware draws.
#include "device/attention.cuh"
#include "device/exchange.cuh"
#include "device/token.cuh"
#include "device/weight_ring.cuh"

namespace s1 {

constexpr int kBlocks = 128;
constexpr int kWorkers = 12;  // warps that compute
// Units in the ring: a multiple of kWorkers, so that a slot's last unit was the same warp's. Else a warp could come for
// a unit before the one that the slot held before has arrived, and take the parity of that for its own.
constexpr int kSlots = 2 * kWorkers;
constexpr int kAtOnce = 8;            // units that may be under way; more does not stream faster
constexpr int kPollDelay = 400;       // cycles before the first poll of a phase: one that misses costs a round trip
constexpr int kWidth = 1024;          // C of both stacks
constexpr int kSplits = kBlocks / 8;  // parts of a slow head's positions
constexpr int kSlowDim = 128, kFastDim = 64;  // D
constexpr int kPartWords = 2 * (kSlowDim + 2);
constexpr int kPlaces = 16;        // fast positions at most
constexpr int kOwnRows = 8;        // of the residual stream
constexpr int kMostLogits = 1280;  // main logits of a block

enum Kind { kQkv, kAttend, kCombine, kOutput, kSwiglu, kFastOutput, kHead, kFastHead };
enum Source { kWords, kTokens, kCodes };

struct Phase {
  uint64 row_a, row_b;  // T [.., columns]: a unit's two rows, of pair 0
  uint64 norm_weight;   // T [1024] or null
  int stride;           // bytes from a pair of rows to the next
  int pairs;            // of a block
  int slices;           // of 1024 columns in a row
  int rows;             // of the matrix; the last pair may lack its second row
  int kind, source;
  int in, out;   // word offsets into `words`
  int vectors;   // 1, or 2 in the fast stack's first pass
  int layer;     // of its stack
  int position;  // of the first vector in the fast stack; the code that is drawn is number position + vectors
  int unused;
};

struct PersistentFrameArgs {
  const Phase* phases;
  uint32* words;               // exchanged activations, kEmpty before the launch
  uint32* passes;              // [96, kBlocks, 8] of the main draw, kEmpty before the launch: more than draw() makes
  uint32* parts;               // [kBlocks, kPartWords, 2] of the slow attention, with tags
  int* abandoned;              // [1], zero before the launch
  uint32* turn;                // [1], counts frames, for the tags
  const int* tokens;           // [N+1]
  const int* position;         // [1]
  const void* text_embedding;  // [Vt, 1024]
  const void* codebook_embedding;  // [N*K, 1024]
  const void* fast_embedding;      // [K, 1024]
  const uint64* caches;            // [2 * slow layers] k then v of each layer, T [G, S, 128]
  const uint64* norms;             // [2 * slow layers] q then k norm weights of each layer, T [128], or null
  const void* cos_sin;             // [P, 64, 2]
  const void* fast_cos_sin;        // [N, 32, 2]
  const int* ids;                  // [V] or null
  const int* window;               // [N+1, W]
  const float* temperature;
  const float* top_p;
  const float* repetition_penalty;
  const int* top_k;
  const int64* rng;    // [2]
  float* main_logits;  // [V]
  float* fast_logits;  // [N-1, K']
  int* out;            // [N+1]
  int64* times;        // [phases + 1] ns, when block 0 began each phase, or null
  int phase_count;
  int slow_layers;
  int fast_layers;
  int codebooks;      // N
  int codebook_size;  // K
  int text_rows;      // Vt
  int semantic_begin;
  int semantic_end;
  int capacity;      // S
  int vocabulary;    // V
  int fast_rows;     // K'
  int width;         // W
  int main_threads;  // of torch's grid for the main draw
  int fast_threads;
  int fast_offset;  // from the generator's offset to the first fast draw
  int fast_step;    // from one fast draw to the next
  float scale;      // of semantic embeddings
  float eps;
};

// Barriers among some of a block's warps. Not the aligned kind: a warp may arrive in pieces, after polls that took its
// lanes different times.
__device__ __forceinline__ void sync_workers() { asm volatile("barrier.sync 1, %0;" ::"n"(kWorkers * 32) : "memory"); }
__device__ __forceinline__ void sync_samplers() {
  asm volatile("barrier.sync 2, %0;" ::"n"(kSamplerThreads) : "memory");
}

__device__ __forceinline__ int64 nanoseconds() {
  int64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// The units of a phase that this block consumes.
__device__ __forceinline__ int pairs_here(const Phase& f) {
  return max(0, min(f.pairs, ceil_div(f.rows, 2) - static_cast<int>(blockIdx.x) * f.pairs));
}

// As Merger in sampler.cuh, within the sampling warps of a block that has others too.
struct WorkerMerger {
  Ahead* slots;  // shared [2, kSamplerWarps]
  int half;

  __device__ __forceinline__ Ahead exchange(const Ahead& of_warp) {
    Ahead* now = slots + half * kSamplerWarps;
    half ^= 1;
    if (lane_id() == 0) now[warp_id()] = of_warp;
    sync_samplers();
    Ahead found = now[0];
#pragma unroll
    for (int w = 1; w < kSamplerWarps; ++w) found = joined(found, now[w]);
    return found;
  }
  __device__ __forceinline__ Ahead operator()(const Ahead& found) {
    return exchange({warp_sum(found.mass), count_of(found.count), best_of(found.best)});
  }
};

template <class T>
struct Shared {
  unsigned char ring[kSlots * kUnitBytes];
  unsigned char stage[2][12 * 1024];  // a phase's inputs; two, since a warp may be a phase ahead
  union {
    T cache[4][2][10][8][kFastDim];  // the fast stack's keys and values
    struct {
      float value[kMostLogits], gumbel[kMostLogits];
    } logits;  // of the main draw, before the fast stack begins
  };
  float merged[8][2][kSlowDim + 2];  // slow attention, of a warp
  float part[kSplits][20];           // of a block
  float query[2][kSlowDim];
  T fresh[2][kSlowDim];
  T angles[kPlaces][kFastDim];
  float sums[2][2][64];       // a phase's unfinished results, by vector
  float squares[2][2][4];     // of x, by vector and warp
  float own[2][kOwnRows];     // this block's rows of the residual stream, by vector
  uint32 hidden[kWidth / 2];  // the slow stack's result
  uint64 full[kSlots], empty[kSlots];
  Ahead slots[2 * kSamplerWarps];
  Phase phases[4];  // this one, the next two, and the last, which some may still read
  int code;
};

template <class T>
struct PersistentFrame {
  const PersistentFrameArgs& a;
  Shared<T>& s;
  RingCursor<kSlots> ring;
  Waiting waiting;
  int pass;  // exchanges of the main draw so far

  // The warp that streams the weights: one lane.
  static __device__ void stream(const PersistentFrameArgs& a, Shared<T>& s) {
    int issued = 0;
    RingCursor<kSlots> at{0, 1}, done{0, 0};
    Phase next = a.phases[0];
    for (int p = 0; p < a.phase_count; ++p) {
      const Phase f = next;
      if (p + 1 < a.phase_count) next = a.phases[p + 1];
      if (f.row_a == 0) continue;
      const int pairs = pairs_here(f), first = static_cast<int>(blockIdx.x) * f.pairs;
      for (int pair = 0; pair < pairs; ++pair) {
        const int64 offset = static_cast<int64>(first + pair) * f.stride;
        const bool alone = f.kind != kSwiglu && 2 * (first + pair) + 1 >= f.rows;
        for (int slice = 0; slice < f.slices; ++slice) {
          barrier_wait(s.empty + at.slot, at.parity);
          if (issued++ >= kAtOnce) {
            barrier_wait(s.full + done.slot, done.parity);
            done.advance(1);
          }
          uint64* full = s.full + at.slot;
          unsigned char* to = s.ring + at.slot * kUnitBytes;
          const int64 from = offset + slice * (kUnitBytes / 2);
          barrier_expect(full, kUnitBytes);
          bulk_copy(to, reinterpret_cast<const unsigned char*>(f.row_a) + from, kUnitBytes / 2, full);
          bulk_copy(to + kUnitBytes / 2, reinterpret_cast<const unsigned char*>(alone ? f.row_a : f.row_b) + from,
                    kUnitBytes / 2, full);
          at.advance(1);
        }
      }
    }
  }

  // 1/rms of a vector, after stage_normed() and a barrier.
  __device__ __forceinline__ float norm_scale(int half, int vector) const {
    const float* q = s.squares[half][vector];
    return rsqrtf((q[0] + q[1] + q[2] + q[3]) * (1.0f / kWidth) + a.eps);
  }

  // Eight elements of the input of a phase that begins a stack.
  __device__ __forceinline__ Vec16 source(const Phase& f, int vector, int column) {
    if (f.source == kCodes) {
      if (f.vectors == 2 && vector == 0) return load_vec(s.hidden + column / 2);
      return load_vec(static_cast<const T*>(a.fast_embedding) + static_cast<int64>(s.code) * kWidth + column);
    }
    const int main = a.tokens[0];
    float sum[8], x[8];
    if (main < 0 || main >= a.text_rows) return pack8_of_nan();
    unpack8<T>(load_vec(static_cast<const T*>(a.text_embedding) + static_cast<int64>(main) * kWidth + column), sum);
    if (main >= a.semantic_begin && main <= a.semantic_end) {
      for (int i = 0; i < a.codebooks; ++i) {
        const int code = a.tokens[1 + i];
        if (code < 0 || code >= a.codebook_size) return pack8_of_nan();
        const int64 row = static_cast<int64>(i) * a.codebook_size + code;
        unpack8<T>(load_vec(static_cast<const T*>(a.codebook_embedding) + row * kWidth + column), x);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += x[e];
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] *= a.scale;
    }
    return pack8<T>(sum);
  }
  static __device__ __forceinline__ Vec16 pack8_of_nan() {
    float x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = not_a_number();
    return pack8<T>(x);
  }

  // Stages x * norm_weight of a phase's vectors in float32: elements 0 to 3 of every eight first, then 4 to 7. Four
  // warps a vector.
  __device__ __forceinline__ void stage_normed(const Phase& f, int half) {
    const int vector = threadIdx.x / 128, column = threadIdx.x % 128 * 8;
    if (vector >= f.vectors) return;
    const Vec16 weights = load_weight(reinterpret_cast<const T*>(f.norm_weight) + column);
    Vec16 x;
    if (f.source == kWords) {
      x = waiting.take4(a.words + f.in + vector * (kWidth / 2) + column / 2);
    } else {
      x = source(f, vector, column);
      const int mine = column - static_cast<int>(blockIdx.x) * kOwnRows;
      if (mine == 0) {
        float v[8];
        unpack8<T>(x, v);
#pragma unroll
        for (int e = 0; e < 8; ++e) s.own[vector][e] = v[e];
      }
    }
    if (f.kind == kHead) store_vec(s.hidden + column / 2, x);
    float v[8], n[8], square = 0.0f;
    unpack8<T>(x, v);
    unpack8<T>(weights, n);
#pragma unroll
    for (int e = 0; e < 8; ++e) square = fmaf(v[e], v[e], square);
    float4* to = reinterpret_cast<float4*>(s.stage[half]) + vector * (kWidth / 4) + column / 8;
    to[0] = {v[0] * n[0], v[1] * n[1], v[2] * n[2], v[3] * n[3]};
    to[kWidth / 8] = {v[4] * n[4], v[5] * n[5], v[6] * n[6], v[7] * n[7]};
    square = warp_sum(square);
    if (lane_id() == 0) s.squares[half][vector][warp_id() % 4] = square;
  }

  // Stages the words of a phase's vectors as they are, `words` of them each.
  __device__ __forceinline__ void stage_words(const Phase& f, int half, int words) {
    for (int i = threadIdx.x; i < f.vectors * words / 4; i += kWorkers * 32)
      store_vec(s.stage[half] + i * 16, waiting.take4(a.words + f.in + i * 4));
  }

  // Two rows of a unit times a vector, in all lanes: x as stage_normed() left it, or T [1024].
  __device__ __forceinline__ float2 multiply(const unsigned char* unit, const unsigned char* stage, bool normed) const {
    const Vec16* rows = reinterpret_cast<const Vec16*>(unit);
    float even[2] = {0.0f, 0.0f}, odd[2] = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = k * 32 + lane_id();
      float x[8], w[8];
      if (normed) {
        const float4 low = reinterpret_cast<const float4*>(stage)[i];
        const float4 high = reinterpret_cast<const float4*>(stage)[kWidth / 8 + i];
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
      } else {
        unpack8<T>(load_vec(stage + i * 16), x);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        unpack8<T>(rows[r * 128 + i], w);
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
          even[r] = fmaf(w[e], x[e], even[r]);
          odd[r] = fmaf(w[e + 1], x[e + 1], odd[r]);
        }
      }
    }
    // Both sums in one butterfly: after the first step, half the warp works on each.
    const float a_sum = even[0] + odd[0], b_sum = even[1] + odd[1];
    const bool upper = lane_id() & 16;
    const float passed = __shfl_xor_sync(kAllLanes, upper ? a_sum : b_sum, 16);
    float mine = (upper ? b_sum : a_sum) + passed;
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) mine += __shfl_xor_sync(kAllLanes, mine, offset);
    return {__shfl_sync(kAllLanes, mine, 0), __shfl_sync(kAllLanes, mine, 16)};
  }

  // All of this block's units of a phase: put(unit, vector, sums) in all lanes of the warp that had the unit.
  // `stage_bytes` is from a vector's stage to the next's.
  template <class Put>
  __device__ __forceinline__ void units(const Phase& f, const unsigned char* stage, int stage_bytes, bool normed,
                                        Put put) {
    const int count = pairs_here(f) * f.slices;
    for (int u = warp_id(); u < count; u += kWorkers) {
      const RingCursor<kSlots> at = ring.ahead(u);
      barrier_wait(s.full + at.slot, at.parity);
      const unsigned char* unit = s.ring + at.slot * kUnitBytes;
      for (int v = 0; v < f.vectors; ++v) {
        const int slice = f.slices == 1 ? 0 : u % f.slices * 2048;
        put(u, v, multiply(unit, stage + v * stage_bytes + slice, normed));
      }
      __syncwarp();
      if (lane_id() == 0) barrier_arrive(s.empty + at.slot);
    }
    ring.advance(count);
  }

  __device__ __forceinline__ void qkv(const Phase& f, int half) {
    stage_normed(f, half);
    sync_workers();
    const int n = pairs_here(f), words = f.rows / 2;
    units(f, s.stage[half], kWidth * 4, true, [&](int u, int v, float2 y) {
      const float scale = norm_scale(half, v);
      if (lane_id() == 0)
        put_word(a.words + f.out + v * words + static_cast<int>(blockIdx.x) * n + u, pack<T>(y.x * scale, y.y * scale));
    });
  }

  __device__ __forceinline__ void swiglu_phase(const Phase& f, int half) {
    stage_normed(f, half);
    sync_workers();
    const int n = f.pairs;
    units(f, s.stage[half], kWidth * 4, true, [&](int u, int v, float2 y) {
      const float scale = norm_scale(half, v), gate = y.x * scale;
      if (lane_id() == 0) s.sums[half][v][u] = gate / (1.0f + expf(-gate)) * (y.y * scale);
    });
    sync_workers();
    const int v = threadIdx.x / 32, i = lane_id();
    if (v < f.vectors && i < n / 2)
      put_word(a.words + f.out + (v * kBlocks + static_cast<int>(blockIdx.x)) * (n / 2) + i,
               pack<T>(s.sums[half][v][2 * i], s.sums[half][v][2 * i + 1]));
  }

  // Projection of staged vectors back into the residual stream.
  __device__ __forceinline__ void project(const Phase& f, int half, const unsigned char* stage, int stage_bytes) {
    units(f, stage, stage_bytes, false, [&](int u, int v, float2 y) {
      if (lane_id() != 0) return;
      s.sums[half][v][2 * u] = y.x;
      s.sums[half][v][2 * u + 1] = y.y;
    });
    sync_workers();
    const int v = threadIdx.x / 32, pair = lane_id();
    if (v >= f.vectors || pair >= f.pairs) return;
    float y[2] = {0.0f, 0.0f};
    for (int k = 0; k < f.slices; ++k) {
      y[0] += s.sums[half][v][2 * (pair * f.slices + k)];
      y[1] += s.sums[half][v][2 * (pair * f.slices + k) + 1];
    }
    float* own = s.own[v] + 2 * pair;
    own[0] = rounded<T>(own[0] + y[0]);
    own[1] = rounded<T>(own[1] + y[1]);
    put_word(a.words + f.out + v * (kWidth / 2) + static_cast<int>(blockIdx.x) * f.pairs + pair,
             pack<T>(own[0], own[1]));
  }

  __device__ __forceinline__ void output(const Phase& f, int half) {
    stage_words(f, half, f.slices * (kWidth / 2));
    sync_workers();
    project(f, half, s.stage[half], f.slices * kWidth * 2);
  }

  // Slow attention, first half: this block has a sixteenth of the positions of one key/value head.
  __device__ __forceinline__ void attend(const Phase& f) {
    using Part = Positions<T, kSlowDim, 8, 4>;
    using Head = HeadLanes<kSlowDim>;
    const int g = blockIdx.x / kSplits, split = blockIdx.x % kSplits, warp = warp_id(), lane = lane_id();
    const int here = *a.position, length = here + 1;
    const int chunk = ceil_div(ceil_div(length, kSplits), Part::kStep) * Part::kStep, begin = split * chunk;
    const bool last = here >= begin && here < begin + chunk;
    const int64 cache = static_cast<int64>(g) * a.capacity * kSlowDim;
    Part p;
    p.k_row = reinterpret_cast<T*>(a.caches[2 * f.layer]) + cache;
    p.v_row = reinterpret_cast<T*>(a.caches[2 * f.layer + 1]) + cache;
    p.end = min(begin + chunk, length);
    p.stored = min(p.end, here);
    if (warp < 8) p.load(begin);
    if (warp < 4 && begin < length && (warp < 2 || last)) {
      // A warp a vector: two query heads, the key, the value. A lane has four elements.
      const int heads = 2 * (kBlocks / kSplits), row = warp < 2 ? 2 * g + warp : heads + (warp - 2) * (heads / 2) + g;
      const uint2 raw = waiting.take2(a.words + f.in + row * (kSlowDim / 2) + lane * 2);
      uint2 word = raw;
      if (warp < 3) {
        const float2 x = unpack<T>(raw.x), y = unpack<T>(raw.y);
        float v[4] = {x.x, x.y, y.x, y.y};
        const T* weight = reinterpret_cast<const T*>(a.norms[2 * f.layer + (warp == 2)]);
        if (weight) {
          const float square = v[0] * v[0] + v[1] * v[1] + v[2] * v[2] + v[3] * v[3];
          const float scale = rsqrtf(warp_sum(square) * (1.0f / kSlowDim) + a.eps);
#pragma unroll
          for (int e = 0; e < 4; ++e) v[e] *= scale * to_float(weight[lane * 4 + e]);
        }
        const T* angle = static_cast<const T*>(a.cos_sin) + static_cast<int64>(here) * kSlowDim + lane * 4;
        const float c0 = to_float(angle[0]), s0 = to_float(angle[1]), c1 = to_float(angle[2]), s1_ = to_float(angle[3]);
        word.x = pack<T>(v[0] * c0 - v[1] * s0, v[1] * c0 + v[0] * s0);
        word.y = pack<T>(v[2] * c1 - v[3] * s1_, v[3] * c1 + v[2] * s1_);
      }
      if (warp < 2) {
        const float scale = rsqrtf(static_cast<float>(kSlowDim)) * kLog2e;
        const float2 x = unpack<T>(word.x), y = unpack<T>(word.y);
        reinterpret_cast<float4*>(s.query[warp])[lane] = {x.x * scale, x.y * scale, y.x * scale, y.y * scale};
      } else {
        reinterpret_cast<uint2*>(s.fresh[warp - 2])[lane] = word;
        T* to = (warp == 2 ? p.k_row : p.v_row) + static_cast<int64>(here) * kSlowDim + lane * 4;
        *reinterpret_cast<uint2*>(to) = word;
      }
    }
    sync_workers();
    if (begin < length && warp < 8) {
      float q[2][8];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 8; ++e) q[h][e] = s.query[h][Head::column() + e];
      SoftmaxSum sums[2];
      sums[0].clear();
      sums[1].clear();
      for (int start = begin; start < p.end; start += Part::kBlock) {
        float score[2][Part::kLoads];
        Vec16 v[Part::kLoads];
#pragma unroll
        for (int i = 0; i < Part::kLoads; ++i) {
          if (p.of(start, i) == here) {
            p.k[i] = load_vec(s.fresh[0] + Head::column());
            p.v[i] = load_vec(s.fresh[1] + Head::column());
          }
          v[i] = p.v[i];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float x = head_dot<T, kSlowDim>(q[h], p.k[i]);
            score[h][i] = p.of(start, i) < p.end ? x : -infinity();
          }
        }
        p.load(start + Part::kBlock);
        sums[0].template add<T>(score[0], v);
        sums[1].template add<T>(score[1], v);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sums[h].template merge_slots<Head::kLanes>();
        if (Head::slot() != 0) continue;
        float* to = s.merged[warp][h];
#pragma unroll
        for (int e = 0; e < 8; ++e) to[Head::column() + e] = sums[h].value[e];
        if (Head::column() == 0) {
          to[kSlowDim] = sums[h].total;
          to[kSlowDim + 1] = sums[h].top;
        }
      }
    }
    sync_workers();
    const int i = threadIdx.x;
    if (begin >= length || i >= 2 * kSlowDim) return;
    const int h = i / kSlowDim, d = i % kSlowDim;
    float top = -infinity(), total = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < 8; ++w) top = fmaxf(top, s.merged[w][h][kSlowDim + 1]);
#pragma unroll
    for (int w = 0; w < 8; ++w) {
      const float weight = exp2f(s.merged[w][h][kSlowDim + 1] - top);
      total = fmaf(weight, s.merged[w][h][kSlowDim], total);
      value = fmaf(weight, s.merged[w][h][d], value);
    }
    uint32* to = a.parts + (static_cast<int>(blockIdx.x) * kPartWords + h * (kSlowDim + 2)) * 2;
    put_tagged(to + d * 2, value, tag(f));
    if (d != 0) return;
    put_tagged(to + kSlowDim * 2, total, tag(f));
    put_tagged(to + kSlowDim * 2 + 2, top, tag(f));
  }
  __device__ __forceinline__ uint32 tag(const Phase& f) const {
    return *a.turn * static_cast<uint32>(a.slow_layers) + static_cast<uint32>(f.layer) + 1u;
  }

  // Second half: this block merges the parts of sixteen elements of one query head.
  __device__ __forceinline__ void combine(const Phase& f) {
    const int g = blockIdx.x / kSplits, split = blockIdx.x % kSplits, h = split / 8, first = split % 8 * 16;
    const int length = *a.position + 1;
    const int chunk = ceil_div(ceil_div(length, kSplits), 16) * 16, used = ceil_div(length, chunk);
    const int part = threadIdx.x / 18, item = threadIdx.x % 18;
    if (part < used) {
      const int at = item < 16 ? first + item : kSlowDim + item - 16;
      const uint32* from = a.parts + ((g * kSplits + part) * kPartWords + h * (kSlowDim + 2) + at) * 2;
      s.part[part][item] = waiting.take_tagged(from, tag(f));
    }
    sync_workers();
    if (threadIdx.x >= 8) return;
    float top = -infinity(), total = 0.0f, low = 0.0f, high = 0.0f;
    for (int k = 0; k < used; ++k) top = fmaxf(top, s.part[k][17]);
    for (int k = 0; k < used; ++k) {
      const float weight = exp2f(s.part[k][17] - top);
      total = fmaf(weight, s.part[k][16], total);
      low = fmaf(weight, s.part[k][2 * threadIdx.x], low);
      high = fmaf(weight, s.part[k][2 * threadIdx.x + 1], high);
    }
    put_word(a.words + f.out + (2 * g + h) * (kSlowDim / 2) + first / 2 + threadIdx.x,
             pack<T>(low / total, high / total));
  }

  // A fast head's vector at a position, rotated: eight elements in each of the slot's lanes.
  __device__ __forceinline__ Vec16 rotated(const T* x, int position) const {
    const int column = HeadLanes<kFastDim>::column();
    return norm_rotary<T, kFastDim>(load_vec(x + column), false, Vec16{}, load_vec(&s.angles[position][column]), a.eps);
  }

  // Fast attention, by every block alike, and its projection.
  __device__ __forceinline__ void fast_output(const Phase& f, int half) {
    using Head = HeadLanes<kFastDim>;
    constexpr int kSteps = kPlaces / Head::kSlots, kRow = 32 * kFastDim;  // of qkv
    stage_words(f, half, kRow / 2);
    sync_workers();
    const T* qkv = reinterpret_cast<const T*>(s.stage[half]);
    T* attended = reinterpret_cast<T*>(s.stage[half] + 8 * 1024);
    const int g = warp_id(), column = Head::column(), length = f.position + f.vectors;
    if (g < 8) {
      for (int rh = 0; rh < 2 * f.vectors; ++rh) {
        const int r = rh / 2, head = 2 * g + rh % 2;
        const int here = f.position + r;
        float q[8], score[kSteps], value[8];
        unpack8<T>(rotated(qkv + r * kRow + head * kFastDim, here), q);
        const float scale = rsqrtf(static_cast<float>(kFastDim)) * kLog2e;
#pragma unroll
        for (int e = 0; e < 8; ++e) q[e] *= scale;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const int p = i * Head::kSlots + Head::slot();
          const bool fresh = p >= f.position;
          const T* row = qkv + (fresh && p < length ? p - f.position : 0) * kRow;
          Vec16 k = rotated(row + (16 + g) * kFastDim, min(p, length - 1));
          if (!fresh) k = load_vec(&s.cache[f.layer][0][p][g][column]);
          if (fresh && p < length && rh == 0) {
            store_vec(&s.cache[f.layer][0][p][g][column], k);
            store_vec(&s.cache[f.layer][1][p][g][column], load_vec(row + (24 + g) * kFastDim + column));
          }
          const float x = head_dot<T, kFastDim>(q, k);
          score[i] = p <= here ? x : -infinity();
        }
        Vec16 v[kSteps];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          const int p = i * Head::kSlots + Head::slot();
          const T* row = qkv + max(p - f.position, 0) * kRow + (24 + g) * kFastDim + column;
          if (p <= here) v[i] = load_vec(p < f.position ? &s.cache[f.layer][1][p][g][column] : row);
        }
        SoftmaxSum sum;
        sum.clear();
        sum.template add<T>(score, v);
        sum.merge_slots<Head::kLanes>();
#pragma unroll
        for (int e = 0; e < 8; ++e) value[e] = sum.value[e] / sum.total;
        if (Head::slot() == 0) store_vec(attended + r * kWidth + head * kFastDim + column, pack8<T>(value));
      }
    }
    sync_workers();
    project(f, half, reinterpret_cast<const unsigned char*>(attended), kWidth * 2);
  }

  __device__ __forceinline__ float penalised(float x, bool said) const {
    const float penalty = *a.repetition_penalty;
    if (said) x = x < 0.0f ? x * penalty : x / penalty;
    return x + 0.0f;
  }

  // The slow stack's logits, of which this block has some, and the draw of the main token by all blocks together.
  __device__ __forceinline__ void head(const Phase& f, int half) {
    stage_normed(f, half);
    sync_workers();
    const int first = static_cast<int>(blockIdx.x) * f.pairs * 2, count = min(2 * pairs_here(f), f.rows - first);
    units(f, s.stage[half], kWidth * 4, true, [&](int u, int, float2 y) {
      const float scale = norm_scale(half, 0);
      if (lane_id() >= 2 || 2 * u + lane_id() >= count) return;
      const float x = (lane_id() == 0 ? y.x : y.y) * scale;
      s.logits.value[2 * u + lane_id()] = x;
      a.main_logits[first + 2 * u + lane_id()] = x;
    });
    sync_workers();
    if (warp_id() < kSamplerWarps) {
      const int token = draw_main(first, count);
      if (threadIdx.x == 0) {
        s.code = min(max(token - (token < 0 ? 0 : a.semantic_begin), 0), a.codebook_size - 1);
        if (blockIdx.x == 0) {
          a.out[0] = token;
          a.out[1] = s.code;
        }
      }
    }
    sync_workers();
  }

  // Merges what all blocks found, in all of them alike.
  __device__ __forceinline__ Ahead exchange(const Ahead& mine, WorkerMerger& merge) {
    uint32* slot = a.passes + (static_cast<int64>(pass++) * kBlocks + blockIdx.x) * 8;
    if (threadIdx.x == 0) {
      put_float(slot, mine.mass);
      put_word(slot + 1, static_cast<uint32>(mine.count));
      put_word(slot + 2, min(mine.best.key, kEmpty - 1));  // NaN stays larger than infinity
      put_word(slot + 3, static_cast<uint32>(mine.best.row));
      put_float(slot + 4, mine.best.value);
      put_word(slot + 5, 0u);
    }
    Ahead found = nothing();
    if (threadIdx.x < kBlocks) {
      const uint32* from = slot + (static_cast<int>(threadIdx.x) - static_cast<int>(blockIdx.x)) * 8;
      const Vec16 x = waiting.take4(from);
      const uint2 y = waiting.take2(from + 4);
      found = {__uint_as_float(x.word[0]),
               static_cast<int>(x.word[1]),
               {x.word[2], static_cast<int>(x.word[3]), __uint_as_float(y.x)}};
    }
    return merge(found);
  }

  __device__ __forceinline__ int draw_main(int first, int count) {
    WorkerMerger merge{s.slots, 0};
    const Gumbel noise{
        nullptr,
        a.ids,
        {static_cast<uint64>(a.rng[0]), static_cast<uint64>(a.rng[1]), static_cast<uint32>(a.main_threads)},
        false};
    uint32 top = 0;
    for (int i = threadIdx.x; i < count; i += kSamplerThreads) {
      const int token = a.ids ? a.ids[first + i] : first + i;
      bool said = false;
      for (int w = 0; w <= a.codebooks; ++w) said |= a.window[w * a.width] == token;  // the window's first frame
      s.logits.value[i] = penalised(s.logits.value[i], said);
      s.logits.gumbel[i] = noise(first + i);
      top = max(top, ordered_or_nan(s.logits.value[i]));
    }
    const Ahead of_block = merge.exchange({0.0f, 0, best_of({top, 0, 0.0f})});
    top = exchange(of_block, merge).best.key;
    if (!is_finite(top)) return -1;
    const Scale scale{from_ordered(top), 1.0f / fmaxf(*a.temperature, kLowestTemperature)};
    const Choice choice = draw(Limits{*a.top_p, *a.top_k}, scale, [&](uint64 place) {
      Ahead ahead = nothing();
      for (int i = threadIdx.x; i < count; i += kSamplerThreads)
        consider(ahead, s.logits.value[i], s.logits.gumbel[i], first + i, place, scale);
      return exchange(merge(ahead), merge);
    });
    if (choice.key == 0) return -1;
    return a.ids ? a.ids[choice.row] : choice.row;
  }

  // A fast code's logits, and its draw by every block alike.
  __device__ __forceinline__ void fast_head(const Phase& f, int half) {
    stage_normed(f, half);
    sync_workers();
    const int number = f.position;  // of the code that is drawn, 2 ... N
    float* logits = a.fast_logits + static_cast<int64>(number - 2) * a.fast_rows;
    units(f, s.stage[half], kWidth * 4, true, [&](int u, int, float2 y) {
      const float scale = norm_scale(half, 0);
      const int row = (static_cast<int>(blockIdx.x) * f.pairs + u) * 2 + lane_id();
      if (lane_id() >= 2) return;
      const float x = (lane_id() == 0 ? y.x : y.y) * scale;
      logits[row] = x;
      put_float(a.words + f.out + row, x);
    });
    if (warp_id() < kSamplerWarps) {
      const int code = draw_code(f, number);
      if (threadIdx.x == 0) {
        s.code = min(max(code, 0), a.codebook_size - 1);
        if (blockIdx.x == 0) a.out[number] = code;
      }
    }
    sync_workers();
  }

  __device__ __forceinline__ int draw_code(const Phase& f, int number) {
    WorkerMerger merge{s.slots, 0};
    const Gumbel noise{nullptr,
                       nullptr,
                       {static_cast<uint64>(a.rng[0]),
                        static_cast<uint64>(a.rng[1]) + static_cast<uint32>(a.fast_offset + (number - 2) * a.fast_step),
                        static_cast<uint32>(a.fast_threads)},
                       false};
    const int first = static_cast<int>(threadIdx.x) * 4;
    float value[4], gumbel[4];
    uint32 top = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) gumbel[i] = noise(first + i);
    const Vec16 words = waiting.take4(a.words + f.out + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bool said = false;
      for (int w = 0; w < a.width; ++w) said |= a.window[number * a.width + w] == first + i;
      value[i] = penalised(__uint_as_float(words.word[i]), said);
      top = max(top, ordered_or_nan(value[i]));
    }
    top = merge.exchange({0.0f, 0, best_of({top, 0, 0.0f})}).best.key;
    if (!is_finite(top)) return -1;
    const Scale scale{from_ordered(top), 1.0f / fmaxf(*a.temperature, kLowestTemperature)};
    const Choice choice = draw(Limits{*a.top_p, *a.top_k}, scale, [&](uint64 place) {
      Ahead ahead = nothing();
#pragma unroll
      for (int i = 0; i < 4; ++i) consider(ahead, value[i], gumbel[i], first + i, place, scale);
      return merge(ahead);
    });
    return choice.key == 0 ? -1 : choice.row;
  }

  // Starts to copy a phase into its slot: the last warp, which has the least to do.
  __device__ __forceinline__ void fetch_phase(int p) {
    constexpr int kPieces = sizeof(Phase) / 8;
    if (p >= a.phase_count || warp_id() != kWorkers - 1 || lane_id() >= kPieces) return;
    copy_async8(reinterpret_cast<uint64*>(&s.phases[p % 4]) + lane_id(),
                reinterpret_cast<const uint64*>(a.phases + p) + lane_id());
  }

  __device__ void run() {
    for (int i = threadIdx.x; i < min(a.codebooks, kPlaces) * kFastDim; i += kWorkers * 32)
      (&s.angles[0][0])[i] = static_cast<const T*>(a.fast_cos_sin)[i];
    fetch_phase(0);
    fetch_phase(1);
    copies_done();
    sync_workers();
    for (int p = 0; p < a.phase_count; ++p) {
      const Phase& f = s.phases[p % 4];
      const int half = p % 2;
      if (a.times && blockIdx.x == 0 && threadIdx.x == 0) a.times[p] = nanoseconds();
      copies_done();  // of phase p + 1, which the barriers of this one show to all
      fetch_phase(p + 2);
      if (p > 0) {
        const long long start = clock64();
        while (clock64() - start < kPollDelay) {
        }
      }
      switch (f.kind) {
        case kQkv:
          qkv(f, half);
          break;
        case kAttend:
          attend(f);
          break;
        case kCombine:
          combine(f);
          break;
        case kOutput:
          output(f, half);
          break;
        case kSwiglu:
          swiglu_phase(f, half);
          break;
        case kFastOutput:
          fast_output(f, half);
          break;
        case kHead:
          head(f, half);
          break;
        default:
          fast_head(f, half);
      }
    }
    if (blockIdx.x != 0) return;
    sync_workers();
    if (a.times && threadIdx.x == 0) a.times[a.phase_count] = nanoseconds();
    if (threadIdx.x <= a.codebooks && *static_cast<volatile int*>(a.abandoned) != 0) a.out[threadIdx.x] = -2;
    if (threadIdx.x == 0) *a.turn += 1;
  }
};

struct PrepareFrameArgs {
  uint32* words;   // [count], all that the frame exchanges
  int* abandoned;  // [1]
  int count;       // a multiple of 4
};

// Before each frame: nothing has been said yet.
template <class T>
__device__ void prepare_frame(const PrepareFrameArgs& a) {
  launch_next();
  wait_for_inputs();
  const int first = (static_cast<int>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x)) * 4;
  for (int i = first; i < a.count; i += static_cast<int>(gridDim.x) * 1024)
    store_vec(a.words + i, Vec16{{kEmpty, kEmpty, kEmpty, kEmpty}});
  if (first == 0) *a.abandoned = 0;
}

template <class T>
__device__ void persistent_frame(const PersistentFrameArgs& a) {
  extern __shared__ __align__(128) unsigned char shared[];
  static_assert(sizeof(Shared<T>) <= 222208, "what the host asks for");
  static_assert(sizeof(Phase) == 72, "as the host writes it");
  Shared<T>& s = *reinterpret_cast<Shared<T>*>(shared);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(s.full + i);
      barrier_init(s.empty + i);
    }
    barriers_visible();
  }
  __syncthreads();
  if (warp_id() == kWorkers) {
    if (lane_id() == 0) PersistentFrame<T>::stream(a, s);
    return;
  }
  PersistentFrame<T> frame{a, s, {0, 0}, {a.abandoned, false}, 0};
  frame.run();
}

S1_KERNEL_HALVES(prepare_frame, PrepareFrameArgs, 256, 1, prepare_frame)
S1_KERNEL_HALVES(persistent_frame, PersistentFrameArgs, 416, 1, persistent_frame)

}  // namespace s1
