"""One frame by stage: the time, bytes and rate of its projections, attention, heads and draws.

Of the ops' kernels, one by one in the order of a frame (CPU) or each stage as one CUDA graph over memory that no cache
holds (GPU); and of the persistent kernel, by its own clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from s1kernels import Engine, registry, testing
from s1kernels.bench import ops, timing
from s1kernels.bench.runners import SAMPLING
from s1kernels.bench.timing import Refused
from s1kernels.contract import Op
from s1kernels.decoder import HostDecoder, OpsProgram
from s1kernels.model.dual_ar import DualAR
from s1kernels.sampling import WINDOW

STAGES = (
    "slow qkv", "slow attention", "slow wo", "slow ffn", "head", "draw", "fast qkv", "fast attention", "fast wo",
    "fast ffn", "fast head", "fast draws",
)  # fmt: skip
"""In the order of a frame. "embed" comes before, where it is timed by itself."""

OF_OP = {
    "embed_frame": "embed",
    "rms_norm_qkv": "qkv",
    "qk_norm_rotary_append": "attention",
    "attention_decode": "attention",
    "rms_norm_swiglu": "ffn",
}


@dataclass
class Recorder:
    """The ops of a `DualAR`, which notes every call with the stage that it belongs to."""

    backend: str
    calls: list[tuple[str, Op, Callable[..., Any], tuple]] = field(default_factory=list)

    def ops(self) -> SimpleNamespace:
        return SimpleNamespace(**{name: self._recording(op) for name, op in registry.OPS.items()})

    def _recording(self, op: Op) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            out, run = op.empty(op.checked(*args)), registry.choose(op.name, *args, backend=self.backend).run
            run(*args, out)
            self.calls.append((self._stage(op.name), op, run, (*args, out)))
            return out

        return call

    def _stage(self, name: str) -> str:
        fast = any(stage == "draw" for stage, *_ in self.calls)
        if name == "rms_norm_logits":
            return "fast head" if fast else "head"
        if name == "sample_token":
            return "fast draws" if fast else "draw"
        if name == "linear_residual":
            before = self.calls[-1][1].name
            stage = {"attention_decode": "wo", "rms_norm_swiglu": "ffn"}.get(before, "projection")
        else:
            stage = OF_OP[name]
        return stage if stage == "embed" else f"{'fast' if fast else 'slow'} {stage}"


@torch.inference_mode()
def of_ops(
    engine: Engine, frame: Tensor, position: int, ceiling: float, backend: str, count: int
) -> list[dict[str, Any]]:
    """The stages of one frame by the ops' kernels of a back end.

    Args:
        engine: the model, its cache filled up to `position`.
        frame: [N+1, 1], the frame at `position`.
        ceiling: GB/s that plain reads reach.
        count: rounds.
    Raises:
        BackendError: the back end lacks an op here.
    """
    device, recorder = frame.device, Recorder(backend)
    model = DualAR(engine.config, engine.weights, recorder.ops())
    host = HostDecoder(engine.config, engine.active_rows, engine.cache, OpsProgram(model, engine.active_rows.head))
    previous = torch.zeros(engine.config.codebooks + 1, WINDOW[engine.config.line], dtype=torch.int32, device=device)
    next(iter(host.decode(frame.T.contiguous(), position, 1, SAMPLING, previous, None)))
    in_order = _in_order(recorder, count) if device.type == "cpu" else {}
    rows = []
    for stage in dict.fromkeys(stage for stage, *_ in recorder.calls):
        mine = [(op, given) for s, op, _, given in recorder.calls if s == stage]
        moved = sum(op.bytes_moved(op.checked(*given[:-1])) for op, given in mine)
        try:
            each = in_order.get(stage) or _graph(recorder, stage, count)
        except Refused as error:
            rows.append({"program": f"ops, {backend}", "stage": stage, "refused": str(error)})
        else:
            rows.append(_row(f"ops, {backend}", stage, each, moved, len(mine), ceiling))
    return rows


def _in_order(recorder: Recorder, count: int) -> dict[str, list[float]]:
    """Seconds of every stage in each of `count` frames."""
    times: dict[str, list[float]] = {stage: [0.0] * count for stage, *_ in recorder.calls}
    for i in range(-1, count):  # one round warms up
        for stage, _, run, given in recorder.calls:
            start = time.perf_counter()
            run(*given)
            if i >= 0:
                times[stage][i] += time.perf_counter() - start
    return times


def _graph(recorder: Recorder, stage: str, count: int) -> list[float]:
    """Seconds of a stage's calls, captured as one graph; a stage that fits into a cache is copied until it does not."""
    calls = [(run, given) for s, _, run, given in recorder.calls if s == stage]
    moved = sum(op.bytes_moved(op.checked(*given[:-1])) for s, op, _, given in recorder.calls if s == stage)
    held = sum({t.data_ptr(): t.nbytes for _, given in calls for t in ops.tensors_of(given)}.values())
    copies = [calls]
    if held < ops.ROTATED["cuda"]:
        each = sum(t.nbytes for _, given in calls for t in ops.tensors_of(given))
        wanted = max(1, min(ops.MOST_COPIES, -(-ops.ROTATED["cuda"] // moved), ops.MOST_COPIED // each))
        copies = [[(run, testing.clone(given, offset=0)) for run, given in calls] for _ in range(wanted)]
    run = ops.replay([call for copy in copies for call in copy])
    return [value / len(copies) / ops.REPLAYS for value in timing.rounds(run, count, torch.device("cuda"), warm_up=3)]


def persistent(engine: Engine, frame: Tensor, position: int, ceiling: float, count: int) -> list[dict[str, Any]]:
    """The stages of one frame by the persistent kernel's own clock; arguments as of `of_ops`.

    Raises:
        Refused: the kernel does not serve the model here.
    """
    from s1kernels.backends.cuda import persistent_frame
    from s1kernels.backends.cuda.support import run
    from s1kernels.draws import Draws

    config, weights, rows, device = engine.config, engine.weights, engine.active_rows, frame.device
    if reason := persistent_frame.refusal(config, weights, rows.head, config.fast_rows):
        raise Refused(f"the persistent kernel does not serve here: {reason}")
    phases = persistent_frame.Phases(config, weights, rows.head).list
    floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    times = torch.zeros(len(phases) + 1, dtype=torch.int64, device=device)
    scalars = {k: torch.tensor(getattr(SAMPLING, k), **floats) for k in ("temperature", "top_p", "repetition_penalty")}
    engine.cache.reserve(position + 1)
    launches = persistent_frame.launches(
        config, weights, rows.head, None, tokens=frame.T.contiguous(),
        position=torch.tensor([position], **ints), k_caches=engine.cache.k, v_caches=engine.cache.v,
        window=torch.full((config.codebooks + 1, WINDOW[config.line]), -1, **ints), ids=rows.ids, logit_bias=rows.bias,
        scalars=scalars | {"top_k": torch.tensor(SAMPLING.top_k, **ints)},
        rng=torch.tensor([7, 0], dtype=torch.int64, device=device),
        main_logits=torch.zeros(1, rows.head.shape[0], **floats),
        fast_logits=torch.zeros(1, config.codebooks - 1, config.fast_rows, **floats),
        out=torch.zeros(1, config.codebooks + 1, **ints), times=times, **Draws(config, rows, config.fast_rows).offsets,
    )  # fmt: skip
    named = _phase_stages(phases)
    rounds: dict[str, list[float]] = {stage: [] for stage in dict.fromkeys(named)}
    for i in range(-3, count):
        run(launches, device)
        torch.cuda.synchronize(device)
        each = times.diff().tolist()
        if i >= 0:
            for stage, values in rounds.items():
                values.append(sum(ns for name, ns in zip(named, each, strict=True) if name == stage) / 1e9)
    size, kept = rows.head.element_size(), 2 * config.slow.kv_heads * config.slow.head_dim * (position + 1)
    moved = dict.fromkeys(rounds, 0)
    for stage, phase in zip(named, phases, strict=True):
        moved[stage] += sum(matrix.nbytes for matrix in phase.weights)
        moved[stage] += kept * size if phase.kind == persistent_frame.Kind.ATTEND else 0
    return [
        _row("persistent kernel", stage, values, moved[stage], named.count(stage), ceiling)
        for stage, values in rounds.items()
    ]


def _phase_stages(phases: list[Any]) -> list[str]:
    """The stage of every phase. A draw is part of the phase that reads it, the fast stack's attention of its wo."""
    from s1kernels.backends.cuda.persistent_frame import Kind

    of = {
        Kind.QKV: "slow qkv", Kind.ATTEND: "slow attention", Kind.SLOW_OUTPUT: "slow wo", Kind.HEAD: "head",
        Kind.FAST_QKV: "fast qkv", Kind.FAST_OUTPUT: "fast wo", Kind.FAST_HEAD: "fast head",
    }  # fmt: skip
    stages, fast = [], False
    for phase in phases:
        stages.append(of.get(phase.kind, f"{'fast' if fast else 'slow'} ffn"))
        fast |= phase.kind == Kind.HEAD
    return stages


def _row(program: str, stage: str, each: list[float], moved: int, calls: int, ceiling: float) -> dict[str, Any]:
    row = {"program": program, "stage": stage, "calls": calls, **timing.summary(each)}
    return row | {"microseconds": statistics.median(each) * 1e6} | timing.rates(row, moved, ceiling)
