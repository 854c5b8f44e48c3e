"""A frame by ONNX Runtime: the exported slow and fast steps on one execution provider, draws by torch."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s1kernels import extras
from s1kernels.bench.runners import Model, name, put, scalars
from s1kernels.bench.timing import Refused
from s1kernels.cli.gpu import synchronize
from s1kernels.export import OPSET, Part, export, module
from s1kernels.model import torch_ops
from s1kernels.model.config import DualARConfig
from s1kernels.model.weights import Weights

PROVIDERS = {
    "TensorRT through ONNX": "TensorrtExecutionProvider",
    "ONNX Runtime (CUDA)": "CUDAExecutionProvider",
    "ONNX Runtime (CPU)": "CPUExecutionProvider",
}
"""Row -> execution provider, best first."""

ELEMENT = {torch.float32: 1, torch.int32: 6, torch.float16: 10}
"""dtype -> ONNX's TensorProto.DataType"""
IR_VERSION = 8  # of OPSET; a later one may be too new for an ONNX Runtime


def refusal(provider: str, device: torch.device) -> str | None:
    """Why a provider cannot run on a device here, or None."""
    if reason := extras.missing("onnx", "onnx", "onnxruntime"):
        return reason
    if (provider == "CPUExecutionProvider") != (device.type == "cpu"):
        return f"it does not run on {device.type}"
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        return f"this onnxruntime {onnxruntime.__version__} has no {provider}; pip install onnxruntime-gpu"
    served = _served_by(provider, device)
    return None if served == provider else f"{provider} does not load: ONNX Runtime fell back to {served}"


@cache
def _served_by(provider: str, device: torch.device) -> str:
    """What ONNX Runtime takes where a provider is asked for: one that it lists may miss its libraries."""
    import onnx
    import onnxruntime

    x, y = (onnx.helper.make_tensor_value_info(title, 1, [1]) for title in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "one", [x], [y])
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), _settings(), providers=_providers(provider, device)
    )
    return str(session.get_providers()[0])


def _settings() -> Any:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = torch.get_num_threads()
    return settings


