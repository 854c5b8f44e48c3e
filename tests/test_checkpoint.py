"""Reading published models: S1 directories that upstream saved, 2.0 directories made by hand, and what can be wrong."""

import base64
import json
import os
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from fish_speech.models.text2semantic import llama
from fish_speech.tokenizer import ALL_SPECIAL_TOKENS, FishTokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from s1kernels.engine import Engine, Sampling
from s1kernels.model.checkpoint import INDEX, Checkpoint, load
from s1kernels.model.config import LAYER_KEYS, MODEL_KEYS
from s1kernels.testing import rel_error

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


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """One directory of each kind, not to be changed."""
    root = tmp_path_factory.mktemp("published")
    save_s1(root / "s1")
    save_s1(root / "tied", tie_word_embeddings=True)
    state = torch.load(root / "tied" / "model.pth", weights_only=True)
    save_omni(root / "omni", state)
    save_omni(root / "sharded", state, shards=3)
    return root


@pytest.fixture
def copy(published, tmp_path):
    """A copy of one of them, by name."""
    return lambda name: Path(shutil.copytree(published / name, tmp_path / name))


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


# What is read


@pytest.mark.parametrize("name", VARIANTS)
def test_an_s1_model_computes_what_upstream_computes_from_the_same_directory(name, tmp_path):
    save_s1(tmp_path, **VARIANTS[name])
    upstream = llama.DualARTransformer.from_pretrained(str(tmp_path), load_weights=True).eval()
    upstream.setup_caches(1, 64, torch.float32)
    checkpoint = load(tmp_path)
    engine = Engine(checkpoint.config, checkpoint.weights)
    main = torch.randint(0, SIZES["vocab_size"], (1, 9), generator=torch.Generator().manual_seed(1))
    frames = torch.cat([main, main % CODES, main % 7, main % 11])
    frames[0, ::2] = frames[1, ::2] + BEGIN
    with torch.inference_mode():
        for i in range(frames.shape[1]):
            theirs = upstream.forward_generate(frames[None, :, i : i + 1], torch.tensor([i]))
            ours, _ = engine.slow_step(frames[:, i : i + 1], i)
            assert rel_error(ours, theirs.logits[:, 0]) < 1e-5
        codes = engine.step(frames[:, -1:], i, Sampling(temperature=0))
        hidden = theirs.hidden_states
        for position, code in enumerate(codes[1:].tolist()):
            logits = upstream.forward_generate_fast(hidden, torch.tensor([position]))[:, 0]
            if position:
                assert rel_error(engine.fast_logits[:, position - 1], logits[:, : engine.fast_logits.shape[2]]) < 1e-5
            hidden = upstream.fast_embeddings(torch.tensor([[code]]))


def test_an_s1_directory(published):
    checkpoint = load(str(published / "s1"))
    config = checkpoint.config
    assert (config.line, config.semantic_begin, config.semantic_end, config.end_token) == ("s1", BEGIN, END, IM_END)
    assert checkpoint.directory == published / "s1"
    assert same(tensors(checkpoint), torch.load(published / "s1" / "model.pth", weights_only=True))


@pytest.mark.parametrize("kind", ["omni", "sharded"])
def test_a_2_0_directory(kind, published):
    checkpoint = load(published / kind)
    config = checkpoint.config
    assert (config.line, config.semantic_begin, config.semantic_end, config.end_token) == ("2.0", BEGIN, END, IM_END)
    assert config.scale_codebook_embeddings and config.norm_fast_input and config.tie_embeddings
    state = torch.load(published / "tied" / "model.pth", weights_only=True)
    expected = {key: tensor.bfloat16() for key, tensor in state.items()}
    assert same(tensors(checkpoint), expected | {"output.weight": expected["embeddings.weight"]})
    prompt = torch.full((4, 3), 5)
    assert Engine(config, checkpoint.weights).generate(prompt, 2, seed=1).shape[0] == 4


def test_upstream_numbers_the_tokens_the_same_without_special_tokens_json(tmp_path):
    save_s1(tmp_path, ALL_SPECIAL_TOKENS, vocab_size=1200)
    (tmp_path / "special_tokens.json").unlink()
    theirs, ours = FishTokenizer.from_pretrained(tmp_path), load(tmp_path).config
    assert (ours.semantic_begin, ours.semantic_end) == (theirs.semantic_begin_id, theirs.semantic_end_id)
    assert ours.end_token == theirs.get_token_id("<|im_end|>")


