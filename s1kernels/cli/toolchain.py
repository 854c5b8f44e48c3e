"""The compilers that `pip install .` would take: CUDA's nvcc, and on Windows Visual Studio's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

WINDOWS = sys.platform == "win32"
VISUAL_STUDIO = {15: 2017, 16: 2019, 17: 2022, 18: 2026}
"""The first number of its version -> its name."""


@dataclass(frozen=True)
class Compiler:
    path: str
    version: tuple[int, ...]


def nvcc() -> Compiler | None:
    """The CUDA toolkit's compiler, as setup.py finds it: in CUDA_HOME or CUDA_PATH, else the usual places."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    homes = [named] if named else ["/usr/local/cuda"]
    path = shutil.which("nvcc", path=os.pathsep.join(os.path.join(home, "bin") for home in homes))
    if path := path or (None if named else shutil.which("nvcc")):
        said = re.search(r"release (\d+)\.(\d+)", _output([path, "--version"]))
        return Compiler(path, tuple(map(int, said.groups()))) if said else None
    return None


def visual_studios() -> list[Compiler]:
    """The installations of Visual Studio or its Build Tools that have a C++ compiler, the newest first."""
    folder = os.environ.get("ProgramFiles(x86)", "")  # noqa: SIM112  its name on Windows
    vswhere = Path(folder, "Microsoft Visual Studio/Installer/vswhere.exe")
    if not WINDOWS or not vswhere.exists():
        return []
    tools = "Microsoft.VisualStudio.Component.VC.Tools.x86.x64"
    said = _output([str(vswhere), "-products", "*", "-requires", tools, "-format", "json", "-utf8"])
    found = [Compiler(v["installationPath"], _numbers(v["installationVersion"])) for v in json.loads(said or "[]")]
    return sorted(found, key=lambda compiler: compiler.version, reverse=True)


def mismatch(cuda: tuple[int, ...], visual_studio: int) -> str | None:
    """Why an nvcc refuses a Visual Studio (by the first number of its version), or None.

    Source: crt/host_config.h of the toolkits.
    """
    oldest, newest = (15 if cuda < (13, 0) else 16), (17 if cuda < (13, 2) else 18)
    if oldest <= visual_studio <= newest:
        return None
    accepted = f"{VISUAL_STUDIO[oldest]} to {VISUAL_STUDIO[newest]}"
    name = VISUAL_STUDIO.get(visual_studio, f"version {visual_studio}")
    return f"CUDA {cuda[0]}.{cuda[1]} takes Visual Studio {accepted}, not {name} (error C1189)"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _output(command: list[str]) -> str:
    """What a command prints, or nothing if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
