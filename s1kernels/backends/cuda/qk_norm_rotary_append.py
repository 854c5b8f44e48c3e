"""qk_norm_rotary_append on CUDA: csrc/cuda/qk_norm_rotary_append.cu."""

from __future__ import annotations

from torch import Tensor

from s1kernels.backends.cuda.launch import Kernel, Launch
from s1kernels.backends.cuda.support import ceil_div, run, supports
from s1kernels.registry import implement

HEADS_A_BLOCK = 4
KERNEL = Kernel(
    "qk_norm_rotary_append", "qk_norm_rotary_append", block=32 * HEADS_A_BLOCK,
    pointers="qkv q_norm_weight k_norm_weight cos_sin position k_cache v_cache out",
    ints="rows caches heads kv_heads head_dim capacity angles", floats="eps",
)  # fmt: skip


def launches(
    qkv: Tensor, q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, cos_sin: Tensor, position: Tensor,
    k_cache: Tensor, v_cache: Tensor, eps: float, out: Tensor,
) -> list[Launch]:  # fmt: skip
    """The op as launches to be enqueued in this order."""
    rows, heads, head_dim = out.shape
    caches, kv_heads, capacity, _ = k_cache.shape
    if rows == 0:
        return []
    return [
        KERNEL.bind(
            qkv.dtype, qkv.device, grid=ceil_div(rows * (heads + 2 * kv_heads), HEADS_A_BLOCK), qkv=qkv,
            q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, cos_sin=cos_sin, position=position,
            k_cache=k_cache, v_cache=v_cache, out=out, rows=rows, caches=caches, heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, capacity=capacity, angles=cos_sin.shape[0], eps=eps,
        )
    ]  # fmt: skip


@implement("qk_norm_rotary_append", backend="cuda", supports=supports)
def qk_norm_rotary_append(
    qkv: Tensor, q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, cos_sin: Tensor, position: Tensor,
    k_cache: Tensor, v_cache: Tensor, eps: float, out: Tensor,
) -> None:  # fmt: skip
    run(launches(qkv, q_norm_weight, k_norm_weight, cos_sin, position, k_cache, v_cache, eps, out), qkv.device)
