"""PEP 517 backend: setuptools, able to see the torch of the environment that is being installed into.

An isolated build hides that environment, and naming torch in build-system.requires would download another torch.
So torch is looked for where the user keeps it, and what is found is appended to sys.path: the isolated setuptools,
ninja and pybind11 keep winning. setup.py decides what a missing torch means.
The wheel for all systems (S1KERNELS_BUILD=cubin) needs no torch, and is the same in every byte whoever builds it.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that need no torch

PROBE = """
import importlib.util, json, sys
spec = importlib.util.find_spec("torch")
print(json.dumps([bool(spec and spec.origin), sys.version_info[:2], [p for p in sys.path if p]]))
"""
FOR_ALL_SYSTEMS = os.environ.get("S1KERNELS_BUILD") == "cubin"
PYTHON = Path("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _interpreters() -> Iterator[tuple[str, Path]]:
    """Where the user's torch may live, the likeliest first."""
    env = os.environ
    if named := env.get("S1KERNELS_TORCH_PYTHON"):
        yield "S1KERNELS_TORCH_PYTHON", Path(named)
    yield "sys.executable", Path(sys.executable)  # pip isolates by PYTHONPATH alone
    if prefix := env.get("VIRTUAL_ENV"):
        yield "VIRTUAL_ENV", Path(prefix) / PYTHON
    if prefix := env.get("CONDA_PREFIX"):
        yield "CONDA_PREFIX", Path(prefix) / ("python.exe" if os.name == "nt" else PYTHON)
    yield ".venv", Path.cwd() / ".venv" / PYTHON
    for folder in env.get("PATH", "").split(os.pathsep):  # uv leaves an activated environment only here
        if folder and Path(folder).parent.joinpath("pyvenv.cfg").exists():
            yield "PATH", Path(folder) / PYTHON.name


def _search_path(python: Path) -> list[str]:
    """sys.path of an interpreter that has torch and can share it with this one, else nothing."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "PYTHONNOUSERSITE")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    try:
        probe = subprocess.run([python, "-c", PROBE], env=env, capture_output=True, text=True, timeout=60, check=True)
        found, version, path = json.loads(probe.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    return path if found and tuple(version) == sys.version_info[:2] else []


def expose_torch() -> None:
    """Makes `import torch` work in this process if the user has a torch that fits."""
    if importlib.util.find_spec("torch"):
        return
    for name, python in _interpreters():
        if path := _search_path(python):
            print(f"s1kernels: using the torch of {python} ({name})", file=sys.stderr)
            sys.path += [entry for entry in path if entry not in sys.path]
            return


def get_requires_for_build_wheel(config_settings=None):
    version = json.loads(Path("csrc/build.json").read_text())["cuda"]["nvrtc"]
    return [f"nvidia-cuda-nvrtc-cu12=={version}"] if FOR_ALL_SYSTEMS else []


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    expose_torch()
    if FOR_ALL_SYSTEMS:
        shutil.rmtree("build/lib", ignore_errors=True)  # modules of earlier builds would go along
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    if FOR_ALL_SYSTEMS:
        _strip_origin(Path(wheel_directory, name))
    return name


def _strip_origin(wheel: Path) -> None:
    """Takes times and modes of the builder's files out of a wheel."""
    with zipfile.ZipFile(wheel) as built:
        files = [(name, built.read(name)) for name in built.namelist()]
    with zipfile.ZipFile(wheel, "w") as stripped:
        for name, data in files:
            entry = zipfile.ZipInfo(name)  # of 1980
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            stripped.writestr(entry, data, zipfile.ZIP_DEFLATED, compresslevel=9)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    expose_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
