"""Builds s1kernels._C from csrc/build.json with torch's BuildExtension; without torch or a compiler, pure Python.

S1KERNELS_BUILD is auto (the default: with CUDA kernels if there is a GPU and a CUDA toolkit), cuda (an error without
them), cpu (none of them), none (pure Python) or cubin (the wheel for all systems: pure Python, with CUDA kernels that
NVRTC made). Compiled kernels are for TORCH_CUDA_ARCH_LIST, else for the GPUs here, else for every GPU.
S1KERNELS_REQUIRE_NATIVE=1 makes the absence of the native module an error.
What was built, or why it was not, goes to s1kernels/_build_info.json, which `s1kernels info` prints.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from distutils import ccompiler, sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Command, Extension, setup
from setuptools.command.build import build

CONFIG = json.loads(Path("csrc/build.json").read_text())
INFO = {"native": False, "reason": "", "compiler": "", "flags": [], "isa": []}
INFO |= {"cuda": "", "cuda_reason": "", "architectures": [], "torch": ""}
INFO |= {"python": platform.python_version(), "platform": platform.platform()}
WANTED = os.environ.get("S1KERNELS_BUILD") or "auto"
FROM_SOURCES = "`pip install --force-reinstall --no-deps --no-cache-dir .` from the sources"


def find_gaps(compiler, flags) -> list[str]:
    """What is missing here to build C++ for this Python and torch; empty if nothing is."""
    gaps = []
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except Exception as error:  # a torch that does not load is no torch
        gaps.append(f"no torch for Python {platform.python_version()} ({error}; `pip install torch`)")
    with TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <string_view>\nstd::string_view probe() { return {}; }\n")
        try:
            compiler.compile([str(source)], folder, extra_postargs=flags)
        except Exception as error:  # each kind of compiler has errors of its own
            gaps.append(f"no working C++17 compiler ({error}; install one, or set CC and CXX)")
    if not Path(headers := sysconfig.get_python_inc(), "Python.h").exists():
        gaps.append(f"no Python headers in {headers} (install them: the python3-dev package on Debian)")
    return gaps


def plan_cuda(torch, home: str | None) -> str:
    """Enters the CUDA toolkit and what it is to compile for into INFO, or returns why there will be no CUDA kernels."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() and not torch.version.hip else 0)
    present = sorted({gpu for i in gpus if (gpu := torch.cuda.get_device_capability(i)) >= (7, 5)})
    if WANTED == "cpu":
        return "left out by S1KERNELS_BUILD=cpu"
    if WANTED == "auto" and not present:
        return "torch finds no NVIDIA GPU here, of 7.5 or later (S1KERNELS_BUILD=cuda compiles for one elsewhere)"
    if not (nvcc := home and shutil.which("nvcc", path=os.path.join(home, "bin"))):
        return f"no CUDA toolkit in {home or 'the usual places'} (install one, or set CUDA_HOME to yours)"
    version, archs = (subprocess.check_output([nvcc, flag], text=True) for flag in ("--version", "--list-gpu-arch"))
    release = re.search(r"release (\d+)\.(\d+)", version)
    if int(release[1]) < 12:
        return f"{nvcc} is CUDA {release[1]}.{release[2]} (install 12.0 or later, and set CUDA_HOME to it)"
    known = [f"{int(a) / 10}" for a in re.findall(r"compute_(\d+)\b", archs) if int(a) >= 75]
    every = [arch for arch in CONFIG["cuda"]["architectures"] if arch in known]
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    wanted = wanted or [f"{a}.{b}" for a, b in present] or [*every[:-1], every[-1] + "+PTX"]
    if unfit := [arch for arch in wanted if arch.removesuffix("+PTX").rstrip("af") not in known]:
        return f"{nvcc} compiles for {', '.join(known)}, not for {', '.join(unfit)} (see TORCH_CUDA_ARCH_LIST)"
    INFO.update(cuda=f"{release[1]}.{release[2]}", architectures=wanted)
    return ""


