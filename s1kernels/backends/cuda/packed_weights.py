"""The matrices of a frame as the persistent kernel streams them: each block's rows in the half of L2 that is near."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from s1kernels.backends.cuda import l2_halves
from s1kernels.backends.cuda.l2_halves import CHUNK_BYTES

BLOCKS, WIDTH, UNIT_ROWS = 128, 1024, 8
UNIT_BYTES = UNIT_ROWS * WIDTH * 2  # of the kernel's ring
UNIT_CHUNKS = UNIT_BYTES // CHUNK_BYTES

Matrices = tuple[Tensor, ...]
"""What a phase multiplies with: a matrix of [rows, slices * WIDTH] 16-bit weights, or two alike, tile by tile."""


class NoHalvesError(Exception):
    """L2 has no two halves here that can be told apart."""


class PackedWeights:
    """A copy of matrices, made of chunks as `own_block` of csrc/cuda/device/frame_state.cuh says.

    Args:
        matrices: of one dtype, on one device; the same may come several times.
    Attributes:
        memory: all of them. sides: [MULTIPROCESSORS] uint8. near: [units and more, BLOCKS / 2] uint8.
    """

    def __init__(self, matrices: list[Matrices]) -> None:
        given = {_key(m): m for m in matrices}
        like, pair, unit_bytes = matrices[0][0], 2 * CHUNK_BYTES, BLOCKS * UNIT_BYTES  # of all blocks
        room = unit_bytes * sum(map(units_of, given.values()))
        whole = torch.zeros(room + pair, dtype=torch.uint8, device=like.device)
        self.memory = whole[-whole.data_ptr() % pair :][:room]
        halves = l2_halves.measure(self.memory, like.dtype)
        if halves is None:
            raise NoHalvesError("halves of L2 cannot be told apart on this GPU now")
        self.sides = halves.sides
        bits = 1 << torch.arange(UNIT_CHUNKS, dtype=torch.uint8, device=like.device)
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}
        tables, before = [], 0
        for key, m in given.items():
            units = units_of(m)
            start, end = before * unit_bytes, (before + units) * unit_bytes
            place = self.memory[start:end].view(like.dtype)
            second = halves.second[start // pair : end // pair].view(BLOCKS // 2, units, UNIT_CHUNKS)
            pairs = _rows_of_blocks(m).view(BLOCKS // 2, 2, units, UNIT_CHUNKS, -1).permute(0, 2, 3, 1, 4)
            place.view(pairs.shape).copy_(torch.where(second[..., None, None], pairs.flip(3), pairs))
            tables.append((second * bits).sum(-1, dtype=torch.uint8).T)
            self._places[key] = place.data_ptr(), before
            before += units
        self.near = pad(torch.cat(tables), (0, 0, 0, UNIT_CHUNKS))  # the kernel looks ahead

    def place(self, matrices: Matrices) -> tuple[int, int]:
        """Where they are: the address, and the number of the first of their units among all."""
        return self._places[_key(matrices)]


def share_of(matrices: Matrices) -> int:
    """Rows that a block has of each matrix; the last blocks may have fewer."""
    return -(-matrices[0].shape[0] // BLOCKS)


def chunks_of(matrices: Matrices) -> int:
    """Chunks of a block."""
    return -(-share_of(matrices) * matrices[0].shape[1] * 2 * len(matrices) // CHUNK_BYTES)


def units_of(matrices: Matrices) -> int:
    """Units of a block."""
    return -(-chunks_of(matrices) // UNIT_CHUNKS)


def _key(matrices: Matrices) -> tuple[int, ...]:
    return tuple(m.data_ptr() for m in matrices)


def _rows_of_blocks(matrices: Matrices) -> Tensor:
    """[BLOCKS, units * UNIT_ROWS, WIDTH]: the rows in the order in which a block multiplies them, zeros behind."""
    share, tiles = share_of(matrices), []
    for m in matrices:
        rows = pad(m, (0, 0, 0, BLOCKS * share - m.shape[0])).view(BLOCKS, -1, WIDTH)
        tiles.append(pad(rows, (0, 0, 0, -rows.shape[1] % UNIT_ROWS)).view(BLOCKS, -1, UNIT_ROWS, WIDTH))
    return torch.stack(tiles, 2).view(BLOCKS, -1, WIDTH)
