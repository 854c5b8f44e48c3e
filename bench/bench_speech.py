"""Text in, sound out: time to the first sound, times real time, and the codec's share, by texts' lengths.

Model and codec have S1-mini's shape and seeded random weights, so that what is said is noise; a text takes as long as
it is read aloud. One row lets the codec work between frames of one persistent kernel, the other beside frames of many.

    python bench/bench_speech.py --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import codec_models

from s1kernels import Engine, IncompleteSpeech, Speech, Voice
from s1kernels.bench import models, provenance, speech, timing
from s1kernels.cli import gpu
from s1kernels.model.config import DualARConfig
from s1kernels.speech.codec import Codec
from s1kernels.speech.tokenizer import Tokenizer

SPECIALS = {"<|interleave|>": 300, "<|im_end|>": models.END}
TEXT = "The birch canoe slid on the smooth planks while the boy glued the sheet to the dark blue background. "


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--characters", type=int, nargs="*", default=speech.CHARACTERS, help="lengths of the texts")
    parser.add_argument("--small", action="store_true", help="a model of fewer layers")
    parser.add_argument("--rounds", type=int, default=5, help="measurements a row; the median counts (default: 5)")
    parser.add_argument("--json", type=Path, help="write the result there")
    return parser.parse_args()


def tokens(text: str) -> list[int]:
    """As many tokens as a tokenizer makes of English, whatever they are."""
    return [1 + byte for byte in text.encode()[:: speech.CHARACTERS_PER_TOKEN]]


def reference(shape: DualARConfig) -> Voice:
    return Voice("What is said.", models.prompt(shape, speech.REFERENCE_FRAMES, torch.device("cpu"))[1:])


def speak(tts: Speech, voice: Voice, characters: int, seed: int) -> dict[str, float]:
    """Seconds to the first sound, in all, and of sound, of a text that goes on as long as it takes to read aloud."""
    text = (TEXT * (characters // len(TEXT) + 1))[:characters]
    seconds = characters / speech.CHARACTERS_PER_SECOND
    gpu.synchronize(tts.device)
    start, first, samples = time.perf_counter(), 0.0, 0
    try:
        for chunk in tts.stream(text, voice, seed=seed, max_seconds=seconds):
            first = first or time.perf_counter() - start
            samples += len(chunk)
    except IncompleteSpeech:
        pass  # random weights know no end
    return {"first": first, "all": time.perf_counter() - start, "sound": samples / tts.sample_rate}


@torch.inference_mode()
def main() -> None:
    args = parse()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shape = models.config(args.small, 4096)
    weights = models.weights(shape, dtype, device)
    codec = Codec.from_state(codec_models.build_full().state_dict(), device, dtype)
    voice, rows = reference(shape), []
    for persistent in (True, False) if device.type == "cuda" else (False,):
        engine = Engine(shape, weights, persistent=persistent)
        if persistent and not engine.persistent:
            print("no persistent kernel here")
            continue
        tts = Speech(engine, Tokenizer(tokens, SPECIALS, "none"), codec)
        tts.warm_up()
        name = "between frames of one kernel" if engine.persistent else "beside frames of many kernels"
        name = name if device.type == "cuda" else "between frames"
        for characters in args.characters:
            speak(tts, voice, characters, 0)
            taken = [speak(tts, voice, characters, seed) for seed in range(args.rounds)]
            row: dict[str, Any] = {"codec": name, "characters": characters, "sound": taken[0]["sound"]}
            row |= {key: timing.summary([one[key] for one in taken]) for key in ("first", "all")}
            codes = torch.zeros(shape.codebooks, round(row["sound"] * tts.frame_rate), dtype=torch.int64)
            row["codec_alone"] = timing.summary(
                timing.rounds(lambda codes=codes: codec.decode(codes), args.rounds, device)
            )
            total = row["all"]["seconds"]
            row |= {"times_real_time": row["sound"] / total, "codec_share": row["codec_alone"]["seconds"] / total}
            print(
                f"{name:30} {characters:4} characters, {row['sound']:5.1f} s: first sound after "
                f"{1e3 * row['first']['seconds']:6.1f} ms, {row['times_real_time']:6.2f} times real time, "
                f"codec alone {100 * row['codec_share']:.0f} %"
            )
            rows.append(row)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    result = {"provenance": provenance.collect(device), "dtype": args.dtype, "peak_bytes": peak, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
