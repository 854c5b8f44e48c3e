"""Many frames without a pause: none hangs, and the same seed brings the same codes, run after run.

    python bench/bench_endurance.py --frames 100000 --beside --json bench/results/endurance.json

Every run decodes the same frames anew. With --beside another process keeps the GPU busy meanwhile, as a game or a
second model would. Exits with 1 if codes differ; a frame that does not end raises.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from s1kernels import Engine, Sampling
from s1kernels.bench import models, provenance
from s1kernels.cli import gpu

PROMPT = 64  # frames
SAMPLING = Sampling(temperature=0.7, top_p=0.7, repetition_penalty=1.2)
LOAD = """
import sys, torch
x = torch.randn(4096, 4096, device=sys.argv[1], dtype=torch.bfloat16)
print("busy", flush=True)
while True:
    for _ in range(20): y = x @ x
    torch.cuda.synchronize(x.device)
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--frames", type=int, default=100_000, help="in all, at least (default: 100000)")
    parser.add_argument("--run", type=int, default=2000, help="frames of a run (default: 2000)")
    parser.add_argument(
        "--beside", action="store_true", help="another process multiplies matrices on the GPU meanwhile"
    )
    parser.add_argument("--packed", action="store_true", help="weights in the half of L2 that is near")
    parser.add_argument("--small", action="store_true", help="a small model: does it run at all?")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    if not 1 <= options.run <= options.frames:
        parser.error("--run must be at least 1, and --frames as much")
    for name in ("beside", "packed"):
        if getattr(options, name) and torch.device(options.device).type != "cuda":
            parser.error(f"--{name} needs a CUDA device, --device is {options.device}")
    return options


@contextlib.contextmanager
def load(device: str) -> Iterator[None]:
    """Another process that keeps the device busy."""
    with subprocess.Popen([sys.executable, "-c", LOAD, device], stdout=subprocess.PIPE, text=True) as process:
        try:
            if not process.stdout or process.stdout.readline() != "busy\n":
                raise RuntimeError("the process that should keep the GPU busy has not begun; its output is above")
            yield
            if process.poll() is not None:
                raise RuntimeError(f"the process that kept the GPU busy ended early, with {process.returncode}")
        finally:
            process.kill()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device, dtype = gpu.require(options.device), getattr(torch, options.dtype)
    shape = models.config(options.small, PROMPT + options.run)
    engine = Engine(shape, models.weights(shape, dtype, device), constrained=True, packed=options.packed)
    if options.packed and (why := engine.decoder.frame.unpacked):
        raise RuntimeError(f"weights are not packed: {why}")
    prompt, runs = models.prompt(shape, PROMPT, device), -(-options.frames // options.run)
    first = engine.generate(prompt, options.run, SAMPLING, seed=1)
    if first.shape[1] != options.run:
        raise RuntimeError(f"a run ended after {first.shape[1]} of {options.run} frames")
    seconds, same = [], 0
    with load(options.device) if options.beside else contextlib.nullcontext():
        for _ in track(range(runs), "decoding"):
            start = time.perf_counter()
            codes = engine.generate(prompt, options.run, SAMPLING, seed=1)
            gpu.synchronize(device)
            seconds.append((time.perf_counter() - start) / options.run)
            same += torch.equal(codes, first)
    return {
        "provenance": provenance.collect(device), "model": models.describe(shape), "dtype": options.dtype,
        "backends": dict(engine.backends), "persistent": engine.persistent,
        "packed": options.packed, "beside": options.beside, "frames": runs * options.run, "runs": runs, "same": same,
        "milliseconds_per_frame": {
            "median": statistics.median(seconds) * 1e3, "least": min(seconds) * 1e3, "most": max(seconds) * 1e3,
        },
    }  # fmt: skip


def main() -> int:
    options = parse()
    result = measure(options)
    provenance.write(options.json, result)
    of, ms = result["runs"], result["milliseconds_per_frame"]
    print(f"{result['model']}, {result['dtype']}, {provenance.machine(result['provenance'])}")
    print(f"{result['frames']} frames{', another process beside them' if options.beside else ''}: none hung")
    print(f"codes of {result['same']} of {of} runs are the first's")
    print(f"milliseconds a frame, run by run: median {ms['median']:.3f}, {ms['least']:.3f} to {ms['most']:.3f}")
    return 0 if result["same"] == of else 1


if __name__ == "__main__":
    raise SystemExit(main())
