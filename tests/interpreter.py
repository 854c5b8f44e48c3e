"""Triton's interpreter rounds to bfloat16 as GPUs do, with this in its place: up to release 3.9 it truncates."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float


def convert_float(values, source, target, rounding):
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(values, source, target, rounding)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16).reshape(np.shape(values))
