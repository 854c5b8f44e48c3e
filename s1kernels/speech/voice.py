"""A voice: what someone said, as text and as codes. The model speaks on in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s1kernels import extras
from s1kernels.speech.text import clean

KIND = "s1kernels voice"
"""What the metadata of a voice's file says that it is."""


@dataclass(frozen=True, eq=False)
class Voice:
    """A reference to speak like.

    Args:
        text: what is said in it, word for word.
        codes: [N, T] int32, the codec's codes of it, T >= 1 frames.
    Raises:
        ValueError: nothing is said. TypeError: codes of another shape or dtype.
    """

    text: str
    codes: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not clean(self.text):
            raise ValueError(f"voice: text must be what is said in it, got {self.text!r}; write it down")
        codes = self.codes
        fits = isinstance(codes, Tensor) and codes.dim() == 2 and not (codes.is_floating_point() or codes.is_complex())
        if not fits or 0 in codes.shape:
            got = f"{list(codes.shape)} {codes.dtype}" if isinstance(codes, Tensor) else type(codes).__name__
            raise TypeError(f"voice: codes must be integers [N, T >= 1], got {got}; encode the audio by the codec")
        if int(codes.min()) < 0:
            raise ValueError(f"voice: codes must be at least 0, got {int(codes.min())}; encode the audio by the codec")
        object.__setattr__(self, "codes", codes.to("cpu", torch.int32).contiguous())

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file.

        Raises:
            OSError: it cannot be written. ModuleNotFoundError: safetensors is not installed.
        """
        extras.require("speech", "safetensors")
        from safetensors.torch import save

        Path(path).write_bytes(save({"codes": self.codes}, {"kind": KIND, "text": self.text}))

    @classmethod
    def load(cls, path: str | Path) -> Voice:
        """Read what `save` wrote. Raises FileNotFoundError, ValueError for other files, or as `save` does."""
        extras.require("speech", "safetensors")
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"voice: {path} must be a file, got none; save a voice there first")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("kind") == KIND:
                    return cls(metadata.get("text", ""), file.get_tensor("codes"))
        except SafetensorError as error:
            metadata = {"kind": f"{error}"}
        got = metadata.get("kind", "other tensors")
        raise ValueError(f"voice: {path} must be a voice that was saved, got {got}; make it by Speech.clone")
