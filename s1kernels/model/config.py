"""The shape of a DualAR model. The only place, with `patch.py`, that knows upstream's names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

Line = Literal["s1", "2.0"]
"""Upstream's two code lines: they control repetition differently and sample different rows of the fast head."""

MODEL_KEYS = {
    "text_embedding": "embeddings.weight",
    "codebook_embedding": "codebook_embeddings.weight",
    "norm": "norm.weight",
    "head": "output.weight",
    "project_weight": "fast_project_in.weight",
    "project_bias": "fast_project_in.bias",
    "fast_embedding": "fast_embeddings.weight",
    "fast_norm": "fast_norm.weight",
    "fast_head": "fast_output.weight",
}
"""Our name of a weight -> upstream's state-dict key."""

LAYER_KEYS = {
    "attention_norm": "attention_norm.weight",
    "wqkv": "attention.wqkv.weight",
    "qkv_bias": "attention.wqkv.bias",
    "q_norm": "attention.q_norm.weight",
    "k_norm": "attention.k_norm.weight",
    "wo": "attention.wo.weight",
    "o_bias": "attention.wo.bias",
    "ffn_norm": "ffn_norm.weight",
    "w1": "feed_forward.w1.weight",
    "w3": "feed_forward.w3.weight",
    "w2": "feed_forward.w2.weight",
}
"""The same within a layer, behind "layers.<i>." in the slow stack and "fast_layers.<i>." in the fast one."""

S1_FAST_ROWS = 1024  # upstream's S1 line samples the fast codes from logits[:, :, :1024]


@dataclass(frozen=True)
class StackConfig:
    """One transformer stack."""

    layers: int
    dim: int  # C
    heads: int  # H
    kv_heads: int  # G
    head_dim: int  # D
    intermediate: int  # F
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for field in ("layers", "dim", "heads", "kv_heads", "head_dim", "intermediate"):
            _require(getattr(self, field) > 0, field, "positive", getattr(self, field))
        _require(self.heads % self.kv_heads == 0, "heads", f"a multiple of kv_heads={self.kv_heads}", self.heads)
        _require(self.head_dim % 2 == 0, "head_dim", "even (rotary pairs)", self.head_dim)

    @property
    def qkv_rows(self) -> int:
        """Rows of the joint q, k and v projection: (H + 2G) * D."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True)
class DualARConfig:
    """A slow transformer over frames and a fast transformer over the codebooks of one frame."""

    slow: StackConfig
    fast: StackConfig
    vocab_size: int  # Vt
    codebooks: int  # N
    codebook_size: int  # K
    max_positions: int  # rows of the rotary table, and the most that a cache can hold
    norm_eps: float
    rope_base: float
    tie_embeddings: bool  # the head is the text embedding
    scale_codebook_embeddings: bool  # semantic rows are divided by sqrt(N+1)
    norm_fast_input: bool  # the fast transformer takes the slow one's output after its final norm, not before
    semantic_begin: int
    semantic_end: int
    end_token: int  # <|im_end|>
    line: Line

    def __post_init__(self) -> None:
        for field in ("vocab_size", "codebooks", "codebook_size", "max_positions"):
            _require(getattr(self, field) > 0, field, "positive", getattr(self, field))
        semantic = (self.semantic_begin, self.semantic_end)
        inside = 0 <= semantic[0] <= semantic[1] < self.vocab_size
        _require(inside, "semantic_begin, semantic_end", f"in [0, {self.vocab_size}), in order", semantic)
        _require(0 <= self.end_token < self.vocab_size, "end_token", f"in [0, {self.vocab_size})", self.end_token)
        _require(self.line in ("s1", "2.0"), "line", "'s1' or '2.0'", self.line)

    @property
    def projects(self) -> bool:
        """Whether a projection leads from the slow transformer's width to the fast one's."""
        return self.fast.dim != self.slow.dim

    @property
    def fast_rows(self) -> int:
        """K': rows of the fast head that are sampled."""
        return min(S1_FAST_ROWS, self.codebook_size) if self.line == "s1" else self.codebook_size

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    @lru_cache(maxsize=16)
    def from_json(text: str) -> DualARConfig:
        fields = json.loads(text)
        return DualARConfig(**fields | {"slow": StackConfig(**fields["slow"]), "fast": StackConfig(**fields["fast"])})


