"""Reading published models: S1 directories that upstream saved, and 2.0 directories made by hand."""

from collections import OrderedDict

import pytest
import torch
from checkpoint_files import (
    BEGIN,
    CODES,
    END,
    IM_END,
    SIZES,
    VARIANTS,
    edit_json,
    edit_pth,
    same,
    save_s1,
    split_qkv,
    tensors,
)
from fish_speech.models.text2semantic import llama
from fish_speech.tokenizer import ALL_SPECIAL_TOKENS, FishTokenizer
from safetensors.torch import save_file

from s1kernels.engine import Engine
from s1kernels.model.checkpoint import load
from s1kernels.sampling import Sampling
from s1kernels.testing import rel_error


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
