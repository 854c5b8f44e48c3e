"""Side by side in one run: audio from codes by upstream's own codec and by ours, whole and chunk by chunk.

The codec has S1-mini's shape and seeded random weights. A row whose audio differs from upstream's in float32 by more
than its dtype explains gets no number.

    python bench/bench_codec.py --device cpu --dtype float32 --frames 43 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import codec_models

from s1kernels import testing
from s1kernels.bench import provenance, timing
from s1kernels.speech.codec import Codec

LIMIT = {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.05}
"""Relative error of the audio, against upstream in float32: random weights carry a rounding on through the layers."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(LIMIT))
    parser.add_argument("--frames", type=int, default=215, help="of 46 ms, decoded by a measurement (default: 215)")
    parser.add_argument("--chunks", type=int, nargs="*", default=[1, 4, 25], help="frames of a stream's chunks")
    parser.add_argument("--rounds", type=int, default=5, help="measurements a row; the median counts (default: 5)")
    parser.add_argument("--json", type=Path, help="write the result there")
    return parser.parse_args()


def streamed(codec: Codec, codes: Tensor, size: int) -> Tensor:
    stream = codec.stream()
    return torch.cat([stream.push(part) for part in codes.split(size, dim=1)])


@torch.inference_mode()
def main() -> None:
    args = parse()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = codec_models.build_full()
    codec = Codec.from_state(model.state_dict(), device, dtype)
    codes = codec_models.codes(args.frames, sizes=codec.codebook_sizes).to(device)
    lengths = torch.tensor([args.frames], device=device)

    def upstream() -> Tensor:
        return model.decode(codes[None].clone(), lengths)[0][0, 0]

    model.to(device)
    truth, seconds = upstream().double(), args.frames * codec.frame_samples / codec.sample_rate
    model.to(dtype)
    calls: dict[str, Callable[[], Tensor]] = {"upstream": upstream, "s1kernels": lambda: codec.decode(codes)}
    for size in args.chunks:
        calls[f"s1kernels, chunks of {size}"] = lambda size=size: streamed(codec, codes, size)
    measured: dict[str, list[float]] = {name: [] for name in calls}
    errors = {name: testing.rel_error(call(), truth) for name, call in calls.items()}
    for _ in range(args.rounds):  # in turn, so that what else the machine does meets all alike
        for name, call in calls.items():
            measured[name].append(timing.seconds(call, device))
    rows: dict[str, dict[str, Any]] = {}
    for name, values in measured.items():
        rows[name] = timing.summary(values) | {"error": errors[name]}
        right = name == "upstream" or errors[name] <= LIMIT[args.dtype]
        speed = f"{seconds / rows[name]['seconds']:.3g} times real time" if right else "refused"
        rows[name] |= {"times_real_time": seconds / rows[name]["seconds"]} if right else {}
        print(f"{name:28} {speed:28} error {errors[name]:.1e}")
    result = {"provenance": provenance.collect(device), "audio_seconds": seconds, "dtype": args.dtype, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
