"""Checkpoint directories that can speak, as far as codes go, and a stand-in for the codec."""

import base64
import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
from checkpoint_files import CODES, SIZES, edit_pth
from fish_speech.models.text2semantic import llama
from fish_speech.tokenizer import ALL_SPECIAL_TOKENS, FishTokenizer

LEARNED = [
    "The quick brown fox jumps over the lazy dog. It's 12:30, isn't it? There, there.",
    "你好世界，今天天气很好。你好！ これは日本語の文です。 안녕하세요, 반갑습니다.",
    "Größe, naïve café; señor. Ελληνικά. Привет, мир! 🙂 emoji <|im_end|>",
]
SAMPLE_RATE, FRAME_SAMPLES = 44100, 2048


def train(merges: int = 80) -> tokenizers.Tokenizer:
    """A byte-level tokenizer of a few words."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(LEARNED * 3, trainer)
    return tokenizer


def save_tiktoken(path: Path) -> int:
    """tokenizer.tiktoken; returns how many tokens it has."""
    model = json.loads(train().to_str())["model"]
    written = {char: bytes([byte]) for byte, char in _byte_characters().items()}
    tokens = [bytes([byte]) for byte in range(256)]
    for first, second in model["merges"]:
        tokens.append(b"".join(written[char] for char in first + second))
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return len(tokens)


def save_s1(directory: Path, end: float = 3.0, **overrides) -> Path:
    """A small S1 model, saved by upstream's own code. `end` makes the end token more likely than others."""
    directory.mkdir(exist_ok=True)
    texts = save_tiktoken(directory / "tokenizer.tiktoken")
    tokenizer = FishTokenizer(directory / "tokenizer.tiktoken", ALL_SPECIAL_TOKENS[: 15 + CODES])
    sizes = SIZES | dict(vocab_size=texts + 15 + CODES, max_seq_len=4096) | overrides
    torch.manual_seed(0)
    llama.DualARTransformer(llama.DualARModelArgs(**sizes), tokenizer).save_pretrained(directory)

    def speech_only(state):
        head = state["output.weight"]
        last = head[texts + 4] * end
        head[: texts + 15] = 0  # neither text nor other special tokens are ever the likeliest
        head[texts + 4] = last
        return state

    edit_pth(directory, speech_only)
    return directory


def _byte_characters() -> dict[int, str]:
    """How byte-level tokenizers write bytes: visible ones as they are, others from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class StandInCodec:
    """Codes to steps and back: a step's height depends on every code so far, so that order and state matter."""

    sample_rate, frame_samples = SAMPLE_RATE, FRAME_SAMPLES

    def __init__(self, codebooks: int = 3) -> None:
        self.codebook_sizes, self.chunks = (CODES,) * codebooks, []

    def decode(self, codes):
        return StandInStream(self).push(codes)

    def encode(self, audio, sample_rate):
        assert sample_rate == SAMPLE_RATE and audio.ndim == 1 and audio.dtype == np.float32
        frames = -(-len(audio) // FRAME_SAMPLES)
        loudness = np.abs(np.resize(audio, frames * FRAME_SAMPLES).reshape(frames, -1)).mean(1)
        codes = torch.from_numpy((loudness * 997).astype(np.int64) % CODES)
        return torch.stack([(codes + i) % CODES for i in range(len(self.codebook_sizes))])

    def stream(self, chunks=()):
        return StandInStream(self)


class StandInStream:
    def __init__(self, codec):
        self.codec, self.total = codec, 0

    def reset(self):
        self.total = 0

    def push(self, codes):
        sizes = torch.tensor(self.codec.codebook_sizes)[:, None]
        assert codes.shape[0] == len(sizes) and codes.shape[1] >= 1 and (codes < sizes).all()
        self.codec.chunks.append(codes.shape[1])
        weights = 1 + 4 * torch.arange(len(sizes))[:, None]
        totals = self.total + (codes.long() * weights).sum(0).cumsum(0)
        self.total = int(totals[-1])
        return (totals % 97 / 97 - 0.5).float().repeat_interleave(FRAME_SAMPLES)
