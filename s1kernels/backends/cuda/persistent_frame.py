"""The frame as one persistent kernel, csrc/cuda/persistent_frame.cu, for models of S1-mini's proportions.

A list of phases tells the kernel what to do in which order, and where words are exchanged.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from s1kernels.backends.cuda import driver
from s1kernels.backends.cuda.device import index_of, l2_bytes, memory_bandwidth
from s1kernels.backends.cuda.launch import Kernel, Launch, capability, multiprocessors
from s1kernels.backends.cuda.packed_weights import (
    BLOCKS,
    UNIT_BYTES,
    WIDTH,
    Matrices,
    PackedWeights,
    chunks_of,
    share_of,
    units_of,
)
from s1kernels.backends.cuda.support import HALVES
from s1kernels.model.config import DualARConfig, StackConfig
from s1kernels.model.weights import LayerWeights, Weights

PARTS, PASSES = 4, 96
SHARED_BYTES = 231_808  # sizeof(Shared<T>), rounded up
MOST_LOGITS = 1280  # of a block
LEVELS = 8 * 32  # words with the weights of these parts
SLOTS = 10  # of the ring
PARTED = 576  # past positions up to which they are not streamed
SPLITS, STEP, UNIT_POSITIONS = 16, 16, 32  # blocks that share them; what a warp attends to, what a unit holds
HEAD_UNITS = 2  # units of a step of the head
KEPT_IN_L2 = 0.4  # of its bytes, for weights that come again; what helps most on an H100, with 50 MB

FRAME = Kernel(
    "persistent_frame", "persistent_frame", block=544,
    pointers="phases words passes parts abandoned turn tokens position text_embedding codebook_embedding "
    "fast_embedding cos_sin fast_cos_sin ids logit_bias window temperature top_p repetition_penalty top_k "
    "rng main_logits fast_logits out times sides near tickets",
    ints="under_way_near phase_count slow_layers codebooks codebook_size text_rows semantic_begin semantic_end "
    "capacity fast_rows width main_threads fast_threads fast_offset fast_step",
    floats="scale eps",
)  # fmt: skip
PREPARE = Kernel("persistent_frame", "prepare_frame", block=256, pointers="words abandoned", ints="count")


Caches = tuple[list[Tensor], list[Tensor]]
"""[1, G, S, D] of each of the slow layers: keys, then values."""


class Kind(IntEnum):
    QKV, ATTEND, SLOW_OUTPUT, OUTPUT, SWIGLU, FAST_QKV, FAST_OUTPUT, HEAD, FAST_HEAD = range(9)


@dataclass(frozen=True, eq=False)
class Phase:
    """`Phase` of the kernel: what all blocks do between two exchanges."""

    kind: Kind
    weights: Matrices = ()
    norm_weight: Tensor | None = None
    begins: bool = False
    given: int = 0
    out: int = 0
    vectors: int = 1
    layer: int = 0
    position: int = 0
    past: int = 0
    kept: int = 0
    norms: tuple[Tensor | None, Tensor | None] = (None, None)
    """Of slow attention's queries and keys."""

    def units(self, past: int = 0) -> int:
        """Of the ring, for each block, whose past has so many."""
        if self.kind == Kind.ATTEND:
            return past
        units = units_of(self.weights) if self.weights else 0
        return -(-units // HEAD_UNITS) * HEAD_UNITS if self.kind == Kind.HEAD else units

    def as_struct(
        self, place: tuple[int, int] | None, before: int, past_units: int, kept_share: float, caches: Caches
    ) -> bytes:
        """With packed weights at a place, or as they lie, when so many units come before, a block's past has
        `past_units`, L2 keeps a share of the weights, and the slow stack has these caches."""
        turn, slot = divmod(before, SLOTS)
        weight, second = [*(w.data_ptr() for w in self.weights), 0, 0][:2]
        rows = share = slices = chunks = unit = 0
        if self.weights:
            rows, slices, share = self.weights[0].shape[0], self.weights[0].shape[1] // WIDTH, share_of(self.weights)
        if place is not None:
            (weight, unit), second, chunks = place, 0, chunks_of(self.weights) if self.weights else 0
        norm_weight = 0 if self.norm_weight is None else self.norm_weight.data_ptr()
        cached = [0] * 6
        if self.kind == Kind.ATTEND:
            layers = [*zip(*caches, strict=True), (None, None)][self.layer : self.layer + 2]
            cached = [0 if t is None else t.data_ptr() for pair in (*layers, self.norms) for t in pair]
        return struct.pack(
            "<3Q15if2i6Q", weight, second, norm_weight, rows, share, self.kind, self.begins, self.given, self.vectors,
            self.out, slices, self.layer, self.position, self.units(past_units), chunks, unit, self.past, self.kept,
            kept_share, slot, turn % 2, *cached,
        )  # fmt: skip


def under_way_near(device: torch.device) -> int:
    """Units of packed weights that a block copies at a time: what is fastest on an H100, with 3.4 TB/s, and an H200."""
    return 3 if memory_bandwidth(device) < 4e12 else 4


def past_units(positions: int) -> int:
    """Units of a past of so many positions in each of the blocks that share it; `PastShare` of the kernel."""
    chunk = -(-positions // (SPLITS * STEP)) * STEP
    return -(-chunk // UNIT_POSITIONS) if positions > PARTED else 0


def refusal(config: DualARConfig, weights: Weights, head: Tensor, fast_rows: int) -> str | None:
    """Why the persistent kernel cannot serve a model, or None."""
    device, slow, fast = head.device, config.slow, config.fast
    facts: Any = torch.cuda.get_device_properties(device)
    shape = (slow.dim, slow.heads, slow.kv_heads, slow.head_dim, fast.dim, fast.heads, fast.kv_heads, fast.head_dim)
    reasons = {
        f"the GPU has compute capability {capability(device)}; it needs 9 to 11": not 9 <= capability(device)[0] < 12,
        f"the GPU has {multiprocessors(device)} SMs; it needs {BLOCKS}": multiprocessors(device) < BLOCKS,
        "driver and GPU have no cooperative launches": not driver.attribute(
            index_of(device), driver.Attribute.COOPERATIVE_LAUNCH
        ),
        "the GPU has too little shared memory a block": facts.shared_memory_per_block_optin < SHARED_BYTES,
        f"the dtype is {head.dtype}; it needs a 16-bit one": head.dtype not in HALVES,
        f"the stacks have other proportions than S1-mini's: {shape}": shape != (1024, 16, 8, 128, 1024, 16, 8, 64),
        "a feed-forward width is not 1024, 2048 or 3072": {slow.intermediate, fast.intermediate} - {1024, 2048, 3072},
        "the fast stack is too deep, or has too many codebooks": fast.layers > 4 or config.codebooks > 10,
        "there are biases, or norms in the fast stack's attention": slow.qkv_bias or slow.o_bias or fast.qkv_bias
        or fast.o_bias or fast.qk_norm,
        "the fast stack takes a normalised or projected state": config.norm_fast_input or config.projects,
        "it does not draw in the 2.0 line's way": config.line != "s1",
        f"{fast_rows} rows of the fast head are sampled; it needs 1024": fast_rows != 1024,
        f"too many logits: {head.shape[0]}": head.shape[0] > BLOCKS * MOST_LOGITS,
        "a weight is not aligned to 16 bytes": any(t.data_ptr() % 16 for t in [head, *weights.flat()]),
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), None)


class Phases:
    """The phases of a frame, and the words that they exchange."""

    def __init__(self, config: DualARConfig, weights: Weights, head: Tensor) -> None:
        self.config, self.list, self.words = config, [], 0
        self.fast_qkv = [self._room(config.codebooks * config.fast.qkv_rows // 2) for _ in weights.fast]
        x = self._stack(config.slow, weights.slow)
        self.list.append(Phase(Kind.HEAD, (head,), weights.norm, given=x))
        for i in range(1, config.codebooks):
            pair = i == 1  # positions 0 and 1 need no draw between them
            x = self._stack(config.fast, weights.fast, 2 if pair else 1, position=0 if pair else i)
            fast_head = weights.fast_head[:1024]
            given = x + (WIDTH // 2 if pair else 0)
            self.list.append(
                Phase(
                    Kind.FAST_HEAD, (fast_head,), weights.fast_norm, given=given, out=self._room(1024), position=i + 1
                )
            )

    def pack(self) -> PackedWeights:
        """A copy of what the phases multiply with, to be streamed. Raises NoHalvesError."""
        return PackedWeights([phase.weights for phase in self.list if phase.weights])

    def structs(self, device: torch.device, caches: Caches, packed: PackedWeights | None = None) -> Tensor:
        """Lists of them, of which a frame takes one, by the units that the past has in a block; for all positions
        that the caches have."""
        places: list[tuple[int, int] | None] = [None] * len(self.list)
        if packed is not None:
            unit = 0
            for i in reversed(range(len(self.list))):  # without weights: the number of the next phase's first unit
                address, unit = packed.place(weights) if (weights := self.list[i].weights) else (0, unit)
                places[i] = address, unit
        shares = self.kept_shares(KEPT_IN_L2 * l2_bytes(device))
        data = bytearray()
        for past in range(past_units(caches[0][0].shape[2]) + 1):
            before = accumulate((phase.units(past) for phase in self.list), initial=0)
            for phase, place, first, share in zip(self.list, places, before, shares, strict=False):
                data += phase.as_struct(place, first, past, share, caches)
        return torch.frombuffer(data, dtype=torch.uint8).to(device)

    def kept_shares(self, room: float) -> list[float]:
        """The share of each phase's weights that L2 keeps, in so many bytes: of the fast stack's, which come again."""
        slow = [phase.kind for phase in self.list].index(Kind.HEAD) + 1
        again = {phase.weights[0].data_ptr(): phase.units() for phase in self.list[slow:]}
        share = room / (BLOCKS * UNIT_BYTES * sum(again.values()))
        return [0.0] * slow + [min(share, 1.0)] * (len(self.list) - slow)

    def _stack(self, stack: StackConfig, layers: list[LayerWeights], vectors: int = 1, position: int = 0) -> int:
        """Adds a stack's phases; returns where its result is."""
        slow, x = stack is self.config.slow, 0
        half = vectors * WIDTH // 2
        for i, w in enumerate(layers):
            common: dict[str, Any] = dict(vectors=vectors, layer=i, position=position)
            if slow:
                qkv, kept = self._room(stack.qkv_rows // 2), 0
            else:  # every position's stays, for those that come
                last = i + 1 == len(layers)
                qkv, kept = self.fast_qkv[i] + position * stack.qkv_rows // 2, position + (vectors if last else 0)
            kind = Kind.QKV if slow else Kind.FAST_QKV
            self.list.append(Phase(kind, (w.wqkv,), w.attention_norm, given=x, out=qkv, begins=i == 0, **common))
            if slow:
                results = PARTS * stack.heads * stack.head_dim // 2
                attended, out = self._room(results + LEVELS), self._room(half)
                self.list.append(Phase(Kind.ATTEND, given=qkv, out=attended, layer=i, norms=(w.q_norm, w.k_norm)))
                self.list.append(Phase(Kind.SLOW_OUTPUT, (w.wo,), given=attended, out=out, **common))
            else:
                out = self._room(half)
                past = self.fast_qkv[(i + 1) % len(layers)]
                self.list.append(Phase(Kind.FAST_OUTPUT, (w.wo,), given=qkv, out=out, past=past, kept=kept, **common))
            gated, x = self._room(vectors * stack.intermediate // 2), self._room(half)
            self.list.append(Phase(Kind.SWIGLU, (w.w1, w.w3), w.ffn_norm, given=out, out=gated, **common))
            self.list.append(Phase(Kind.OUTPUT, (w.w2,), given=gated, out=x, kept=kept, **common))
        return x

    def _room(self, words: int) -> int:
        start, self.words = self.words, self.words + -(-words // 4) * 4
        return start


def launches(
    config: DualARConfig, weights: Weights, head: Tensor, packed: PackedWeights | None, *, tokens: Tensor,
    position: Tensor, k_caches: list[Tensor], v_caches: list[Tensor], window: Tensor, ids: Tensor | None,
    logit_bias: Tensor | None, scalars: dict[str, Tensor], rng: Tensor,
    main_threads: int, fast_threads: int, fast_offset: int, fast_step: int, main_logits: Tensor, fast_logits: Tensor,
    out: Tensor, times: Tensor | None = None,
) -> list[Launch]:  # fmt: skip
    """One frame, in two launches: forget the last one's words, and go.

    Args:
        packed: Phases.pack()'s copy of the matrices to stream, or None: they are streamed as they lie.
    """
    device = head.device
    phases = Phases(config, weights, head)
    exchanged = torch.empty(phases.words + PASSES * BLOCKS * 8, dtype=torch.int32, device=device)
    parts = torch.zeros(BLOCKS * 16 * 36, dtype=torch.int32, device=device)
    state = torch.zeros(4, dtype=torch.int32, device=device)
    prepare = PREPARE.bind(
        head.dtype, device, grid=BLOCKS, pdl=False, words=exchanged, abandoned=state[:1], count=exchanged.numel()
    )
    frame = FRAME.bind(
        head.dtype, device, grid=BLOCKS, shared=SHARED_BYTES, pdl=True, cooperative=True,
        phases=phases.structs(device, (k_caches, v_caches), packed), words=exchanged,
        passes=exchanged[phases.words :], parts=parts, abandoned=state[:1], turn=state[1:2], tickets=state[2:],
        sides=packed and packed.sides, near=packed and packed.near, tokens=tokens, position=position,
        text_embedding=weights.text_embedding,
        codebook_embedding=weights.codebook_embedding, fast_embedding=weights.fast_embedding,
        cos_sin=weights.cos_sin, fast_cos_sin=weights.fast_cos_sin, ids=ids, logit_bias=logit_bias, window=window,
        **scalars, rng=rng,
        main_logits=main_logits, fast_logits=fast_logits, out=out, times=times,
        under_way_near=under_way_near(device), phase_count=len(phases.list), slow_layers=config.slow.layers,
        codebooks=config.codebooks, codebook_size=config.codebook_size, text_rows=weights.text_embedding.shape[0],
        semantic_begin=config.semantic_begin, semantic_end=config.semantic_end, capacity=k_caches[0].shape[2],
        fast_rows=1024, width=window.shape[1], main_threads=main_threads,
        fast_threads=fast_threads, fast_offset=fast_offset, fast_step=fast_step,
        scale=(config.codebooks + 1) ** -0.5 if config.scale_codebook_embeddings else 1.0, eps=config.norm_eps,
    )  # fmt: skip
    return [prepare, frame]
