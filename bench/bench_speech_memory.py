"""Minutes of sound streamed without a break, and the memory in use after each of them: it must not grow.

The text goes on from part to part in one call of Speech.stream, past the end of the model's context. Model and codec
are those of bench_speech.py; since random weights know no end, each part ends when it has been read aloud. The model's
cache has all its positions from the start. Exits with 1 if memory grows by more than half of what the sound would take
if it were kept.

    python bench/bench_speech_memory.py --minutes 10 --json bench/results/speech-memory.json
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from speech_pipelines import Given, Ours, text

from s1kernels import Engine
from s1kernels.bench import models, provenance
from s1kernels.cli import gpu

MINUTE = 60.0  # seconds of sound between two looks at the memory
PART = 20.0  # seconds that a part of the text takes
SAMPLE_BYTES = 4
USES = ("allocated", "reserved", "host")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--minutes", type=int, default=10, help="of sound (default: 10)")
    parser.add_argument("--small", action="store_true", help="a small model and codec: does it run at all?")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    if options.minutes < 2:
        parser.error("--minutes must be at least 2: memory is compared with that after the first")
    return options


def end_parts(engine: Engine) -> None:
    """Let the engine draw the end token when a part may go on no longer."""
    stream = engine.stream

    def ending(prompt: Tensor, max_frames: int, *args: Any, **options: Any) -> Iterator[Tensor]:
        yield from stream(prompt, max_frames - 1, *args, **options)
        yield torch.tensor([models.END, *[0] * engine.config.codebooks], dtype=torch.int32)

    engine.stream = ending  # type: ignore[method-assign]


def in_use(device: torch.device) -> dict[str, int]:
    """Bytes: torch's tensors on a GPU, what it holds for them, and the process's on the host."""
    gc.collect()
    used = dict.fromkeys(USES, 0)
    if device.type == "cuda":
        gpu.synchronize(device)
        used |= {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
    return used | {"host": psutil.Process().memory_info().rss}


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    device = torch.device(options.device)
    given = Given(options.small, device, getattr(torch, options.dtype))
    tts = Ours(given, persistent=device.type == "cuda").tts
    tts.warm_up()
    tts.engine.cache.reserve(given.shape.max_positions)
    end_parts(tts.engine)
    minutes: list[dict[str, Any]] = []
    start, samples = time.perf_counter(), 0
    long = text(round(options.minutes * MINUTE / PART + 1) * 300)  # a part has less than 300 characters
    for chunk in tts.stream(long, given.voice, seed=0, max_seconds=PART):
        samples += len(chunk)
        if samples / tts.sample_rate >= (len(minutes) + 1) * MINUTE:
            taken = time.perf_counter() - start
            minutes.append({"minute": len(minutes) + 1, "seconds": taken} | in_use(device))
            console.print(f"minute {len(minutes)}: {samples / tts.sample_rate / taken:.2f} times real time")
            if len(minutes) == options.minutes:
                break
    kept = (options.minutes - 1) * MINUTE * tts.sample_rate * SAMPLE_BYTES
    grown = {use: max(minute[use] for minute in minutes[1:]) - minutes[0][use] for use in USES}
    return {
        "provenance": provenance.collect(device), "model": models.describe(given.shape), "dtype": options.dtype,
        "minutes": minutes, "grown": grown, "sound_bytes": kept, "flat": max(grown.values()) <= kept / 2,
    }  # fmt: skip


def show(result: dict[str, Any], console: Console) -> None:
    console.print(f"{result['model']}, {result['dtype']}, {provenance.machine(result['provenance'])}")
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in ("minute", "after s", *(f"{use} MiB" for use in USES)):
        table.add_column(column, justify="right")
    for minute in result["minutes"]:
        cells = (f"{minute[use] / 2**20:.1f}" for use in USES)
        table.add_row(str(minute["minute"]), f"{minute['seconds']:.1f}", *cells)
    console.print(table)
    grown = ", ".join(f"{use} {size / 2**20:.1f} MiB" for use, size in result["grown"].items())
    verdict = "memory is flat" if result["flat"] else "MEMORY GROWS"
    console.print(f"{verdict}: {grown} more than after the first; the sound takes {result['sound_bytes'] / 2**20:.1f}")


def main() -> int:
    options = parse()
    result = measure(options, Console(stderr=True, markup=False, highlight=False))
    provenance.write(options.json, result)
    show(result, Console(markup=False, highlight=False))
    return 0 if result["flat"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