def from_upstream(
    args: Mapping[str, Any], *, semantic_begin: int, semantic_end: int, end_token: int, line: Line
) -> DualARConfig:
    """The config that upstream's DualARModelArgs (or a config.json of either line) describes.

    Args:
        args: the fields of upstream's args, flat, or nested as in a 2.0 config.json.
        semantic_begin, semantic_end, end_token: token ids; upstream keeps them in the tokenizer or in the config.
        line: which of upstream's code lines decodes the model.
    Raises:
        ValueError: a field is missing or out of range, or model_type is not a DualAR model's.
    Source: fish_speech/models/text2semantic/llama.py, BaseModelArgs and DualARModelArgs.
    """
    args = flatten(args)
    slow = _stack({"head_dim": 64} | args, "", "n_layer", {})  # upstream's default; an explicit null means dim / n_head
    inherited = {name: args.get(name) for name in _STACK_FIELDS} | {"head_dim": slow.head_dim}
    inherited |= {"intermediate_size": slow.intermediate, "n_local_heads": slow.kv_heads}
    fast = _stack(args, "fast_", "n_fast_layer", inherited)
    return DualARConfig(
        slow=slow,
        fast=fast,
        vocab_size=_field(args, "vocab_size"),
        codebooks=_field(args, "num_codebooks"),
        codebook_size=_field(args, "codebook_size"),
        max_positions=_field(args, "max_seq_len"),
        norm_eps=_field(args, "norm_eps"),
        rope_base=_field(args, "rope_base"),
        tie_embeddings=args.get("tie_word_embeddings", True),
        scale_codebook_embeddings=args.get("scale_codebook_embeddings", False),
        norm_fast_input=args.get("norm_fastlayer_input", False),
        semantic_begin=semantic_begin,
        semantic_end=semantic_end,
        end_token=end_token,
        line=line,
    )


def flatten(args: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of either line with the names of upstream's DualARModelArgs."""
    kind = args.get("model_type")
    if kind == "fish_qwen3_omni":
        slow, fast = args["text_config"], args["audio_decoder_config"]
        flat = {name: value for name, value in slow.items() if value is not None} | {
            "num_codebooks": fast["num_codebooks"],
            "codebook_size": fast["vocab_size"],
            "n_fast_layer": fast["n_layer"],
        }
        flat |= {f"fast_{name}": fast[name] for name in _STACK_FIELDS if fast.get(name) is not None}
        return flat | {"scale_codebook_embeddings": True, "norm_fastlayer_input": True}
    _require(kind == "dual_ar", "model_type", "'dual_ar' or 'fish_qwen3_omni'", kind)
    return dict(args)


_STACK_FIELDS = (
    "dim", "n_head", "n_local_heads", "head_dim", "intermediate_size", "attention_qkv_bias", "attention_o_bias",
    "attention_qk_norm",
)  # fmt: skip


def _stack(args: Mapping[str, Any], prefix: str, layers: str, inherited: Mapping[str, Any]) -> StackConfig:
    def get(name: str, default: Any = None) -> Any:
        value = args.get(prefix + name)
        value = inherited.get(name) if value is None else value
        return default if value is None else value

    dim, heads = get("dim", None), get("n_head", None)
    _require(dim is not None and heads is not None, f"{prefix}dim, {prefix}n_head", "given", (dim, heads))
    kv_heads = get("n_local_heads", -1)
    hidden = -(-int(2 * 4 * dim / 3) // 256) * 256  # upstream's default: two thirds of 4 * dim, rounded up to 256
    return StackConfig(
        layers=_field(args, layers),
        dim=dim,
        heads=heads,
        kv_heads=heads if kv_heads == -1 else kv_heads,
        head_dim=get("head_dim", dim // heads),
        intermediate=get("intermediate_size", hidden),
        qkv_bias=get("attention_qkv_bias", False),
        o_bias=get("attention_o_bias", False),
        qk_norm=get("attention_qk_norm", False),
    )


def _field(args: Mapping[str, Any], name: str) -> Any:
    _require(args.get(name) is not None, name, "given", "nothing")
    return args[name]


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"model config: {name} must be {expected}, got {got}; check config.json")
