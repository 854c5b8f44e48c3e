"""Where CUDA kernels come from. Three providers, tried in this order:

    compiled  in s1kernels._C, if `pip install .` found a CUDA toolkit
    cubin     shipped in the wheel for all systems (`shipped`), made by NVRTC from the sources that it ships
    nvrtc     compiled at first use from those sources, and kept on disk (`cache`)

S1KERNELS_CUDA_PROVIDER, or `use_provider` in code, names the one to take; if that cannot serve, BackendError says why.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import cache
from typing import Protocol

import torch

from s1kernels.backends.cuda import cache as disk
from s1kernels.backends.cuda import driver, dtypes, nvrtc, shipped, sources
from s1kernels.backends.cuda.arch import dotted, runs
from s1kernels.backends.cuda.device import capability, index_of
from s1kernels.backends.cuda.sources import Source
from s1kernels.build_info import build_info
from s1kernels.registry import BackendError

try:
    from s1kernels import _C
except ImportError:
    _C = None  # type: ignore[assignment]

logger = logging.getLogger("s1kernels")

OLDEST = (7, 5)

Functions = Callable[[str], int]
"""The name of a kernel with its dtype -> its CUfunction."""


class Provider(Protocol):
    def refusal(self, source: str | None, arch: tuple[int, int]) -> str | None:
        """Why it has no kernels of a source (None: of any) for a compute capability, or None."""

    def load(self, source: str, dtype: torch.dtype, device: int, arch: tuple[int, int]) -> tuple[Functions, str]:
        """The kernels, and who made them."""


class CompiledProvider:
    """The kernels in s1kernels._C."""

    def refusal(self, source: str | None, arch: tuple[int, int]) -> str | None:
        info = build_info()
        if _C is None or not _C.cuda_kernels():
            return f"not built: {info.cuda_reason or info.reason or 'see `s1kernels info`'}"
        if info.architectures and not any(runs(built, arch) for built in info.architectures):
            return f"built for {', '.join(info.architectures)}, not for {dotted(arch)} (see TORCH_CUDA_ARCH_LIST)"
        if info.cuda and int(info.cuda.split(".")[0]) > driver.driver().version[0]:
            return f"built by CUDA {info.cuda}; the driver is for CUDA {dotted(driver.driver().version)}"
        return None

    def load(self, source: str, dtype: torch.dtype, device: int, arch: tuple[int, int]) -> tuple[Functions, str]:
        def functions(name: str) -> int:
            with driver.Current(driver.context(device)):
                return _C.cuda_function(name, device)

        return functions, f"s1kernels._C, by CUDA {build_info().cuda}"


class CubinProvider:
    """What the package ships."""

    def refusal(self, source: str | None, arch: tuple[int, int]) -> str | None:
        found = shipped.find(source, arch)
        return found if isinstance(found, str) else None

    def load(self, source: str, dtype: torch.dtype, device: int, arch: tuple[int, int]) -> tuple[Functions, str]:
        found = shipped.find(source, arch)
        if isinstance(found, str):
            raise BackendError(found)
        entry, code = found
        try:
            module = driver.Module(code, device, origin=entry["file"])
        except RuntimeError as error:
            raise BackendError(f"{error}; S1KERNELS_CUDA_PROVIDER=nvrtc compiles kernels for this driver") from None
        return module.function, f"shipped for {entry['arch']}, by NVRTC {entry['nvrtc']}"


class NvrtcProvider:
    """Kernels compiled at run time."""

    def refusal(self, source: str | None, arch: tuple[int, int]) -> str | None:
        return _nvrtc_refusal(arch)

    def load(self, source: str, dtype: torch.dtype, device: int, arch: tuple[int, int]) -> tuple[Functions, str]:
        compiler = nvrtc.nvrtc_for(arch, driver.driver().version)
        target = compiler.target(arch)
        assert target is not None  # it was chosen for that
        cubin = compile_cubin(sources.source(source), dtypes.MASKS[dtype], compiler, target)
        return driver.Module(cubin, device, origin=f"{source}.cu for sm_{target} by {compiler}").function, str(compiler)


PROVIDERS: dict[str, Provider] = {"compiled": CompiledProvider(), "cubin": CubinProvider(), "nvrtc": NvrtcProvider()}

_CHOICE: ContextVar[str] = ContextVar("s1kernels_cuda_provider", default="")
_functions: dict[tuple, int] = {}
_loaded: dict[tuple, Functions] = {}
_said: set[tuple[str, int]] = set()
_locks: dict[tuple, threading.Lock] = {}


def choice() -> str:
    """The provider asked for (`use_provider`, else S1KERNELS_CUDA_PROVIDER), or "auto"."""
    return _CHOICE.get() or _known(os.environ.get("S1KERNELS_CUDA_PROVIDER") or "auto", "S1KERNELS_CUDA_PROVIDER")


@contextlib.contextmanager
def use_provider(name: str) -> Iterator[None]:
    """Within the block, kernels are bound from this provider: "compiled", "cubin", "nvrtc" or "auto"."""
    token = _CHOICE.set(_known(name, "provider"))
    try:
        yield
    finally:
        _CHOICE.reset(token)


def provider(source: str, dtype: torch.dtype, device: torch.device) -> str:
    """The name of the provider that serves csrc/cuda/<source>.cu. Raises BackendError if none does."""
    wanted, arch = choice(), capability(device)
    reasons = {}
    for name in PROVIDERS if wanted == "auto" else (wanted,):
        if (reason := PROVIDERS[name].refusal(source, arch)) is None:
            return name
        reasons[name] = reason
    raise BackendError(f"no CUDA kernels of {source}.cu for compute capability {dotted(arch)}: {_listed(reasons)}")


def function(source: str, name: str, dtype: torch.dtype, device: torch.device) -> int:
    """The CUfunction of the kernel <name>_<dtype> of csrc/cuda/<source>.cu. Raises BackendError if none can be had."""
    key = (source, name, dtype, index_of(device), choice())
    if (found := _functions.get(key)) is None:
        functions = _load(provider(source, dtype, device), source, dtype, index_of(device))
        found = _functions[key] = functions(f"{name}_{dtypes.NAMES[dtype]}")
    return found


def prepare(names: list[str], dtype: torch.dtype, device: torch.device) -> None:
    """Have all kernels of these sources ready. What NVRTC must compile for that is compiled side by side."""
    wanted = [(provider(source, dtype, device), source, dtype, index_of(device)) for source in names]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda key: _load(*key), wanted))


def available(device: torch.device) -> dict[str, str | None]:
    """Provider -> why it has no kernels for this device, or None."""
    return offers(None, capability(device))


def offers(source: str | None, arch: tuple[int, int]) -> dict[str, str | None]:
    """Provider -> why it has no kernels of a source (None: of any) for a compute capability, or None."""
    return {name: each.refusal(source, arch) for name, each in PROVIDERS.items()}


@cache
def unavailable() -> str | None:
    """Why no CUDA kernel can run on this machine, or None. A provider that was asked for is not judged here: a call
    that it cannot serve raises."""
    if not torch.version.cuda:
        return f"torch {torch.__version__} has no CUDA; install a CUDA build of torch"
    try:
        driver.driver()
    except BackendError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    fit = [device for device in devices if capability(device) >= OLDEST]
    if not fit:
        return f"every GPU is of a compute capability before {dotted(OLDEST)}"
    arches = {capability(device) for device in fit}
    if any(each.refusal(None, arch) is None for arch in arches for each in PROVIDERS.values()):
        return None
    return _listed(available(fit[0]))


def compile_cubin(source: Source, mask: int, compiler: nvrtc.Nvrtc, arch: int) -> bytes:
    """A source's kernels of the dtypes in `mask`, from the disk cache or compiled."""
    options = [*sources.options(arch, mask), *os.environ.get("S1KERNELS_NVRTC_OPTIONS", "").split()]
    key = disk.key(source.text, *options, dotted(compiler.version))
    if (cubin := disk.load(key)) is None:
        cubin = compiler.compile(source.text, f"{source.name}.cu", options).code
        disk.store(key, cubin)
    return cubin


def _load(name: str, source: str, dtype: torch.dtype, device: int) -> Functions:
    """The kernels of a source from the provider `name`."""
    key = (name, source, dtype, device)
    with _locks.setdefault(key, threading.Lock()):
        if key not in _loaded:
            torch.cuda.init()
            arch = capability(torch.device("cuda", device))
            _loaded[key], by = PROVIDERS[name].load(source, dtype, device, arch)
            if (name, device) not in _said:
                _said.add((name, device))
                gpu = f"cuda:{device} ({torch.cuda.get_device_name(device)}, sm_{arch[0]}{arch[1]})"
                logger.info("CUDA kernels for %s: %s (%s)", gpu, name, by)
        return _loaded[key]


@cache
def _nvrtc_refusal(arch: tuple[int, int]) -> str | None:
    try:
        nvrtc.nvrtc_for(arch, driver.driver().version)
    except nvrtc.NvrtcError as error:
        return str(error)
    return None


def _listed(reasons: dict) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _known(name: str, what: str) -> str:
    if name not in ("auto", *PROVIDERS):
        raise ValueError(f"{what} must be auto or one of {', '.join(PROVIDERS)}, got {name!r}")
    return name
