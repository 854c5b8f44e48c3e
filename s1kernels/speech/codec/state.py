"""Reads a codec's state dict: names, shapes, dtype; weight norm is folded, buffers that are computed stay unread."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s1kernels.model.checkpoint import read_pickle

FILE = "codec.pth"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

COMPUTED = re.compile(r"(^|\.)(freqs_cis|causal_mask)$|^quantizer\.semantic_predictor_module\.")
"""Keys of what is computed (1 GiB of masks among it) and of what serves training alone."""

NORMED = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))
"""Magnitude and direction of a weight under weight norm, as older and newer releases of torch name them."""


def error(claim: str, got: object, advice: str, kind: type[Exception] = ValueError) -> Exception:
    return kind(f"codec: {claim}, got {got}; {advice}")


def read(path: str | Path) -> Mapping[str, Any]:
    """The state dict of a codec's file, or of codec.pth in a directory; mapped into memory rather than read.

    Raises:
        FileNotFoundError: there is no such file. ValueError, TypeError: it is damaged or no plain state dict.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise error(f"path must be {FILE} or the folder that it is in", path, "download it", FileNotFoundError)
    return read_pickle(file)


class State:
    """A state dict to take tensors from by name, each once.

    Args:
        tensors: upstream's keys, with or without `generator.` before them.
        device, dtype: where the tensors go and what they become; dtype None: what most of the file is.
    """

    def __init__(self, tensors: Mapping[str, Any], device: torch.device, dtype: torch.dtype | None) -> None:
        trained = any(key.startswith("generator.") for key in tensors)  # a training run's checkpoint
        pick = {
            key.removeprefix("generator."): t for key, t in tensors.items() if key[:10] == "generator." or not trained
        }
        self._left = {key: tensor for key, tensor in pick.items() if not COMPUTED.search(key)}
        self.device, self.dtype = device, dtype or self._dtype()
        if self.dtype not in DTYPES:
            raise error("dtype must be float32, bfloat16 or float16", self.dtype, "pass dtype=", TypeError)

    def __contains__(self, prefix: str) -> bool:
        """Whether anything of this name, or under it, is left."""
        return any(key == prefix or key.startswith(f"{prefix}.") for key in self._left)

    def count(self, prefix: str) -> int:
        """How many numbered parts there are under a name."""
        return next(i for i in range(len(self._left) + 1) if f"{prefix}.{i}" not in self)

    def take(self, name: str, *shape: int | None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of a shape, in which None is any size.

        Raises:
            ValueError: it is missing or misshapen, or not finite. TypeError: it is no plain tensor.
        """
        tensor = self._plain(name)
        if len(tensor.shape) != len(shape) or any(s not in (None, t) for s, t in zip(shape, tensor.shape, strict=True)):
            expected = f"[{', '.join('any' if size is None else str(size) for size in shape)}]"
            raise error(f"{name} must be {expected}", list(tensor.shape), "pass the codec of S1-mini")
        return self._placed(name, tensor, dtype)

    def weight(self, name: str, *shape: int | None, dtype: torch.dtype | None = None) -> Tensor:
        """`name`.weight, its weight norm folded: magnitude * direction / |direction|, one norm for each first index."""
        for magnitude, direction in NORMED:
            if f"{name}.{direction}" in self:
                v = self.take(f"{name}.{direction}", *shape, dtype=torch.float32)
                g = self.take(f"{name}.{magnitude}", v.shape[0], *[1] * (v.dim() - 1), dtype=torch.float32)
                folded = v * (g / v.flatten(1).norm(dim=1).view_as(g))
                return self._placed(f"{name}.weight", folded, dtype)
        return self.take(f"{name}.weight", *shape, dtype=dtype)

    def finish(self) -> None:
        """Raise unless everything of the codec was taken; what else a training run kept is left alone."""
        for key in sorted(self._left):
            if key.startswith(("encoder.", "decoder.", "quantizer.")):
                raise error("the tensors must be those of upstream's modded DAC", f"{key} too", "pass its codec.pth")

    def _plain(self, name: str) -> Tensor:
        if name not in self._left:
            raise error(f"{name} must be in the codec's file", "no such tensor", "download it again")
        tensor = self._left.pop(name)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.layout != torch.strided:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise error(f"{name} must be a floating tensor", got, "quantised codecs are not read", TypeError)
        return tensor.detach()

    def _placed(self, name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        placed = tensor.to(self.device, dtype or self.dtype).contiguous()
        if not placed.isfinite().all():
            got = "NaN or infinity"
            raise error(
                f"{name} must be finite in {placed.dtype}", got, "is the file damaged, or the dtype too narrow?"
            )
        return placed

    def _dtype(self) -> torch.dtype:
        sizes: dict[torch.dtype, int] = {}
        for tensor in self._left.values():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
