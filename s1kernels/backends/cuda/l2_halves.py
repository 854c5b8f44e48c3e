"""In which half of L2 memory lies, and multiprocessors are: by how soon one hears from the other.

csrc/cuda/device/l2_halves.cuh measures it, and says what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s1kernels.backends.cuda.device import l2_bytes
from s1kernels.backends.cuda.launch import Kernel, multiprocessors

CHUNK_BYTES = 4096  # neighbours are in different halves
MULTIPROCESSORS = 1024  # in a table of them
TRIES = 3
FLUSH = 4  # times L2: what is written so that nothing else is in it
OTHER_TURNS = 32  # of all blocks, which read some of that first
TIMES = 2  # that a multiprocessor measures a pair: of an H200's pairs, one in five hundred is mistaken by one time
CLEAR = 0.25  # by how much more or less than half of their pairs two multiprocessors must agree on

MEASURE = Kernel(
    "persistent_frame", "measure_halves", block=32, pointers="memory other lead where", ints="pairs others shift zero"
)


@dataclass(frozen=True)
class Halves:
    """sides: [MULTIPROCESSORS] uint8, the half that a multiprocessor is at, 0 or 1. second: [pairs] bool, whether the
    second chunk of a pair lies in half 0, and not the first."""

    sides: Tensor
    second: Tensor

    @staticmethod
    def at_random(memory: Tensor, seed: int = 0) -> Halves:
        """Of memory as `measure` takes it, without measuring: for tests, and tools that disturb it. A frame's results
        do not depend on halves."""
        g, pairs = torch.Generator().manual_seed(seed), len(memory) // (2 * CHUNK_BYTES)
        sides, second = (torch.randint(0, 2, (n,), generator=g, dtype=torch.uint8) for n in (MULTIPROCESSORS, pairs))
        return Halves(sides.to(memory.device), second.to(memory.device).bool())


def measure(memory: Tensor, dtype: torch.dtype) -> Halves | None:
    """The halves of uint8 memory, [pairs * 2 * CHUNK_BYTES] from a multiple of that on; some 30 ms a gigabyte. None if
    they cannot be told apart: L2 is one, or others use the GPU. A pair that is mistaken is read from afar."""
    for _ in range(TRIES):
        lead, again = (_measure(memory, dtype, shift) for shift in (0, 1))
        if lead is None or again is None:
            continue
        sides = torch.zeros(MULTIPROCESSORS, dtype=torch.uint8, device=memory.device)
        if (found := told_apart(lead, again, multiprocessors(memory.device))) is not None:
            sides[: len(found[0])] = found[0]
            return Halves(sides, found[1])
    return None


def told_apart(lead: Tensor, again: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """By multiprocessor whether it is not at the half of number 0, and by pair whether its second chunk
    is there; None if that is not clear. A pair is measured by two neighbours in a ring of all, which so are told apart.

    Args:
        lead: [pairs], by how many cycles a pair's first chunk answers before its second, to number pair % count.
        again: the same to the number before that.
    """
    turns, pairs = len(lead) // count, len(lead)
    if turns == 0:
        return None
    numbers = torch.arange(pairs, device=lead.device) % count
    first, second = (x - x[: turns * count].view(turns, count).float().mean(0)[numbers] for x in (lead, again))
    agreed = ((first > 0) == (second > 0))[: turns * count].view(turns, count).float().mean(0)
    differ = agreed < 0.5
    if bool(((agreed - 0.5).abs() < CLEAR).any()) or int(differ.sum()) % 2 or not bool(differ.any()):
        return None
    sides = (differ.cumsum(0) - differ[0].long()) % 2 == 1
    signs = 1 - 2 * sides.float()
    return sides, first * signs[numbers] + second * signs[(numbers - 1) % count] < 0


def _measure(memory: Tensor, dtype: torch.dtype, shift: int) -> Tensor | None:
    """Leads, of TIMES times, or None if not every multiprocessor has had a block."""
    device, blocks = memory.device, multiprocessors(memory.device)
    facts: Any = torch.cuda.get_device_properties(device)
    pairs = len(memory) // (2 * CHUNK_BYTES)
    lead = torch.zeros(TIMES, pairs, dtype=torch.int32, device=device)
    where = torch.zeros(TIMES, blocks, dtype=torch.int32, device=device)
    others = OTHER_TURNS * blocks
    other = torch.empty(max(FLUSH * l2_bytes(device), others * 2 * CHUNK_BYTES), dtype=torch.uint8, device=device)
    for i in range(TIMES):
        other.zero_()
        MEASURE(
            dtype, device, grid=blocks, shared=facts.shared_memory_per_block_optin, memory=memory, other=other,
            lead=lead[i], where=where[i], pairs=pairs, others=others, shift=shift, zero=0,
        )  # fmt: skip
    all_numbers = torch.arange(blocks, dtype=torch.int32, device=device).expand_as(where)
    return lead.sum(0) if torch.equal(where.sort().values, all_numbers) else None
