// What the persistent frame kernel is told (phases and arguments), and what a block keeps in shared memory.
#pragma once

#include "attention.cuh"
#include "exchange.cuh"
#include "token.cuh"
#include "weight_ring.cuh"

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

}  // namespace s1
