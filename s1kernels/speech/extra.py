"""The packages that speech needs beside torch."""

from __future__ import annotations

import importlib
from typing import Any


def require(name: str) -> Any:
    """A module of the extra `speech`. Raises ModuleNotFoundError, which says what to type."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'speech: {name} must be installed, got: {error}; run `pip install "s1kernels[speech]"`'
        ) from error
