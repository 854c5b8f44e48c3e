"""What bench_frame.py holds its rows to: logits from float64, bytes, memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import s1kernels
from s1kernels import Engine, Sampling
from s1kernels.testing import rel_error

FORCED = 4  # frames whose logits are compared


@dataclass
class Yardstick:
    """What a context's rows are held to."""

    prompt: Tensor
    truth: Tensor
    """[FORCED, Vt] float64: the reference's logits of the prompt's last frames."""
    semantic: Tensor
    """Ids of the rows that may follow in speech."""
    bytes: dict[str, int]
    """Bytes that a frame must move at least, by rows."""
    upstream_error: dict[str, float] = field(default_factory=dict)

    def error(self, logits: Tensor, rows: str) -> float:
        truth = self.truth
        if rows == "semantic":
            truth = truth[:, self.semantic]
            logits = logits if logits.shape == truth.shape else logits[:, self.semantic]
        return rel_error(logits.flatten(), truth.flatten())


@contextmanager
def patched(model: Any, arguments: dict[str, Any] | None) -> Iterator[Engine | None]:
    """The engine of the model, patched with these arguments; None without."""
    if arguments is None:
        yield None
        return
    s1kernels.patch(model, **arguments)
    try:
        yield s1kernels.engine_of(model)
    finally:
        s1kernels.unpatch(model)


@torch.inference_mode()
def forced_logits(model: Any, engine: Engine | None, prompt: Tensor) -> Tensor:
    """[FORCED, V]: the main logits of the prompt's last frames, each fed alone as a decode step feeds it."""
    T = prompt.shape[1]
    logits = []
    if engine is None:
        model.forward_generate(prompt[None, :, :-FORCED], torch.arange(T - FORCED, device=prompt.device))
        with sdpa_kernel(SDPBackend.MATH):  # as upstream's decode loop does
            for t in range(T - FORCED, T):
                position = torch.tensor([t], device=prompt.device)
                logits.append(model.forward_generate(prompt[None, :, t : t + 1], position).logits[0].clone())
    else:
        engine.prefill(prompt[:, :-FORCED])
        for t in range(T - FORCED, T):
            engine.step(prompt[:, t : t + 1], t, Sampling())
            logits.append(engine.main_logits.clone())
    return torch.cat(logits)


def forget_caches(model: Any) -> None:
    """An upstream model as it is before its setup_caches."""
    for layer in [*model.layers, *model.fast_layers]:
        layer.attention.kv_cache = None
    model.max_seq_len = model.max_batch_size = -1


def memory(model: Any, before: int, peak: int) -> dict[str, int]:
    """Bytes: the model's own, its caches, the peak, and what came on top of all that was there and the caches."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    caches = sum(tensor.nbytes for name, tensor in tensors if ".kv_cache." in name)
    own = sum(tensor.nbytes for _, tensor in tensors) - caches
    return {"model": own, "caches": caches, "before": before, "peak": peak, "extra": peak - before - caches}
