"""Every CUDA source compiles for every architecture, without spilled registers, and the structs are those of C++.

No GPU is needed. NVRTC comes with the extra `test`: without it these tests fail. `-rP` prints the registers of every
kernel.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import s1kernels.backends.cuda  # noqa: F401  defines the kernels
from s1kernels.backends.cuda import nvrtc, sources
from s1kernels.backends.cuda.launch import KERNELS

CONFIG = json.loads(Path(__file__).parents[1].joinpath("csrc/build.json").read_text())["cuda"]
ARCHITECTURES = [int(arch.replace(".", "")) for arch in CONFIG["architectures"]]
CORES = os.cpu_count() or 1

SPILLS = {
    ("persistent_frame_bfloat16", 100): "no such GPU was at hand to see where it matters",
}
"""Kernel and architecture -> why its spilled registers are left."""

_SHIPPED = sources.names()
_KERNELS = [kernel for kernel in KERNELS if kernel.source in _SHIPPED]
_OPTIONS = ["--std=c++17", "--ptxas-options=--verbose"]
_COMPILED = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
_ENTRY = re.compile(r"#define S1_ENTRY\(.*?\n(?=\n)", re.DOTALL)
_EMPTY_ENTRY = """
#define S1_ENTRY(name, T, Args, threads, blocks, body) \\
  using name##_args = Args;                            \\
  constexpr int name##_threads = threads;              \\
  extern "C" __global__ void name(const Args args) {}
"""
_TYPES = """
template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;
template <class A> constexpr bool pointer = false;
template <class A> constexpr bool pointer<A*> = true;
"""


@dataclass(frozen=True)
class Use:
    """What a kernel takes of a multiprocessor."""

    registers: int
    spilled_bytes: int


def compile_source(text: str, name: str, arch: int, *more: str) -> dict[str, Use]:
    """Kernel with its dtype -> what it takes."""
    options = [*_OPTIONS, f"--gpu-architecture=sm_{arch}", *more]
    log = nvrtc.nvrtc_for((arch // 10, arch % 10)).compile(text, f"{name}.cu", options).log
    assert not re.search(r"\bwarning\b", log), log
    return {kernel: Use(int(used), int(stores) + int(loads)) for kernel, stores, loads, used in _COMPILED.findall(log)}


def outline(source: str) -> str:
    """A source whose kernels are empty, with their argument structs and their most threads by name."""
    text, count = _ENTRY.subn(lambda _: _EMPTY_ENTRY, sources.source(source).text)
    assert count == 1
    return text


@cache
def declared(source: str) -> frozenset[str]:
    """The kernels of a source, with their dtypes."""
    return frozenset(compile_source(outline(source), source, 90, "--disable-warnings"))


def without_dtype(kernel: str) -> str:
    return kernel.rpartition("_")[0]


def test_every_source_is_built():
    assert sorted(CONFIG["sources"]) == [f"csrc/cuda/{name}.cu" for name in _SHIPPED]


def test_every_kernel_is_known_to_python():
    in_python = [(kernel.source, kernel.name) for kernel in _KERNELS]
    assert len(set(in_python)) == len(in_python)
    assert set(in_python) == {(source, without_dtype(name)) for source in _SHIPPED for name in declared(source)}


def struct_checks(kernel, entry: str) -> list[str]:
    """The kernel's struct has the fields that Python packs, in place and type, and a block may be as large."""
    args, offset = f"{entry}_args", 0
    checks = [f"sizeof({args}) == {kernel.argument_bytes}", f"{kernel.block} <= {entry}_threads"]
    for field in kernel.fields:
        kind, is_pointer = f"decltype({args}::{field})", field in kernel.pointers
        is_as_packed = (
            f"pointer<{kind}>" if is_pointer else f"same<{kind}, {'int' if field in kernel.ints else 'float'}>"
        )
        checks += [is_as_packed, f"__INTADDR__(&static_cast<{args}*>(nullptr)->{field}) == {offset}"]  # offsetof
        offset += 8 if is_pointer else 4
    return checks


