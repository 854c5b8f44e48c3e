"""Side by side in one run: audio from codes by upstream's own codec and by ours, whole and chunk by chunk.

The codec has S1-mini's shape and seeded random weights. A row whose audio is farther from upstream's in float32
than upstream's own in the dtype gets no number.

    python bench/bench_codec.py --device cpu --dtype float32 --frames 43 --rounds 3
"""

from __future__ import annotations

import argparse
import functools
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
from s1kernels.speech.codec import Codec, Stream

MARGIN, FLOOR = 1.25, 1e-5
"""How much farther from float32 than upstream's own audio a row's may be, and what float32 leaves open."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--frames", type=int, default=215, help="of 46 ms, decoded by a measurement (default: 215)")
    parser.add_argument("--chunks", type=int, nargs="*", default=[1, 4, 25], help="frames of a stream's chunks")
    parser.add_argument("--rounds", type=int, default=5, help="measurements a row; the median counts (default: 5)")
    parser.add_argument("--json", type=Path, help="write the result there")
    return parser.parse_args()


def streamed(stream: Stream, codes: Tensor, size: int) -> Tensor:
    stream.reset()
    return torch.cat([stream.push(part) for part in codes.split(size, dim=1)])


@torch.inference_mode()
def main() -> None:
    args = parse()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be just that
    model = codec_models.build_full()
    codec, weights = occupied(lambda: Codec.from_state(model.state_dict(), device, dtype), device)
    codes = codec_models.codes(args.frames, sizes=codec.codebook_sizes)
    lengths = torch.tensor([args.frames], device=device)

    def upstream() -> Tensor:
        return model.decode(codes[None].to(device), lengths)[0][0, 0]

    model.to(device)
    truth, seconds = upstream().double(), args.frames * codec.frame_samples / codec.sample_rate
    model.cpu()
    _, theirs = occupied(lambda: model.to(device, dtype), device)
    calls: dict[str, Callable[[], Tensor]] = {"upstream": upstream, "s1kernels": lambda: codec.decode(codes)}
    for size in args.chunks:
        tapes = {"": codec.stream((size,))} | ({" op by op": codec.stream()} if device.type == "cuda" else {})
        for how, tape in tapes.items():
            calls[f"s1kernels, chunks of {size}{how}"] = functools.partial(streamed, tape, codes, size)
    measured: dict[str, list[float]] = {name: [] for name in calls}
    rows: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        audio, most = peak(call, device)
        rows[name] = {"error": testing.rel_error(audio, truth), "peak_bytes": most}
    for _ in range(args.rounds):  # in turn, so that what else the machine does meets all alike
        for name, call in calls.items():
            measured[name].append(timing.seconds(call, device))
    for name, row in rows.items():
        row |= timing.summary(measured[name])
        right = row["error"] <= max(FLOOR, MARGIN * rows["upstream"]["error"])
        row |= {"times_real_time": seconds / row["seconds"]} if right else {"seconds": None}
        speed = f"{row['times_real_time']:.3g} times real time" if right else "refused"
        print(f"{name:32} {speed:24} error {row['error']:.1e}  {row['peak_bytes'] / 2**20:.0f} MiB at work")
    memory = {"s1kernels": weights, "upstream": theirs}
    print("bytes of the codec:", memory)
    result = {"provenance": provenance.collect(device), "audio_seconds": seconds, "dtype": args.dtype}
    if args.json:
        args.json.write_text(json.dumps(result | {"weights_bytes": memory, "rows": rows}, indent=1) + "\n")


def occupied(make: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What `make` makes, and the bytes that it occupies on a GPU (0 on the CPU)."""
    gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if gpu else 0
    made = make()
    return made, torch.cuda.memory_allocated(device) - before if gpu else 0


def peak(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int]:
    """A call's result, and the most bytes on a GPU that it needed while it ran (0 on the CPU)."""
    if device.type != "cuda":
        return call(), 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    audio = call()
    return audio, torch.cuda.max_memory_allocated(device) - before


if __name__ == "__main__":
    main()
