"""The codec's three parts, from a state dict: the encoder, the quantizers and the decoder.

Widths, rates, layers and codebooks are read from the tensors' shapes; what shapes do not say is in `Settings`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s1kernels.speech.codec.layers import (
    Conv,
    ConvNeXt,
    Downsample,
    Past,
    Place,
    Raise,
    ResidualUnit,
    Transformer,
    Upsample,
)
from s1kernels.speech.codec.state import State

DILATIONS = (1, 3, 9)
"""Of a block's residual units."""

FRAMES = 32
"""Frames that are decoded or encoded at once, so that long audio takes no more memory than these."""


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

    def transformer(self, state: State, name: str, width: int, window: int, most: int) -> Transformer:
        """most: steps of a call at most."""
        return Transformer(
            state, name, width, window=window, most=most, head_dim=self.head_dim, rope_base=self.rope_base,
            eps=self.norm_eps,
        )  # fmt: skip


def run(layers: Sequence[Callable[[Tensor, Past], Tensor]], x: Tensor, past: Past) -> Tensor:
    for layer in layers:
        x = layer(x, past)
    return x


class EncoderBlock:
    """Residual units, then a convolution that reduces the rate, then a transformer where the state has one.

    owes: the bias of what it returns.
    """

    def __init__(self, state: State, name: str, width: int, owed: Tensor) -> None:
        self.units: list[ResidualUnit] = []
        for i, dilation in enumerate(DILATIONS):
            self.units.append(ResidualUnit(state, f"{name}.block.{i}", width, dilation, owed))
            owed = self.units[-1].owes
        reduce = f"{name}.block.4.conv"
        self.reduce = Conv(state, reduce, 2 * width, width, None, stride=None, snake=f"{name}.block.3", owed=owed)
        self.transformer: Transformer | None = None  # the encoder's to add
        self.owes = torch.zeros_like(self.reduce.owes) if f"{name}.block.5" in state else self.reduce.owes

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        x = self.reduce(run(self.units, x, past), past)
        return x if self.transformer is None else self.transformer(x.add_(self.reduce.owes), past)


class Encoder:
    """Samples [T, 1] -> [T / (product of the rates), C], before quantization."""

    def __init__(self, state: State, settings: Settings) -> None:
        blocks = max(0, state.count("encoder.block") - 3)  # and a convolution before, a snake and a convolution behind
        self.first = Conv(state, "encoder.block.0.conv", None, 1, 7)
        width, owed = self.first.width, self.first.owes
        self.blocks: list[EncoderBlock] = []
        for i in range(blocks):
            self.blocks.append(EncoderBlock(state, f"encoder.block.{1 + i}", width << i, owed))
            owed = self.blocks[-1].owes
        most = FRAMES << state.count("quantizer.downsample")
        for i, block in reversed([*enumerate(self.blocks)]):
            if (inner := f"encoder.block.{1 + i}.block.5") in state:
                window = settings.encoder_window
                block.transformer = settings.transformer(state, inner, block.reduce.width, window, most)
            most *= block.reduce.stride
        end, last = f"encoder.block.{1 + blocks}", f"encoder.block.{2 + blocks}.conv"
        self.last = Conv(state, last, None, width << blocks, 3, snake=end, owed=owed)
        self.width = self.last.width
        self.after: list[Any] = []
        for i in range(state.count("quantizer.downsample")):
            name = f"quantizer.downsample.{i}"
            self.after += [
                Downsample(state, f"{name}.0.conv", self.width, 2),
                ConvNeXt(state, f"{name}.1", self.width),
            ]
        self.after.append(settings.transformer(state, "quantizer.pre_module", self.width, settings.window, FRAMES))

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        x = self.last(run(self.blocks, self.first(x, past), past), past)
        return run(self.after, x.add_(self.last.owes), past)


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
            dim = self.codebooks[0].shape[1] if self.codebooks else None
            codebook = state.take(f"{name}.codebook.weight", None, dim, dtype=torch.float32)
            self.codebooks.append(codebook)
            for proj, out, of in (("in_proj", codebook.shape[1], width), ("out_proj", width, codebook.shape[1])):
                weight = state.weight(f"{name}.{proj}", out, of, 1, dtype=torch.float32)[..., 0]
                bias = state.take(f"{name}.{proj}.bias", out, dtype=torch.float32)
                (self.into if proj == "in_proj" else self.back).append((weight, bias))
        self.sizes = tuple(codebook.shape[0] for codebook in self.codebooks)
        self.directions = [F.normalize(codebook) for codebook in self.codebooks]
        self.table = torch.cat(self.codebooks)
        self.starts = torch.tensor([0, *self.sizes[:-1]]).cumsum(0)  # of the codebooks in the table, on the CPU
        self.all_back = torch.cat([weight for weight, _ in self.back], dim=1)
        self.all_bias = torch.stack([bias for _, bias in self.back]).sum(dim=0)

    def vectors(self, rows: Tensor) -> Tensor:
        """[T, N] rows of the table -> [T, C], the sum of all codebooks' vectors."""
        return F.linear(F.embedding(rows, self.table).flatten(1), self.all_back, self.all_bias)

    def codes(self, x: Tensor) -> Tensor:
        """[T, C] -> [N, T] int64: codebook by codebook, the vector whose direction is nearest to what is left."""
        left, codes = x.float(), []
        for into, back, codebook, directions in zip(self.into, self.back, self.codebooks, self.directions, strict=True):
            code = (F.normalize(F.linear(left, *into)) @ directions.T).argmax(dim=1)
            left = left - F.linear(F.embedding(code, codebook), *back)
            codes.append(code)
        return torch.stack(codes)


