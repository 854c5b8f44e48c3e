"""The model's parts as ONNX files whose keys and values go in and come out: for ONNX Runtime, TensorRT and the like.

    session = onnxruntime.InferenceSession(export(config, weights, "slow", "slow.onnx", capacity=512))

Needs the package `onnx`: pip install "s1kernels[onnx]".
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from s1kernels import extras
from s1kernels.model import torch_ops
from s1kernels.model.config import DualARConfig, StackConfig
from s1kernels.model.dual_ar import DualAR
from s1kernels.model.weights import Weights

Part = Literal["block", "slow", "fast"]

OPSET = 18


class _Part(nn.Module):
    def __init__(self, model: DualAR, layers: int = 0) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        weights = model.weights
        for prefix, of in (
            ("", weights),
            *((f"slow_{i}_", layer) for i, layer in enumerate(weights.slow)),
            *((f"fast_{i}_", layer) for i, layer in enumerate(weights.fast)),
        ):
            for name, value in vars(of).items():
                if isinstance(value, Tensor):  # a buffer has a name in the file
                    self.register_buffer(prefix + name, value)


class Block(_Part):
    """Layers of the slow stack: x [T, C], position [T] int32 -> x."""

    def forward(self, x: Tensor, position: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        slow, table = self.model.weights.slow[: self.layers], self.model.weights.cos_sin
        k, v = _halves(caches)
        return self.model.stack(x, slow, table, position, k, v), *caches


class SlowStep(_Part):
    """One frame: tokens [1, N+1] int32, position [1] int32 -> logits [1, V] float32, and hidden [1, C] for the fast
    step."""

    def forward(self, tokens: Tensor, position: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        config, weights = self.model.config, self.model.weights
        x = self.model.slow_step(tokens, position, *_halves(caches))
        logits, normed = torch_ops.rms_norm_logits(x, weights.norm, weights.head, config.norm_eps)
        return logits, normed if config.norm_fast_input else x, *caches


class FastStep(_Part):
    """One codebook: position 0 reads hidden [1, C], a later one the last code [1] int32 -> logits [1, K'] float32."""

    def forward(self, hidden: Tensor, code: Tensor, position: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        config, weights = self.model.config, self.model.weights
        if weights.project_weight is not None:
            hidden = torch_ops.linear_residual(hidden, weights.project_weight, weights.project_bias, None)
        x = torch.where(position[:, None] == 0, hidden, weights.fast_embedding[code.long()])
        x = self.model.stack(x, weights.fast, weights.fast_cos_sin, position, *_halves(caches))
        head = weights.fast_head[: config.fast_rows]
        return torch_ops.rms_norm_logits(x, weights.fast_norm, head, config.norm_eps)[0], *caches


def module(
    config: DualARConfig, weights: Weights, part: Part, *, capacity: int, layers: int = 1, rows: int = 1
) -> tuple[nn.Module, dict[str, Tensor], list[str]]:
    """A part in plain torch: the module, zeros for its inputs by name, and the names of its outputs.

    Its forward takes the inputs in that order, writes the caches k_0 ... v_(L-1) where they lie, and returns them last.
    Arguments and errors are those of `export`.
    """
    if part not in ("block", "slow", "fast"):
        raise ValueError(f"export: part must be 'block', 'slow' or 'fast', got {part!r}; a frame is slow and fast")
    most = config.max_positions if part != "fast" else config.codebooks
    if not 1 <= capacity <= most:
        raise ValueError(f"export: capacity must be in [1, {most}], got {capacity}; the model has no more positions")
    if part == "block" and not 1 <= layers <= config.slow.layers:
        raise ValueError(f"export: layers must be in [1, {config.slow.layers}], got {layers}; the model has no more")
    model = DualAR(config, weights, torch_ops)

    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=weights.norm.device)

    x = weights.norm.new_zeros(rows, config.slow.dim)
    made: _Part
    if part == "block":
        made, inputs, outputs = Block(model, layers), {"x": x, "position": ints(rows)}, ["y"]
        caches = _caches(config.slow, layers, capacity, x)
    elif part == "slow":
        made, inputs = SlowStep(model), {"tokens": ints(1, config.codebooks + 1), "position": ints(1)}
        outputs, caches = ["logits", "hidden"], _caches(config.slow, config.slow.layers, capacity, x)
    else:
        made, inputs = FastStep(model), {"hidden": x[:1], "code": ints(1), "position": ints(1)}
        outputs, caches = ["logits"], _caches(config.fast, config.fast.layers, capacity, x)
    return made.eval(), inputs | caches, outputs + [f"{name}_out" for name in caches]


def export(
    config: DualARConfig, weights: Weights, part: Part, path: str | Path, *, capacity: int, layers: int = 1,
    rows: int = 1,
) -> str:  # fmt: skip
    """Write a part of the model as ONNX.

    Args:
        config, weights: the model. What ONNX Runtime computes in is the weights' dtype: float16 or float32.
        part: "block" (the first `layers` of the slow stack on `rows` positions at once), "slow" (a frame's tokens to
            its main logits) or "fast" (one codebook).
        path: the file. Tensors of a model over 2 GB lie beside it.
        capacity: S, positions of the caches; of the fast step at most N.
    Returns:
        The path. Inputs are x, or tokens, or hidden and code; then position, and k_0, v_0, k_1 ... [1, G, S, D].
        Outputs are y, or logits and hidden, or logits; then k_0_out, v_0_out ... A position past its caches is not
        noticed.
    Raises:
        ModuleNotFoundError: onnx is not installed. ValueError: another part, or a size that the model does not have.
        TypeError: the weights are bfloat16 or float64, of which ONNX Runtime lacks most kernels.
    """
    extras.require("onnx", "onnx")
    if weights.norm.dtype not in (torch.float32, torch.float16):
        raise TypeError(
            f"export: weights must be float32 or float16, got {str(weights.norm.dtype).removeprefix('torch.')}; "
            "convert them by weights.to(torch.float16)"
        )
    made, inputs, outputs = module(config, weights, part, capacity=capacity, layers=layers, rows=rows)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter that needs no other package is deprecated, and says so
        torch.onnx.export(
            made, tuple(inputs.values()), str(path), input_names=list(inputs), output_names=outputs,
            opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    return str(path)


def _caches(stack: StackConfig, layers: int, capacity: int, like: Tensor) -> dict[str, Tensor]:
    shape = (1, stack.kv_heads, capacity, stack.head_dim)
    return {f"{name}_{i}": like.new_zeros(shape) for i in range(layers) for name in ("k", "v")}


def _halves(caches: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    return list(caches[0::2]), list(caches[1::2])
