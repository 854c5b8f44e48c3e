"""One frame of S1-mini's shape by the persistent kernel, for compute-sanitizer and profilers.

    S1KERNELS_CUDA_PROVIDER=nvrtc compute-sanitizer --tool memcheck python tests/one_frame.py --position 300

The past is zeros. racecheck needs a build of its own, S1KERNELS_NVRTC_OPTIONS=-DS1_RACECHECK=1 (docs/cuda.md).
"""

import argparse

import torch
from cuda_models import build

from s1kernels.backends.cuda import l2_halves


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--position", type=int, default=300, help="past positions (default: 300)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--packed", action="store_true", help="weights in halves of L2, which are random here")
    options = parser.parse_args()
    l2_halves.measure = lambda memory, dtype: l2_halves.Halves.at_random(memory)  # tools disturb what is measured
    engine = build("s1_mini", "cuda", getattr(torch, options.dtype), persistent=True, packed=options.packed)
    engine.cache.reserve(options.position + 1)
    seconds = engine.decoder.time_frames(options.position, 1)
    print(f"a frame after {options.position} positions took {seconds:.3g} s")


if __name__ == "__main__":
    main()