def cuda_arguments(torch, cpp_extension, compiler_type: str) -> dict:
    """What CUDA kernels add to the arguments of Extension; nothing without them, and INFO says why."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [named] if named else [cpp_extension._find_cuda_home(), "/usr/local/cuda"]  # PATH may have a mere script
    home = next((home for home in homes if home and Path(home, "include/cuda_runtime_api.h").exists()), named)
    if reason := plan_cuda(torch, home):
        if WANTED == "cuda":
            sys.exit(f"s1kernels: S1KERNELS_BUILD=cuda cannot be met: {reason}")
        INFO["cuda_reason"] = reason
        return {}
    flags = list(CONFIG["cuda"]["flags"][compiler_type])
    for arch in INFO["architectures"]:
        number, _, ptx = arch.replace(".", "").partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=[sm_{number}{f',compute_{number}' if ptx else ''}]")
    cpp_extension.CUDA_HOME = home  # unset in a torch without CUDA
    cpp_extension._check_cuda_version = lambda *_: None  # torch is not linked, so its CUDA need not be this one
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
    libraries = ["cudart_static"] if compiler_type == "msvc" else ["cudart_static", "dl", "rt", "pthread"]
    folders = [os.path.join(home, *folder) for folder in (("lib64",), ("lib",), ("lib", "x64"))]
    return {"nvcc": flags, "libraries": libraries, "library_dirs": folders, "define_macros": [("S1_CUDA", None)]}


def native_module() -> dict:
    """The arguments of setup() for the native module; if there can be none, INFO says why."""
    if WANTED not in ("auto", "cuda", "cpu", "none", "cubin"):
        sys.exit(f"s1kernels: S1KERNELS_BUILD must be auto, cuda, cpu, none or cubin, got {WANTED!r}")
    if WANTED == "cubin":
        INFO["reason"] = INFO["cuda_reason"] = f"the wheel for all systems has no native module; {FROM_SOURCES}"
        INFO.update(python="", platform="")  # it is the same wherever it was made
        return {}
    compiler = ccompiler.new_compiler()
    sysconfig.customize_compiler(compiler)
    flags = CONFIG["flags"][compiler.compiler_type]
    if gaps := ["left out by S1KERNELS_BUILD=none"] if WANTED == "none" else find_gaps(compiler, flags):
        gaps.append(f"mend that, then {FROM_SOURCES}")
        INFO["reason"] = INFO["cuda_reason"] = "; ".join(gaps)
        return {}
    import pybind11
    import torch
    from torch.utils import cpp_extension

    if compiler.compiler_type == "msvc":
        INFO["compiler"] = compiler.cc
        if "VSCMD_ARG_TGT_ARCH" in os.environ:  # torch insists on it in a developer prompt
            os.environ.setdefault("DISTUTILS_USE_SDK", "1")
    else:
        cxx = os.environ.setdefault("CXX", compiler.compiler_so_cxx[0])  # torch is to take the one probed here
        INFO["compiler"] = subprocess.check_output([*cxx.split(), "--version"], text=True).splitlines()[0]
    machine = platform.machine().lower().replace("amd64", "x86_64")
    INFO.update(native=True, torch=torch.__version__, flags=flags, isa=CONFIG["isa"].get(machine, ["scalar"]))
    cuda = cuda_arguments(torch, cpp_extension, compiler.compiler_type)
    flags = {"cxx": flags, "nvcc": cuda.pop("nvcc", [])}
    sources = CONFIG["sources"] + (CONFIG["cuda"]["sources"] if cuda else [])
    includes = [*map(os.path.abspath, CONFIG["include_dirs"]), pybind11.get_include()]  # ninja runs elsewhere
    includes += [os.path.join(cpp_extension.CUDA_HOME, "include")] if cuda else []
    module = Extension("s1kernels._C", sources, includes, extra_compile_args=flags, language="c++", **cuda)
    return {"ext_modules": [module], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


class WriteBuildInfo(Command):
    """The last step of `build`: says what came of it, and leaves that and the CUDA sources beside the modules."""

    user_options = []  # noqa: RUF012

    def initialize_options(self):
        self.build_lib, self.editable_mode = None, False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        if INFO["reason"] and (WANTED == "cuda" or os.environ.get("S1KERNELS_REQUIRE_NATIVE") == "1"):
            unmet = "S1KERNELS_BUILD=cuda" if WANTED == "cuda" else "S1KERNELS_REQUIRE_NATIVE=1"
            sys.exit(f"s1kernels: {unmet} cannot be met: {INFO['reason']}")
        package = Path("." if self.editable_mode else self.build_lib, "s1kernels")
        for suffix in EXTENSION_SUFFIXES if INFO["reason"] else ():
            package.joinpath("_C" + suffix).unlink(missing_ok=True)  # left by an earlier build
        if not self.editable_mode:  # NVRTC compiles them at run time; an editable install has them beside the package
            shutil.rmtree(package / "csrc", ignore_errors=True)
            shutil.copytree("csrc/cuda", package / "csrc/cuda", ignore=shutil.ignore_patterns("*.cpp", "*.h"))
        package.joinpath("_build_info.json").write_text(json.dumps(INFO, indent=2) + "\n")
        if WANTED == "cubin":
            self.write_cubins(package / "cubin")
        outcome = f"PURE PYTHON: {INFO['reason']}" if INFO["reason"] else f"native, built by {INFO['compiler']}"
        if not INFO["reason"]:
            compiled = f"compiled by CUDA {INFO['cuda']} for {', '.join(INFO['architectures'])}"
            outcome += f"; CUDA kernels {compiled if INFO['cuda'] else 'left out: ' + INFO['cuda_reason']}"
        print(f"s1kernels: {outcome}", file=sys.stderr)

    def write_cubins(self, folder):
        if self.editable_mode:
            sys.exit("s1kernels: S1KERNELS_BUILD=cubin makes wheels; an editable install compiles kernels at first use")
        sys.path.append("_build")
        import cubins

        shutil.rmtree(folder, ignore_errors=True)
        try:
            count = cubins.write(folder, CONFIG["cuda"])
        except RuntimeError as error:
            sys.exit(f"s1kernels: S1KERNELS_BUILD=cubin cannot be met: {error}")
        print(f"s1kernels: {count} CUDA sources compiled by NVRTC {CONFIG['cuda']['nvrtc']}", file=sys.stderr)


arguments = {} if {"egg_info", "dist_info", "sdist"} & set(sys.argv) else native_module()
arguments.setdefault("cmdclass", {})["write_build_info"] = WriteBuildInfo
build.sub_commands.append(("write_build_info", None))
setup(**arguments)
