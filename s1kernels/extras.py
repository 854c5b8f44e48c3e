"""The packages that parts of this one need beside torch and numpy, by the extra that has them."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def missing(extra: str, *names: str) -> str | None:
    """Which of these packages of an extra are not installed, and what to type; None if all are."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f'{" and ".join(absent)} must be installed, got no such package; run `pip install "s1kernels[{extra}]"`'


def require(extra: str, *names: str) -> None:
    """Raise ModuleNotFoundError, which says what to type, if packages of an extra are not installed."""
    if reason := missing(extra, *names):
        raise ModuleNotFoundError(reason)


def load(extra: str, name: str) -> Any:
    """A package of an extra. Raises ModuleNotFoundError as `require` does."""
    require(extra, name)
    return importlib.import_module(name)
