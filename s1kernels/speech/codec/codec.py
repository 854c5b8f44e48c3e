"""What a program calls: `Codec`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s1kernels.speech.codec import state as files
from s1kernels.speech.codec.layers import Past
from s1kernels.speech.codec.network import FRAMES, Decoder, Encoder, Quantizers, Settings
from s1kernels.speech.codec.state import State, error
from s1kernels.speech.codec.stream import Stream


class Codec:
    """Codes to audio and back. Made by `from_checkpoint` or `from_state`.

    sample_rate: Hz. frame_samples: samples of a frame. codebook_sizes: codes of each codebook, in the order of rows.

    >>> codec = Codec.from_checkpoint("checkpoints/openaudio-s1-mini", device="cuda")    # doctest: +SKIP
    >>> codec.decode(codec.encode(audio, 44100))    # doctest: +SKIP
    """

    def __init__(self, state: State, settings: Settings) -> None:
        self.encoder = Encoder(state, settings)
        self.quantizers = Quantizers(state, self.encoder.width)
        self.decoder = Decoder(state, self.encoder.width, settings)
        state.finish()
        self.sample_rate, self.frame_samples = settings.sample_rate, self.decoder.frame_samples
        self.codebook_sizes, self.codebooks = self.quantizers.sizes, len(self.quantizers.sizes)
        self.device, self.dtype = state.device, state.dtype
        self._lock = threading.Lock()  # of what `decode` shares between calls on a GPU
        self._shared: tuple[Stream, torch.cuda.Event] | None = None

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
        settings: Settings | None = None,
    ) -> Codec:  # fmt: skip
        """Read a codec from its file.

        Args:
            path: codec.pth as it is published, or the folder that it is in.
            device: where the weights go.
            dtype: float32, bfloat16 or float16; None keeps the file's. The codebooks are float32 in any case.
            settings: what the file's tensors do not say; None: S1-mini's.
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or a tensor is missing, unknown, misshapen or not finite; the message names it.
            TypeError: a tensor is quantised, or dtype is none of the three.
        """
        return cls.from_state(files.read(path), device, dtype, settings)

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
        settings: Settings | None = None,
    ) -> Codec:  # fmt: skip
        """As `from_checkpoint`, from the state dict of upstream's module."""
        return cls(State(state, torch.device(device), dtype), settings or Settings())

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """The audio of codes. On a GPU the first call with more than 32 frames captures a CUDA graph, which it replays,
        and later calls do, one after another.

        Args:
            codes: [N, T] int32 or int64, T frames, on any device; left as they are.
        Returns:
            [T * frame_samples] float32 in [-1, 1], on the codec's device.
        Raises:
            ValueError, TypeError: codes are no such tensor, or one is outside its codebook.
        Numerics: convolutions and products in the codec's dtype, the vectors of the codes and the last tanh in float32.
        Source: fish_speech/models/dac/modded_dac.py, DAC.decode.
        """
        codes = self.known(codes)
        if self.device.type == "cuda" and (self._shared or codes.shape[1] > FRAMES):
            return self._replayed(codes)
        return self.stream().push(codes)

    @torch.inference_mode()
    def encode(self, audio: Tensor | np.ndarray, sample_rate: int) -> Tensor:
        """The codes of audio.

        Args:
            audio: [samples] or [channels, samples], floating, full scale at 1; channels are averaged. The last frame is
                filled up with silence.
            sample_rate: Hz; must be the codec's.
        Returns:
            [N, ceil(samples / frame_samples)] int64, on the codec's device.
        Raises:
            ValueError, TypeError: audio is no such array, is shorter than a frame, is not finite, or has another rate.
        Numerics: as `decode`; the search in the codebooks is in float32.
        Source: fish_speech/models/dac/modded_dac.py, DAC.encode.
        """
        samples = self._mono(audio, sample_rate)
        samples = torch.nn.functional.pad(samples, (0, -samples.shape[0] % self.frame_samples))
        past, codes = Past(self.device), []
        for part in samples.to(self.device, self.dtype).split(FRAMES * self.frame_samples):
            codes.append(self.quantizers.codes(self.encoder(part[:, None], past)))
            past.turn.bitwise_xor_(1)
        return torch.cat(codes, dim=1)

    def stream(self, chunks: Sequence[int] = ()) -> Stream:
        """A decoder that takes its codes chunk by chunk.

        Args:
            chunks: numbers of frames for which a GPU captures a CUDA graph, now; chunks of other sizes run op by op.
                The CPU has no use for them.
        """
        return Stream(self, chunks)

    def known(self, codes: Tensor) -> Tensor:
        """The codes on the host. Raises unless `decode` can take them."""
        if not isinstance(codes, Tensor) or codes.dtype not in (torch.int32, torch.int64):
            got = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
            raise error("codes must be an int32 or int64 tensor", got, "convert them", TypeError)
        if codes.dim() != 2 or codes.shape[0] != self.codebooks or codes.shape[1] == 0:
            advice = "pass one row a codebook and one column a frame"
            raise error(f"codes must be [N={self.codebooks}, T >= 1]", list(codes.shape), advice)
        here = codes.cpu()
        values = here.numpy()
        bounds = zip(values.min(axis=1).tolist(), values.max(axis=1).tolist(), self.codebook_sizes, strict=True)
        for row, (low, high, size) in enumerate(bounds):
            if low < 0 or high >= size:
                got = low if low < 0 else high
                raise error(f"codes[{row}] must be in [0, {size})", got, "pass the codes without the text's row")
        return here

    def _replayed(self, codes: Tensor) -> Tensor:
        """`decode` by a graph of FRAMES frames. The last ones are filled up: what comes later does not change them."""
        here = torch.cuda.current_stream(self.device)
        with self._lock:
            self._shared = self._shared or (self.stream((FRAMES,)), torch.cuda.Event())
            tape, done = self._shared
            here.wait_event(done)  # of the call before, which may be in another stream
            tape.reset()
            audio = tape.push(torch.nn.functional.pad(codes, (0, -codes.shape[1] % FRAMES)))
            done.record(here)
        return audio[: codes.shape[1] * self.frame_samples]

    def _mono(self, audio: Tensor | np.ndarray, sample_rate: int) -> Tensor:
        if sample_rate != self.sample_rate:
            raise error(f"sample_rate must be {self.sample_rate} Hz", sample_rate, "resample the audio")
        if isinstance(audio, np.ndarray):
            audio = torch.from_numpy(np.ascontiguousarray(audio))
        if not isinstance(audio, Tensor) or not audio.is_floating_point():
            got = audio.dtype if isinstance(audio, Tensor) else type(audio).__name__
            raise error("audio must be a floating tensor or array", got, "scale it to [-1, 1]", TypeError)
        if audio.dim() == 2 and audio.shape[0] > audio.shape[1]:
            raise error("audio must be [channels, samples]", list(audio.shape), "transpose it")
        if audio.dim() not in (1, 2) or audio.numel() == 0 or audio.shape[-1] < self.frame_samples:
            expected = f"audio must be [samples] or [channels, samples], {self.frame_samples} samples or more"
            raise error(expected, list(audio.shape), "pass a longer recording")
        mono = audio.float().mean(dim=0) if audio.dim() == 2 else audio.float()
        if not mono.isfinite().all():
            raise error("audio must be finite", "NaN or infinity", "is the file damaged?")
        return mono
