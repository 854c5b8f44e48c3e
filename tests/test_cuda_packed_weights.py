"""Weights in halves of L2: what a block's chunks are, and how halves are told apart."""

from unittest import mock

import pytest
import torch

from s1kernels.backends.cuda import l2_halves
from s1kernels.backends.cuda.l2_halves import CHUNK_BYTES, Halves, told_apart
from s1kernels.backends.cuda.packed_weights import BLOCKS, NoHalvesError, PackedWeights, chunks_of, units_of

PAIR = 2 * CHUNK_BYTES


@pytest.fixture
def packed():
    """Packs matrices in memory whose pairs of chunks are near in a random order, and gives that as well."""

    def pack(matrices):
        with mock.patch.object(l2_halves, "measure", lambda memory, dtype: Halves.at_random(memory)):
            made = PackedWeights(matrices)
        assert len(made.memory) % PAIR == made.memory.data_ptr() % PAIR == 0
        return made, Halves.at_random(made.memory).second

    return pack


def streamed(packed, matrices, block):
    """What a block's chunks hold, as the kernel finds them."""
    address, unit = packed.place(matrices)
    chunks, start = [], (address - packed.memory.data_ptr()) + block // 2 * units_of(matrices) * 4 * PAIR
    for i in range(chunks_of(matrices)):
        near = int(packed.near[unit + i // 4, block // 2]) >> i % 4 & 1
        at = start + i * PAIR + (near ^ block % 2) * CHUNK_BYTES
        chunks.append(packed.memory[at : at + CHUNK_BYTES])
    return torch.cat(chunks).view(matrices[0].dtype)


def test_every_block_finds_its_rows(packed):
    """Of matrices of all shapes that a frame has; the last has no whole share for every block."""
    shapes = [(2048, 1024), (1024, 2048), (1024, 3072), (128 * 33 - 40, 1024)]
    single = [(torch.randn(shape).to(torch.bfloat16),) for shape in shapes]
    twins = tuple(torch.randn(2048, 1024).to(torch.bfloat16) for _ in range(2))
    both, second = packed([*single, twins, single[0]])
    size = sum(BLOCKS * units_of(m) * 4 * CHUNK_BYTES for m in (*single, twins))  # each once
    assert len(both.memory) == size == PAIR * len(second)
    for (matrix,) in single:
        share = -(-matrix.shape[0] // BLOCKS)
        for block in (0, 1, 6, 127):
            rows = matrix[block * share : (block + 1) * share].flatten()
            assert torch.equal(streamed(both, (matrix,), block)[: len(rows)], rows)
    for block in (0, 77):
        w1, w3 = (w[block * 16 : block * 16 + 16] for w in twins)
        tiles = torch.cat([w1[:8], w3[:8], w1[8:], w3[8:]])
        assert torch.equal(streamed(both, twins, block), tiles.flatten())


def test_a_chunk_is_where_its_block_is_near(packed):
    """Even blocks read chunks of half 0."""
    number = torch.arange(BLOCKS).repeat_interleave(8 * 1024).view(1024, 1024)  # of the block that has a row
    both, second = packed([(number.to(torch.bfloat16),)])
    first = both.memory.view(torch.bfloat16).view(-1, 2, CHUNK_BYTES // 2)[:, :, 0]
    assert not (torch.where(second, first[:, 1], first[:, 0]) % 2).any()


def leads(sides, second, noise=100, bias=-80):
    """What multiprocessors at these halves would measure, once each and once its neighbour's pairs."""
    generator, numbers = torch.Generator().manual_seed(1), torch.arange(len(second)) % len(sides)
    for asked in (sides[numbers], sides[(numbers - 1) % len(sides)]):
        signal = torch.where(second ^ asked, -400, 400) + bias
        yield (signal + noise * torch.randn(len(second), generator=generator)).int()


def test_halves_are_told_apart():
    """Up to which one is the first: that of multiprocessor 0."""
    generator = torch.Generator().manual_seed(2)
    sides, second = (torch.rand(n, generator=generator) < 0.5 for n in (132, 132 * 40 + 7))
    for flipped in (False, True):
        found = told_apart(*leads(sides ^ flipped, second ^ flipped), 132)
        assert torch.equal(found[0], sides != sides[0])
        assert ((found[1] != sides[0]) == second).float().mean() > 0.999


def test_what_is_one_is_not_told_apart():
    second = torch.rand(132 * 40, generator=torch.Generator().manual_seed(3)) < 0.5
    assert told_apart(*leads(torch.zeros(132).bool(), second), 132) is None
    assert told_apart(*(torch.randint(-40, 40, (132 * 40,)) for _ in range(2)), 132) is None
    assert told_apart(*(torch.zeros(100, dtype=torch.int32) for _ in range(2)), 132) is None


def test_without_halves_nothing_is_packed():
    with mock.patch.object(l2_halves, "measure", lambda memory, dtype: None), pytest.raises(NoHalvesError):
        PackedWeights([(torch.zeros(1024, 1024, dtype=torch.bfloat16),)])