def test_special_tokens_json_suffices(copy):
    directory = copy("s1")
    (directory / "tokenizer.tiktoken").unlink()
    assert load(directory).config.semantic_begin == BEGIN


@pytest.mark.parametrize("removed", ["tokenizer.json", "eos_token_id"])
def test_either_source_of_the_end_token_suffices(removed, copy):
    directory = copy("omni")
    if removed == "tokenizer.json":
        (directory / removed).unlink()
    else:
        edit_json(directory / "config.json", lambda c: {key: c[key] for key in c if key != removed})
    assert load(directory).config.end_token == IM_END


def split_qkv(state, kind="weight"):
    for key in [key for key in state if key.endswith(f"wqkv.{kind}")]:
        rows = [24, 12, 12]
        parts = state.pop(key).split(rows)
        state |= {key.replace("wqkv", name): part.clone() for name, part in zip(("wq", "wk", "wv"), parts, strict=True)}
    return state


@pytest.mark.parametrize(
    "change",
    [
        split_qkv,
        lambda state: {
            "state_dict": OrderedDict((f"model.{key}", tensor) for key, tensor in state.items()),
            "epoch": 3,
        },
        lambda state: {key: torch.nn.Parameter(tensor) for key, tensor in state.items()},
        lambda state: (
            state
            | {"audio_projector.weight": torch.ones(2), "freqs_cis": torch.ones(2), "causal_mask": torch.ones(2) > 0}
        ),
        lambda state: state | {"layers.0.attention.kv_cache.k_cache": torch.zeros(1, 2, 8, 6)},
    ],
    ids=["split qkv", "lightning", "parameters", "ignored", "caches"],
)
def test_forms_of_a_state_dict(change, copy, published):
    directory = copy("s1")
    edit_pth(directory, change)
    assert same(tensors(load(directory)), tensors(load(published / "s1")))


def test_split_qkv_with_biases(tmp_path):
    save_s1(tmp_path, attention_qkv_bias=True)
    expected = {key: tensor.clone() for key, tensor in tensors(load(tmp_path)).items()}
    edit_pth(tmp_path, lambda state: split_qkv(split_qkv(state), "bias"))
    assert same(tensors(load(tmp_path)), expected)


def test_an_s1_model_in_safetensors(copy, published):
    directory = copy("s1")
    save_file(torch.load(directory / "model.pth", weights_only=True), directory / "model.safetensors")
    (directory / "model.pth").unlink()
    assert same(tensors(load(directory)), tensors(load(published / "s1")))


@pytest.mark.parametrize("kind", ["s1", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype(dtype, kind, published):
    as_saved = tensors(load(published / kind))
    converted = load(published / kind, dtype=dtype)
    assert same(tensors(converted), {key: tensor.to(dtype) for key, tensor in as_saved.items()})
    assert converted.weights.cos_sin.dtype == dtype
    if dtype != as_saved["norm.weight"].dtype:  # then nothing of the mapped file is held
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors(converted).values())


def test_several_dtypes_become_one_on_request(copy):
    directory = copy("s1")
    edit_pth(directory, lambda state: state | {"norm.weight": state["norm.weight"].half()})
    with pytest.raises(TypeError, match=r"the weights must be of one dtype, got float16 and float32; pass dtype="):
        load(directory)
    assert {tensor.dtype for tensor in tensors(load(directory, dtype=torch.bfloat16)).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["s1", "omni"])
def test_writing_to_the_weights_leaves_the_file_alone(kind, copy):
    directory = copy(kind)
    load(directory).weights.norm.fill_(7)
    assert not (load(directory).weights.norm == 7).any()


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("kind", ["s1", "sharded"])
def test_progress_counts_the_bytes_of_the_file_that_are_needed(kind, dtype, published):
    needed = {tensor.data_ptr(): tensor.nbytes for tensor in tensors(load(published / kind)).values()}
    total, calls = sum(needed.values()), []
    load(published / kind, dtype=dtype, progress=lambda *call: calls.append(call))
    assert calls[0] == (0, total) and calls[-1] == (total, total)
    assert calls == sorted(calls) and {whole for _, whole in calls} == {total}


# What is refused


def refused(directory: Path, kind: type[Exception], text: str, **options) -> None:
    with pytest.raises(kind, match=text) as caught:
        load(directory, **options)
    assert CLEAR.fullmatch(str(caught.value))


def test_directories(tmp_path, published):
    refused(
        tmp_path / "no",
        FileNotFoundError,
        "directory must be a folder, got .*no, which does not exist; download the model",
    )
    refused(
        published / "s1" / "config.json", ValueError, "directory must be a folder, got the file .*config.json; pass"
    )
    refused(tmp_path, FileNotFoundError, "config.json must be in .*, got no such file; download it")


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("s1", "config.json"), ("s1", "model.pth"), ("omni", "model.safetensors"), ("sharded", INDEX),
        ("sharded", "model-00002-of-00003.safetensors"),
    ],
)  # fmt: skip
def test_missing_files(kind, file, copy):
    directory = copy(kind)
    (directory / file).unlink()
    refused(directory, FileNotFoundError, f"{file}.* must be in .*, got no such file; download it")


