"""NVRTC, NVIDIA's run-time compiler, called through ctypes. It needs no CUDA toolkit and no C++ compiler.

CUDA builds of torch bring it along (a wheel on Linux, in torch\\lib on Windows); `pip install "s1kernels[nvrtc-cu12]"`
or `[nvrtc-cu13]` adds a newer one. _build/cubins.py loads this file by itself, without torch.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path

WINDOWS = sys.platform == "win32"
_BUILTIN_OPERATION_FAILURE = 7


class NvrtcError(RuntimeError):
    """There is no NVRTC that can compile."""


@dataclass(frozen=True)
class Compiled:
    code: bytes
    """A cubin, or PTX for the option --gpu-architecture=compute_..."""
    log: str


class Nvrtc:
    """A loaded NVRTC. Raises OSError if it does not load, AttributeError if it is older than CUDA 11.2."""

    def __init__(self, path: str) -> None:
        folder = Path(path).parent
        if folder.is_absolute():
            if WINDOWS:
                os.add_dll_directory(str(folder))  # type: ignore[attr-defined,unused-ignore]
            for builtins in folder.glob("nvrtc-builtins64_*.dll" if WINDOWS else "libnvrtc-builtins.so*"):
                ctypes.CDLL(str(builtins))  # NVRTC asks for it by its name alone
        self.path, self._library = path, ctypes.CDLL(path)
        major, minor, count = c_int(), c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        self._call("nvrtcGetNumSupportedArchs", byref(count))
        archs = (c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", archs)
        self.version, self.archs = (major.value, minor.value), tuple(archs)

    def __str__(self) -> str:
        return f"NVRTC {self.version[0]}.{self.version[1]} ({self.path})"

    def target(self, capability: tuple[int, int]) -> int | None:
        """The architecture to compile for, such as 89: a GPU runs code of its own or a lower minor version."""
        wanted = capability[0] * 10 + capability[1]
        return max((arch for arch in self.archs if wanted // 10 * 10 <= arch <= wanted), default=None)

    def compile(self, text: str, name: str, options: list[str]) -> Compiled:
        """Compile device code. Raises RuntimeError with the compiler's messages."""
        program, size = c_void_p(), c_size_t()
        self._call(
            "nvrtcCreateProgram", byref(program), c_char_p(text.encode()), c_char_p(name.encode()), 0, None, None
        )
        try:
            given = (c_char_p * len(options))(*(option.encode() for option in options))
            result = self._library.nvrtcCompileProgram(program, len(options), given)
            self._call("nvrtcGetProgramLogSize", program, byref(size))
            log = ctypes.create_string_buffer(size.value)
            self._call("nvrtcGetProgramLog", program, log)
            messages = log.value.decode(errors="replace").strip()
            if result == _BUILTIN_OPERATION_FAILURE:
                advice = "its nvrtc-builtins library is missing or of another version: reinstall the package it is from"
                raise NvrtcError(f"{self} cannot compile: {advice} ({messages})")
            if result:
                raise RuntimeError(f"{self} cannot compile {name} ({self._describe(result)}):\n{messages}")
            kind = "PTX" if any("=compute_" in option for option in options) else "CUBIN"
            self._call(f"nvrtcGet{kind}Size", program, byref(size))
            code = ctypes.create_string_buffer(size.value)
            self._call(f"nvrtcGet{kind}", program, code)
            return Compiled(code.value if kind == "PTX" else code.raw, messages)
        finally:
            self._library.nvrtcDestroyProgram(byref(program))

    @cached_property
    def failure(self) -> str | None:
        """Why it cannot compile anything, or None."""
        try:
            self.compile("", "empty.cu", [])
        except RuntimeError as error:
            return str(error)
        return None

    def _call(self, function: str, *args: object) -> None:
        if result := getattr(self._library, function)(*args):
            raise RuntimeError(f"{self.path}: {function}: {self._describe(result)}")

    def _describe(self, result: int) -> str:
        self._library.nvrtcGetErrorString.restype = c_char_p
        return self._library.nvrtcGetErrorString(result).decode()


def folders() -> Iterator[Path]:
    """Where NVRTC may be, the likeliest first."""
    if torch := find_spec("torch"):
        yield Path(str(torch.origin)).parent / "lib"
    nvidia = find_spec("nvidia")
    for base in (nvidia and nvidia.submodule_search_locations) or ():  # NVIDIA's wheels
        for pattern in ("cuda_nvrtc/lib", "cuda_nvrtc/bin", "cu[0-9]*/lib", "cu[0-9]*/bin", "cu[0-9]*/bin/x86_64"):
            yield from sorted(Path(base).glob(pattern), reverse=True)
    yield Path(sys.prefix, "Library/bin" if WINDOWS else "lib")  # conda
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), None if WINDOWS else "/usr/local/cuda"]
    for home in filter(None, homes):
        yield from (Path(home, name) for name in ("lib64", "lib", "bin", "bin/x64"))
    if WINDOWS:  # a DLL that is asked for by its name is not looked for there
        yield from (Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder)


def candidates() -> Iterator[str]:
    """The libraries that may be NVRTC, and last the names that the system's loader is asked for."""
    pattern, seen = "nvrtc64_*_0.dll" if WINDOWS else "libnvrtc.so*", set()
    for folder in folders():
        for path in sorted(folder.glob(pattern), reverse=True):
            if (real := path.resolve()) not in seen:
                seen.add(real)
                yield str(path)
    yield from ("nvrtc64_130_0.dll", "nvrtc64_120_0.dll") if WINDOWS else ("libnvrtc.so.13", "libnvrtc.so.12")


@cache
def load(path: str) -> Nvrtc | str:
    """The NVRTC at `path`, or why it does not load."""
    try:
        return Nvrtc(path)
    except OSError as error:
        return f"{path} does not load ({error}); reinstall the package it is from"
    except AttributeError:
        return f"{path} is older than CUDA 11.2"


def found() -> Iterator[Nvrtc | str]:
    """Every NVRTC here, or why it does not load."""
    versions = set()
    for path in candidates():
        loaded, by_name = load(path), not os.path.isabs(path)
        if isinstance(loaded, str):
            if not by_name:  # else the system's loader knows none
                yield loaded
        elif not by_name or loaded.version not in versions:  # else it is one of those before
            versions.add(loaded.version)
            yield loaded


def nvrtc_for(capability: tuple[int, int], driver: tuple[int, int] | None = None) -> Nvrtc:
    """The NVRTC that compiles for a GPU, for a driver of that CUDA version. Raises NvrtcError if there is none."""
    reasons = []
    for nvrtc in found():
        if isinstance(nvrtc, str):
            reasons.append(nvrtc)
        elif nvrtc.target(capability) is None:
            reasons.append(f"{nvrtc} cannot compile for sm_{capability[0]}{capability[1]}")
        elif driver and nvrtc.version[0] > driver[0]:
            reasons.append(f"what {nvrtc} compiles does not load into a driver for CUDA {driver[0]}")
        elif nvrtc.failure:
            reasons.append(nvrtc.failure)
        else:
            return nvrtc
    fitting = [major for major in (12, 13) if not driver or major == min(driver[0], 13)]
    advice = " or ".join(f'pip install --upgrade "s1kernels[nvrtc-cu{major}]"' for major in fitting)
    raise NvrtcError(f"{'; '.join(reasons) or 'NVRTC is not installed'}; {advice}")
