"""Checkpoint directories for tests: S1 ones that upstream saves, 2.0 ones made by hand, and ways to change them."""

import base64
import json
import re
from pathlib import Path

import torch
from fish_speech.models.text2semantic import llama
from fish_speech.tokenizer import ALL_SPECIAL_TOKENS, FishTokenizer
from safetensors.torch import load_file, save_file

from s1kernels.model.checkpoint import INDEX, Checkpoint
from s1kernels.model.config import LAYER_KEYS, MODEL_KEYS

TEXT_TOKENS, CODES = 100, 40
BEGIN, END, IM_END = TEXT_TOKENS + 15, TEXT_TOKENS + 15 + CODES - 1, TEXT_TOKENS + 4
SIZES = dict(
    vocab_size=END + 6, n_layer=2, n_head=4, n_local_heads=2, head_dim=6, dim=16, intermediate_size=20, max_seq_len=64,
    codebook_size=CODES, num_codebooks=3, n_fast_layer=1, tie_word_embeddings=False, attention_qk_norm=True,
    norm_eps=1e-6, rope_base=1e4, initializer_range=0.3, use_gradient_checkpointing=False,
)  # fmt: skip
VARIANTS = {
    "s1_like": dict(fast_attention_qk_norm=False, fast_head_dim=10),
    "tied": dict(tie_word_embeddings=True, scale_codebook_embeddings=True),
    "projected": dict(fast_dim=12, fast_n_head=2, fast_n_local_heads=1, fast_head_dim=8, fast_intermediate_size=14),
    "biases": dict(attention_qkv_bias=True, attention_o_bias=True),
}
CLEAR = re.compile(r"(checkpoint|weights|model config): .+ must be .+, got .*; .+", re.DOTALL)


def save_s1(directory: Path, specials=ALL_SPECIAL_TOKENS[: 15 + CODES], **overrides) -> None:
    """A small model, saved by upstream's own code."""
    directory.mkdir(exist_ok=True)
    tokens = [base64.b64encode(bytes([i])).decode() for i in range(TEXT_TOKENS)]
    (directory / "tokenizer.tiktoken").write_text("".join(f"{token} {rank}\n" for rank, token in enumerate(tokens)))
    torch.manual_seed(0)
    tokenizer = FishTokenizer(directory / "tokenizer.tiktoken", list(specials))
    model = llama.DualARTransformer(llama.DualARModelArgs(**SIZES | overrides), tokenizer)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(directory)


def save_omni(directory: Path, state: dict, shards: int = 1, dtype: torch.dtype = torch.bfloat16) -> None:
    """The same weights as the 2.0 line publishes them."""
    directory.mkdir(exist_ok=True)
    stack = ("dim", "n_head", "n_local_heads", "head_dim", "intermediate_size", "attention_qk_norm", "n_layer")
    text = {name: SIZES[name] for name in (*stack, "vocab_size", "max_seq_len", "norm_eps", "rope_base")}
    text |= {"tie_word_embeddings": True}
    audio = {name: SIZES[name] for name in stack} | {"vocab_size": CODES, "num_codebooks": 3, "n_layer": 1}
    edit_json(directory / "config.json", lambda _: {
        "model_type": "fish_qwen3_omni", "text_config": text, "audio_decoder_config": audio,
        "semantic_start_token_id": BEGIN, "semantic_end_token_id": END, "eos_token_id": IM_END,
    })  # fmt: skip
    added = [{"id": IM_END, "content": "<|im_end|>"}, {"id": 0, "content": "<|other|>"}]
    edit_json(directory / "tokenizer.json", lambda _: {"added_tokens": added})

    def published(key: str) -> str:
        if key.startswith("fast_"):
            return key.replace("fast_", "audio_decoder.", 1)
        return f"{'audio_decoder' if key.startswith('codebook') else 'text_model.model'}.{key}"

    state = {published(key): tensor.to(dtype) for key, tensor in state.items() if key != "output.weight"}
    state |= {"audio_tower.conv.weight": torch.ones(3), "text_model.model.freqs_cis": torch.ones(2)}
    if shards == 1:
        save_file(state, directory / "model.safetensors")
        return
    files = {key: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, key in enumerate(state)}
    for file in set(files.values()):
        save_file({key: state[key] for key in state if files[key] == file}, directory / file)
    edit_json(directory / INDEX, lambda _: {"metadata": {}, "weight_map": files})


def edit_json(path: Path, change) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(change(value) if callable(change) else value | change))


def edit_pth(directory: Path, change) -> None:
    state = torch.load(directory / "model.pth", weights_only=True)
    torch.save(change(state), directory / "model.pth")


def edit_safetensors(directory: Path, change) -> None:
    save_file(change(load_file(directory / "model.safetensors")), directory / "model.safetensors")


def publish(root: Path) -> Path:
    """One directory of each kind below `root`."""
    save_s1(root / "s1")
    save_s1(root / "tied", tie_word_embeddings=True)
    state = torch.load(root / "tied" / "model.pth", weights_only=True)
    save_omni(root / "omni", state)
    save_omni(root / "sharded", state, shards=3)
    return root


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights under upstream's keys."""
    w = checkpoint.weights
    found = {MODEL_KEYS[name]: getattr(w, name) for name in MODEL_KEYS}
    for prefix, layers in (("layers", w.slow), ("fast_layers", w.fast)):
        for i, layer in enumerate(layers):
            found |= {f"{prefix}.{i}.{LAYER_KEYS[name]}": getattr(layer, name) for name in LAYER_KEYS}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def split_qkv(state, kind="weight"):
    for key in [key for key in state if key.endswith(f"wqkv.{kind}")]:
        rows = [24, 12, 12]
        parts = state.pop(key).split(rows)
        state |= {key.replace("wqkv", name): part.clone() for name, part in zip(("wq", "wk", "wv"), parts, strict=True)}
    return state