def test_no_tokenizer(copy):
    directory = copy("s1")
    for file in ("special_tokens.json", "tokenizer.tiktoken"):
        (directory / file).unlink()
    refused(directory, FileNotFoundError, "special_tokens.json or tokenizer.tiktoken must be in")


@pytest.mark.parametrize("kind", ["s1", "omni"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "config.json must be JSON, got JSONDecodeError: Expecting"),
        (b"\xff\xfe", "config.json must be JSON, got UnicodeDecodeError: 'utf-8'"),
        (b"[]", "config.json must be a JSON object, got list"), (b"[" * 100000, "config.json must be JSON"),
        (b'{"model_type": "naive"}', r"model_type in config.json must be one of \['dual_ar', .*\], got 'naive'; pass"),
        (b'{"model_type": ["dual_ar"]}', r"model_type .* got \['dual_ar'\]"), (b"{}", "model_type .* got None"),
    ],
)  # fmt: skip
def test_config_json(content, text, kind, copy):
    directory = copy(kind)
    (directory / "config.json").write_bytes(content)
    refused(directory, ValueError, text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"is_reward_model": True}, "must be a speech model's, got a reward model's"),
        ({"n_layer": None}, "model config: n_layer must be given, got nothing"),
        ({"n_layer": 2.0}, "layers in config.json must be int, got 2.0"),
        ({"n_layer": "2"}, "config.json must be a DualAR model's, got a value of another kind"),
        ({"n_head": 0}, "config.json must be a DualAR model's"),
        ({"norm_eps": "1e-6"}, "norm_eps in config.json must be float, got '1e-6'"),
        ({"tie_word_embeddings": "no"}, "tie_embeddings in config.json must be bool, got 'no'"),
        ({"vocab_size": 50}, r"model config: semantic_begin, semantic_end must be in \[0, 50\)"),
        ({"n_layer": 3}, r"weights: layers.2.attention_norm.weight must be \[16\], got nothing"),
        ({"n_layer": 1}, "the weights must be those of config.json, got layers.1.attention.k_norm.weight too"),
        ({"dim": 32}, r"weights: embeddings.weight must be \[160, 32\] floating point, got \[160, 16\] float32"),
        ({"tie_word_embeddings": True}, "the weights must be those of config.json, got output.weight too; merge"),
    ],
)
def test_config_fields(change, text, copy):
    directory = copy("s1")
    edit_json(directory / "config.json", change)
    refused(directory, ValueError, text)


@pytest.mark.parametrize("field", ["text_config", "audio_decoder_config"])
@pytest.mark.parametrize("value", [None, [], {}, {"dim": 4}])
def test_omni_config_parts(field, value, copy):
    directory = copy("omni")
    edit_json(directory / "config.json", {field: value})
    refused(directory, ValueError, "(config.json must be a DualAR model's|model config: .* must be given)")


