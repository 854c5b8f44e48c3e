// In which half of L2 memory lies, as multiprocessors hear it.
//
// L2 of the GPUs that the persistent frame is for has two halves. A multiprocessor reads memory of its own half at once
// and the other half's through a link, later, where words that blocks pass on have to go as well. By a hash of physical
// addresses memory belongs to the halves in chunks of 4 KB, one of every two neighbours to each.
#pragma once

#include "vec.cuh"

namespace s1 {

constexpr int kChunkBytes = 4096;
constexpr int kMultiprocessors = 1024;  // in a table of them

__device__ __forceinline__ int multiprocessor() {
  uint32 id;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(id));
  return static_cast<int>(id % kMultiprocessors);
}

// As L2 has it, past L1; volatile, so that it stays between the clocks' readings.
__device__ __forceinline__ uint32 load_cached(const uint32* at) {
  uint32 word;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(word) : "l"(at) : "memory");
  return word;
}

struct HalvesArgs {
  const uint32* memory;  // pairs of chunks
  const uint32* other;   // pairs that are read first, and not measured
  int* lead;             // [pairs], the cycles by which a pair's first chunk answers before its second
  int* where;            // [blocks], the multiprocessor that a block runs on
  int pairs;
  int others;  // pairs in `other`, a multiple of the number of blocks
  int shift;   // multiprocessor m measures the pairs whose number is m + shift, modulo the number of blocks
  int zero;    // 0, which the compiler must not know
};

// One warp a block, one block a multiprocessor, which has lines come from memory and then reads them, one after the
// other. What the other half's multiprocessors have read lately is in both halves: the lines must not be in L2 before.
// A far line answers later only after some turns of all blocks, which other memory is for.
template <class T>
__device__ void measure_halves(const HalvesArgs& a) {
  constexpr int kWords = kChunkBytes / 4, kLines = 8;
  launch_next();
  wait_for_inputs();
  const int lane = threadIdx.x, own = multiprocessor(), blocks = gridDim.x;
  if (lane == 0) a.where[blockIdx.x] = own;
  for (int i = (own + a.shift) % blocks; i < a.others + a.pairs; i += blocks) {
    const uint32* pair = (i < a.others ? a.other : a.memory - static_cast<int64>(a.others) * 2 * kWords) +
                         static_cast<int64>(i) * 2 * kWords;
    const uint32 here = load_cached(pair + lane * (2 * kWords / 32));
    uint32 after = __shfl_xor_sync(0xffffffffu, here, 1) & a.zero;
    if (lane == 0) {
      int64 cycles[2];
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        const int64 start = clock64();
#pragma unroll 1  // so that the clock is read behind them
        for (int line = 0; line < kLines; ++line)
          after = load_cached(pair + chunk * kWords + line * (kWords / kLines) + after) & a.zero;
        cycles[chunk] = clock64() - start + after;
      }
      if (i >= a.others) a.lead[i - a.others] = static_cast<int>(cycles[1] - cycles[0]);
    }
    __syncwarp();
  }
}

}  // namespace s1
