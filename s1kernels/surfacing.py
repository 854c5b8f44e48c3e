"""Errors of a GPU come at some later call; these say in which stage of a frame, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from s1kernels.registry import BackendError


@contextmanager
def surfacing(stage: str) -> Iterator[None]:
    """Say in which stage the GPU failed, and what to do about it."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        if str(error).startswith("decode_frame:"):
            raise
        raise torch.cuda.OutOfMemoryError(
            f"decode_frame: out of GPU memory in the {stage}; free some, or go on unpatched: {error}"
        ) from error
    except RuntimeError as error:
        told = isinstance(error, BackendError) or str(error).startswith("decode_frame:")
        if told or "CUDA" not in str(error):
            raise
        if _goes_on():
            advice = "The GPU goes on: unpatch the model, or patch it with graph=False"
        else:
            advice = "An error inside a kernel cannot be cleared; restart the process"
        raise RuntimeError(f"decode_frame: the GPU failed in the {stage}: {error}. {advice}") from error


def _goes_on() -> bool:
    """Whether the GPU still takes work: an error inside a kernel stays for good, a refused launch does not."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