class DecoderBlock:
    """A convolution that raises the rate, then residual units.

    owes: the bias of what it returns.
    """

    def __init__(self, state: State, name: str, width: int, owed: Tensor) -> None:
        self.raise_rate = Raise(state, f"{name}.block.1.conv", width, f"{name}.block.0", owed)
        self.width, self.owes = self.raise_rate.width, self.raise_rate.owes
        self.units: list[ResidualUnit] = []
        for i, dilation in enumerate(DILATIONS):
            self.units.append(ResidualUnit(state, f"{name}.block.{2 + i}", self.width, dilation, self.owes))
            self.owes = self.units[-1].owes

    def __call__(self, x: Tensor, past: Past) -> Tensor:
        return run(self.units, self.raise_rate(x, past), past)


class Decoder:
    """Vectors [T, C] of the codebooks -> samples [T * samples of a frame] in [-1, 1]."""

    def __init__(self, state: State, width: int, settings: Settings) -> None:
        self.transformer = settings.transformer(state, "quantizer.post_module", width, settings.window, FRAMES)
        self.before: list[Any] = []
        for i in range(state.count("quantizer.upsample")):
            self.before.append(Upsample(state, f"quantizer.upsample.{i}.0.conv", width))
            self.before.append(ConvNeXt(state, f"quantizer.upsample.{i}.1", width))
        blocks = max(0, state.count("decoder.model") - 3)
        self.first = Conv(state, "decoder.model.0.conv", None, width, 7)
        width, owed = self.first.width, self.first.owes
        self.blocks: list[DecoderBlock] = []
        for i in range(blocks):
            self.blocks.append(DecoderBlock(state, f"decoder.model.{1 + i}", width, owed))
            width, owed = self.blocks[-1].width, self.blocks[-1].owes
        end, last = f"decoder.model.{1 + blocks}", f"decoder.model.{2 + blocks}.conv"
        self.last = Conv(state, last, 1, width, 7, snake=end, owed=owed, at_once=gcd(self.frame_samples, 8))

    def __call__(self, x: Tensor, past: Past, place: Place) -> Tensor:
        """Writes over x. place: where the frames are, by the transformer's `place`."""
        x = self.first(run(self.before, self.transformer(x, past, place), past), past)
        x = self.last(run(self.blocks, x, past), past)
        return torch.tanh(x.flatten().float() + self.last.owes)

    @property
    def frame_samples(self) -> int:
        """Samples that a frame becomes."""
        rates = [layer.stride for layer in self.before if isinstance(layer, Upsample)]
        rates += [block.raise_rate.stride for block in self.blocks]
        return prod(rates)
