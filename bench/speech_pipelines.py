"""Text in, sound out, by two pipelines on the same seeded weights: s1kernels' own and upstream's."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import codec_models
import torch
import upstream_step
from torch import Tensor, nn

from s1kernels import Engine, IncompleteSpeech, Speech, Voice, fish_speech
from s1kernels.bench import models, speech
from s1kernels.bench.timing import Refused
from s1kernels.cli import demo, gpu
from s1kernels.model.config import DualARConfig
from s1kernels.model.weights import Weights
from s1kernels.speech.codec import Codec, Settings
from s1kernels.speech.prompt import Prompt
from s1kernels.speech.speech import SAMPLING
from s1kernels.speech.text import clean, split
from s1kernels.speech.tokenizer import Tokenizer

SPECIALS = {"<|interleave|>": 300, "<|im_end|>": models.END}
TEXT = "The birch canoe slid on the smooth planks while the boy glued the sheet to the dark blue background. "
NEVER = -1  # an end token that cannot be drawn


@dataclass(frozen=True)
class Spoken:
    """Seconds to the first sound on the host and in all, and the samples that came."""

    first: float
    all: float
    samples: int


@dataclass(frozen=True)
class Given:
    """What both pipelines have in common: shapes, weights by their seed, voice, texts."""

    small: bool
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def shape(self) -> DualARConfig:
        """S1-mini's, with its 8192 positions."""
        return models.config(self.small, 2048 if self.small else 8192)

    @cached_property
    def voice(self) -> Voice:
        return Voice("What is said.", models.prompt(self.shape, speech.REFERENCE_FRAMES, torch.device("cpu"))[1:])

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(tokens, SPECIALS, "none")

    def weights(self) -> Weights:
        return models.weights(self.shape, self.dtype, self.device)

    def dac(self) -> tuple[nn.Module, Settings]:
        """Upstream's codec, in float32 on the CPU, and what its tensors do not say."""
        if self.small:
            return codec_models.build(codes=(4096, *[1024] * (self.shape.codebooks - 1))), codec_models.SETTINGS
        return codec_models.build_full(), Settings()

    def codec(self) -> Codec:
        dac, settings = self.dac()
        return Codec.from_state(dac.state_dict(), self.device, self.dtype, settings)

    def frames(self, characters: int) -> int:
        """Of a text that takes as long as it is read aloud."""
        return max(1, round(characters / speech.CHARACTERS_PER_SECOND * demo.FRAMES_PER_SECOND))


def tokens(text: str) -> list[int]:
    """As many tokens as a tokenizer makes of English, whatever they are."""
    return [1 + byte for byte in text.encode()[:: speech.CHARACTERS_PER_TOKEN]]


def text(characters: int) -> str:
    return (TEXT * math.ceil(characters / len(TEXT)))[:characters]


class Ours:
    """s1kernels.Speech.

    Raises:
        Refused: the persistent kernel is asked for, and cannot run here.
    """

    def __init__(self, given: Given, persistent: bool) -> None:
        self.given = given
        engine = Engine(given.shape, given.weights(), persistent=persistent)
        if persistent and not engine.persistent:
            raise Refused(getattr(engine.decoder.frame, "persistent", "") or "no persistent kernel here")
        self.tts = Speech(engine, given.tokenizer, given.codec())

    def warm_up(self) -> None:
        self.tts.warm_up()

    def speak(self, characters: int, seed: int) -> Spoken:
        """A text that goes on as long as it takes to read aloud."""
        gpu.synchronize(self.given.device)
        start, first, samples = time.perf_counter(), 0.0, 0
        try:
            seconds = characters / speech.CHARACTERS_PER_SECOND
            for chunk in self.tts.stream(text(characters), self.given.voice, seed=seed, max_seconds=seconds):
                first = first or time.perf_counter() - start
                samples += len(chunk)
        except IncompleteSpeech:
            pass  # random weights know no end
        return Spoken(first, time.perf_counter() - start, samples)

    def sound(self, codes: Tensor) -> Tensor:
        return self.tts.codec.decode(codes)


class Upstream:
    """fish-speech 0.1.0: its generate(), eager or with its step compiled as its init_model does it, then its codec's
    decode of all codes, samples to the host. Model and codec are in one dtype."""

    def __init__(self, given: Given, compiled: bool) -> None:
        self.given, self.inference = given, fish_speech.upstream_module()
        shape = given.shape
        what = argparse.Namespace(
            checkpoint=None, small=given.small, device=str(given.device), cache=shape.max_positions
        )
        self.model, _ = demo.build(what, given.dtype)
        self.model.tokenizer.get_token_id = lambda token: NEVER
        fill(self.model, shape, given.weights())
        self.dac = given.dac()[0].to(given.device, given.dtype)
        self.prompt = Prompt(shape, given.tokenizer)
        self.step: dict[str, Callable[..., Tensor]] = {}
        if compiled:
            self.step["decode_one_token"] = upstream_step.compiled(self.inference, given.device)

    def warm_up(self) -> None:
        for seed in range(2):  # compilation, then capture
            self.speak(speech.CHARACTERS[0], seed)

    def speak(self, characters: int, seed: int) -> Spoken:
        """The same, of as many frames; the first sound comes with the last."""
        device, chosen = self.given.device, SAMPLING["s1"]
        torch.manual_seed(seed)
        bar, self.inference.tqdm = self.inference.tqdm, iter
        gpu.synchronize(device)
        start = time.perf_counter()
        try:
            turn = self.prompt.turn(split(clean(text(characters)))[0])
            prompt = torch.cat([self.prompt.opening([self.given.voice]), turn], dim=1).to(device)
            frames = self.inference.generate(
                model=self.model, prompt=prompt, max_new_tokens=self.given.frames(characters), audio_masks=None,
                audio_parts=None, temperature=chosen.temperature, top_p=chosen.top_p,
                repetition_penalty=chosen.repetition_penalty, **self.step,
            )  # fmt: skip
        finally:
            self.inference.tqdm = bar
        samples = self.sound(frames[1:, prompt.shape[1] :]).float().cpu().numpy()
        taken = time.perf_counter() - start
        return Spoken(taken, taken, len(samples))

    @torch.inference_mode()
    def sound(self, codes: Tensor) -> Tensor:
        codes = codes.to(self.given.device, torch.int64)
        lengths = torch.tensor([codes.shape[1]], device=self.given.device)
        return self.dac.decode(codes[None], lengths)[0][0, 0]


@torch.no_grad()
def fill(model: Any, shape: DualARConfig, weights: Weights) -> None:
    """Give an upstream model these weights. Raises ValueError if its shape is another."""
    theirs = Weights.from_state_dict(shape, dict(model.named_parameters()))
    for mine, given in zip(theirs.flat(), weights.flat(), strict=True):
        mine.copy_(given)