S1_TOKENS = [
    (
        lambda ids: ids | {"<|im_end|>": 3},
        "end_token must be the same in special_tokens.json and tokenizer.tiktoken, got 3 and 104",
    ),
    (
        lambda ids: ids | {"<|semantic:0|>": "115"},
        "<|semantic:0|> in special_tokens.json must be a token id, got '115'",
    ),
    (
        lambda ids: ids | {"<|semantic:7|>": 3},
        "<|semantic:i|> in special_tokens.json must be consecutive from i=0 on, got gaps",
    ),
    (lambda ids: ids | {"<|semantic:99|>": 159}, "<|semantic:i|> in special_tokens.json must be consecutive"),
    (lambda ids: {k: i for k, i in ids.items() if k != "<|semantic:0|>"}, "must be consecutive from i=0 on"),
    (lambda ids: {k: i for k, i in ids.items() if k != "<|im_end|>"}, "semantic_begin must be the same in"),
    (lambda ids: [*ids], "special_tokens.json must be a JSON object, got list"),
]


@pytest.mark.parametrize(("change", "text"), S1_TOKENS)
def test_special_tokens(change, text, copy):
    directory = copy("s1")
    edit_json(directory / "special_tokens.json", change)
    refused(directory, ValueError, re.escape(text))


@pytest.mark.parametrize("name", ["<|im_end|>", "<|semantic:"])
def test_incomplete_special_tokens(name, copy):
    directory = copy("s1")
    (directory / "tokenizer.tiktoken").unlink()
    edit_json(directory / "special_tokens.json", lambda ids: {key: ids[key] for key in ids if not key.startswith(name)})
    refused(
        directory,
        ValueError,
        "(end_token|semantic_begin) must be in special_tokens.json or tokenizer.tiktoken, got nothing",
    )


def test_tokenizer_tiktoken(copy):
    directory = copy("s1")
    whole = (directory / "tokenizer.tiktoken").read_bytes()
    (directory / "tokenizer.tiktoken").write_bytes(whole.replace(b" 7\n", b"\n"))
    refused(directory, ValueError, "tokenizer.tiktoken must be lines of a token and its rank, got others")
    (directory / "tokenizer.tiktoken").write_bytes(b"".join(whole.splitlines(True)[:-1]))
    refused(
        directory,
        ValueError,
        "semantic_begin must be the same in special_tokens.json and tokenizer.tiktoken, got 115 and 114",
    )
    (directory / "tokenizer.tiktoken").write_bytes(whole.replace(b"\n", b"\r\n") + b"\r\n= 100\r\n")
    assert load(directory).config.semantic_begin == BEGIN


SHIFTED = [{"id": BEGIN + 1 + i, "content": f"<|semantic:{i}|>"} for i in range(CODES)]
BOTH = "must be the same in config.json and tokenizer.json"
OMNI_TOKENS = [
    ("config.json", {"eos_token_id": 7}, f"end_token {BOTH}, got 7 and 104; download both from one place"),
    ("config.json", {"eos_token_id": [7]}, r"eos_token_id in config.json must be a token id, got \[7\]"),
    (
        "config.json",
        {"semantic_start_token_id": None},
        "semantic_begin must be in config.json or tokenizer.json, got no",
    ),
    ("config.json", {"semantic_end_token_id": BEGIN - 1}, "semantic_begin, semantic_end must be in .*, in order"),
    ("config.json", {"semantic_end_token_id": 10**6}, "semantic_begin, semantic_end must be in"),
    (
        "tokenizer.json",
        {"added_tokens": [{"id": 3}]},
        "added_tokens in tokenizer.json must be a list of content and id",
    ),
    ("tokenizer.json", {"added_tokens": 3}, "added_tokens in tokenizer.json must be a list of content and id"),
    ("tokenizer.json", {"added_tokens": SHIFTED}, f"semantic_begin {BOTH}, got 115 and 116"),
]


@pytest.mark.parametrize(("file", "change", "text"), OMNI_TOKENS)
def test_omni_tokens(file, change, text, copy):
    directory = copy("omni")
    edit_json(directory / file, change)
    refused(directory, ValueError, text)


def nan(tensor):
    return torch.where(torch.arange(tensor.numel()).view(tensor.shape) == 3, torch.nan, tensor)


def replaced(key, change):
    """A change of one tensor of a state dict."""
    return lambda state: state | {key: change(state[key])}


