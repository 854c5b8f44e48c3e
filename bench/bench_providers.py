"""Seconds a frame with each provider of CUDA kernels, in turn in this one process; prints JSON with their ratios.

An installation has compiled kernels or the wheel's cubins. To have both, unpack s1kernels/cubin of the wheel into the
package that a CUDA toolkit compiled, from the same sources.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics

from s1kernels.backends.cuda import providers
from s1kernels.bench import provenance
from s1kernels.cli import gpu, selfcheck


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--providers", nargs="+", default=[*providers.PROVIDERS], choices=[*providers.PROVIDERS])
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each, in turn (default: 7)")
    options = parser.parse_args()
    logging.getLogger("s1kernels").setLevel(logging.WARNING)
    device = gpu.require("cuda")
    seconds: dict[str, list[float]] = {name: [] for name in options.providers}
    for _ in range(options.rounds):
        for name, taken in seconds.items():
            with providers.use_provider(name):
                frame, model = selfcheck.time_frames(device)
            taken.append(frame)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    fastest = min(medians.values())
    facts = {
        "provenance": provenance.collect(device),
        "model": model,
        "seconds_per_frame": medians,
        "ratio_to_fastest": {name: median / fastest for name, median in medians.items()},
        "rounds": seconds,
    }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
