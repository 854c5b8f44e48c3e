"""GPU architectures by name: "8.6", "9.0a" (for that GPU alone), "12.0+PTX" (drivers compile it for later GPUs)."""

from __future__ import annotations


def runs(built: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on a GPU: on later minor versions of it too, with an "a" on no other, PTX
    on all later GPUs."""
    number = version(built)
    if built.endswith("a"):
        return number == capability
    return number <= capability and (number[0] == capability[0] or built.endswith("+PTX"))


def version(dotted: str) -> tuple[int, ...]:
    """
    >>> version("12.0+PTX")
    (12, 0)
    """
    return tuple(map(int, dotted.removesuffix("+PTX").rstrip("af").split(".")))


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
