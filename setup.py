"""Builds s1kernels._C from csrc/build.json with torch's BuildExtension; without torch or a compiler, pure Python.

S1KERNELS_BUILD=none leaves the native module out; S1KERNELS_REQUIRE_NATIVE=1 makes its absence an error.
What was built, or why it was not, goes to s1kernels/_build_info.json, which `s1kernels info` prints.
"""

import json
import os
import platform
import subprocess
import sys
from distutils import ccompiler, sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Command, Extension, setup
from setuptools.command.build import build

CONFIG = json.loads(Path("csrc/build.json").read_text())
INFO = {"native": False, "reason": "", "compiler": "", "flags": [], "isa": [], "cuda": "", "architectures": []}
INFO |= {"torch": "", "python": platform.python_version(), "platform": platform.platform()}


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


def native_module() -> dict:
    """The arguments of setup() for the native module; if there can be none, INFO says why."""
    compiler = ccompiler.new_compiler()
    sysconfig.customize_compiler(compiler)
    flags = CONFIG["flags"][compiler.compiler_type]
    unwanted = os.environ.get("S1KERNELS_BUILD") == "none"
    if gaps := ["left out by S1KERNELS_BUILD=none"] if unwanted else find_gaps(compiler, flags):
        gaps.append("mend that, then `pip install --force-reinstall --no-deps --no-cache-dir .` from the sources")
        INFO["reason"] = "; ".join(gaps)
        return {}
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension

    if compiler.compiler_type == "msvc":
        INFO["compiler"] = compiler.cc
        if "VSCMD_ARG_TGT_ARCH" in os.environ:  # torch insists on it in a developer prompt
            os.environ.setdefault("DISTUTILS_USE_SDK", "1")
    else:
        cxx = os.environ.setdefault("CXX", compiler.compiler_so_cxx[0])  # torch is to take the one probed here
        INFO["compiler"] = subprocess.check_output([*cxx.split(), "--version"], text=True).splitlines()[0]
    machine = platform.machine().lower().replace("amd64", "x86_64")
    INFO.update(native=True, torch=torch.__version__, flags=flags, isa=CONFIG["isa"].get(machine, ["scalar"]))
    includes = [*map(os.path.abspath, CONFIG["include_dirs"]), pybind11.get_include()]  # ninja runs elsewhere
    module = Extension("s1kernels._C", CONFIG["sources"], includes, extra_compile_args=flags, language="c++")
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


class WriteBuildInfo(Command):
    """The last step of `build`: says what came of it, and leaves that beside the modules."""

    user_options = []  # noqa: RUF012

    def initialize_options(self):
        self.build_lib, self.editable_mode = None, False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        if INFO["reason"] and os.environ.get("S1KERNELS_REQUIRE_NATIVE") == "1":
            sys.exit(f"s1kernels: S1KERNELS_REQUIRE_NATIVE=1 cannot be met: {INFO['reason']}")
        package = Path("." if self.editable_mode else self.build_lib, "s1kernels")
        for suffix in EXTENSION_SUFFIXES if INFO["reason"] else ():
            package.joinpath("_C" + suffix).unlink(missing_ok=True)  # left by an earlier build
        package.joinpath("_build_info.json").write_text(json.dumps(INFO, indent=2) + "\n")
        outcome = f"PURE PYTHON: {INFO['reason']}" if INFO["reason"] else f"native, built by {INFO['compiler']}"
        print(f"s1kernels: {outcome}", file=sys.stderr)


arguments = {} if {"egg_info", "dist_info", "sdist"} & set(sys.argv) else native_module()
arguments.setdefault("cmdclass", {})["write_build_info"] = WriteBuildInfo
build.sub_commands.append(("write_build_info", None))
setup(**arguments)
