"""What the tests change in Triton's interpreter.

It rounds to bfloat16 as GPUs do; up to release 3.9 it truncates. What it makes anew for every operation and stays the
same, which takes most of its time, is remembered: types, and that the language has been patched.
"""

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

_convert, _np_dtype, _patch = interpreter._convert_float, interpreter._get_np_dtype, interpreter._patch_lang
_make_block_type, _make_tensor = tl.block_type.__init__, tl.tensor.__init__
_block_types, _tensors, _np_dtypes = {}, {}, {}  # attributes of types, of tensors by type; dtypes of numpy by name


def convert_float(values, source, target, rounding):
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(values, source, target, rounding)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16).reshape(np.shape(values))


def make_block_type(self, element, shape):
    key = element.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape)
    if key not in _block_types:
        _make_block_type(self, element, shape)
        _block_types[key] = self.__dict__
    self.__dict__ = _block_types[key]


def make_tensor(self, handle, type):
    if type.name not in _tensors:
        _make_tensor(self, None, type)
        _tensors[type.name] = self.__dict__
    self.__dict__ = _tensors[type.name] | {"handle": handle}


def np_dtype(type):
    name = type.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _np_dtype(type)
    return _np_dtypes[name]


def patch_lang(function):
    """Before every call of a function of kernels, too: but then a caller has usually done it."""
    languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    return _patch(function) if any(tl.core.is_builtin(language.load) for language in languages) else None


def change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)
    monkeypatch.setattr(interpreter, "_get_np_dtype", np_dtype)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_lang)
    monkeypatch.setattr(tl.block_type, "__init__", make_block_type)
    monkeypatch.setattr(tl.tensor, "__init__", make_tensor)
