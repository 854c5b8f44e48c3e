"""The compiled module: functions over addresses, called by s1kernels.backends.cpu (csrc/module.cpp) and by
s1kernels.backends.cuda (csrc/cuda/bindings.cpp) alone."""

from collections.abc import Sequence
from typing import Any

class Launch:
    """A CUDA kernel with all that it takes but the stream."""

    def __init__(
        self,
        name: str,
        function: int,
        context: int,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        pdl: bool,
        cooperative: bool,
        args: bytes,
    ) -> None: ...
    def enqueue(self, stream: int) -> None: ...

def driver_error() -> str:
    """Why no kernel can be launched on this machine; empty if they can."""

def cuda_kernels() -> list[str]:
    """The CUDA kernels that were compiled into this module."""

def cuda_function(name: str, device: int) -> int:
    """The CUfunction of one of them. The device's primary context becomes the current one."""

def __getattr__(name: str) -> Any: ...  # the CPU functions
