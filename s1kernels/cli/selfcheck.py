"""Short checks of this machine: is every op right, and how fast is a frame?"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from s1kernels import registry, testing
from s1kernels.backends.cuda.device import capability
from s1kernels.cli.demo import FRAMES_PER_SECOND, S1_MINI, SMALL
from s1kernels.engine import Engine
from s1kernels.model.config import from_upstream
from s1kernels.model.weights import Weights
from s1kernels.registry import OPS
from s1kernels.sampling import Sampling

SECONDS = 1.5  # of frames that are timed
ROOM = 3e9  # bytes that S1-mini takes in 16 bits, with some to spare
CONTEXT, WARM, MOST = 64, 8, 256  # frames; together they fit into the first cache


def dtype_of(device: torch.device) -> torch.dtype:
    """bfloat16, as upstream's models; float16 where the GPU has none."""
    old = device.type == "cuda" and capability(device) < (8, 0)
    return torch.float16 if old else torch.bfloat16


def check_ops(device: torch.device) -> Iterator[testing.Outcome]:
    """Every op on its first case, the model's own sizes, by each back end that can serve it."""
    for op in OPS.values():
        for impl in registry.candidates(op.name, device.type):
            if impl.backend != "reference" and registry.BACKENDS[impl.backend]() is None:
                case, dtype = next(iter(op.cases)), dtype_of(device)
                yield testing.check_op(op, impl.backend, case, dtype, device=device.type, offset=0)


def time_frames(device: torch.device) -> tuple[float, str]:
    """Seconds a frame, of which model. S1-mini's shape on a GPU with room for it, else fewer layers; random weights."""
    whole = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > ROOM
    shape = S1_MINI if whole else SMALL
    vocabulary = int(shape["vocab_size"])
    config = from_upstream(
        shape | {"model_type": "dual_ar", "max_seq_len": 512}, semantic_begin=vocabulary - 4096,
        semantic_end=vocabulary - 1, end_token=0, line="s1",
    )  # fmt: skip
    generator, dtype = torch.Generator(device).manual_seed(0), dtype_of(device)

    def draw(key: str, size: tuple[int, ...]) -> Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=dtype, device=device)
        return torch.empty(size, dtype=dtype, device=device).normal_(0, size[-1] ** -0.5, generator=generator)

    weights = Weights.build(config, draw)
    weights.head[config.end_token] = 0  # its logit is outside the nucleus of these, so that it never comes
    engine = Engine(config, weights)
    prompt = torch.zeros(config.codebooks + 1, CONTEXT, dtype=torch.int32)
    engine.generate(prompt, WARM, seed=1)
    warm = _seconds(engine, prompt, WARM)
    seconds = _seconds(engine, prompt, min(MOST, max(WARM, int(SECONDS / warm))))
    name = f"{'S1-mini' if whole else 'S1-mini with 6 of 28 slow layers'}, {str(dtype).removeprefix('torch.')}"
    served = ", ".join(sorted(set(engine.backends.values())))
    if frame := getattr(engine.decoder, "frame", None):  # of the CUDA kernels
        served += f": {frame.persistent or 'one persistent kernel'}"
    return seconds, f"{name}, served by {served}"


def times_real_time(seconds: float) -> float:
    return 1 / (seconds * FRAMES_PER_SECOND)


def _seconds(engine: Engine, prompt: Tensor, frames: int) -> float:
    """A frame's share of so many."""
    begun = time.perf_counter()
    count = sum(1 for _ in engine.frames(prompt[:, -1:], CONTEXT, frames, Sampling()))
    return (time.perf_counter() - begun) / count