FP8 = torch.float8_e4m3fn
STATE_DICTS = [
    (
        replaced("norm.weight", nan),
        ValueError,
        "norm.weight must be finite in float32, got NaN or infinity; is the file",
    ),
    (
        replaced("norm.weight", lambda t: torch.ones(17)),
        ValueError,
        "weights: norm.weight must be [16] floating point, got [17]",
    ),
    (
        replaced("norm.weight", lambda t: torch.ones(0)),
        ValueError,
        "weights: norm.weight must be [16] floating point, got [0]",
    ),
    (
        replaced("norm.weight", list),
        TypeError,
        "norm.weight in model.pth must be a tensor, got list; save model.state_dict()",
    ),
    (
        replaced("output.weight", torch.Tensor.char),
        TypeError,
        "output.weight in model.pth must be a plain tensor of float16, ",
    ),
    (replaced("output.weight", torch.Tensor.char), TypeError, "got int8 (strided, cpu); quantised models are not read"),
    (replaced("output.weight", lambda t: t.to(FP8)), TypeError, "got float8_e4m3fn (strided, cpu); quantised models"),
    (replaced("output.weight", torch.Tensor.to_sparse), TypeError, "got float32 (sparse_coo, cpu)"),
    (replaced("output.weight", lambda t: t.to("meta")), TypeError, "got float32 (strided, meta)"),
    (lambda s: s | {"layers.9.ffn_norm.weight": torch.ones(16)}, ValueError, "got layers.9.ffn_norm.weight too; merge"),
    (lambda s: s | {"embeddings.lora_A": torch.ones(2)}, ValueError, "got embeddings.lora_A too; merge adapters"),
    (lambda s: s | {"score_output.weight": torch.ones(2)}, ValueError, "got score_output.weight too"),
    (
        lambda s: s | {"model.norm.weight": torch.ones(16)},
        ValueError,
        "norm.weight must be in model.pth once, got it twice",
    ),
    (lambda s: dict([*s.items()][1:]), ValueError, "weights: embeddings.weight must be [160, 16], got nothing"),
    (lambda s: {}, ValueError, "weights: embeddings.weight must be [160, 16], got nothing; is the checkpoint complete"),
    (lambda s: [*s.values()], TypeError, "model.pth must be a state dict, got list; save model.state_dict()"),
    (lambda s: {3: s["norm.weight"]}, TypeError, "model.pth must be a state dict, got dict"),
    (lambda s: {"state_dict": 3}, TypeError, "model.pth must be a state dict, got int"),
]


@pytest.mark.parametrize(("change", "kind", "text"), STATE_DICTS)
def test_state_dicts(change, kind, text, copy):
    directory = copy("s1")
    edit_pth(directory, change)
    refused(directory, kind, re.escape(text))


def test_split_qkv_of_other_heads(copy):
    """24 + 12 + 12 rows and 12 + 24 + 12 rows join to the same shape."""
    directory = copy("s1")
    edit_pth(directory, split_qkv)
    q, k = "layers.1.attention.wq.weight", "layers.1.attention.wk.weight"
    edit_pth(directory, lambda state: state | {q: state[k], k: state[q]})
    refused(
        directory,
        ValueError,
        r"layers.1.attention.wq.weight must be \[24, 16\], got \[12, 16\]; does config.json fit\?",
    )
    edit_pth(directory, lambda state: {key: state[key] for key in state if key not in (q, k)} | {q: state[k]})
    refused(directory, ValueError, r"layers.1.attention.wk.weight must be \[12, 16\], got None")


def test_too_narrow_a_dtype(copy):
    directory = copy("s1")
    edit_pth(directory, lambda state: state | {"norm.weight": state["norm.weight"] * 1e6})
    load(directory, dtype=torch.bfloat16)
    refused(
        directory, ValueError, "norm.weight must be finite in float16, .* or the dtype too narrow", dtype=torch.float16
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "float16"])
def test_dtypes_that_no_model_has(dtype, published):
    refused(published / "s1", TypeError, "dtype must be float16, bfloat16, float32, float64 or None, got ", dtype=dtype)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_devices_that_are_not_there(device, published):
    refused(
        published / "s1", RuntimeError, f"device must be usable here, got {device}: .*; choose another", device=device
    )


class Rude:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_is_not_executed(copy, monkeypatch):
    directory = copy("s1")
    monkeypatch.chdir(directory)
    edit_pth(directory, lambda state: state | {"rude": Rude()})
    refused(
        directory,
        ValueError,
        r"model.pth must be a plain checkpoint, got \w+.mkdir, which was not executed; use one that",
    )
    assert not (directory / "executed").exists()


