// What the persistent frame kernel is told (phases and arguments), and what a block keeps in shared memory.
#pragma once

#include "attention.cuh"
#include "exchange.cuh"
#include "gemv.cuh"
#include "l2_halves.cuh"
#include "token.cuh"
#include "weight_ring.cuh"

namespace s1 {

constexpr int kBlocks = 128, kPairs = kBlocks / 2;
constexpr int kWorkers = 16;  // warps that compute
// Units of the ring that are copied at a time: as few as keep memory busy, since copies stand in the words' way. Packed
// weights stand less in it (PersistentFrameArgs::under_way_near). The head passes on nothing.
constexpr int kUnderWay = 2, kUnderWayPast = 4, kUnderWayHead = 6;
constexpr int kSayers = S1_RACECHECK ? 32 : 1;    // lanes of a warp that wait for a unit, and that give it back
constexpr int kCopyLanes = S1_RACECHECK ? 1 : 2;  // that copy units
constexpr int kWidth = 1024;                      // C of both stacks
constexpr int kSplits = kBlocks / 8;              // blocks of a slow key/value head, parts of its positions
constexpr int kSlowDim = 128, kFastDim = 64;      // D
constexpr int kChunkStep = 16;                    // positions that a warp attends to at a time
constexpr int kPoolBytes = 192640;                // of shared memory: the ring, and what lies behind it
// Past positions up to which a block takes all of a head's, a step a warp; and up to which one of kMostParts parts, by
// as many warps as there is room for. Beyond, the past is streamed (PastShare).
constexpr int kMostParts = 4, kWholeWarps = kWorkers - 1, kPartWarps = 9;
constexpr int kWhole = kWholeWarps * kChunkStep, kParted = kMostParts * kPartWarps * kChunkStep;
constexpr int kPartWords = 2 * (16 + 2);     // of 16 elements, with total, top and tags
constexpr int kFastQkvRows = 32 * kFastDim;  // 16 query, 8 key and 8 value heads
constexpr int kPlaces = 12;                  // fast positions at most
constexpr int kOwnRows = 8;                  // of the residual stream
constexpr int kMostRows = 48;                // of a phase on normalised vectors
constexpr int kSums = 2 * kWorkers + 4;      // from a row's to the next's: without bank conflicts
constexpr int kOwnSums = kWorkers + 4;
constexpr int kMostLogits = 1280;  // main logits of a block

enum Kind { kQkv, kAttend, kSlowOutput, kOutput, kSwiglu, kFastQkv, kFastOutput, kHead, kFastHead };

// Where slow attention finds what it wants, in a layer.
struct PhaseCaches {
  uint64 keys, values;            // T [G, S, 128]
  uint64 next_keys, next_values;  // the next layer's, or 0
  uint64 query_norm, key_norm;    // weights, T [128], or 0
};

struct Phase {
  uint64 weight;       // T [rows, slices * 1024], or packed (own_block()), of kSwiglu tiles of w1 and w3 by turns; or 0
  uint64 second;       // of kSwiglu, where weight is w1: w3
  uint64 norm_weight;  // T [1024], or 0
  int rows;            // of each matrix
  int share;           // of a block: a multiple of 8, all blocks alike, but for kHead
  int kind;
  int begins;   // whether its vectors are those that a stack begins with: Shared::begin, not words
  int in;       // word offset into `words`; so is out
  int vectors;  // 1, or 2 in the fast stack's first pass
  int out;
  int slices;
  int layer;           // of its stack
  int position;        // of the first vector in the fast stack; of kFastHead: the number of the code that is drawn
  int units;           // of the ring, in every block; whole steps of kHead; of kAttend: of the past
  int chunks;          // packed: of these units, that hold weights
  int unit;            // packed: the first one's number among those of all matrices; without any, of the next phase's
  int past;            // of kFastOutput: word offset of all positions' qkv of the layer that comes next
  int kept;            // how many of these positions are copied; in the phase that waits for them too
  float kept_share;    // of the weights: what L2 is to keep of them, since they come again
  int slot;            // of the first unit
  uint32 parity;       // of its turn
  PhaseCaches cached;  // of kAttend
};

struct PersistentFrameArgs {
  const Phase* phases;
  uint32* words;               // exchanged activations, kEmpty before the launch
  uint32* passes;              // [96, kBlocks, 8] of the main draw, kEmpty before the launch: more than draw() makes
  uint32* parts;               // [kBlocks, kSplits, kPartWords] of the slow attention, by the block that reads them
  int* abandoned;              // [1], zero before the launch
  uint32* turn;                // [1], counts frames, for the tags
  const int* tokens;           // [N+1]
  const int* position;         // [1]
  const void* text_embedding;  // [Vt, 1024]
  const void* codebook_embedding;  // [N*K, 1024]
  const void* fast_embedding;      // [K, 1024]
  const void* cos_sin;             // [P, 64, 2]
  const void* fast_cos_sin;        // [N, 32, 2]
  const int* ids;                  // [V] or null
  const float* logit_bias;         // [V], added to the main logits, or null
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
  const uint8* sides;  // [kMultiprocessors] 0 or 1: the half of L2 that a multiprocessor is at
  const uint8* near;   // [units of all matrices, kPairs], bits of its pairs of chunks: the even block's is the second;
                       // or null: weights are not packed
  int* tickets;        // [2], zero before the launch
  int under_way_near;  // units of packed weights that are copied at a time
  int phase_count;
  int slow_layers;
  int codebooks;      // N
  int codebook_size;  // K
  int text_rows;      // Vt
  int semantic_begin;
  int semantic_end;
  int capacity;      // S
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
enum Barrier { kWorking = 1, kSampling, kAttending, kAttended, kBarriers };

#if S1_RACECHECK  // compute-sanitizer loses count of more than one named barrier: mbarriers, but for the workers'
__device__ __forceinline__ uint64* barrier_of(Barrier b) {
  __shared__ uint64 barriers[kBarriers];
  return barriers + b;
}
// One thread, before the others need it.
__device__ __forceinline__ void begin_barrier(Barrier b, int threads) { barrier_init(barrier_of(b), threads); }
__device__ __forceinline__ void arrive(Barrier b, int) {
  __syncwarp();
  barrier_arrive(barrier_of(b));
}
__device__ __forceinline__ void meet(Barrier b, int threads) {
  __syncwarp();
  if (b == kWorking) {
    asm volatile("barrier.sync %0, %1;" ::"r"(static_cast<int>(b)), "r"(threads) : "memory");
  } else {
    barrier_meet(barrier_of(b));
  }
}
#else
__device__ __forceinline__ void begin_barrier(Barrier, int) {}
__device__ __forceinline__ void arrive(Barrier b, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(static_cast<int>(b)), "r"(threads) : "memory");
}
__device__ __forceinline__ void meet(Barrier b, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(static_cast<int>(b)), "r"(threads) : "memory");
}
#endif

