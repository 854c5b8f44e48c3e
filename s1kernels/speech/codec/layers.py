"""The codec's layers. All are causal: an output depends on inputs up to its own time, so that a layer that is given the
last of its earlier inputs goes on where it stopped.

Signals are [1, C, T], C channels of T steps. Source: fish_speech/models/dac/modded_dac.py and rvq.py.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor
from torch.nn import functional as F

from s1kernels import ops
from s1kernels.speech.codec.state import State


class Past:
    """What layers keep of their inputs from one call to the next. At first all is zero, as upstream pads."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor] = {}
        self._seen: dict[Hashable, int] = {}

    def extend(self, key: Hashable, x: Tensor, count: int, dim: int = -1) -> Tensor:
        """`x` behind the `count` steps that came before it along `dim`; what now comes last is kept."""
        if count == 0:
            return x
        if key not in self._kept:
            shape = list(x.shape)
            shape[dim] = count
            self._kept[key] = x.new_zeros(shape)
        kept = self._kept[key]
        joined = torch.cat((kept, x), dim)
        kept.copy_(joined.narrow(dim, joined.shape[dim] - count, count))
        return joined

    def allocate(self, other: Past) -> None:
        """Keep all that `other` keeps, as zeros where it is new."""
        for key, kept in other._kept.items():
            self._kept.setdefault(key, torch.zeros_like(kept))

    def clear(self) -> None:
        """As at first; the tensors stay where they are."""
        self._seen.clear()
        for kept in self._kept.values():
            kept.zero_()

    def advance(self, key: Hashable, steps: int) -> int:
        """The number of steps that came before these."""
        before = self._seen.get(key, 0)
        self._seen[key] = before + steps
        return before

    @property
    def nbytes(self) -> int:
        """Bytes that are kept; once every layer has run, their number does not change."""
        return sum(kept.nbytes for kept in self._kept.values())


class Conv:
    """A convolution whose last tap is at the present."""

    def __init__(
        self, state: State, name: str, out: int | None, width: int | None, taps: int | None, *, stride: int | None = 1,
        dilation: int = 1, groups: int = 1,
    ) -> None:  # fmt: skip
        """stride None: half of the taps, as upstream's layers that reduce the rate have it."""
        self.weight = state.weight(name, out, width, taps)
        self.bias = state.take(f"{name}.bias", self.weight.shape[0])
        self.stride = stride or self.weight.shape[2] // 2
        self.dilation, self.groups = dilation, groups
        self.reach = (self.weight.shape[2] - 1) * dilation + 1 - self.stride

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """[1, C, T] -> [1, C', T / stride]; T is a multiple of the stride."""
        if self.weight.shape[2] == 1:
            return torch.addmm(self.bias[:, None], self.weight[..., 0], x[0])[None]
        x = past.extend(self, x, self.reach)
        return F.conv1d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Upsample:
    """A transposed convolution of `stride` or twice as many taps: a step becomes `stride` steps. One matrix product:
    what a step and, with twice the taps, the step before it give to each of the `stride` outputs."""

    def __init__(self, state: State, name: str, width: int, out: int | None, *, reach: int) -> None:
        """reach: earlier steps that a step's output needs, 0 or 1."""
        weight = state.weight(name, width, out, None)
        self.out, self.reach, self.stride = weight.shape[1], reach, weight.shape[2] // (reach + 1)
        parts = [part.permute(1, 2, 0).flatten(0, 1) for part in weight.split(self.stride, dim=2)]
        self.weight = torch.cat(parts, dim=1)  # [C' * stride, C * (reach + 1)], the present before the past
        bias = state.take(f"{name}.bias", self.out)
        self.bias = bias.repeat_interleave(self.stride)[:, None].contiguous()

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        """[1, C, T] -> [1, C', T * stride]."""
        seen, steps = past.extend(self, x, self.reach)[0], x.shape[2]
        if self.reach:
            seen = torch.cat((seen[:, 1:], seen[:, :-1]))
        y = torch.addmm(self.bias, self.weight, seen).view(self.out, self.stride, steps)
        return y.mT.reshape(1, self.out, steps * self.stride)


class Snake:
    def __init__(self, state: State, name: str, width: int) -> None:
        self.alpha = state.take(f"{name}.alpha", 1, width, 1).view(width)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.snake(x, self.alpha)


class ResidualUnit:
    """x + conv1(snake(conv7(snake(x))))."""

    def __init__(self, state: State, name: str, width: int, dilation: int) -> None:
        self.first = Snake(state, f"{name}.block.0", width)
        self.wide = Conv(state, f"{name}.block.1.conv", width, width, 7, dilation=dilation)
        self.second = Snake(state, f"{name}.block.2", width)
        self.narrow = Conv(state, f"{name}.block.3.conv", width, width, 1)

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        return self.narrow(self.second(self.wide(self.first(x), past)), past).add_(x)


