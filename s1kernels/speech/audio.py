"""Sound in files: references are read, speech is written as it comes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from s1kernels import extras

SHORTEST, LONGEST = 1.0, 60.0
"""Seconds of a reference. Shorter ones hardly have a voice; longer ones take the context that speech needs."""

SILENT = 1e-3  # full scale is 1

FORMATS = (".wav", ".flac", ".ogg")


@dataclass(frozen=True, eq=False)
class Audio:
    """Speech.

    samples: [S] float32 in [-1, 1]; sample_rate: of them, in Hz; codes: [N, T] int32, what was decoded into them.
    """

    samples: np.ndarray
    sample_rate: int
    codes: Tensor

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sample_rate

    def save(self, path: str | Path) -> None:
        """Write it to a WAV, FLAC or OGG file. Raises as `Writer` does."""
        with Writer(path) as file:
            file.write(self.samples, self.sample_rate)


class Writer:
    """A WAV, FLAC or OGG file that is written as speech comes, and is whole whenever it is closed.

    The file is made when the first samples are written; that it can be is found at once.

    Args:
        path: its name, whose suffix says the format.
    Raises:
        ValueError: no such format. OSError: the file cannot be written.
        ModuleNotFoundError: soundfile is not installed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self._soundfile = Path(path), extras.load("speech", "soundfile")
        if self.path.suffix.lower() not in FORMATS:
            raise ValueError(f"speech: {path} must end in one of {', '.join(FORMATS)}, got {self.path.suffix!r}")
        self._made = not self.path.exists()
        self.path.open("ab").close()  # raises if it cannot be written, and leaves what it holds
        self._file: Any = None

    def write(self, samples: np.ndarray, sample_rate: int) -> None:
        """Append samples [S], float32 in [-1, 1], all at one rate in Hz."""
        if self._file is None:
            self._file = self._soundfile.SoundFile(self.path, "w", sample_rate, channels=1)
        self._file.write(samples)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        elif self._made:
            os.unlink(self.path)


def read(path: str | Path, sample_rate: int) -> np.ndarray:
    """A reference as one channel at `sample_rate`: channels are averaged, other rates resampled.

    Returns:
        [S] float32.
    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no audio file, broken, too short, too long, or
            silent.
        ModuleNotFoundError: soundfile or soxr is not installed.
    """
    path, soundfile, soxr = Path(path), extras.load("speech", "soundfile"), extras.load("speech", "soxr")
    if not path.is_file():
        raise FileNotFoundError(f"reference: {path} must be an audio file, got none; give the path of a recording")
    try:
        with soundfile.SoundFile(path) as file:
            seconds = file.frames / file.samplerate
            if not SHORTEST <= seconds <= LONGEST:
                expected = f"{SHORTEST:g} to {LONGEST:g} s long"
                raise _unusable(path, expected, f"{seconds:.2f} s", "use 10 to 30 s of clear speech")
            samples, found = file.read(dtype="float32", always_2d=True), file.samplerate
    except soundfile.LibsndfileError as error:
        got = str(error).split(": ")[-1]
        raise _unusable(path, "a WAV, FLAC, OGG or MP3 file", got, "convert it, such as by ffmpeg") from error
    if len(samples) < seconds * found - 1:
        got = f"{len(samples) / found:.2f} s"
        raise _unusable(path, f"{seconds:.2f} s long, as its header says", got, "copy it again")
    mono = samples.mean(axis=1)
    if not np.isfinite(mono).all():
        raise _unusable(path, "finite", "NaN or infinity", "record or convert it again")
    if np.abs(mono).max() < SILENT:
        raise _unusable(path, "audible", f"a peak of {np.abs(mono).max():.1e}", "raise its volume or record it again")
    return mono if found == sample_rate else soxr.resample(mono, found, sample_rate)


def _unusable(path: Path, expected: str, got: str, advice: str) -> ValueError:
    return ValueError(f"reference: {path} must be {expected}, got {got}; {advice}")
