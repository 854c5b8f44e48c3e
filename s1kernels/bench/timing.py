"""Rounds of a call, and what counts of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from s1kernels.bench import provenance
from s1kernels.cli.gpu import synchronize


class Refused(RuntimeError):
    """Something cannot run here; the message says why. It gets no number."""


class Wrong(Refused):
    """Something is not correct, so that it is not timed."""


def why(error: BaseException) -> str:
    """One line for a row that has no number: a refusal's own words, or what else went wrong."""
    said = provenance.reason(error)
    return said.removeprefix(f"{type(error).__name__}: ") if isinstance(error, Refused) else said


def rounds(
    call: Callable[[], Any], count: int, device: torch.device, warm_up: int = 1, budget: float = float("inf")
) -> list[float]:
    """Seconds of `count` calls, each from an idle device to an idle device. When `budget` seconds are used up, two are
    enough."""
    for _ in range(warm_up):
        call()
    values: list[float] = []
    while len(values) < count and (len(values) < 2 or sum(values) < budget):
        values.append(seconds(call, device))
    return values


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def summary(values: list[float], per: int = 1) -> dict[str, Any]:
    """The median of rounds that did `per` things each, the rounds themselves and their spread; seconds of one thing."""
    each = [value / per for value in values]
    return {"seconds": statistics.median(each), "rounds": each, "fastest": min(each), "slowest": max(each)}


def spread(row: dict[str, Any]) -> float:
    """Half the range of a row's rounds, over their median: what may differ without meaning anything."""
    return (row["slowest"] - row["fastest"]) / 2 / row["seconds"]


def rates(row: dict[str, Any], moved: int, ceiling: float) -> dict[str, Any]:
    """`moved` bytes over a row's seconds, and what part of the read bandwidth (`ceiling`, GB/s) that is."""
    rate = moved / row["seconds"] / 1e9
    return {"bytes": moved, "gigabytes_per_second": rate, "percent_of_read_bandwidth": 100 * rate / ceiling}
