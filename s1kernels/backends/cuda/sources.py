"""The CUDA sources that the package ships, each as one text with its headers in place of the #include lines.

_build/cubins.py loads this file by itself, without torch.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[2]
_INCLUDE = re.compile(r'^#include "([^"]+)"$')


@dataclass(frozen=True)
class Source:
    """A .cu file. `digest` changes with it and with every header that it includes."""

    name: str
    text: str
    digest: str


def folder() -> Path:
    """csrc/cuda: inside an installed package, beside an editable one."""
    return next(path for path in (_PACKAGE / "csrc/cuda", _PACKAGE.parent / "csrc/cuda") if path.is_dir())


def names() -> list[str]:
    """The stems of the .cu files."""
    return sorted(path.stem for path in folder().glob("*.cu"))


@cache
def source(name: str) -> Source:
    """csrc/cuda/<name>.cu."""
    return read(folder() / f"{name}.cu")


def options(arch: int, dtypes: int | None = None, *, ptx: bool = False) -> list[str]:
    """What NVRTC is given to compile for sm_<arch>, or to PTX.

    Args:
        dtypes: S1_DTYPES of csrc/cuda/device/kernel.cuh; every dtype that the GPU has if there is none.
    """
    if dtypes is None:
        dtypes = 7 if arch >= 80 else 5  # bfloat16 came with 8.0
    return [f"--gpu-architecture={'compute' if ptx else 'sm'}_{arch}", "--std=c++17", f"-DS1_DTYPES={dtypes}"]


def read(path: Path) -> Source:
    """A .cu file with all that it includes. Line numbers in a compiler's messages are those of the files."""
    text = _expanded(path, path.parent, set())
    return Source(path.stem, text, hashlib.sha256(text.encode()).hexdigest())


def _expanded(path: Path, root: Path, seen: set[Path]) -> str:
    seen.add(path.resolve())
    shown = path.relative_to(root).as_posix()
    lines = [f'#line 1 "{shown}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line == "#pragma once":  # that is done here
            lines.append("")
        elif include := _INCLUDE.match(line):
            header = path.parent / include[1]
            if header.resolve() not in seen:
                lines.append(_expanded(header, root, seen))
            lines.append(f'#line {number + 1} "{shown}"')
        else:
            lines.append(line)
    return "\n".join(lines)
