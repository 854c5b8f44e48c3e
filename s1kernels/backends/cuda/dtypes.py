"""The dtypes that there are CUDA kernels for."""

import torch

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""dtype -> the suffix of its kernels."""
MASKS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 4}
"""dtype -> its bit in S1_DTYPES (csrc/cuda/device/kernel.cuh)."""