def test_safetensors_errors(copy):
    directory = copy("omni")
    edit_safetensors(
        directory, lambda state: state | {"text_model.model.norm.weight": torch.ones(16, dtype=torch.int8)}
    )
    refused(
        directory, TypeError, "text_model.model.norm.weight in model.safetensors must be a plain tensor of .*, got int8"
    )
    edit_safetensors(directory, lambda state: state | {"text_model.model.norm.weight": torch.full((16,), torch.inf)})
    refused(directory, ValueError, "norm.weight must be finite in bfloat16", dtype=torch.bfloat16)
    edit_safetensors(directory, lambda state: state | {"text_model.lm_head.weight": torch.ones(1)})
    refused(directory, ValueError, "config.json, got text_model.lm_head.weight too")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda files: files | {"extra.weight": min(files.values())},
            "must be as .* says, got a file without extra.weight",
        ),
        (
            lambda files: dict([*files.items()][1:]),
            r"must be as .* says, got a file with text_model\.\S+; download both",
        ),
        (lambda files: dict.fromkeys(files, "../model.safetensors"), "weight_map in .* must be keys and file names"),
        (lambda files: dict.fromkeys(files, 3), "weight_map in .* must be keys and file names"),
        (lambda files: None, "weight_map in .* must be keys and file names"),
        (lambda files: {}, "weights: embeddings.weight must be .*, got nothing"),
    ],
)
def test_the_index_and_the_shards_must_agree(change, text, copy):
    directory = copy("sharded")
    edit_json(directory / INDEX, lambda index: {"weight_map": change(index["weight_map"])})
    refused(directory, ValueError, text)


# Damage

FILES = [("s1", "model.pth"), ("omni", "model.safetensors"), ("sharded", "model-00002-of-00003.safetensors")]
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(("kind", "file"), FILES)
@QUICK
@given(data=st.data())
def test_a_file_cut_off_anywhere_is_damaged(data, kind, file, published, tmp_path):
    whole = (published / kind / file).read_bytes()
    directory = Path(shutil.copytree(published / kind, tmp_path / kind, dirs_exist_ok=True))
    edge = st.integers(0, 200)
    length = data.draw(st.one_of(st.integers(0, len(whole) - 1), edge, edge.map(lambda n: len(whole) - 1 - n)))
    (directory / file).write_bytes(whole[:length])
    refused(directory, ValueError, f"{file} must be whole and readable, got .*; download it again")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns of what a damaged pickle asks for
@pytest.mark.parametrize(("kind", "file"), FILES)
@QUICK
@given(data=st.data())
def test_a_changed_byte_is_refused_clearly_or_only_changes_values(data, kind, file, published, tmp_path):
    damaged = bytearray((published / kind / file).read_bytes())
    directory = Path(shutil.copytree(published / kind, tmp_path / kind, dirs_exist_ok=True))
    edge = st.integers(0, 3000)
    at = data.draw(st.one_of(st.integers(0, len(damaged) - 1), edge, edge.map(lambda n: len(damaged) - 1 - n)))
    damaged[at] ^= data.draw(st.integers(1, 255))
    (directory / file).write_bytes(damaged)
    try:
        checkpoint = load(directory)
    except (ValueError, TypeError) as error:
        assert CLEAR.fullmatch(str(error))
    else:
        shapes = {key: tensor.shape for key, tensor in tensors(load(published / kind)).items()}
        assert {key: tensor.shape for key, tensor in tensors(checkpoint).items()} == shapes


@QUICK
@given(
    field=st.sampled_from([*SIZES, "model_type", "fast_dim", "fast_n_head", "fast_head_dim", "fast_attention_qk_norm"]),
    value=st.one_of(
        st.none(), st.booleans(), st.integers(-3, 70), st.floats(), st.text(max_size=3), st.just([]), st.just({})
    ),
)
def test_any_value_of_a_config_field_is_refused_clearly_or_fits(field, value, published, tmp_path):
    directory = Path(shutil.copytree(published / "s1", tmp_path / "s1", dirs_exist_ok=True))
    edit_json(directory / "config.json", {field: value})
    try:
        checkpoint = load(directory)
    except (ValueError, TypeError) as error:
        assert CLEAR.fullmatch(str(error))
    else:
        assert same(tensors(checkpoint), tensors(load(published / "s1")))
