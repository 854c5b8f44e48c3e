"""The codec's layers. All are causal: an output depends on inputs up to its own time, so that a layer that is given the
last of its earlier inputs goes on where it stopped.

Signals are [T, C], T steps of C channels. A convolution is one matrix product: the op `snake` activates its input, lays
out the steps that each output needs and keeps the last of them. It adds no bias: what it returns owes one, which
whatever reads it next has to add. So residual units add to their input where it lies.

Source: fish_speech/models/dac/modded_dac.py and rvq.py.
"""

from __future__ import annotations

from collections.abc import Hashable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from s1kernels import ops
from s1kernels.speech.codec.state import State


class Past:
    """What layers keep from one call to the next. At first all is zero, as upstream pads.

    turn: [1] int32, whose lowest bit changes from call to call: `snake` reads one half of what is kept for it, and
    writes the other.
    """

    def __init__(self, device: torch.device) -> None:
        self.turn = torch.zeros(1, dtype=torch.int32, device=device)
        self._room = torch.empty(0)
        self._kept: dict[Hashable, Tensor] = {}
        self._seen: dict[Hashable, int] = {}

    def keep(self, key: Hashable, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """The tensor of a key, of the dtype and device of `like`."""
        if key not in self._kept:
            self._kept[key] = like.new_zeros(shape)
        return self._kept[key]

    def room(self, shape: tuple[int, int], like: Tensor) -> Tensor | None:
        """Where windows may lie until the next call, on the CPU: its new memory costs more than what goes into it."""
        if like.device.type != "cpu":
            return None
        if self._room.numel() < prod(shape) or self._room.dtype != like.dtype:
            self._room = like.new_empty(prod(shape))
        return self._room[: prod(shape)].view(shape)

    def allocate(self, other: Past) -> None:
        """Keep all that `other` keeps, as zeros where it is new."""
        for key, kept in other._kept.items():
            self._kept.setdefault(key, torch.zeros_like(kept))

    def clear(self) -> None:
        """As at first; the tensors stay where they are."""
        self._seen.clear()
        if self._kept:
            torch._foreach_zero_(list(self._kept.values()))

    def advance(self, key: Hashable, steps: int) -> int:
        """The number of steps that came before these."""
        before = self._seen.get(key, 0)
        self._seen[key] = before + steps
        return before

    @property
    def nbytes(self) -> int:
        """Bytes that are kept; once every layer has run, their number does not change."""
        return sum(kept.nbytes for kept in self._kept.values())


class Snake:
    """The activation of a signal that owes a bias, and the windows of the convolution behind it: the op `snake`."""

    def __init__(
        self, alpha: Tensor | None, owed: Tensor | None, *, taps: int = 1, dilation: int = 1, stride: int = 1
    ) -> None:
        """alpha None: no activation. owed None: the signal owes nothing."""
        self.alpha, self.owed = alpha, owed
        self.taps, self.dilation, self.stride = taps, dilation, stride
        self.reach = (taps - 1) * dilation + 1 - stride

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """[T, C] -> [T / stride, taps * C], good until the next call; T is a multiple of the stride."""
        kept = past.keep(self, (2, self.reach, x.shape[1]), x)
        out = past.room((x.shape[0] // self.stride, self.taps * x.shape[1]), x)
        return ops.snake(x, self.owed, self.alpha, kept, past.turn, self.taps, self.dilation, self.stride, out=out)


class Conv:
    """A convolution whose last tap is at the present, behind an activation or none.

    owes: the bias of what it returns.
    """

    def __init__(
        self, state: State, name: str, out: int | None, width: int, taps: int | None, *, stride: int | None = 1,
        dilation: int = 1, snake: str | None = None, owed: Tensor | None = None, at_once: int = 1,
    ) -> None:  # fmt: skip
        """stride None: half of the taps, as upstream's layers that reduce the rate have it. snake: the activation's
        name. owed: the input's bias. at_once: outputs of a row of the product, for a convolution of few channels and
        without dilation; the windows of all of them overlap."""
        weight = state.weight(name, out, width, taps)
        self.owes = state.take(f"{name}.bias", weight.shape[0])
        alpha = state.take(f"{snake}.alpha", 1, width, 1).view(width) if snake else None
        self.width, self.stride = weight.shape[0], stride or weight.shape[2] // 2
        parts = [F.pad(weight, (i, at_once - 1 - i)).mT.flatten(1) for i in range(at_once)]
        self.weight = torch.cat(parts)  # [at_once * C', taps * C]
        seen = weight.shape[2] + at_once - 1
        self.snake = Snake(alpha, owed, taps=seen, dilation=dilation, stride=self.stride * at_once)

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """[T, C] -> [T / stride, C']; T is a multiple of the stride, and of `at_once`."""
        return F.linear(self.snake(x, past), self.weight).view(-1, self.width)

    def add_to(self, x: Tensor, y: Tensor, past: Past) -> Tensor:
        """x [T / stride, C'], where it lies, plus the convolution of y."""
        return x.addmm_(self.snake(y, past), self.weight.T)


class Downsample:
    """A convolution of as many taps as its stride: its windows lie side by side."""

    def __init__(self, state: State, name: str, width: int, stride: int) -> None:
        self.weight = state.weight(name, width, width, stride).mT.flatten(1)
        self.bias = state.take(f"{name}.bias", width)

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """[T, C] -> [T / stride, C]; T is a multiple of the stride."""
        return F.linear(x.view(-1, self.weight.shape[1]), self.weight, self.bias)


class Upsample:
    """A transposed convolution of as many taps as its stride: a step becomes `stride` steps."""

    def __init__(self, state: State, name: str, width: int) -> None:
        weight = state.weight(name, width, width, None)
        self.stride = weight.shape[2]
        self.weight = weight.permute(2, 1, 0).flatten(0, 1)  # [stride * C, C]
        self.bias = state.take(f"{name}.bias", width).repeat(self.stride)

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """[T, C] -> [T * stride, C]."""
        return F.linear(x, self.weight, self.bias).view(-1, x.shape[1])


class Raise:
    """A transposed convolution of twice as many taps as its stride, behind an activation: a step and the one before it
    become `stride` steps.

    owes: the bias of what it returns.
    """

    def __init__(self, state: State, name: str, width: int, snake: str, owed: Tensor) -> None:
        self.snake = Snake(state.take(f"{snake}.alpha", 1, width, 1).view(width), owed, taps=2)
        weight = state.weight(name, width, None, None)
        self.width, self.stride = weight.shape[1], weight.shape[2] // 2
        present, before = (part.permute(2, 1, 0).flatten(0, 1) for part in weight.split(self.stride, dim=2))
        self.weight = torch.cat((before, present), dim=1)  # [stride * C', 2 * C]
        self.owes = state.take(f"{name}.bias", self.width)

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """[T, C] -> [T * stride, C']."""
        return F.linear(self.snake(x, past), self.weight).view(-1, self.width)


class ResidualUnit:
    """x + conv1(snake(conv7(snake(x)))).

    owes: the bias of what it returns.
    """

    def __init__(self, state: State, name: str, width: int, dilation: int, owed: Tensor) -> None:
        wide, narrow = f"{name}.block.1.conv", f"{name}.block.3.conv"
        self.wide = Conv(state, wide, width, width, 7, dilation=dilation, snake=f"{name}.block.0", owed=owed)
        self.narrow = Conv(state, narrow, width, width, 1, snake=f"{name}.block.2", owed=self.wide.owes)
        self.owes = owed + self.narrow.owes

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """Writes over x."""
        return self.narrow.add_to(x, self.wide(x, past), past)


class ConvNeXt:
    """x + gamma * mlp(layer_norm(depthwise(x)))."""

    def __init__(self, state: State, name: str, width: int) -> None:
        taps = 7
        self.snake = Snake(None, None, taps=taps)
        weight = state.weight(f"{name}.dwconv.conv", width, 1, taps)
        self.depthwise = weight[:, 0].T.float().contiguous()  # [taps, C]
        bias = state.take(f"{name}.dwconv.conv.bias", width).float()
        self.bias = F.pad(bias[None], (0, 0, 0, taps - 1))  # [taps, C], all of it in the first
        self.norm = state.take(f"{name}.norm.weight", width).float(), state.take(f"{name}.norm.bias", width).float()
        self.up = state.take(f"{name}.pwconv1.weight", None, width)
        hidden = self.up.shape[0]
        self.up_bias = state.take(f"{name}.pwconv1.bias", hidden)
        self.down = state.take(f"{name}.pwconv2.weight", width, hidden)
        self.down_bias, self.gamma = state.take(f"{name}.pwconv2.bias", width), state.take(f"{name}.gamma", width)

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """Writes over x. The depthwise convolution and the norm are in float32."""
        windows = self.snake(x, past).view(-1, *self.depthwise.shape)
        y = torch.addcmul(self.bias, windows, self.depthwise).sum(dim=1)
        y = F.layer_norm(y, self.gamma.shape, *self.norm, 1e-6).to(x.dtype)
        y = F.linear(F.gelu(F.linear(y, self.up, self.up_bias)), self.down, self.down_bias)
        return x.addcmul_(y, self.gamma)


class Place(NamedTuple):
    """Where T steps are among the S that a transformer keeps: a step lies in the slot of its number modulo S.

    slots: [T] int32. cos_sin: [S, D/2, 2], rotary angles, in the rows of these slots. mask: [T, S], what is added to a
    step's scores: -infinity for slots that it does not see.
    """

    slots: Tensor
    cos_sin: Tensor
    mask: Tensor


class Transformer:
    """Blocks of attention over the last `window` steps and a gated feed-forward, both scaled by a gain a channel.

    Args:
        window: steps that a step sees, itself among them.
        most: steps of a call at most.
        head_dim, rope_base, eps: as upstream's config has them.
    """

    def __init__(
        self, state: State, name: str, width: int, *, window: int, most: int, head_dim: int, rope_base: float,
        eps: float,
    ) -> None:  # fmt: skip
        self.window, self.head_dim, self.eps, self.dtype = window, head_dim, eps, state.dtype
        self.rates = 1.0 / rope_base ** (torch.arange(0, head_dim, 2).float() / head_dim)
        self.capacity = -(-(window - 1 + most) // 16) * 16  # a mask's rows are aligned as attention kernels want them
        self.blocks = [self._block(state, f"{name}.layers.{i}", width) for i in range(state.count(f"{name}.layers"))]
        self.norm = state.take(f"{name}.norm.weight", width)

    def _block(self, state: State, name: str, width: int) -> dict[str, Tensor]:
        attention, feed_forward = f"{name}.attention", f"{name}.feed_forward"
        block = {"wqkv": state.take(f"{attention}.wqkv.weight", None, width)}
        inner = block["wqkv"].shape[0] // 3
        if block["wqkv"].shape[0] % (3 * self.head_dim):
            expected = f"{attention}.wqkv.weight must have a multiple of 3 * head_dim={3 * self.head_dim} rows"
            raise ValueError(f"codec: {expected}, got {block['wqkv'].shape[0]}; pass the Settings that fit")
        w1 = state.take(f"{feed_forward}.w1.weight", None, width)
        w3 = state.take(f"{feed_forward}.w3.weight", w1.shape[0], width)
        block["w13"] = torch.stack((w1, w3))
        for norm in ("attention_norm", "ffn_norm"):
            block[norm] = state.take(f"{name}.{norm}.weight", width)
        scaled = {"wo": (f"{attention}.wo", "attention", inner), "w2": (f"{feed_forward}.w2", "ffn", w1.shape[0])}
        for key, (weight, part, of) in scaled.items():
            wide = state.take(f"{weight}.weight", width, of, dtype=torch.float32)
            gain = state.take(f"{name}.{part}_layer_scale.gamma", width, dtype=torch.float32)
            block[key] = (gain[:, None] * wide).to(state.dtype)
        return block

    def place(self, before: int, steps: int) -> Place:
        """Where `steps` steps are that follow `before` earlier ones, on the CPU. The angles are in bfloat16's precision
        as upstream's table has them, but without its end."""
        at = torch.arange(before, before + steps)
        slots, end = at % self.capacity, before + steps - 1
        angles = torch.outer(at, self.rates)
        cos_sin = torch.zeros(self.capacity, len(self.rates), 2, dtype=self.dtype)
        cos_sin[slots] = torch.stack((angles.cos(), angles.sin()), dim=-1).bfloat16().to(self.dtype)
        held = end - (end - torch.arange(self.capacity)) % self.capacity  # the step in each slot
        seen = (held >= 0) & (held <= at[:, None]) & (held > at[:, None] - self.window)
        mask = torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, -torch.inf)
        return Place(slots.int(), cos_sin, mask)

    def __call__(self, x: Tensor, past: Past, place: Place | None = None) -> Tensor:
        """[T, C] -> [T, C]; writes over x. `place` None: the steps follow those that `past` has seen."""
        steps = x.shape[0]
        if place is None:
            place = Place(*(part.to(x.device) for part in self.place(past.advance(self, steps), steps)))
        slots, cos_sin, mask = place
        for i, block in enumerate(self.blocks):
            qkv = F.linear(ops.rms_norm(x, block["attention_norm"], self.eps), block["wqkv"])
            shape = 1, qkv.shape[1] // (3 * self.head_dim), self.capacity, self.head_dim
            k, v = (past.keep((self, i, part), shape, x) for part in "kv")
            q = ops.qk_norm_rotary_append(qkv, None, None, cos_sin, slots, k, v, self.eps)
            y = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask)
            x.addmm_(y[0].transpose(0, 1).flatten(1), block["wo"].T)
            n = ops.rms_norm(x, block["ffn_norm"], self.eps)
            gate, up = torch.bmm(n.expand(2, *n.shape), block["w13"].mT)
            x.addmm_(ops.swiglu(gate, up), block["w2"].T)
        return ops.rms_norm(x, self.norm, self.eps)
