"""What NVRTC compiled, kept on disk: in S1KERNELS_CACHE_DIR, else in the user's cache folder.

An entry begins with the SHA-256 of the rest, so that a damaged one is noticed, deleted and made anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger("s1kernels")

T = TypeVar("T")

LOCAL_APP_DATA = uuid.UUID("f1b32785-6fba-4fcf-9d55-7b8e7f157091")  # FOLDERID_LocalAppData, knownfolders.h
DONT_VERIFY = 0x4000  # KF_FLAG_DONT_VERIFY, shlobj_core.h

_DIGEST = hashlib.sha256().digest_size
_warned: set[Path] = set()


def directory() -> Path:
    """%LOCALAPPDATA%\\s1kernels\\Cache on Windows, ~/.cache/s1kernels or that of $XDG_CACHE_HOME on Linux."""
    if chosen := os.environ.get("S1KERNELS_CACHE_DIR"):
        return Path(chosen)
    if sys.platform == "win32":
        return _local_app_data() / "s1kernels" / "Cache"
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (caches if caches.is_absolute() else Path("~/.cache").expanduser()) / "s1kernels"


def _local_app_data() -> Path:
    """The user's %LOCALAPPDATA%, as Windows itself knows it. Raises OSError if it does not."""
    path = ctypes.c_wchar_p()
    dlls = ctypes.oledll  # type: ignore[attr-defined,unused-ignore]
    dlls.shell32.SHGetKnownFolderPath(LOCAL_APP_DATA.bytes_le, DONT_VERIFY, None, ctypes.byref(path))
    folder = Path(str(path.value))
    ctypes.windll.ole32.CoTaskMemFree(path)  # type: ignore[attr-defined,unused-ignore]
    return folder


def key(*parts: str) -> str:
    """The name of what was made from these texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def load(name: str) -> bytes | None:
    """What was stored under this name, or None."""
    path = _path(name)
    try:
        entry = _patiently(path.read_bytes)
    except OSError:
        return None
    digest, data = entry[:_DIGEST], entry[_DIGEST:]
    if hashlib.sha256(data).digest() == digest:
        return data
    logger.warning("the cache entry %s is damaged: it is deleted and made anew", path)
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def store(name: str, data: bytes) -> None:
    """Keep `data`; where nothing can be written, warn once and go on without."""
    path = _path(name)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(hashlib.sha256(data).digest() + data)
        _patiently(partial(os.replace, temporary, path))
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if path.parent not in _warned:
            _warned.add(path.parent)
            advice = "S1KERNELS_CACHE_DIR names another folder"
            logger.warning("kernels are compiled at every start: %s; %s", error, advice)


def _patiently(action: Callable[[], T], tries: int = 5) -> T:
    """Do something to a file that on Windows fails for as long as another process, such as a virus scanner, has it."""
    for attempt in range(tries - 1):
        with contextlib.suppress(PermissionError):
            return action()
        time.sleep(0.02 * 2**attempt)
    return action()


def _path(name: str) -> Path:
    return directory() / f"{name}.cubin"
