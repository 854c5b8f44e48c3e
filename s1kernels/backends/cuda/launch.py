"""Kernels with their argument structs, and launches of them.

    ADD = Kernel("add", "add", block=256, pointers="x y out", ints="n", floats="scale")
    ADD(x.dtype, x.device, grid=ceil_div(n, 256), x=x, y=y, out=out, n=n, scale=1.0)

calls add_<dtype> of csrc/cuda/add.cu with {const void *x, *y; void* out; int n; float scale}.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s1kernels.backends.cuda import driver, dtypes, providers
from s1kernels.backends.cuda.device import capability, current_stream, index_of, multiprocessors

try:
    from s1kernels import _C
except ImportError:
    _C = None  # type: ignore[assignment]

__all__ = ["KERNELS", "Kernel", "Launch", "capability", "current_stream", "multiprocessors"]

KERNELS: list[Kernel] = []
"""Every kernel, in the order of definition."""

PDL_CAPABILITY, PDL_DRIVER = (9, 0), (12, 3)
_SHARED_BYTES = 48 * 1024  # what every kernel may have without asking
_allowed: dict[int, int] = {}  # CUfunction -> bytes of dynamic shared memory asked for
_lock = threading.Lock()


class Launch:
    """A kernel with its grid and its arguments. It keeps the tensors among them alive.

    enqueue: puts it into a stream (a raw CUstream handle) of the device that it was bound for.
    tensors: those among its arguments, in the order of the kernel's pointers.
    """

    __slots__ = ("enqueue", "tensors")

    def __init__(self, enqueue: Callable[[int], None], tensors: list[Tensor]) -> None:
        self.enqueue, self.tensors = enqueue, tensors


class Kernel:
    """One kernel entry point and its argument struct.

    Args:
        source: the stem of csrc/cuda/<source>.cu.
        name: the kernel's name, without the suffix of the dtype.
        block: threads of a block.
        pointers, ints, floats: the names of the struct's fields, separated by spaces; in the struct, all pointers come
            first, then all ints, then all floats.
    """

    def __init__(self, source: str, name: str, *, block: int, pointers: str, ints: str = "", floats: str = "") -> None:
        self.source, self.name, self.block = source, name, block
        self.pointers, self.ints, self.floats = pointers.split(), ints.split(), floats.split()
        self.fields = [*self.pointers, *self.ints, *self.floats]
        numbers = len(self.ints) + len(self.floats)
        padding = 4 * (numbers % 2) if self.pointers else 0
        self._struct = struct.Struct(f"<{len(self.pointers)}Q{len(self.ints)}i{len(self.floats)}f{padding}x")
        self._known = frozenset(self.fields)
        self.argument_bytes = self._struct.size
        KERNELS.append(self)

    def bind(
        self, dtype: torch.dtype, device: torch.device, *, grid: int | tuple[int, ...], shared: int = 0,
        pdl: bool = True, cooperative: bool = False, **values: Any,
    ) -> Launch:  # fmt: skip
        """A launch, ready to be enqueued.

        Args:
            grid: blocks in x, or in up to three dimensions.
            shared: bytes of dynamic shared memory.
            pdl: let the kernel start before its predecessor ends, where the GPU can (see wait_for_inputs in
                csrc/cuda/device/kernel.cuh).
            cooperative: all blocks run at once, or the launch fails.
            values: one for each field; a pointer takes a tensor on `device`, None or an address.
        """
        args, tensors = self._pack(values, device)
        index = index_of(device)
        function = providers.function(self.source, self.name, dtype, device)
        if _allowed.get(function, -1) < max(shared, _SHARED_BYTES):
            self._prepare(function, index, shared)
        whole_grid = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)[:3]
        pdl = pdl and programmatic(device)
        name, block = f"{self.name}_{dtypes.NAMES[dtype]}", (self.block, 1, 1)
        create = driver.Launch if _C is None else _C.Launch
        launch = create(name, function, driver.context(index), whole_grid, block, shared, pdl, cooperative, args)
        return Launch(launch.enqueue, tensors)

    def __call__(
        self, dtype: torch.dtype, device: torch.device, *, grid: int | tuple[int, ...], shared: int = 0,
        pdl: bool = True, cooperative: bool = False, **values: Any,
    ) -> None:  # fmt: skip
        """Bind, and enqueue on the device's current stream."""
        launch = self.bind(dtype, device, grid=grid, shared=shared, pdl=pdl, cooperative=cooperative, **values)
        launch.enqueue(current_stream(device))

    def _pack(self, values: dict[str, Any], device: torch.device) -> tuple[bytes, list[Tensor]]:
        """The bytes of the argument struct, and the tensors that it points into."""
        if values.keys() != self._known:
            missing, unknown = sorted(self._known - values.keys()), sorted(values.keys() - self._known)
            raise TypeError(f"kernel {self.name}: missing fields {missing}, unknown fields {unknown}")
        tensors = []
        for field in self.pointers:
            value = values[field]
            if isinstance(value, Tensor):
                if value.device.type != device.type or value.device.index != index_of(device):
                    raise ValueError(f"kernel {self.name}: {field} must be on {device}, got {value.device}")
                tensors.append(value)
                values[field] = value.data_ptr()
            elif value is None:
                values[field] = 0
        try:
            return self._struct.pack(*(values[field] for field in self.fields)), tensors
        except (struct.error, OverflowError) as error:
            given = {field: values[field] for field in self.fields}
            raise ValueError(f"kernel {self.name}: {error}; the fields are {given}") from None

    def _prepare(self, function: int, index: int, shared: int) -> None:
        """Before the first launch of a function, and before one with more shared memory than it may have."""
        with _lock:
            size = driver.load_function(function, index)
            if size not in (None, self.argument_bytes):
                raise RuntimeError(
                    f"kernel {self.name} takes {size} bytes of arguments, not {self.argument_bytes}: the compiled code "
                    "is not of this version; install s1kernels again"
                )
            if function not in _allowed:
                driver.prefer_shared(function, index)
            if shared > _SHARED_BYTES:
                driver.allow_shared(function, index, shared, name=self.name)
            _allowed[function] = max(shared, _SHARED_BYTES)


def programmatic(device: torch.device) -> bool:
    """Whether GPU and driver let a kernel start before its predecessor in the stream ends."""
    return capability(device) >= PDL_CAPABILITY and driver.driver().version >= PDL_DRIVER
