"""The CUDA kernels that the wheel for all systems ships (_build/cubins.py makes them): cubins for the GPUs that NVRTC
knew then, and PTX, from which the driver compiles for GPUs that came later.

manifest.json has an entry for each file: what it was made from (the source and its digest, NVRTC's options and its
version) and its own digest. A file that is not what its entry says, or not made from this package's sources, is never
loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TypedDict

from s1kernels.backends.cuda import driver, sources
from s1kernels.backends.cuda.arch import dotted, runs, version

logger = logging.getLogger("s1kernels")

FOLDER = Path(__file__).parents[2] / "cubin"

_REINSTALL = "install s1kernels again"
_warned: set[str] = set()


class Entry(TypedDict):
    """Of manifest.json."""

    file: str
    digest: str
    """SHA-256 of the file."""
    source: str
    """The stem of csrc/cuda/<source>.cu."""
    source_digest: str
    """`sources.Source.digest`."""
    arch: str
    """Such as "8.9" or "12.0+PTX"."""
    options: list[str]
    nvrtc: str


def find(source: str | None, capability: tuple[int, int]) -> tuple[Entry, bytes] | str:
    """The code of a source (None: of any) that serves a GPU, and its entry; or why there is none."""
    entries = _manifest()
    if isinstance(entries, str):
        return entries
    fitting = [e for e in entries if runs(e["arch"], capability) and source in (None, e["source"])]
    if not fitting:
        return f"none for {dotted(capability)}" + (f" of {source}" if source else "")
    entry = max(fitting, key=lambda e: (version(e["arch"]), not e["arch"].endswith("+PTX")))
    if entry["arch"].endswith("+PTX") and version(entry["nvrtc"]) > driver.driver().version:
        have = dotted(driver.driver().version)
        return f"none for {dotted(capability)}, and the PTX needs a driver for CUDA {entry['nvrtc']}, not for {have}"
    origin = sources.source(entry["source"])
    options = sources.options(_number(entry["arch"]), ptx=entry["arch"].endswith("+PTX"))
    if entry["source_digest"] != origin.digest or entry["options"] != options:
        return _wrong(f"{entry['file']} was not made from the {entry['source']}.cu of this package")
    try:
        code = FOLDER.joinpath(entry["file"]).read_bytes()
    except OSError as error:
        return _wrong(f"{entry['file']} cannot be read ({error})")
    if hashlib.sha256(code).hexdigest() != entry["digest"]:
        return _wrong(f"{entry['file']} is damaged")
    return entry, code


def _manifest() -> list[Entry] | str:
    path = FOLDER / "manifest.json"
    if not path.exists():
        return "this package ships none"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return _wrong(f"{path} cannot be read ({error})")


def _number(arch: str) -> int:
    major, minor = version(arch)
    return major * 10 + minor


def _wrong(complaint: str) -> str:
    """A complaint about what is shipped, with advice; the log has it once."""
    if complaint not in _warned:
        _warned.add(complaint)
        logger.warning("shipped CUDA kernels are not used: %s; %s", complaint, _REINSTALL)
    return f"{complaint}; {_REINSTALL}"
