"""Speech from text: model, tokenizer and codec of one checkpoint directory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s1kernels.engine import Engine
from s1kernels.model import checkpoint
from s1kernels.sampling import Sampling
from s1kernels.speech import audio, tokenizer
from s1kernels.speech.audio import Audio
from s1kernels.speech.conversation import Conversation, IncompleteSpeech, Part
from s1kernels.speech.pipeline import CHUNKS, Codec, Pipeline
from s1kernels.speech.prompt import Prompt
from s1kernels.speech.text import clean, most_seconds, split
from s1kernels.speech.voice import Voice

SAMPLING = {"s1": Sampling(0.8, 0.8, 1.1), "2.0": Sampling(1.0, 0.9, top_k=30)}
"""Upstream's own defaults, line by line."""

WARM_POSITIONS = 4096  # of the cache, made at warm-up: a reference, what was said, and the most of a part

Chunk = tuple[Tensor, np.ndarray]  # codes [N, n] and their samples


class Speech:
    """Speaks texts, one at a time.

    Args:
        engine: decodes codes. text_tokenizer: of the same model. codec: makes sound of codes, on the same device.
    Raises:
        ValueError: model and codec do not fit together.

    >>> tts = Speech.from_checkpoint("checkpoints/openaudio-s1-mini", device="cuda")    # doctest: +SKIP
    >>> voice = tts.clone("ref.wav", "what is said in it")                              # doctest: +SKIP
    >>> tts.say("Hello there.", voice, seed=7).save("hello.wav")                        # doctest: +SKIP
    """

    def __init__(self, engine: Engine, text_tokenizer: tokenizer.Tokenizer, codec: Codec) -> None:
        codebooks, found = engine.config.codebooks, len(codec.codebook_sizes)
        if found != codebooks:
            expected = f"codec must have the model's {codebooks} codebooks"
            raise ValueError(f"Speech: {expected}, got {found}; take both from one checkpoint")
        self.engine, self.codec = engine, codec
        self.prompt = Prompt(engine.config, text_tokenizer)
        self.device = engine.weights.head.device
        self.pipeline = Pipeline(codec, self.device, beside=not engine.persistent)
        self._speaking = threading.Lock()

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Speech:
        """Read a checkpoint directory: model, tokenizer and codec.pth.

        Args:
            directory: as it is published.
            device: None is a GPU if torch finds one, else the CPU.
            dtype: of model and codec; None keeps the files'.
            progress: called with (bytes done, bytes in all) of the model.
            options: `backend`, `graph`, `persistent`, `packed` and `constrained`, as for `Engine`.
        Raises:
            FileNotFoundError: a file is missing. ValueError, TypeError: one is damaged, or they do not fit together.
            RuntimeError: the device cannot be used. ModuleNotFoundError: a package is missing.
        """
        directory = Path(directory)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        checkpoint.check_request(dtype, device)
        text_tokenizer = tokenizer.load(directory, checkpoint.read_config(directory))  # what is small is read first
        codec = load_codec(directory, torch.device(device), dtype)
        model = checkpoint.load(directory, dtype=dtype, device=device, progress=progress)
        return cls(Engine(model.config, model.weights, **options), text_tokenizer, codec)

    @property
    def sample_rate(self) -> int:
        """Samples a second, in Hz."""
        return self.codec.sample_rate

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.codec.sample_rate / self.codec.frame_samples

    def clone(self, path: str | Path, text: str) -> Voice:
        """A voice from a recording.

        Args:
            path: WAV, FLAC, OGG or MP3, 1 to 60 s, any rate; channels are averaged.
            text: what is said in it, word for word.
        Raises:
            FileNotFoundError, ValueError: the recording cannot be used, or text is empty; the message says why.
        """
        if not clean(text):
            raise ValueError(f"reference: text must be what is said in {path}, got {text!r}; write it down")
        samples = audio.read(path, self.sample_rate)
        with torch.inference_mode():
            return Voice(text, self.codec.encode(samples, self.sample_rate).cpu())

    def say(
        self,
        text: str,
        reference: Voice | Sequence[Voice] | None = None,
        *,
        seed: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        sampling: Sampling | None = None,
        max_seconds: float | None = None,
    ) -> Audio:
        """Speak a text.

        Args:
            text: of any length. A long one is spoken in parts, each after those before it in the same context.
            reference: whose voice; None is one that the model makes up, and keeps through the text.
            seed: same seed, same speech; None draws from torch's generator.
            temperature, top_p: how codes are drawn, beside what `sampling` says; None is upstream's default.
            max_seconds: that a part may take; None bounds it by its text, generously.
        Returns:
            Audio at `sample_rate`, with its codes.
        Raises:
            ValueError: there is nothing to speak, the reference does not fit the model or its context, or an argument
                is out of range. IncompleteSpeech: a part did not come to its end; `audio` has what was spoken.
            RuntimeError: another text is being spoken.
        """
        spoken: list[Chunk] = []
        try:
            for chunk in self._speak(text, reference, seed, self._sampling(temperature, top_p, sampling), max_seconds):
                spoken.append(chunk)
        except IncompleteSpeech as error:
            error.audio = self._joined(spoken)
            raise
        return self._joined(spoken)

    def stream(
        self,
        text: str,
        reference: Voice | Sequence[Voice] | None = None,
        *,
        seed: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        sampling: Sampling | None = None,
        max_seconds: float | None = None,
    ) -> Iterator[np.ndarray]:
        """As `say`, in chunks as soon as they are there: float32 [S] at `sample_rate`, small ones first.

        Joined they are what `say` returns. Arguments are checked at once, and `IncompleteSpeech` ends the last chunk.
        """
        chunks = self._speak(text, reference, seed, self._sampling(temperature, top_p, sampling), max_seconds)
        return _samples(chunks)

    def warm_up(self) -> None:
        """Do what the first text would wait for: compile, capture graphs, make room."""
        self.engine.cache.reserve(min(WARM_POSITIONS, self.engine.config.max_positions))
        prompt = torch.cat([self.prompt.opening(), self.prompt.turn("Hello.")], dim=1)
        generator = torch.Generator(self.device).manual_seed(0)
        list(self.engine.stream(prompt, 2, generator=generator))  # the first frame, and those after it
        silence = torch.zeros(self.engine.config.codebooks, dtype=torch.int32)
        list(self._alone([silence] * sum(CHUNKS)))

    def _sampling(self, temperature: float | None, top_p: float | None, sampling: Sampling | None) -> Sampling:
        given = sampling or SAMPLING[self.engine.config.line]
        if temperature is not None:
            given = replace(given, temperature=temperature)
        return given if top_p is None else replace(given, top_p=top_p)

    def _speak(
        self,
        text: str,
        reference: Voice | Sequence[Voice] | None,
        seed: int | None,
        sampling: Sampling,
        max_seconds: float | None,
    ) -> Generator[Chunk, None, None]:
        """Check everything, then speak chunk by chunk."""
        parts = self._parts(text, max_seconds)
        references = [] if reference is None else [reference] if isinstance(reference, Voice) else list(reference)
        if not all(isinstance(voice, Voice) for voice in references):
            got = ", ".join(type(voice).__name__ for voice in references)
            raise TypeError(f"speech: reference must be a Voice, got {got}; make it by clone() or Voice.load()")
        opening = self.prompt.opening(references)
        need = opening.shape[1] + max(part.turn.shape[1] + part.frames for part in parts)
        if need > (limit := self.engine.config.max_positions):
            raise ValueError(
                f"speech: reference and text must fit the model's {limit} positions, got {need}; shorten the reference "
                "or give a lower max_seconds"
            )
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        conversation = Conversation(self.engine, self.prompt, opening, self.frame_rate)
        return self._alone(frame for part in parts for frame in conversation.speak(part, sampling, generator))

    def _parts(self, text: str, max_seconds: float | None) -> list[Part]:
        if not isinstance(text, str):
            raise TypeError(f"speech: text must be a str, got {type(text).__name__}; decode it")
        if max_seconds is not None and not max_seconds > 0:
            raise ValueError(f"speech: max_seconds must be positive, got {max_seconds}; leave it out")
        parts = []
        for part in split(clean(text)):
            seconds = most_seconds(part) if max_seconds is None else max_seconds
            parts.append(Part(part, self.prompt.turn(part), max(1, round(seconds * self.frame_rate))))
        if not parts:
            raise ValueError(f"speech: text must have something to speak, got {text[:60]!r}; write letters or digits")
        return parts

    def _alone(self, frames: Iterable[Tensor]) -> Generator[Chunk, None, None]:
        """The sound of frames, while no other text is spoken."""
        if not self._speaking.acquire(blocking=False):
            raise RuntimeError("speech: one text must be spoken at a time, got a second; finish or close the first")
        try:
            yield from self.pipeline.sounds(frames)
        finally:
            self._speaking.release()

    def _joined(self, chunks: list[Chunk]) -> Audio:
        codes = [torch.zeros(self.engine.config.codebooks, 0, dtype=torch.int32), *(codes for codes, _ in chunks)]
        samples = [np.zeros(0, np.float32), *(samples for _, samples in chunks)]
        return Audio(np.concatenate(samples), self.sample_rate, torch.cat(codes, dim=1))


def _samples(chunks: Generator[Chunk, None, None]) -> Iterator[np.ndarray]:
    """What is heard of chunks. Whoever closes it closes them: in Python 3.12 a generator expression would not."""
    with closing(chunks):
        for _, samples in chunks:
            yield samples


def load_codec(directory: Path, device: torch.device, dtype: torch.dtype | None) -> Codec:
    """The codec of a checkpoint directory."""
    from s1kernels.speech.codec import Codec

    return Codec.from_checkpoint(directory, device=device, dtype=dtype)
