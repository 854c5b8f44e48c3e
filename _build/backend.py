"""PEP 517 backend: setuptools, able to see the torch of the environment that is being installed into.

An isolated build hides that environment, and naming torch in build-system.requires would download another torch.
So torch is looked for where the user keeps it, and what is found is appended to sys.path: the isolated setuptools,
ninja and pybind11 keep winning. setup.py decides what a missing torch means.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that need no torch

PROBE = """
import importlib.util, json, sys
spec = importlib.util.find_spec("torch")
print(json.dumps([bool(spec and spec.origin), sys.version_info[:2], [p for p in sys.path if p]]))
"""
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


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    expose_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    expose_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
