"""The codec's three parts, from a state dict: the encoder, the quantizers and the decoder.

Widths, rates, layers and codebooks are read from the tensors' shapes; what shapes do not say is in `Settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s1kernels.speech.codec.layers import Conv, ConvNeXt, Past, ResidualUnit, Snake, Transformer, Upsample
from s1kernels.speech.codec.state import State

DILATIONS = (1, 3, 9)
"""Of a block's residual units."""


@dataclass(frozen=True)
class Settings:
    """What a codec's tensors do not say; the defaults are S1-mini's.

    Source: fish_speech/configs/modded_dac_vq.yaml; of encoder_window: fish_speech/models/dac/modded_dac.py,
    EncoderBlock.
    """

    sample_rate: int = 44100
    window: int = 128
    encoder_window: int = 512
    head_dim: int = 64
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def transformer(self, state: State, name: str, width: int, window: int) -> Transformer:
        return Transformer(
            state, name, width, window=window, head_dim=self.head_dim, rope_base=self.rope_base, eps=self.norm_eps
        )


def run(layers: Sequence[Callable[[Tensor, Past], Tensor]], x: Tensor, past: Past) -> Tensor:
    for layer in layers:
        x = layer(x, past)
    return x


class EncoderBlock:
    """Residual units, then a convolution that reduces the rate, then a transformer where the state has one."""

    def __init__(self, state: State, name: str, width: int, settings: Settings) -> None:
        units = [ResidualUnit(state, f"{name}.block.{i}", width, d) for i, d in enumerate(DILATIONS)]
        self.units, self.snake = units, Snake(state, f"{name}.block.3", width)
        self.reduce = Conv(state, f"{name}.block.4.conv", 2 * width, width, None, stride=None)
        inner = f"{name}.block.5"
        window = settings.encoder_window
        self.after = [settings.transformer(state, inner, 2 * width, window)] if inner in state else []

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        x = self.reduce(self.snake(run(self.units, x, past)), past)
        return run(self.after, x, past)


class Encoder:
    """Samples [1, 1, T] -> [1, C, T / (product of the rates)], before quantization."""

    def __init__(self, state: State, settings: Settings) -> None:
        blocks = max(0, state.count("encoder.block") - 3)  # and a convolution before, a snake and a convolution behind
        self.first = Conv(state, "encoder.block.0.conv", None, 1, 7)
        width = self.first.weight.shape[0]
        self.blocks = [EncoderBlock(state, f"encoder.block.{1 + i}", width << i, settings) for i in range(blocks)]
        self.snake = Snake(state, f"encoder.block.{1 + blocks}", width << blocks)
        self.last = Conv(state, f"encoder.block.{2 + blocks}.conv", None, width << blocks, 3)
        self.width = self.last.weight.shape[0]
        self.after: list[Any] = []
        for i in range(state.count("quantizer.downsample")):
            name = f"quantizer.downsample.{i}"
            self.after.append(Conv(state, f"{name}.0.conv", self.width, self.width, 2, stride=2))
            self.after.append(ConvNeXt(state, f"{name}.1", self.width))
        self.after.append(settings.transformer(state, "quantizer.pre_module", self.width, settings.window))

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        x = run(self.blocks, self.first(x, past), past)
        return run(self.after, self.last(self.snake(x), past), past)


