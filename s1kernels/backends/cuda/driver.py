"""The NVIDIA driver, called through ctypes: loads modules, and launches kernels where there is no `s1kernels._C`."""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from enum import IntEnum
from functools import cache

from s1kernels.registry import BackendError

OLDEST = (12, 0)
"""The CUDA version that the driver must support: 12.0 came with drivers 525 (Linux) and 527 (Windows)."""

_LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_COOPERATIVE, _PROGRAMMATIC_STREAM_SERIALIZATION = 2, 6  # CUlaunchAttributeID
_MAX_DYNAMIC_SHARED, _PREFERRED_SHARED = 8, 9  # CUfunction_attribute
_ALL_SHARED = 100  # percent
_RAN_BEFORE = range(700, 720)  # errors of a kernel that ran before the call


class Attribute(IntEnum):
    """CUdevice_attribute: what can be asked about a GPU."""

    MULTIPROCESSORS = 16
    EXEC_TIMEOUT = 17  # the system ends kernels that take too long
    MEMORY_CLOCK_RATE, MEMORY_BUS_WIDTH = 36, 37  # kilohertz, bits
    MAJOR, MINOR = 75, 76  # of the compute capability
    COOPERATIVE_LAUNCH = 95
    MAX_SHARED_OPTIN = 97  # bytes of shared memory a block


class _Attribute(ctypes.Structure):
    _fields_ = [("id", c_int), ("pad", c_int), ("value", c_int), ("rest", c_int * 15)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared", c_uint), ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("attribute_count", c_uint),
    ]  # fmt: skip


class Driver:
    """The loaded driver. Raises BackendError if there is none, or one too old."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            advice = "install the driver from nvidia.com/drivers"
            raise BackendError(f"no NVIDIA driver: {_LIBRARY} cannot be loaded ({error}); {advice}") from None
        number = c_int()
        self("cuDriverGetVersion", byref(number))
        self.version = (number.value // 1000, number.value % 1000 // 10)
        if self.version < OLDEST:
            have, need = ("{}.{}".format(*version) for version in (self.version, OLDEST))
            raise BackendError(f"the NVIDIA driver is for CUDA {have}; CUDA {need} is needed: install a newer driver")
        if result := self._library.cuInit(c_uint(0)):
            raise BackendError(f"the NVIDIA driver cannot start: {self.describe(result)}")

    def __call__(self, name: str, *args: object, about: str = "") -> None:
        """Call a function of the driver; `about` begins the text of an error."""
        if result := getattr(self._library, name)(*args):
            advice = "please report this with the output of `s1kernels info`"
            if result in _RAN_BEFORE:
                advice = "an earlier kernel failed: set CUDA_LAUNCH_BLOCKING=1 to find it, then restart"
            raise RuntimeError(f"{about or name}: {self.describe(result)}; {advice}")

    def has(self, name: str) -> bool:
        return hasattr(self._library, name)

    def describe(self, result: int) -> str:
        """An error's name and its text."""
        name, text = c_char_p(), c_char_p()
        self._library.cuGetErrorName(result, byref(name))
        self._library.cuGetErrorString(result, byref(text))
        return f"{(name.value or b'unknown error').decode()} ({(text.value or str(result).encode()).decode()})"


driver = cache(Driver)
"""The driver, loaded once."""


@cache
def attribute(device: int, which: Attribute) -> int:
    """What the driver says about a GPU."""
    value = c_int()
    driver()("cuDeviceGetAttribute", byref(value), c_int(which), c_int(device))
    return value.value


def gpus() -> list[str]:
    """The names of the GPUs, in the driver's order, which is torch's."""
    count = c_int()
    driver()("cuDeviceGetCount", byref(count))
    names = []
    for device in range(count.value):
        name = ctypes.create_string_buffer(256)
        driver()("cuDeviceGetName", name, c_int(len(name)), c_int(device))
        names.append(name.value.decode())
    return names


@cache
def context(device: int) -> int:
    """The primary context of a GPU: the one that torch uses. It is held until the process ends."""
    handle, ordinal = c_void_p(), c_int()
    driver()("cuDeviceGet", byref(ordinal), c_int(device))
    driver()("cuDevicePrimaryCtxRetain", byref(handle), ordinal)
    return handle.value or 0