@pytest.mark.parametrize("source", _SHIPPED)
def test_the_structs_are_those_of_cpp(source):
    kernels = [kernel for kernel in _KERNELS if kernel.source == source]
    assert kernels
    checks = []
    for kernel in kernels:
        entry = min(name for name in declared(source) if without_dtype(name) == kernel.name)
        checks += [f'static_assert({check}, "{kernel.name}");' for check in struct_checks(kernel, entry)]
    added = "\n".join(['\n#line 1 "python"', _TYPES, "namespace s1 {", *checks, "}\n"])
    compile_source(outline(source) + added, source, 90, "--disable-warnings")


MASKS = {75: 5, 90: 7, 120: 7}
"""S1_DTYPES by architecture; 3 elsewhere. bfloat16 needs 8.0; float16 differs from it in conversions alone, so that one
architecture of each kind does."""
BITS = {"float32": 1, "bfloat16": 2, "float16": 4}


def compiled_for(arch: int, kernel: str) -> bool:
    return bool(MASKS.get(arch, 3) & BITS[kernel.rpartition("_")[2]])


@pytest.fixture(scope="module")
def compiled():
    """(source, architecture) -> what its kernels take, or the error."""

    def outcome(job):
        source, arch = job
        try:
            return compile_source(sources.source(source).text, source, arch, f"-DS1_DTYPES={MASKS.get(arch, 3)}")
        except Exception as error:  # for the test of this source to raise
            return error

    jobs = list(itertools.product(_SHIPPED, ARCHITECTURES))
    with ThreadPoolExecutor(CORES) as pool:
        return dict(zip(jobs, pool.map(outcome, jobs), strict=True))


@pytest.mark.parametrize("source", _SHIPPED)
def test_nvrtc_compiles_for_every_architecture_without_spills(compiled, source):
    uses = {arch: compiled[source, arch] for arch in ARCHITECTURES}
    for arch, found in uses.items():
        if isinstance(found, Exception):
            raise found
        assert found.keys() == {name for name in declared(source) if compiled_for(arch, name)}
    print(f"{'registers':48}", *(f"sm_{arch:<4}" for arch in uses))
    for name in sorted(declared(source)):
        print(f"{name:48}", *(f"{found[name].registers if name in found else '-':<7}" for found in uses.values()))
    spilled = [
        f"{name} on sm_{arch}: {use.spilled_bytes} bytes"
        for arch, found in uses.items()
        for name, use in found.items()
        if use.spilled_bytes and (name, arch) not in SPILLS
    ]
    assert not spilled, "\n".join(spilled)


def test_what_racecheck_is_given_compiles():
    found = compile_source(
        sources.source("persistent_frame").text, "persistent_frame", 90, "-DS1_DTYPES=2", "-DS1_RACECHECK=1"
    )
    assert "persistent_frame_bfloat16" in found


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(folders))


@pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc")
def test_nvcc_compiles_without_warnings(tmp_path):
    """For an architecture of each kind, hardly optimised: NVRTC, which has the same device compiler, does the rest."""
    nvcc = find_nvcc()
    known, options = (subprocess.check_output([nvcc, flag], text=True) for flag in ("--list-gpu-arch", "--help"))
    fast = ["--Ofast-compile=max"] if "--Ofast-compile" in options else []  # of CUDA 12.8 or later
    archs = [arch for arch in MASKS if f"compute_{arch}" in known.split()]
    assert archs
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags = [*CONFIG["flags"]["msvc" if os.name == "nt" else "unix"], *codes, f"-DS1_DTYPES={MASKS[75]}"]
    flags += [*fast, "-Werror=all-warnings", "-fatbin"]

    def compile_one(source):
        command = [nvcc, *flags, "-o", tmp_path / f"{source}.fatbin", sources.folder() / f"{source}.cu"]
        done = subprocess.run(command, capture_output=True, text=True)
        return f"{source}:\n{done.stdout}{done.stderr}" if done.returncode else ""

    with ThreadPoolExecutor(CORES) as pool:
        failures = "\n".join(filter(None, pool.map(compile_one, _SHIPPED)))
    assert not failures