def dtype_for(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What an exported model computes in: ONNX Runtime lacks bfloat16, and on CPUs is slow in float16."""
    return torch.float32 if device.type == "cpu" or dtype == torch.float32 else torch.float16


class Step:
    """An exported part of a model with its buffers, which torch and ONNX Runtime share: `inputs` and `outputs` by name.
    A cache comes out where it goes in."""

    def __init__(
        self, config: DualARConfig, weights: Weights, part: Part, provider: str, directory: Path, **options: Any
    ) -> None:
        import onnxruntime

        self.device = weights.norm.device
        path = export(config, weights, part, directory / f"{part}.onnx", **options)
        self.session = onnxruntime.InferenceSession(path, _settings(), providers=_providers(provider, self.device))
        self.providers = self.session.get_providers()
        self.inputs = module(config, weights, part, **options)[1]
        self.outputs: dict[str, Tensor] = {}
        types = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
        for out in self.session.get_outputs():
            shared = self.inputs.get(out.name.removesuffix("_out"))
            fresh = torch.zeros(out.shape, dtype=types[out.type], device=self.device) if shared is None else shared
            self.outputs[out.name] = fresh
        self._binding = self.session.io_binding()
        for bind, tensors in ((self._binding.bind_input, self.inputs), (self._binding.bind_output, self.outputs)):
            for title, tensor in tensors.items():
                bind(
                    title, self.device.type, self.device.index or 0, ELEMENT[tensor.dtype], tuple(tensor.shape),
                    tensor.data_ptr(),
                )  # fmt: skip

    def __call__(self) -> None:
        """Run on the inputs as they are; ONNX Runtime has a stream of its own."""
        synchronize(self.device)
        self.session.run_with_iobinding(self._binding)

    @property
    def caches(self) -> tuple[list[Tensor], list[Tensor]]:
        k, v = ([t for title, t in self.inputs.items() if title.startswith(kind)] for kind in ("k_", "v_"))
        return k, v


class OnnxRunner:
    """A frame: one slow step, one fast step a codebook, and draws between them by torch."""

    def __init__(self, model: Model, provider: str) -> None:
        self.config = model.config
        dtype = dtype_for(model.weights.norm.dtype, model.device)
        weights = model.weights.to(dtype)
        with tempfile.TemporaryDirectory() as directory:
            at = Path(directory)
            self.slow = Step(self.config, weights, "slow", provider, at, capacity=model.capacity)
            self.fast = Step(self.config, weights, "fast", provider, at, capacity=self.config.codebooks)
        self.facts = {"dtype": name(dtype), "providers": self.slow.providers}
        floats: dict[str, Any] = {"dtype": torch.float32, "device": model.device}
        ints: dict[str, Any] = {"dtype": torch.int32, "device": model.device}
        self.noise = {rows: torch.ones(1, rows, **floats) for rows in (weights.head.shape[0], self.config.fast_rows)}
        self.scalars = scalars(model.device)
        self.main_window = torch.zeros(1, self.config.codebooks + 1, **ints)
        self.fast_window = torch.zeros(1, 16, **ints)

    def load(self, k: list[Tensor], v: list[Tensor]) -> None:
        for caches, values in zip(self.slow.caches, (k, v), strict=True):
            put(caches, values)

    def logits(self, frame: Tensor, position: int) -> Tensor:
        self._slow(frame.T, position)
        return self.slow.outputs["logits"].clone()

    def prefill(self, prompt: Tensor) -> None:
        for t in range(prompt.shape[1]):  # the exported step reads one frame at a time
            self._slow(prompt[:, t : t + 1].T, t)

    def decode(self, frame: Tensor, position: int, count: int, seed: int) -> int:
        torch.manual_seed(seed)
        tokens = frame.T
        for done in range(1, count + 1):
            tokens = self._frame(tokens, position + done - 1)
            if int(tokens[0, 0].cpu()) == self.config.end_token:
                return done
        return count

    def _slow(self, tokens: Tensor, position: int) -> None:
        self.slow.inputs["tokens"].copy_(tokens)
        self.slow.inputs["position"].fill_(position)
        self.slow()

    @torch.inference_mode()
    def _frame(self, tokens: Tensor, position: int) -> Tensor:
        c, given = self.config, self.fast.inputs
        self._slow(tokens, position)
        main = self._draw(self.slow.outputs["logits"], self.main_window)
        codes = [main, (main - c.semantic_begin).clamp(0, c.codebook_size - 1)]
        given["hidden"].copy_(self.slow.outputs["hidden"])
        given["position"].fill_(0)
        self.fast()
        for i in range(1, c.codebooks):
            given["code"].copy_(codes[-1])
            given["position"].fill_(i)
            self.fast()
            codes.append(self._draw(self.fast.outputs["logits"], self.fast_window))
        return torch.stack(codes, dim=1)

    def _draw(self, logits: Tensor, window: Tensor) -> Tensor:
        noise = self.noise[logits.shape[1]].exponential_()
        return torch_ops.sample_token(logits, noise, None, window, None, *self.scalars, 0, 0)


def best(device: torch.device) -> str:
    """The first provider that this machine has for a device. Raises Refused if there is none."""
    reasons = {provider: refusal(provider, device) for provider in PROVIDERS.values()}
    for provider, reason in reasons.items():
        if reason is None:
            return provider
    raise Refused("; ".join(f"{provider}: {reason}" for provider, reason in reasons.items()))


def _providers(first: str, device: torch.device) -> list[Any]:
    """A provider with its options, and those that take what it cannot."""
    order = list(PROVIDERS.values())
    at = {"device_id": device.index or 0}
    options = {"TensorrtExecutionProvider": at | {"trt_fp16_enable": True}, "CUDAExecutionProvider": at}
    return [(title, options.get(title, {})) for title in order[order.index(first) :]]
