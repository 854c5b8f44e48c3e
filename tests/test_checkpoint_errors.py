"""What can be wrong with a checkpoint directory: each a clear error, and nothing loaded."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import BEGIN, CLEAR, CODES, SIZES, edit_json, edit_pth, edit_safetensors, same, split_qkv, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s1kernels.model.checkpoint import INDEX, load


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