class Current:
    """Makes a context current within a block: a thread that has used no CUDA yet has none."""

    def __init__(self, handle: int) -> None:
        self._handle = c_void_p(handle)

    def __enter__(self) -> None:
        driver()("cuCtxPushCurrent_v2", self._handle)

    def __exit__(self, *_: object) -> None:
        driver()("cuCtxPopCurrent_v2", byref(c_void_p()))


class Module:
    """Device code, loaded into the primary context of a GPU until the process ends."""

    def __init__(self, cubin: bytes, device: int, *, origin: str) -> None:
        self._handle, self._context, self._origin = c_void_p(), context(device), origin
        with Current(self._context):
            driver()("cuModuleLoadData", byref(self._handle), c_char_p(cubin), about=f"cannot load {origin}")

    def function(self, name: str) -> int:
        """The CUfunction of a kernel."""
        handle = c_void_p()
        with Current(self._context):
            about = f"no kernel {name} in {self._origin}"
            driver()("cuModuleGetFunction", byref(handle), self._handle, c_char_p(name.encode()), about=about)
        return handle.value or 0


def load_function(function: int, device: int) -> int | None:
    """Have a kernel's code on the GPU before it is launched, since a graph capture forbids loading.

    Returns the size of its one argument; None if the driver is too old to tell (it must be of CUDA 12.4).
    """
    if not driver().has("cuFuncLoad"):
        return None
    offset, size = c_size_t(), c_size_t()
    with Current(context(device)):
        driver()("cuFuncLoad", c_void_p(function))
        driver()("cuFuncGetParamInfo", c_void_p(function), c_size_t(0), byref(offset), byref(size))
    return size.value


def prefer_shared(function: int, device: int) -> None:
    """Ask for as much shared memory, and as little L1, as a multiprocessor can have. So do all kernels: one that wants
    another division than its predecessor cannot start before the multiprocessor is idle."""
    with Current(context(device)):
        driver()("cuFuncSetAttribute", c_void_p(function), c_int(_PREFERRED_SHARED), c_int(_ALL_SHARED))


def allow_shared(function: int, device: int, shared: int, *, name: str) -> None:
    """Let a kernel be launched with more than 48 KB of dynamic shared memory."""
    most = attribute(device, Attribute.MAX_SHARED_OPTIN)
    about = f"kernel {name}: {shared} bytes of shared memory, where a block has {most} at most"
    with Current(context(device)):
        driver()("cuFuncSetAttribute", c_void_p(function), c_int(_MAX_DYNAMIC_SHARED), c_int(shared), about=about)


class Launch:
    """As `s1kernels._C.Launch`, which is a few microseconds faster."""

    def __init__(
        self, name: str, function: int, context: int, grid: tuple[int, int, int], block: tuple[int, int, int],
        shared: int, pdl: bool, cooperative: bool, args: bytes,
    ) -> None:  # fmt: skip
        self._driver = driver()
        self._args = ctypes.create_string_buffer(args, len(args))
        self._params = (c_void_p * 1)(ctypes.addressof(self._args))
        chosen = [i for i, on in ((_PROGRAMMATIC_STREAM_SERIALIZATION, pdl), (_COOPERATIVE, cooperative)) if on]
        self._attributes = (_Attribute * 2)(*(_Attribute(i, 0, 1) for i in chosen))
        self._config = _Config((c_uint * 3)(*grid), (c_uint * 3)(*block), shared, None, self._attributes, len(chosen))
        self._function, self._context = c_void_p(function), Current(context)
        sizes = ["x".join(map(str, size)) for size in (grid, block)]
        self._about = f"kernel {name}, grid {sizes[0]}, block {sizes[1]}, {shared} bytes of shared memory"

    def enqueue(self, stream: int) -> None:
        config = _Config.from_buffer_copy(self._config)  # its own: other threads may enqueue too
        config.stream = stream
        with self._context:
            self._driver("cuLaunchKernelEx", byref(config), self._function, self._params, None, about=self._about)
