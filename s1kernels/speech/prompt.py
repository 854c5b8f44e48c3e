"""What the model reads before it speaks, as both lines lay it out: references, then texts, each with its speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s1kernels.model.config import DualARConfig
from s1kernels.speech.text import clean
from s1kernels.speech.tokenizer import Tokenizer
from s1kernels.speech.voice import Voice

SPEAKER = "<|speaker:{}|>"


@dataclass(frozen=True)
class Prompt:
    """Lays out frames ([N+1, T] int32, row 0 the token, rows 1 ... N a frame's codes or zeros) for one model.

    A conversation is `opening`, then `turn`, its speech with the end token's frame, `closing`, the next `turn`, and so
    on. Texts are to be clean.

    Source: generate_long in fish_speech/models/text2semantic/inference.py, of each line.
    """

    config: DualARConfig
    tokenizer: Tokenizer

    def opening(self, references: Sequence[Voice] = ()) -> Tensor:
        """What comes before the first text. Raises ValueError for references of another codec."""
        for voice in references:
            self._check(voice)
        if self.config.line == "s1":
            return self._join([self._special("<|interleave|>"), *(self._reference(voice) for voice in references)])
        task = "convert the provided text to speech"
        said: list[Tensor] = []
        if references:
            tagged = [(SPEAKER.format(i), clean(voice.text) + "\n") for i, voice in enumerate(references)]
            tagged[-1] = (tagged[-1][0], tagged[-1][1].removesuffix("\n"))
            task += " reference to the following:\n\nText:\n"
            said = [self._tokens(self.tokenizer.tagged(tagged)), self._text("\n\nSpeech:\n")]
            said.append(self.speech(torch.cat([voice.codes for voice in references], dim=1)))
        return self._join([self._role("system"), self._text(task), *said, self._special("<|im_end|>"), self.closing()])

    def turn(self, text: str) -> Tensor:
        """A text, up to where its speech starts."""
        if self.config.line == "s1":
            return self._join([self._tokens(self.tokenizer.tagged([(SPEAKER.format(0), "")])), self._text(text)])
        return self._join([
            self._role("user"), self._text(text), self._special("<|im_end|>"), self.closing(), self._role("assistant"),
            self._special("<|voice|>"),
        ])  # fmt: skip

    def closing(self) -> Tensor:
        """What follows the end token's frame."""
        return self._text("" if self.config.line == "s1" else "\n")

    def speech(self, codes: Tensor) -> Tensor:
        """Speech as frames, from its codes [N, T]."""
        codes = codes.to(torch.int32)
        return torch.cat([codes[:1] + self.config.semantic_begin, codes])

    def spoken(self, text: str, codes: Tensor) -> Tensor:
        """A text that has been spoken, with its codes [N, T]."""
        return self._join([self.turn(text), self.speech(codes), self._special("<|im_end|>"), self.closing()])

    def _reference(self, voice: Voice) -> Tensor:
        return self.spoken(clean(voice.text), voice.codes)

    def _check(self, voice: Voice) -> None:
        c = self.config
        sizes = [min(c.codebook_size, c.semantic_end - c.semantic_begin + 1)] + [c.codebook_size] * (c.codebooks - 1)
        most = voice.codes.amax(dim=1).tolist()
        if len(most) != len(sizes) or any(code >= size for code, size in zip(most, sizes, strict=True)):
            raise ValueError(
                f"reference: codes must be [N={c.codebooks}, T] below {sizes}, got {list(voice.codes.shape)} up to "
                f"{most}; clone the voice by this model's codec"
            )

    def _role(self, role: str) -> Tensor:
        return self._join([self._special("<|im_start|>"), self._text(f"{role}\n")])

    def _special(self, token: str) -> Tensor:
        return self._tokens([self.tokenizer.special(token)])

    def _text(self, text: str) -> Tensor:
        return self._tokens(self.tokenizer.plain(text))

    def _tokens(self, tokens: list[int]) -> Tensor:
        frames = torch.zeros(self.config.codebooks + 1, len(tokens), dtype=torch.int32)
        frames[0] = torch.tensor(tokens, dtype=torch.int32)
        return frames

    def _join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1)
