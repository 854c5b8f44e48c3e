"""How large the pieces are that programs take: one table, by GPU family. Nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from s1kernels.backends.cuda.device import capability
from s1kernels.backends.triton.support import INTERPRETED


@dataclass(frozen=True)
class Sizes:
    """
    tile: elements of the weights that a program of a projection loads at once, before it waits for its vector.
    fewest_programs: below so many, a program takes fewer rows of the weight.
    positions: of a cache, that a program has under way.
    splits: parts of a row's positions at most, however long it is: a captured grid must not depend on it.
    output_tile: as `tile`, where a program also computes the fast stack's attention.
    solo_vocabulary: rows of logits that one program draws from.
    chunk: rows of a program where one does not.
    """

    tile: int
    fewest_programs: int
    positions: int
    splits: int
    output_tile: int
    solo_vocabulary: int
    chunk: int


HOPPER = Sizes(
    tile=8192,  # 16 KB, 128 bytes a thread of 4 warps; 4 programs an SM have 64 KB under way, latency times bandwidth
    # of an H200 is 25 KB, and all programs of an S1-mini layer's projection are resident at once
    fewest_programs=256,  # two an SM
    positions=32,  # 16 KB of k and v at D = 128
    splits=32,  # with S1-mini's 8 key/value heads two programs an SM from 1024 positions on
    output_tile=8192,  # 128 programs for S1-mini: an SM computes the attention once
    solo_vocabulary=8192,  # 16 rows a thread of 16 warps
    chunk=2048,  # 77 programs for S1-mini's 155,776 rows
)
"""By calculation, for 132 SMs; not yet measured against others."""
FAMILIES = {9: HOPPER}
"""Major compute capability -> sizes; others take Hopper's."""
INTERPRETER = Sizes(1 << 20, 1, 32, 2, 1 << 20, 8192, 2048)
"""It takes its time for every program, so that there are few."""


def sizes(device: torch.device) -> Sizes:
    """The sizes for a device."""
    if INTERPRETED:
        return INTERPRETER
    return FAMILIES.get(capability(device)[0] if device.type == "cuda" else 0, HOPPER)
