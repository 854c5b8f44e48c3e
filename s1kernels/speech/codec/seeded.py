"""A codec of S1-mini's structure whose weights are drawn: what it says is noise, and takes as long as speech does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from s1kernels.speech.codec.codec import Codec
from s1kernels.speech.codec.network import Settings
from s1kernels.speech.codec.state import State

RATES = (2, 4, 8, 8)  # of the encoder's blocks; the decoder's go the other way


@dataclass(frozen=True)
class Sizes:
    """What a codec's file says by its shapes; the defaults are S1-mini's.

    Source: fish_speech/configs/modded_dac_vq.yaml.
    """

    encoder: int = 64  # channels of the encoder's first convolution
    decoder: int = 1536  # of the decoder's
    latent: int = 1024  # between them
    layers: int = 8  # of the transformers before and behind the codebooks
    encoder_layers: int = 4
    codebooks: tuple[int, ...] = (4096, *[1024] * 9)
    codebook_dim: int = 8


SMALL = Sizes(encoder=8, decoder=96, latent=128, layers=2, encoder_layers=1)
"""The same codebooks and frames of as many samples, a few channels wide."""


def seeded(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Codec:
    """A codec of these sizes; the same weights whenever device and dtype are."""
    return Codec(Drawn(sizes, device, dtype), Settings())


class Drawn(State):
    """A state dict whose tensors are drawn when they are taken, so that signals keep their size."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__({}, device, dtype)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of all that was taken."""
        self._generator = torch.Generator(device).manual_seed(0)
        self._inner = f"encoder.block.{len(RATES)}.block.5"  # the encoder's transformer
        self._counts, self._free = counts(sizes, self._inner), free(sizes, self._inner)

    def __contains__(self, prefix: str) -> bool:
        return prefix == self._inner

    def count(self, prefix: str) -> int:
        return self._counts[prefix]

    def take(self, name: str, *shape: int | None, dtype: torch.dtype | None = None) -> Tensor:
        given = iter(next((sizes for pattern, sizes in self._free.items() if re.fullmatch(pattern, name)), ()))
        self.shapes[name] = sized = tuple(next(given) if size is None else size for size in shape)
        tensor = torch.empty(sized, device=self.device, dtype=dtype or self.dtype)
        if name.endswith("gamma"):
            return tensor.fill_(0.3)
        if name.endswith("bias"):
            return tensor.normal_(0, 0.02, generator=self._generator)
        if name.endswith("alpha") or "norm" in name:
            return tensor.fill_(1)
        raises = re.fullmatch(r"decoder\.model\.\d\.block\.1\.conv\.weight", name)
        scale = 0.7 * (sized[2] / 4) ** 0.5 if raises else 0.7  # two of the taps meet in an output
        return tensor.normal_(0, scale * prod(sized[1:]) ** -0.5, generator=self._generator)


def counts(sizes: Sizes, inner: str) -> dict[str, int]:
    """How many numbered parts a codec has under each name. `inner` is the encoder's transformer."""
    ends = 3  # a convolution before the blocks, a snake and a convolution behind
    return {
        "encoder.block": len(RATES) + ends, "decoder.model": len(RATES) + ends,
        "quantizer.downsample": 2, "quantizer.upsample": 2,
        "quantizer.semantic_quantizer.quantizers": 1, "quantizer.quantizer.quantizers": len(sizes.codebooks) - 1,
        "quantizer.pre_module.layers": sizes.layers, "quantizer.post_module.layers": sizes.layers,
        f"{inner}.layers": sizes.encoder_layers,
    }  # fmt: skip


def free(sizes: Sizes, inner: str) -> dict[str, tuple[int, ...]]:
    """Sizes that a reader takes from the tensors, by patterns of their names."""
    blocks, residual = len(RATES), "quantizer.quantizer.quantizers"
    found: dict[str, tuple[int, ...]] = {
        "encoder.block.0.conv.weight": (sizes.encoder,),
        f"encoder.block.{blocks + 2}.conv.weight": (sizes.latent,),
        r"quantizer.(up|down)sample.\d.1.pwconv1.weight": (4 * sizes.latent,),
        r"quantizer.upsample.\d.0.conv.weight": (2,),
        "decoder.model.0.conv.weight": (sizes.decoder,),
        "quantizer.semantic_quantizer.*codebook.weight": (sizes.codebooks[0], sizes.codebook_dim),
    }
    for i, rate in enumerate(RATES):
        found[f"encoder.block.{1 + i}.block.4.conv.weight"] = (2 * rate,)
        found[f"decoder.model.{blocks - i}.block.1.conv.weight"] = (sizes.decoder >> blocks - i, 2 * rate)
    for i, size in enumerate(sizes.codebooks[1:]):
        found[f"{residual}.{i}.codebook.weight"] = (size, sizes.codebook_dim)
    for name, width in ((inner, sizes.encoder << blocks), ("quantizer.(pre|post)_module", sizes.latent)):
        found[rf"{name}.layers.\d+.attention.wqkv.weight"] = (3 * width,)
        found[rf"{name}.layers.\d+.feed_forward.w1.weight"] = (3 * width,)
    return found
