"""Runs the persistent frame kernel on the CPU at positions of your choice, and says what is wrong with its results.

    python tests/emulator/check.py --position 700 --dtype float16

Exits with 1 if anything is. The seed is that of the order in which threads run: results must not depend on it.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from emulated_frame import Model, config_of, run_frame
from emulated_kernels import SOURCES, LaunchFailed, build, unavailable


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--position", type=int, nargs="+", default=[700])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1], help="of the order of threads; 0 is the natural")
    parser.add_argument("--layers", type=int, default=2, help="of the slow stack")
    parser.add_argument("--fast-layers", type=int, default=4)
    parser.add_argument("--codebooks", type=int, default=3)
    parser.add_argument("--intermediate", type=int, default=3072)
    parser.add_argument("--constrained", action="store_true", help="sample rows named by ids")
    parser.add_argument("--text", action="store_true", help="begin with a token of text")
    parser.add_argument("--packed", action="store_true", help="weights in halves of L2")
    parser.add_argument("--racecheck", action="store_true", help="compile with S1_RACECHECK")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="csrc/cuda, or a changed copy")
    given = parser.parse_args()
    if reason := unavailable():
        sys.exit(reason)
    dtype, wrong = getattr(torch, given.dtype), 0
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder), dtype, given.sources, racecheck=given.racecheck)
        sizes = given.layers, given.fast_layers, given.codebooks, given.intermediate, max(given.position) + 16
        model = Model(config_of(*sizes), dtype, given.constrained)
        for position in given.position:
            results = []
            for seed in given.seed:
                begun = time.perf_counter()
                try:
                    frame = run_frame(model, library, position, text=given.text, seed=seed, packed=given.packed)
                except LaunchFailed as error:
                    sys.exit(f"position {position}, seed {seed}: {error}")
                results.append(frame)
                faults = frame.faults()
                if not all(map(torch.equal, frame.results(), results[0].results())):
                    faults.append(f"other bits than with seed {given.seed[0]}")
                errors = ", ".join(f"{name} {a:.2e} ({b:.2e})" for name, (a, b) in frame.errors().items())
                print(f"position {position}, seed {seed}: distance to float64 (torch's): {errors}; codes {frame.codes}")
                print(f"  {time.perf_counter() - begun:.1f} s;", "; ".join(faults) or "all right", flush=True)
                wrong += bool(faults)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
