"""What `demo --wav` writes: the demo's model through a codec. Seeded random weights make it noise."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

import s1kernels
from s1kernels.model import checkpoint
from s1kernels.speech import IncompleteSpeech, Speech, tokenizer
from s1kernels.speech.audio import Writer
from s1kernels.speech.pipeline import Codec
from s1kernels.speech.speech import load_codec
from s1kernels.speech.tokenizer import Tokenizer

TEXT = "The birch canoe slid on the smooth planks."
SECONDS = 3.0  # of noise, at most
POSITIONS = 384  # of the cache, that the sentence takes at most
NOISE = "noise by design, for the weights of model and codec are random"


def published(directory: Path, device: torch.device, dtype: torch.dtype) -> tuple[Tokenizer, Codec]:
    """Tokenizer and codec of a checkpoint directory.

    Raises:
        FileNotFoundError: a file is missing. ValueError, TypeError: one is damaged.
        ModuleNotFoundError: tiktoken is not installed.
    """
    return tokenizer.load(directory, checkpoint.read_config(directory)), load_codec(directory, device, dtype)


def of_bytes() -> Tokenizer:
    """A tokenizer for a model that knows no words."""
    return Tokenizer(lambda text: list(text.encode()), {"<|interleave|>": 1, "<|im_end|>": 0}, "bytes")


def speak(model: Any, text_tokenizer: Tokenizer, codec: Codec, noise: bool, file: Writer) -> dict[str, Any]:
    """Speak TEXT into the file by an upstream model, patched meanwhile; `noise` for SECONDS at most.

    Returns:
        Seconds of sound, of time in all and to the first sound, and what it is that was said.
    """
    s1kernels.patch(model)
    try:
        tts, said = Speech(s1kernels.engine_of(model), text_tokenizer, codec), NOISE if noise else TEXT
        tts.warm_up()
        start, first, samples = time.perf_counter(), 0.0, 0
        try:
            for chunk in tts.stream(TEXT, seed=0, max_seconds=SECONDS if noise else None):
                first = first or time.perf_counter() - start
                samples += len(chunk)
                file.write(chunk, tts.sample_rate)
        except IncompleteSpeech as error:
            said = NOISE if noise else str(error)
        taken = time.perf_counter() - start
    finally:
        s1kernels.unpatch(model)
    sound = {"file": file.path.name, "sound_seconds": samples / tts.sample_rate, "seconds": taken}
    return sound | {"first_sound_seconds": first, "said": said}
