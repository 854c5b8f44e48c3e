"""Random numbers of torch's CUDA generator, so that a seed means the same in a kernel that draws for itself.

Philox4x32-10 arranged as torch's distribution kernels do (ATen/native/cuda/DistributionTemplates.h): element i of a
tensor belongs to thread i % threads of a grid, which draws four numbers a round, for its next four elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from s1kernels.backends.triton.support import INTERPRETED

if INTERPRETED:

    @triton.jit
    def fast_log(x):
        return tl.log(x)

else:
    from triton.language.extra.cuda.libdevice import fast_logf as fast_log  # type: ignore[no-redef]

_UNIT = tl.constexpr(2.3283064e-10)  # 2^-32
_HALF_EPSILON = tl.constexpr(1.1920929e-07 / 2)


@triton.jit
def uniform(state, offset, threads, element):
    """In (0, 1], as curand_uniform gives it, for elements (int32) of a tensor that is drawn `offset` after `state`.

    state: [2] int64, seed and offset, a multiple of 4. threads: of the grid that torch launches for the tensor.
    """
    seed, counter = tl.load(state), (tl.load(state + 1) + offset) >> 2
    turn = element // threads
    thread = element - turn * threads
    block = counter + (turn >> 2).to(tl.int64)
    a, b, c, d = tl.philox(
        seed, (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32), thread.to(tl.uint32),
        tl.zeros_like(thread).to(tl.uint32),
    )  # fmt: skip
    odd = (turn & 1) == 1
    low, high = tl.where(odd, b, a), tl.where(odd, d, c)
    return tl.fma(tl.where((turn & 2) == 2, high, low).to(tl.float32), _UNIT, _UNIT / 2)


@triton.jit
def noise_of(state, offset, threads, element, UNIFORM: tl.constexpr):
    """Tensor.exponential_(1), or -log(max(u, 1e-38)) of Tensor.uniform_()."""
    u = uniform(state, offset, threads, element)
    if UNIFORM:  # in [0, 1): there 1 becomes 0
        noise = -tl.log(tl.where(u == 1.0, 1e-38, u))
    else:  # torch takes the fast logarithm here, and keeps its result from being 0
        noise = tl.where(u >= 1.0 - _HALF_EPSILON, _HALF_EPSILON, -fast_log(u))
    return noise
