"""CUDA kernels of the project on the CPU: builds a source for the emulator, and launches its kernels from Python.

Every thread of a launch is a fiber of one CPU thread. Not modelled: the order of memory (all accesses are sequentially
consistent, fences and proxies do nothing), time, bank conflicts, a tensor core's order of summation (sums are exact in
double and rounded once), approximate functions (they are correctly rounded), contraction of a * b + c.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from translate import HERE, translate

from s1kernels.backends.cuda import dtypes, launch

SOURCES = HERE.parents[1] / "csrc" / "cuda"
FLAGS = [
    "-std=c++17", "-O1", "-g1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-exceptions",
    "-fno-rtti", "-fno-stack-protector", "-fvisibility=hidden", "-fPIC", "-shared", "-w",
]  # fmt: skip


class LaunchFailed(Exception):
    """A kernel did what it must not, or its threads wait for each other for ever."""


def unavailable() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "the emulator needs Linux on x86-64"
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    if "f16c" not in Path("/proc/cpuinfo").read_text():
        return "the emulator needs a CPU with F16C"
    return None


class Library:
    """A source's kernels."""

    def __init__(self, path: Path) -> None:
        self._c = ctypes.CDLL(str(path))
        self._c.emulator_report.restype = ctypes.c_char_p
        self._c.emulator_launch.argtypes = [
            ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t,
            ctypes.c_uint64,
        ]  # fmt: skip

    @contextmanager
    def bound(self, seed: int = 0) -> Iterator[None]:
        """Kernel.bind gives launches of this library's, which run when their `enqueue` is called. Seeds other than 0
        run blocks, warps and lanes in orders of their own."""

        def bind(kernel, dtype, device, *, grid, shared=0, pdl=True, cooperative=False, **values):
            named = {name: t for name, t in values.items() if isinstance(t, torch.Tensor)}
            args, tensors = kernel._pack(values, device)
            name = f"{kernel.name}_{dtypes.NAMES[dtype]}".encode()

            def enqueue(stream: int) -> None:
                self._name(named)
                if self._c.emulator_launch(name, args, len(args), grid, kernel.block, shared, seed):
                    raise LaunchFailed(self._c.emulator_report().decode())

            return launch.Launch(enqueue, tensors)

        with mock.patch.object(launch.Kernel, "bind", bind), mock.patch.object(launch, "index_of", lambda d: d.index):
            yield

    def _name(self, tensors: dict[str, torch.Tensor]) -> None:
        n = len(tensors)
        names = (ctypes.c_char_p * n)(*(name.encode() for name in tensors))
        begins = (ctypes.c_void_p * n)(*(t.data_ptr() for t in tensors.values()))
        sizes = (ctypes.c_size_t * n)(*(t.numel() * t.element_size() for t in tensors.values()))
        self._c.emulator_name(ctypes.c_size_t(n), names, begins, sizes)


def build(
    folder: Path, dtype: torch.dtype, sources: Path = SOURCES, *, racecheck: bool = False,
    source: str = "persistent_frame",
) -> Library:  # fmt: skip
    """Compiles a source's kernels.

    Args:
        folder: where the library goes.
        dtype: the one that the kernels are compiled for, of 16 bits.
        sources: csrc/cuda, or a changed copy.
        racecheck: what compute-sanitizer's racecheck sees (S1_RACECHECK in device/kernel.cuh).
    """
    name = f"{source}_{dtypes.NAMES[dtype]}{'_racecheck' * racecheck}"
    text, library = folder / f"{name}.cpp", folder / f"{name}.so"
    text.write_text(translate(sources / f"{source}.cu"))
    defines = [f"-DS1_DTYPES={dtypes.MASKS[dtype]}", f"-DS1_RACECHECK={int(racecheck)}"]
    command = ["g++", *FLAGS, *defines, str(text), "-o", str(library), "-ldl"]
    compiler = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if compiler.returncode:
        raise RuntimeError(f"g++ failed:\n{compiler.stderr}")
    return Library(library)
