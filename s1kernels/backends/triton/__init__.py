"""The Triton kernels: one module an op. For Linux, WSL2 and triton-windows, without a CUDA toolkit.

support.py: whether Triton can serve, and how kernels are launched. tuning.py: how large their pieces are. pdl.py: how a
kernel starts before its predecessor ends. project.py, rotary.py, draw.py, rng.py: what several kernels share.
"""

from s1kernels.backends.triton.support import available

if available() is None:
    from s1kernels.backends.triton import (  # noqa: F401  they enter themselves into the registry
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

__all__ = ["available"]
