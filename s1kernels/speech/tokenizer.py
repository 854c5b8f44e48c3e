"""Both lines' tokenizers, from a checkpoint's files. What a user types is never taken for a special token."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s1kernels import extras
from s1kernels.model.config import DualARConfig

PATTERN = "|".join((
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\p{P}", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+", r"\s+(\?!\S)", r"\s+",
))  # fmt: skip
"""How the S1 line cuts text into pieces. Upstream's, its escaped question mark included: the model knows no other."""

SPECIALS = (
    "begin_of_text", "end_of_text", "pad", "im_start", "im_end", "phoneme_start", "phoneme_end", "tool_call_start",
    "tool_call_end", "text", "voice", "interleave", "audio_start", "audio_end", "audio",
)  # fmt: skip
UPSTREAM_SPECIALS = [f"<|{name}|>" for name in (*SPECIALS, *(f"semantic:{code}" for code in range(1024)))]
"""The S1 line's special tokens, in order, where no special_tokens.json says otherwise."""

TIKTOKEN, SPECIAL_TOKENS, JSON = "tokenizer.tiktoken", "special_tokens.json", "tokenizer.json"


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids.

    `plain` encodes a text, whatever it looks like, as text; `specials` has the ids of special tokens; `file` is where
    they come from.
    """

    plain: Callable[[str], list[int]]
    specials: dict[str, int]
    file: str

    def special(self, token: str) -> int:
        """The id of a special token. Raises ValueError naming the file that lacks it."""
        if token not in self.specials:
            raise _error(f"{token} must be in {self.file}", "nothing", "download the tokenizer of this model")
        return self.specials[token]

    def tagged(self, tagged: list[tuple[str, str]]) -> list[int]:
        """The ids of texts behind tags such as `<|speaker:0|>`, which a tokenizer may have as special tokens or not."""
        if all(tag in self.specials for tag, _ in tagged):
            return [token for tag, text in tagged for token in (self.specials[tag], *self.plain(text))]
        return self.plain("".join(tag + text for tag, text in tagged))


def load(directory: str | Path, config: DualARConfig) -> Tokenizer:
    """The tokenizer of a checkpoint directory: tokenizer.tiktoken and special_tokens.json (the S1 line), or
    tokenizer.json (the 2.0 line).

    Args:
        directory: where the files lie. config: the model's, whose ids they must agree with.
    Raises:
        FileNotFoundError: a file is missing. ValueError: it is damaged, or another model's.
        ModuleNotFoundError: tiktoken (S1) or tokenizers (2.0) is not installed.
    """
    directory = Path(directory)
    tokenizer, text_tokens = (_load_s1 if config.line == "s1" else _load_omni)(directory)
    ids = {"end_token": "<|im_end|>", "semantic_begin": "<|semantic:0|>"}
    ids["semantic_end"] = f"<|semantic:{config.semantic_end - config.semantic_begin}|>"
    for name, token in ids.items():
        if (found := tokenizer.special(token)) != getattr(config, name):
            got = f"{found}, where the model has {getattr(config, name)}"
            raise _error(f"{token} in {tokenizer.file} must be the model's", got, "download both from one place")
    most = max(text_tokens, *tokenizer.specials.values())
    if most >= config.vocab_size:
        expected = f"token ids in {tokenizer.file} must be below the model's vocab_size={config.vocab_size}"
        raise _error(expected, str(most), "download both from one place")
    return tokenizer


def _load_s1(directory: Path) -> tuple[Tokenizer, int]:
    """The tokenizer and its last text token."""
    tiktoken = extras.load("speech", "tiktoken")
    ranks = _ranks(directory / TIKTOKEN)
    named = UPSTREAM_SPECIALS
    if (directory / SPECIAL_TOKENS).is_file():
        named = list(_json(directory / SPECIAL_TOKENS))
    specials = {name: len(ranks) + i for i, name in enumerate(named)}  # in the file's order, as upstream counts
    encoding = tiktoken.Encoding("s1", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(encoding.encode_ordinary, specials, SPECIAL_TOKENS), len(ranks) - 1


def _ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken file with their ranks: lines of base64 and a number."""
    lines = [line.split() for line in _read(path).splitlines() if line]
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines if token != b"="}
    except (ValueError, binascii.Error) as error:
        raise _error(f"{path.name} must be lines of a token in base64 and its rank", "others") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _error(f"ranks in {path.name} must be 0, 1, 2, ..., each once", "others")
    if absent := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise _error(f"{path.name} must have a token for every byte", f"none for byte {absent[0]}")
    return ranks


def _load_omni(directory: Path) -> tuple[Tokenizer, int]:
    tokenizers = extras.load("speech", "tokenizers")
    found = _json(directory / JSON)
    try:
        specials = {token["content"]: int(token["id"]) for token in found.get("added_tokens") or []}
        plain = tokenizers.Tokenizer.from_str(json.dumps(found | {"added_tokens": []}))  # then none is found in a text
    except Exception as error:  # the library raises Exception itself
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        raise _error(f"{JSON} must be a file of the tokenizers library", got) from error

    def encode(text: str) -> list[int]:
        return plain.encode(text, add_special_tokens=False).ids

    return Tokenizer(encode, specials, JSON), plain.get_vocab_size() - 1


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise _error(f"{path.name} must be in {path.parent}", "no such file", "download it", FileNotFoundError)
    return path.read_bytes()


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise _error(f"{path.name} must be JSON", str(error).splitlines()[0]) from error
    if not isinstance(value, dict):
        raise _error(f"{path.name} must be a JSON object", type(value).__name__)
    return value


def _error(claim: str, got: str, advice: str = "download it again", kind: type[Exception] = ValueError) -> Exception:
    return kind(f"tokenizer: {claim}, got {got}; {advice}")
