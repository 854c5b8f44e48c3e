"""The compiled module (csrc/module.cpp): functions over addresses, called by s1kernels.backends.cpu alone."""

from typing import Any

def __getattr__(name: str) -> Any: ...
