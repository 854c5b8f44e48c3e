"""What the installation built: the content of _build_info.json, which setup.py writes."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["BuildInfo", "build_info", "source_tree_notice"]


@dataclass(frozen=True)
class BuildInfo:
    """How this package was built. Unknown texts are empty."""

    native: bool
    """Whether the compiled module s1kernels._C is there."""
    reason: str
    """Why there is no native module and how to get it; empty if there is."""
    compiler: str = ""
    """The compiler's own name and version."""
    flags: tuple[str, ...] = ()
    isa: tuple[str, ...] = ()
    """Instruction sets the CPU kernels were compiled for; which of them runs is chosen at run time."""
    cuda: str = ""
    """Version of the CUDA toolkit that compiled the CUDA kernels into s1kernels._C; empty for none."""
    cuda_reason: str = ""
    """Why there are no compiled CUDA kernels; empty if there are. Other providers may serve them all the same."""
    architectures: tuple[str, ...] = ()
    """GPU architectures that they were compiled for, such as "8.9" or "12.0+PTX"."""
    torch: str = ""
    """The torch that drove the build. The module links to none: a later torch needs no rebuild."""
    python: str = ""
    platform: str = ""


@cache
def build_info() -> BuildInfo:
    """How the imported s1kernels was built.

    Example:
        >>> info = build_info()
        >>> info.native or bool(info.reason)
        True
    """
    try:
        text = files("s1kernels").joinpath("_build_info.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        reason = source_tree_notice()
        return BuildInfo(not reason, reason, python=platform.python_version(), platform=platform.platform())
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()}
    return BuildInfo(**fields)


def source_tree_notice() -> str:
    """What to tell who runs a source tree that was never installed or built in place by CMake; else empty.

    `python -m s1kernels` puts the current folder first on sys.path, so inside a clone it runs the clone.
    """
    package = Path(str(files("s1kernels")))
    if package.joinpath("_build_info.json").exists() or find_spec("s1kernels._C"):
        return ""
    return (
        f"this is the source tree {package}, not the installed package: run `pip install .`, "
        "then the command `s1kernels`, or `python -m s1kernels` from another folder"
    )
