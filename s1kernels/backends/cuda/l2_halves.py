"""In which half of L2 memory lies, and multiprocessors are: by how soon one hears from the other.

csrc/cuda/device/l2_halves.cuh measures it, and says what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s1kernels.backends.cuda.launch import Kernel, multiprocessors

CHUNK_BYTES = 4096  # neighbours are in different halves
MULTIPROCESSORS = 1024  # in a table of them
COMMON = 256  # pairs of chunks that all multiprocessors measure, to be told apart by
TRIES = 3
CLEAR = 0.5  # of COMMON: by how much more often two multiprocessors agree, or disagree, than not

MEASURE = Kernel(
    "persistent_frame", "measure_halves", block=32, pointers="memory lead where", ints="pairs apart zero"
)  # fmt: skip


@dataclass(frozen=True)
class Halves:
    """sides: [MULTIPROCESSORS] uint8, the half that a multiprocessor is at, 0 or 1; second: [pairs] bool, whether the
    second chunk of a pair lies in half 0, and not the first. If a GPU has no halves, all are at 0, and it is the first.
    """

    sides: Tensor
    second: Tensor


def measure(memory: Tensor, dtype: torch.dtype) -> Halves:
    """The halves of uint8 memory, [pairs * 2 * CHUNK_BYTES] from a multiple of that on; some 10 ms a gigabyte. What
    another process does meanwhile may disturb it: then more is read from afar, and nothing is wrong."""
    pairs = len(memory) // (2 * CHUNK_BYTES)
    for _ in range(TRIES):
        lead, where = _measure(memory, dtype, min(pairs, COMMON), apart=False)
        sides = told_apart(lead)
        if sides is not None:
            break
    else:
        sides = torch.zeros_like(where, dtype=torch.bool)
    table = torch.zeros(MULTIPROCESSORS, dtype=torch.uint8, device=memory.device)
    table[where] = sides.to(torch.uint8)
    if not sides.any():
        return Halves(table, torch.zeros(pairs, dtype=torch.bool, device=memory.device))
    lead, where = _measure(memory, dtype, pairs, apart=True)
    asked = table[where].bool()[torch.arange(pairs, device=memory.device) % len(where)]
    return Halves(table, (lead < lead.float().mean()) != asked)


def told_apart(lead: Tensor) -> Tensor | None:
    """Whether a multiprocessor is not at the half of the first; None if that is not clear.

    Args:
        lead: [multiprocessors, pairs], by how many cycles a pair's first chunk answered before its second.
    """
    signs = (lead - lead.float().mean(1, keepdim=True)).sign()
    agreed = (signs * signs[:1]).mean(1)
    return agreed < 0 if bool((agreed.abs() > CLEAR).all()) else None


def _measure(memory: Tensor, dtype: torch.dtype, pairs: int, *, apart: bool) -> tuple[Tensor, Tensor]:
    device = memory.device
    facts: Any = torch.cuda.get_device_properties(device)
    blocks = multiprocessors(device)
    lead = torch.zeros((pairs,) if apart else (blocks, pairs), dtype=torch.int32, device=device)
    where = torch.zeros(blocks, dtype=torch.int32, device=device)
    MEASURE(
        dtype, device, grid=blocks, shared=facts.shared_memory_per_block_optin, memory=memory, lead=lead, where=where,
        pairs=pairs, apart=int(apart), zero=0,
    )  # fmt: skip
    return lead, where.long()
