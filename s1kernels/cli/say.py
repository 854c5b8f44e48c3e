"""Speak a text into a WAV, FLAC or OGG file, or to a player, from a checkpoint directory.

Example: s1kernels say "Hello there." -o hello.wav --reference me.wav --reference-text "What I say in it."
         s1kernels say --stream < story.txt | aplay -q -f S16_LE -r 44100
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from s1kernels.cli import gpu
from s1kernels.speech import IncompleteSpeech, Speech, Voice
from s1kernels.speech.audio import Writer
from s1kernels.speech.text import clean, usual_seconds

if TYPE_CHECKING:
    from rich.console import Console

CHECKPOINT = Path("checkpoints/openaudio-s1-mini")  # where upstream looks, too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", help="what to say (default: standard input)")
    parser.add_argument("--file", type=Path, help="a UTF-8 text file instead")
    parser.add_argument("-o", "--output", type=Path, help="the .wav, .flac or .ogg file")
    parser.add_argument("--stream", action="store_true", help="16-bit samples to standard output as they are spoken")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help=f"S1-mini's folder (default: {CHECKPOINT})")
    parser.add_argument("--reference", type=Path, help="a recording of the voice to speak in")
    parser.add_argument("--reference-text", help="what is said in it, word for word")
    parser.add_argument("--voice", type=Path, help="a voice that was saved, instead of a recording")
    parser.add_argument("--save-voice", type=Path, help="save the recording's voice there (.safetensors)")
    parser.add_argument("--seed", type=int, help="same seed, same speech")
    parser.add_argument("--temperature", type=float, help="how freely codes are drawn (default: upstream's)")
    parser.add_argument("--top-p", type=float, help="from which share of the likeliest ones (default: upstream's)")
    parser.add_argument("--max-seconds", type=float, help="that a part of the text may take (default: by its length)")
    parser.add_argument("--device", help="torch device (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of model and codec (default: the files')"
    )


def execute(options: argparse.Namespace) -> int:
    from rich.console import Console

    _check(options)
    text = _text(options)
    if not clean(text):
        raise ValueError(f"say: the text must have something to speak, got {text[:60]!r}; write letters or digits")
    voice = Voice.load(options.voice) if options.voice else None
    console = Console(stderr=True)
    with Writer(options.output) if options.output else nullcontext() as file:
        device = gpu.require(options.device or gpu.default_device())
        tts = _load(options, device, console)
        if options.reference:
            voice = tts.clone(options.reference, options.reference_text)
        if voice and options.save_voice:
            voice.save(options.save_voice)
        return _speak(tts, text, voice, options, file, console)


def _check(options: argparse.Namespace) -> None:
    if not options.output and not options.stream:
        raise ValueError("say: the speech must go somewhere, got no output; give -o out.wav, or --stream for a player")
    if options.stream and sys.stdout.isatty():
        raise ValueError("say: --stream must go to a player, got a terminal; add `| aplay -q -f S16_LE -r 44100`")
    if (options.reference is None) != (options.reference_text is None):
        raise ValueError("say: --reference and --reference-text must be given together, got one; give both")
    if options.reference and options.voice:
        raise ValueError("say: the voice must be --reference or --voice, got both; leave one out")
    if options.save_voice and not options.reference:
        raise ValueError("say: --save-voice must come with --reference, got none; give a recording")
    if options.text is not None and options.file:
        raise ValueError("say: the text must come from one place, got two; leave out --file or the text")


def _text(options: argparse.Namespace) -> str:
    if options.text is not None:
        return options.text
    if not options.file and sys.stdin.isatty():
        raise ValueError("say: there must be a text, got none; write it behind `say`, pipe it in, or give --file")
    source = options.file or "standard input"
    try:
        return (options.file.read_bytes() if options.file else sys.stdin.buffer.read()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"say: {source} must be UTF-8, got {error}; save it as UTF-8") from error


def _load(options: argparse.Namespace, device: torch.device, console: Console) -> Speech:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("loading", total=None)
        dtype = getattr(torch, options.dtype) if options.dtype else None

        def report(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        tts = Speech.from_checkpoint(options.checkpoint, device=device, dtype=dtype, progress=report)
        if device.type == "cuda":
            progress.update(bar, description="warming up")
            tts.warm_up()
    return tts


def _speak(
    tts: Speech, text: str, voice: Voice | None, options: argparse.Namespace, file: Writer | None, console: Console
) -> int:
    """Speak under a progress bar, into the file and to the player; close with a line of what it took."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("speaking"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    spoken, first, end, status = 0.0, 0.0, "", 0
    started = time.perf_counter()
    chunks = tts.stream(
        text, voice, seed=options.seed, temperature=options.temperature, top_p=options.top_p,
        max_seconds=options.max_seconds,
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=usual_seconds(clean(text)), state="")
        try:
            for samples in chunks:
                taken = time.perf_counter() - started
                first = first or taken
                spoken += len(samples) / tts.sample_rate
                if file:
                    file.write(samples, tts.sample_rate)
                if options.stream:
                    _play(samples)
                progress.update(bar, completed=spoken, state=f"{spoken:.1f} s, {spoken / taken:.2f} times real time")
        except KeyboardInterrupt:
            end, status = "interrupted: ", 130
        except IncompleteSpeech as error:
            end, status = f"{error}\n", 1
        except BrokenPipeError:
            end = "the player stopped: "
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would write there once more
    taken = time.perf_counter() - started
    where = f" in {options.output}" if file and spoken else ""
    line = f"{end}{spoken:.2f} s of speech{where}"
    if spoken:
        line += f"; first audio after {1e3 * first:.0f} ms, RTF {taken / spoken:.3f}, {spoken / taken:.2f} times real"
        line += f" time, {spoken * tts.frame_rate / taken:.1f} frames/s"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return status


def _play(samples: np.ndarray) -> None:
    sys.stdout.buffer.write((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    sys.stdout.buffer.flush()
