// The random numbers that torch's generator gives on a GPU, element by element, so that a seed means the same in a
// kernel that draws for itself as in torch.Tensor.exponential_ and uniform_ before it.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), arranged as curand and torch's
// distribution kernels do (ATen/native/cuda/DistributionTemplates.h): element i of a tensor belongs to thread
// i % threads of a grid of `threads`, which draws four numbers a round, for its next four elements.
#pragma once

#include "kernel.cuh"

namespace s1 {

struct Philox4 {
  uint32 word[4];
};

// Block number `counter` of stream number `stream` of the generator with this seed.
__device__ __forceinline__ Philox4 philox(uint64 seed, uint64 counter, uint64 stream) {
  constexpr uint32 kMultiplier0 = 0xd2511f53u, kMultiplier1 = 0xcd9e8d57u;
  constexpr uint32 kWeyl0 = 0x9e3779b9u, kWeyl1 = 0xbb67ae85u;
  uint32 key0 = static_cast<uint32>(seed), key1 = static_cast<uint32>(seed >> 32);
  Philox4 x{{static_cast<uint32>(counter), static_cast<uint32>(counter >> 32), static_cast<uint32>(stream),
             static_cast<uint32>(stream >> 32)}};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32 high0 = __umulhi(kMultiplier0, x.word[0]), low0 = kMultiplier0 * x.word[0];
    const uint32 high1 = __umulhi(kMultiplier1, x.word[2]), low1 = kMultiplier1 * x.word[2];
    x = {{high1 ^ x.word[1] ^ key0, low1, high0 ^ x.word[3] ^ key1, low0}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return x;
}

// Where torch's generator stands, and the grid that it would launch for the tensor that is drawn.
struct TorchGenerator {
  uint64 seed;
  uint64 offset;  // a multiple of 4
  uint32 threads;

  // In (0, 1], as curand_uniform gives it.
  __device__ __forceinline__ float uniform(uint32 element) const {
    uint32 turn = 0, thread = element;
    if (element >= threads) {
      turn = element / threads;
      thread = element - turn * threads;
    }
    const Philox4 four = philox(seed, offset / 4 + turn / 4, thread);
    const uint32 low = turn & 1 ? four.word[1] : four.word[0], high = turn & 1 ? four.word[3] : four.word[2];
    constexpr float kUnit = 2.3283064e-10f;  // 2^-32
    return static_cast<float>(turn & 2 ? high : low) * kUnit + kUnit / 2.0f;
  }

  // Tensor.exponential_(1). torch takes the fast logarithm here, and keeps its result from being 0.
  __device__ __forceinline__ float exponential(uint32 element) const {
    constexpr float kHalfEpsilon = 1.1920929e-07f / 2.0f;
    const float u = uniform(element);
    return u >= 1.0f - kHalfEpsilon ? kHalfEpsilon : -__logf(u);
  }

  // -log(max(u, 1e-38)) of Tensor.uniform_(), whose range is [0, 1): there 1 becomes 0.
  __device__ __forceinline__ float minus_log_uniform(uint32 element) const {
    const float u = uniform(element);
    return -logf(u == 1.0f ? 1e-38f : u);
  }
};

}  // namespace s1