class ConvNeXt:
    """x + gamma * mlp(layer_norm(depthwise(x)))."""

    def __init__(self, state: State, name: str, width: int) -> None:
        self.depthwise = Conv(state, f"{name}.dwconv.conv", width, 1, 7, groups=width)
        self.norm = state.take(f"{name}.norm.weight", width), state.take(f"{name}.norm.bias", width)
        self.up = state.take(f"{name}.pwconv1.weight", None, width)
        hidden = self.up.shape[0]
        self.up_bias = state.take(f"{name}.pwconv1.bias", hidden)
        self.down = state.take(f"{name}.pwconv2.weight", width, hidden)
        self.down_bias, self.gamma = state.take(f"{name}.pwconv2.bias", width), state.take(f"{name}.gamma", width)

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        y = F.layer_norm(self.depthwise(x, past).mT, self.gamma.shape, *self.norm, eps=1e-6)
        y = F.linear(F.gelu(F.linear(y, self.up, self.up_bias)), self.down, self.down_bias)
        return torch.addcmul(x, y.mT, self.gamma[:, None])


class Transformer:
    """Blocks of attention over the last `window` steps and a gated feed-forward, both scaled by a gain a channel.

    Args:
        window: steps that a step sees, itself among them.
        head_dim, rope_base, eps: as upstream's config has them.
    """

    def __init__(
        self, state: State, name: str, width: int, *, window: int, head_dim: int, rope_base: float, eps: float
    ) -> None:
        self.window, self.head_dim, self.rope_base, self.eps = window, head_dim, rope_base, eps
        self.blocks = [self._block(state, f"{name}.layers.{i}", width) for i in range(state.count(f"{name}.layers"))]
        self.norm = state.take(f"{name}.norm.weight", width)

    def _block(self, state: State, name: str, width: int) -> dict[str, Tensor]:
        attention, feed_forward = f"{name}.attention", f"{name}.feed_forward"
        block = {"wqkv": state.take(f"{attention}.wqkv.weight", None, width)}
        if block["wqkv"].shape[0] % (3 * self.head_dim):
            expected = f"{attention}.wqkv.weight must have a multiple of 3 * head_dim={3 * self.head_dim} rows"
            raise ValueError(f"codec: {expected}, got {block['wqkv'].shape[0]}; pass the Settings that fit")
        block["wo"] = state.take(f"{attention}.wo.weight", width, block["wqkv"].shape[0] // 3)
        block["w1"] = state.take(f"{feed_forward}.w1.weight", None, width)
        block["w3"] = state.take(f"{feed_forward}.w3.weight", block["w1"].shape[0], width)
        block["w2"] = state.take(f"{feed_forward}.w2.weight", width, block["w1"].shape[0])
        for norm in ("attention_norm", "ffn_norm"):
            block[norm] = state.take(f"{name}.{norm}.weight", width)
        for scale in ("attention_layer_scale", "ffn_layer_scale"):
            block[scale] = state.take(f"{name}.{scale}.gamma", width)
        return block

    def view(self, before: int, steps: int) -> tuple[Tensor, Tensor]:
        """Where `steps` steps are that follow `before` earlier ones, on the CPU: cos_sin [T, D/2, 2], in bfloat16's
        precision as upstream's table has it, but without its end; mask [T, window - 1 + T], what each step sees of the
        steps kept and of these."""
        rates = 1.0 / self.rope_base ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angles = torch.outer(torch.arange(before, before + steps), rates)
        step, seen = torch.arange(steps)[:, None], torch.arange(self.window - 1 + steps)
        mask = (seen >= step) & (seen < step + self.window) & (seen >= self.window - 1 - before)
        return torch.stack((angles.cos(), angles.sin()), dim=-1).bfloat16().float(), mask

    def __call__(self, x: Tensor, past: Past, view: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[1, C, T] -> [1, C, T]. `view` None: the steps follow those that `past` has seen."""
        steps, h = x.shape[2], x[0].T.contiguous()
        view = view or self.view(past.advance(self, steps), steps)
        cos_sin, mask = (part.to(x.device) for part in view)
        for i, block in enumerate(self.blocks):
            qkv = F.linear(ops.rms_norm(h, block["attention_norm"], self.eps), block["wqkv"])
            q, k, v = qkv.view(steps, 3, -1, self.head_dim).unbind(1)
            k, v = (t.transpose(0, 1)[None] for t in (rotate(k, cos_sin), v))
            k, v = (past.extend((self, i, n), t, self.window - 1, dim=2) for n, t in (("k", k), ("v", v)))
            y = F.scaled_dot_product_attention(rotate(q, cos_sin).transpose(0, 1)[None], k, v, attn_mask=mask)
            y = F.linear(y[0].transpose(0, 1).flatten(1), block["wo"])
            h = torch.addcmul(h, y, block["attention_layer_scale"])
            n = ops.rms_norm(h, block["ffn_norm"], self.eps)
            y = F.linear(ops.swiglu(F.linear(n, block["w1"]), F.linear(n, block["w3"])), block["w2"])
            h = torch.addcmul(h, y, block["ffn_layer_scale"])
        return ops.rms_norm(h, self.norm, self.eps).T[None].contiguous()


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotary embedding of [T, H, D], neighbours forming a pair; in at least float32, rounded once."""
    even, odd = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_sin[:, None].unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
