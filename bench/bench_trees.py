"""Frames of several source trees, or of one with several NVRTC options, on one GPU, in turn: what a change brings.

    git worktree add ../before main~1
    python bench/bench_trees.py before=../before now=. racecheck=.,-DS1_RACECHECK=1 --context 128 512

A case is LABEL=TREE[,OPTION...]; each runs in a process of its own, compiles its tree's kernels by NVRTC and takes the
GPU's own time of replays, with the whole head and with the rows that can be sampled. Prints and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPLAYS, ROUNDS, WARM = 60, 7, 2
PATIENCE = 180  # seconds for a case


@dataclass(frozen=True)
class Case:
    label: str
    tree: Path
    options: tuple[str, ...]

    @staticmethod
    def parse(text: str) -> Case:
        label, equals, rest = text.partition("=")
        tree, *options = rest.split(",")
        if not equals or not (Path(tree) / "s1kernels").is_dir():
            expected = "LABEL=TREE[,OPTION...], where TREE/s1kernels is the package"
            raise argparse.ArgumentTypeError(f"a case must be {expected}, got {text!r}")
        return Case(label, Path(tree).resolve(), tuple(options))

    def run(self, child: list[str]) -> dict[str, Any]:
        """What the case's process measures, or why it does not."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(self.tree), os.environ.get("PYTHONPATH")))),
            "S1KERNELS_CUDA_PROVIDER": "nvrtc",
            "S1KERNELS_NVRTC_OPTIONS": " ".join(self.options),
        }
        try:
            done = subprocess.run(
                [sys.executable, __file__, *child], env=environment, capture_output=True, text=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            return {"refused": f"it took more than {PATIENCE} s"}
        last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
        return json.loads(last[0]) if done.returncode == 0 else {"refused": "".join(last)}


def measure(contexts: list[int], dtype: str, packed: bool) -> dict[str, Any]:
    """Milliseconds a frame of the tree that is on the path."""
    import torch

    from s1kernels import Engine
    from s1kernels.bench import models

    device, found = torch.device("cuda"), {}
    shape = models.config(False, max(contexts) + 512)
    weights = models.weights(shape, getattr(torch, dtype), device)
    for constrained in (False, True):
        asked = {"packed": True} if packed else {}  # trees from before do not know it
        engine = Engine(shape, weights, constrained=constrained, **asked)
        if packed and engine.decoder.frame.unpacked:
            raise RuntimeError(engine.decoder.frame.unpacked)
        engine.generate(models.prompt(shape, 64, device), 8, seed=1)
        for context in contexts:
            times = [engine.decoder.time_frames(context, REPLAYS) * 1e3 for _ in range(WARM + ROUNDS)][WARM:]
            rows = "rows that can be sampled" if constrained else "whole head"
            found[f"{context}, {rows}"] = {"median": statistics.median(times), "least": min(times), "most": max(times)}
    return {"milliseconds": found, "gpu": torch.cuda.get_device_name()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", type=Case.parse, metavar="LABEL=TREE[,OPTION...]")
    parser.add_argument("--context", type=int, nargs="+", default=[128, 512], help="positions (default: 128 512)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--packed", action="store_true", help="weights in the half of L2 that is near")
    parser.add_argument("--turns", type=int, default=2, help="how often every case is measured (default: 2)")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    if not options.cases:  # a case's own process
        print(json.dumps(measure(options.context, options.dtype, options.packed)))
        return
    child = ["--context", *map(str, options.context), "--dtype", options.dtype, *["--packed"] * options.packed]
    result: dict[str, list[dict[str, Any]]] = {case.label: [] for case in options.cases}
    for _ in range(options.turns):
        for case in options.cases:
            result[case.label].append(found := case.run(child))
            print(case.label, json.dumps(found), flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