class Quantizers:
    """The codebooks in their order: a semantic one, then those of the residual. All in float32.

    A codebook's vectors have few dimensions; a projection leads into them and another one back.
    """

    def __init__(self, state: State, width: int) -> None:
        names = [f"quantizer.{part}.quantizers" for part in ("semantic_quantizer", "quantizer")]
        self.codebooks: list[Tensor] = []
        self.into: list[tuple[Tensor, Tensor]] = []
        self.back: list[tuple[Tensor, Tensor]] = []
        for name in [f"{part}.{i}" for part in names for i in range(state.count(part))]:
            codebook = state.take(f"{name}.codebook.weight", None, None, dtype=torch.float32)
            self.codebooks.append(codebook)
            for proj, out, of in (("in_proj", codebook.shape[1], width), ("out_proj", width, codebook.shape[1])):
                weight = state.weight(f"{name}.{proj}", out, of, 1, dtype=torch.float32)[..., 0]
                bias = state.take(f"{name}.{proj}.bias", out, dtype=torch.float32)
                (self.into if proj == "in_proj" else self.back).append((weight, bias))
        self.sizes = tuple(codebook.shape[0] for codebook in self.codebooks)
        self.directions = [F.normalize(codebook) for codebook in self.codebooks]
        self.all_back = torch.cat([weight for weight, _ in self.back], dim=1)
        self.all_bias = torch.stack([bias for _, bias in self.back]).sum(dim=0)

    def vectors(self, codes: Tensor) -> Tensor:
        """[N, T] codes -> [1, C, T], the sum of all codebooks' vectors."""
        found = [F.embedding(code, codebook) for code, codebook in zip(codes, self.codebooks, strict=True)]
        return F.linear(torch.cat(found, dim=1), self.all_back, self.all_bias).T[None]

    def codes(self, x: Tensor) -> Tensor:
        """[1, C, T] -> [N, T] int64: codebook by codebook, the vector whose direction is nearest to what is left."""
        left, codes = x[0].T.float(), []
        for into, back, codebook, directions in zip(self.into, self.back, self.codebooks, self.directions, strict=True):
            code = (F.normalize(F.linear(left, *into)) @ directions.T).argmax(dim=1)
            left = left - F.linear(F.embedding(code, codebook), *back)
            codes.append(code)
        return torch.stack(codes)


class DecoderBlock:
    """A convolution that raises the rate, then residual units."""

    def __init__(self, state: State, name: str, width: int) -> None:
        self.snake = Snake(state, f"{name}.block.0", width)
        self.raise_rate = Upsample(state, f"{name}.block.1.conv", width, None, reach=1)
        self.width = self.raise_rate.out
        self.units = [ResidualUnit(state, f"{name}.block.{2 + i}", self.width, d) for i, d in enumerate(DILATIONS)]

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        return run(self.units, self.raise_rate(self.snake(x), past), past)


class Decoder:
    """Vectors [1, C, T] of the codebooks -> samples [1, 1, T * samples of a frame] in [-1, 1]."""

    def __init__(self, state: State, width: int, settings: Settings) -> None:
        self.transformer = settings.transformer(state, "quantizer.post_module", width, settings.window)
        self.before: list[Any] = []
        for i in range(state.count("quantizer.upsample")):
            self.before.append(Upsample(state, f"quantizer.upsample.{i}.0.conv", width, width, reach=0))
            self.before.append(ConvNeXt(state, f"quantizer.upsample.{i}.1", width))
        blocks = max(0, state.count("decoder.model") - 3)
        self.first = Conv(state, "decoder.model.0.conv", None, width, 7)
        width = self.first.weight.shape[0]
        self.blocks: list[DecoderBlock] = []
        for i in range(blocks):
            self.blocks.append(DecoderBlock(state, f"decoder.model.{1 + i}", width))
            width = self.blocks[-1].width
        self.snake = Snake(state, f"decoder.model.{1 + blocks}", width)
        self.last = Conv(state, f"decoder.model.{2 + blocks}.conv", 1, width, 7)

    def __call__(self, x: Tensor, past: Past, view: tuple[Tensor, Tensor]) -> Tensor:
        """view: where the frames are, by the transformer's `view`."""
        x = self.first(run(self.before, self.transformer(x, past, view), past), past)
        return torch.tanh(self.last(self.snake(run(self.blocks, x, past)), past).float())

    @property
    def frame_samples(self) -> int:
        """Samples that a frame becomes."""
        rates = [layer.stride for layer in self.before if isinstance(layer, Upsample)]
        rates += [block.raise_rate.stride for block in self.blocks]
        return prod(rates)
