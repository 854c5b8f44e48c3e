"""Short checks of this machine: is every op right, and how fast is a frame?"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from s1kernels import registry, testing
from s1kernels.backends.cuda.device import capability
from s1kernels.bench import models
from s1kernels.cli.demo import FRAMES_PER_SECOND
from s1kernels.engine import Engine
from s1kernels.registry import OPS
from s1kernels.sampling import Sampling

SECONDS = 1.5  # of frames that are timed
ROOM = 3e9  # bytes that S1-mini takes in 16 bits, with some to spare
CONTEXT, WARM, MOST = 64, 8, 256  # frames; the longest run fits into the first cache


def dtype_of(device: torch.device) -> torch.dtype:
    """bfloat16, as upstream's models; float16 where the GPU has none."""
    old = device.type == "cuda" and capability(device) < (8, 0)
    return torch.float16 if old else torch.bfloat16


def check_ops(device: torch.device) -> Iterator[testing.Outcome]:
    """Every op on its first case, the model's own sizes, by the back end that "auto" takes; those of the reference
    need no check."""
    for op in OPS.values():
        able = [i.backend for i in registry.candidates(op.name, device.type) if not registry.BACKENDS[i.backend]()]
        if able[0] != "reference":
            case = next(iter(op.cases))
            yield testing.check_op(op, able[0], case, dtype_of(device), device=device.type, offset=0)


def time_frames(device: torch.device) -> tuple[float, str]:
    """Seconds a frame, of which model. S1-mini's shape on a GPU with room for it, else fewer layers; random weights."""
    small = device.type != "cuda" or torch.cuda.mem_get_info(device)[0] < ROOM
    config, dtype = models.config(small, CONTEXT + MOST), dtype_of(device)
    engine = Engine(config, models.weights(config, dtype, device))
    prompt = models.prompt(config, CONTEXT, device)
    engine.generate(prompt, WARM, seed=1)
    warm = _seconds(engine, prompt, WARM)
    seconds = _seconds(engine, prompt, min(MOST, max(WARM, int(SECONDS / warm))))
    served = ", ".join(sorted(set(engine.backends.values())))
    if frame := getattr(engine.decoder, "frame", None):  # of the CUDA kernels
        served += f": {frame.persistent or 'one persistent kernel'}"
    return seconds, f"{models.describe(config)}; {str(dtype).removeprefix('torch.')}; served by {served}"


def times_real_time(seconds: float) -> float:
    return 1 / (seconds * FRAMES_PER_SECOND)


def _seconds(engine: Engine, prompt: Tensor, frames: int) -> float:
    """A frame's share of so many."""
    begun = time.perf_counter()
    count = sum(1 for _ in engine.frames(prompt[:, -1:], CONTEXT, frames, Sampling()))
    return (time.perf_counter() - begun) / count
