"""The hand-written CUDA kernels, csrc/cuda/<op>.cu: one module an op, and how kernels are found and launched.

support.py: what the kernels can take. providers.py: who gives the code of a kernel (compiled, cubin, nvrtc).
launch.py: arguments and attributes of a launch. frame_graph.py: a frame's launches as a CUDA graph.
"""

from s1kernels.backends.cuda import (
    attention_decode,
    decode_frame,
    embed_frame,
    linear_residual,
    qk_norm_rotary_append,
    rms_norm,
    rms_norm_logits,
    rms_norm_qkv,
    rms_norm_swiglu,
    sample_token,
    snake,
    swiglu,
)
from s1kernels.backends.cuda.providers import unavailable as available

__all__ = [
    "attention_decode",
    "available",
    "decode_frame",
    "embed_frame",
    "linear_residual",
    "qk_norm_rotary_append",
    "rms_norm",
    "rms_norm_logits",
    "rms_norm_qkv",
    "rms_norm_swiglu",
    "sample_token",
    "snake",
    "swiglu",
]
