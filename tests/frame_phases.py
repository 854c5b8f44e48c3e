"""What every phase of the persistent frame must have passed on, from what it was given: truth in float64.

The words of a frame lie side by side in one tensor, each phase's results in a place of their own, so that one frame
shows where an error begins.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s1kernels.backends.cuda.persistent_frame import FRAME, LEVELS, PARTS, Kind, Phase, Phases
from s1kernels.model.config import DualARConfig, StackConfig
from s1kernels.model.weights import Weights
from s1kernels.ops import references
from s1kernels.testing import rel_error

WHOLE, PARTED = 240, 576  # kWhole and kParted of csrc/cuda/device/frame_state.cuh

LIMIT = {torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4, torch.float32: 3e-5}
"""Relative error of results that are kept in a dtype: one rounding, and a normalised x of 16 bits."""


@dataclass
class Frame:
    """A frame that has been decoded. tokens: [N+1], what it was given; codes: [N+1], what came of it; launch: of the
    kernel; k, v: [G, S, D] of every slow layer, with the frame's own position."""

    config: DualARConfig
    weights: Weights
    head: Tensor
    launch: object
    tokens: Tensor
    codes: Tensor
    position: int
    k: list[Tensor]
    v: list[Tensor]
    main_logits: Tensor
    fast_logits: Tensor

    def check(self) -> None:
        """Every phase's results are the truth, rounded."""
        for name, value, true in self.results():
            limit = LIMIT[value.dtype if value.dtype == torch.float32 else self.head.dtype]
            error = rel_error(value, true)
            assert error < limit, f"{name}: {error:.2e}, at most {limit:.0e}"

    def results(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """A phase's name, its results and the truth, in the order of the phases."""
        c, w, slow = self.config, self.weights, True
        kept: dict[int, list[Tensor]] = {}  # keys and values of the fast stack's layers, by position
        x = qkv = given = matrix = torch.empty(0)  # matrix: what comes behind `given`
        for phase in Phases(c, w, self.head).list:
            stack, layers, name = (c.slow, w.slow, "slow") if slow else (c.fast, w.fast, "fast")
            layer, name = layers[phase.layer], f"{name} {phase.layer} {phase.kind.name} {phase.position}"
            match phase.kind:
                case Kind.QKV | Kind.FAST_QKV:
                    x = self._begin(phase, x) if phase.begins else x
                    true = self._normed(x, layer.attention_norm) @ layer.wqkv.double().T
                    if phase.kind == Kind.FAST_QKV:
                        heads = true.to(self.head.dtype).double().unflatten(-1, (-1, stack.head_dim))
                        at = slice(phase.position, phase.position + phase.vectors)
                        turned = heads[:, : stack.heads + stack.kv_heads]
                        turned.copy_(rotated(turned, w.fast_cos_sin[at, None]))
                        true = heads.flatten(1)
                    qkv = self._words(phase.out, true.shape)
                    yield name, qkv, true
                case Kind.ATTEND:
                    given = self._attended(phase.out, stack)
                    matrix = layer.wo
                    yield name, given, self._slow_attention(phase, qkv)
                case Kind.SLOW_OUTPUT | Kind.OUTPUT:
                    true = x + given @ matrix.double().T
                    x = self._operand(phase.out, true.shape)
                    yield name, x, true
                case Kind.SWIGLU:
                    normed = self._normed(x, layer.ffn_norm)
                    gate, up = normed @ layer.w1.double().T, normed @ layer.w3.double().T
                    true = torch.nn.functional.silu(gate) * up
                    given, matrix = self._operand(phase.out, true.shape), layer.w2
                    yield name, given, true
                case Kind.FAST_OUTPUT:
                    attended = self._fast_attention(qkv, kept.setdefault(phase.layer, []))
                    true = x + attended @ layer.wo.double().T
                    x = self._operand(phase.out, true.shape)
                    yield name, x, true
                case Kind.HEAD:
                    slow = False
                    yield name, self.main_logits, self._normed(x, w.norm) @ self.head.double().T
                case Kind.FAST_HEAD:
                    true = self._normed(x[-1:], w.fast_norm) @ w.fast_head[:1024].double().T
                    yield name, self.fast_logits[phase.position - 2 :][:1], true

    def _words(self, start: int, shape: tuple[int, ...]) -> Tensor:
        words = self.launch.tensors[FRAME.pointers.index("words")]
        values = words[start : start + torch.Size(shape).numel() // 2].view(self.head.dtype)
        return values.view(shape).double()

    def _attended(self, start: int, stack: StackConfig) -> Tensor:
        """Slow attention's result: as it is, or of its parts."""
        size = stack.heads * stack.head_dim
        if not WHOLE < self.position <= PARTED:
            return self._operand(start, (1, size))
        words = self.launch.tensors[FRAME.pointers.index("words")][start + PARTS * size // 2 :][:LEVELS]
        levels = words.view(torch.float32).double().view(8, 32)[:, : 2 * PARTS].view(8, 2, PARTS).transpose(0, 1)
        weights = torch.softmax(levels.reshape(stack.heads, PARTS) * math.log(2.0), 1)
        parts = self._operand(start, (PARTS, size)).view(PARTS, stack.heads, stack.head_dim)
        return torch.einsum("hp,phd->hd", weights, parts).view(1, size)

    def _operand(self, start: int, shape: tuple[int, ...]) -> Tensor:
        """Words in the order of an operand: of each 32, word 16s + 4t + 2m + h is where 16h + 4t + 2s + m would be."""
        return self._words(start, shape).view(-1, 2, 4, 2, 2, 2).permute(0, 3, 2, 4, 1, 5).reshape(shape)

    def _begin(self, phase: Phase, x: Tensor) -> Tensor:
        """What a stack begins with: the frame's embedding, or the last code's, behind the slow stack's result."""
        c, w = self.config, self.weights
        if phase.kind == Kind.QKV:
            embedded = references.embed_frame(
                self.tokens[None], w.text_embedding, w.codebook_embedding, c.semantic_begin, c.semantic_end,
                c.scale_codebook_embeddings,
            )  # fmt: skip
            return embedded.double()
        number = 1 if phase.vectors == 2 else phase.position
        code = w.fast_embedding[int(self.codes[number])].double()[None]
        return torch.cat([x, code]) if phase.vectors == 2 else code

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * self._scale(x) * weight.double()

    def _scale(self, x: Tensor) -> Tensor:
        return (x.square().mean(-1, keepdim=True) + self.config.norm_eps).rsqrt()

    def _slow_attention(self, phase: Phase, qkv: Tensor) -> Tensor:
        c, w = self.config.slow, self.weights.slow[phase.layer]
        q = qkv[0, : c.heads * c.head_dim].view(c.heads, c.head_dim)
        scale = q.new_ones(c.heads, 1)
        if w.q_norm is not None:
            scale, q = self._scale(q), q * w.q_norm.double()
        q = rotated(q, self.weights.cos_sin[self.position])
        if self.head.dtype == torch.bfloat16 and self.position <= PARTED:  # rounded before its scores are scaled
            q = q.to(self.head.dtype).double() * scale
        else:
            q = (q * scale).to(self.head.dtype).double()
        k, v = (cache[phase.layer][:, : self.position + 1].double() for cache in (self.k, self.v))
        return attention(q.view(c.kv_heads, -1, c.head_dim), k, v).view(1, -1)

    def _fast_attention(self, qkv: Tensor, kept: list[Tensor]) -> Tensor:
        """Of the vectors of a pass, whose keys and values join those that are kept."""
        c, out = self.config.fast, []
        for vector in qkv.view(-1, c.heads + 2 * c.kv_heads, c.head_dim):
            kept.append(vector[c.heads :])
            k, v = torch.stack(kept, 1).split(c.kv_heads)
            out.append(attention(vector[: c.heads].view(c.kv_heads, -1, c.head_dim), k, v).flatten())
        return torch.stack(out).to(self.head.dtype).double()


def rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """[..., D] by a table's [..., D/2, 2], neighbours forming a pair."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.view_as_complex(cos_sin.double().contiguous())).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [G, H/G, D], k and v [G, P, D] -> [G, H/G, D]."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
