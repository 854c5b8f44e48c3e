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

// As L2 has it, past L1.
__device__ __forceinline__ uint32 load_cached(const uint32* at) {
  uint32 word;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(word) : "l"(at) : "memory");
  return word;
}

struct HalvesArgs {
  const uint32* memory;  // pairs of chunks
  int* lead;             // [pairs], or [blocks, pairs]: cycles by which a pair's first chunk answers before its second
  int* where;            // [blocks], the multiprocessor that a block ran on
  int pairs;
  int apart;  // whether blocks take pairs by turns, or every block all of them
  int zero;   // 0, which the compiler must not know
};

// One warp a block. Lines that are in L2 are read one after the other. Blocks that measure the same pairs begin at
// different ones: many that read a line at once wait for each other.
template <class T>
__device__ void measure_halves(const HalvesArgs& a) {
  constexpr int kWords = kChunkBytes / 4, kLines = 8;
  launch_next();
  wait_for_inputs();
  const int lane = threadIdx.x, block = blockIdx.x;
  if (lane == 0) a.where[block] = multiprocessor();
  const int blocks = gridDim.x, each = a.apart ? ceil_div(a.pairs - block, blocks) : a.pairs;
  const int first = a.apart ? block : block * a.pairs / blocks;
  for (int i = 0; i < each; ++i) {
    const int number = a.apart ? first + i * blocks : (first + i) % a.pairs;
    const uint32* pair = a.memory + static_cast<int64>(number) * 2 * kWords;
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
      a.lead[(a.apart ? 0 : block * a.pairs) + number] = static_cast<int>(cycles[1] - cycles[0]);
    }
    __syncwarp();
  }
}

}  // namespace s1