__device__ __forceinline__ void sync_workers() { meet(kWorking, kWorkers * 32); }
__device__ __forceinline__ void sync_samplers() { meet(kSampling, kSamplerThreads); }

// The warps that attend leave their sums to those that merge them.
__device__ __forceinline__ void leave_sums(int warps) { arrive(kAttending, warps * 32); }
__device__ __forceinline__ void sync_attending(int warps) { meet(kAttending, warps * 32); }
// Those that have passed on what slow attention found let the others go on.
__device__ __forceinline__ void leave_results() { arrive(kAttended, kWorkers * 32); }
__device__ __forceinline__ void sync_results() { meet(kAttended, kWorkers * 32); }

__device__ __forceinline__ int64 nanoseconds() {
  int64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// The number of this block, for all that it does. If weights are packed, even ones are at one half of L2 and odd ones
// at the other, as far as multiprocessors go. The weights of 2p and 2p + 1 then lie together, in pairs of chunks, each
// near one of them: a matrix is [kPairs, units, kUnitChunks, 2, kChunkBytes], the units being a block's rows.
__device__ __forceinline__ int& own_block() {
  __shared__ int number;
  return number;
}
__device__ __forceinline__ void number_block(const PersistentFrameArgs& a) {
  own_block() = static_cast<int>(blockIdx.x);
  if (!a.near) return;
  const int side = a.sides[multiprocessor()], ticket = atomicAdd(a.tickets + side, 1);
  own_block() = ticket < kPairs ? 2 * ticket + side : 2 * (kBlocks - 1 - ticket) + 1 - side;
}

// The rows of a phase's matrices that this block has.
__device__ __forceinline__ int first_row(const Phase& f) { return own_block() * f.share; }
__device__ __forceinline__ int rows_here(const Phase& f) { return max(0, min(f.share, f.rows - first_row(f))); }

template <class T>
struct Shared {
  // The ring; behind what is in use of it slow attention has its room (frame_slow_attention.cuh).
  union {
    unsigned char pool[kPoolBytes];
    struct {
      unsigned char ring[kSlots * kSlotBytes];
      union {
        T cache[2][10][8][kFastDim];  // keys and values of a layer of the fast stack
        struct {
          float value[kMostLogits], gumbel[kMostLogits];
        } logits;  // of the main draw, before the fast stack begins
      };
    };
  };
  __align__(128) T heads[kWorkers][2][3][kFastDim];  // a warp's query, key and value in fast attention, by vector
  // The warps' parts of a phase's results, by vector and row: with the high part of x and with the low one; of the
  // residual stream's. A phase between two of a kind keeps them apart.
  __align__(16) float partial[2][kMostRows][kSums];
  __align__(16) float own_partial[2][kOwnRows][kOwnSums];
  T angles[kPlaces][kFastDim];
  __align__(16) float squares[2][2 * kWorkers];  // of x, by vector and half a warp's columns
  float own[2][kOwnRows];                        // this block's rows of the residual stream, by vector
  float gumbel[1024];                            // of the fast code that is drawn next
  uint32 begin[2][kWidth / 2];                   // what a stack begins with, by vector
  uint64 full[kSlots], empty[kSlots];
  int first_phase;  // of the list that is in use
  Ahead slots[2 * kSamplerWarps];
  Phase phases[8];  // this one, the next four, and those that some may still read
  int position;     // of the frame
  uint32 turn;      // number of the frame
  bool given_up;    // whether a reader of words in this block has
};

}  // namespace s1
