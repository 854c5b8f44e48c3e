"""What patch() refuses: a clear error that names the matter, and a model that still works as before."""

import pytest
import torch
from fish_speech.models.text2semantic import inference
from torch import nn
from upstream_models import build, generate

import s1kernels


class Quantised(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.register_buffer("weight", linear.weight.to(torch.int8))

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


def quantise(model):
    model.layers[1].feed_forward.w1 = Quantised(model.layers[1].feed_forward.w1)


def low_rank(model):
    import loralib

    model.layers[0].attention.wo = loralib.Linear(96, 48, r=4, bias=False)


def hook(model):
    model.fast_layers[0].attention.wqkv.register_forward_hook(lambda *_: None)


def mixed(model):
    model.layers[2].attention.wqkv.to(torch.bfloat16)


def not_a_number(model):
    model.layers[1].feed_forward.w2.weight.data[3, 5] = float("nan")


def infinite(model):
    model.fast_norm.weight.data[0] = float("inf")


def misshapen(model):
    model.layers[0].attention.wo.weight = nn.Parameter(torch.zeros(48, 95))


def untied_without_head(model):
    model.codebook_embeddings.weight = nn.Parameter(torch.zeros(7, 48))


def no_tokenizer(model):
    model.tokenizer = None


def reward(model):
    model.config.is_reward_model = True


def no_range(model):
    model.config.norm_eps = None


BAD = {
    quantise: (TypeError, r"layers\.1\.feed_forward\.w1 must be an nn\.Linear, got Quantised"),
    low_rank: (TypeError, r"layers\.0\.attention\.wo must be plain, got Linear with adapters; merge"),
    hook: (TypeError, r"fast_layers\.0\.attention\.wqkv must have no forward hooks"),
    mixed: (TypeError, r"layers\.2\.attention\.wqkv\.weight must be torch\.float32"),
    not_a_number: (ValueError, r"layers\.1\.feed_forward\.w2\.weight must be finite, got NaN"),
    infinite: (ValueError, r"fast_norm\.weight must be finite"),
    misshapen: (ValueError, r"layers\.0\.attention\.wo\.weight must be \[48, 96\] floating point, got \[48, 95\]"),
    untied_without_head: (ValueError, r"codebook_embeddings\.weight must be \[160, 48\]"),
    no_tokenizer: (ValueError, r"model\.tokenizer must be set"),
    reward: (TypeError, r"reward model"),
    no_range: (ValueError, r"norm_eps must be given"),
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_unsuitable_models_are_refused(spoil):
    error, text = BAD[spoil]
    model = build()
    spoil(model)
    before = inference.decode_n_tokens, {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=text):
        s1kernels.patch(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("thing", [nn.Linear(3, 3), "model", None, inference], ids=lambda thing: type(thing).__name__)
def test_other_things_are_refused(thing):
    with pytest.raises(TypeError, match="patch: model must be Fish-Speech's DualAR transformer"):
        s1kernels.patch(thing)


@pytest.mark.parametrize(
    ("backend", "error", "text"),
    [
        ("cuda9", ValueError, "backend must be 'auto' or one of"),
        ({"attention_decode": "magic"}, ValueError, "backend must be 'auto' or one of"),
        ({"attention": "cpu"}, ValueError, "op must be one of"),
    ],
)
def test_unknown_back_ends_and_ops_are_refused(backend, error, text):
    model = build()
    before = inference.decode_n_tokens, {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=text):
        s1kernels.patch(model, backend=backend)
    assert_untouched(model, before)


def test_a_back_end_that_cannot_serve_says_why():
    with pytest.raises(
        s1kernels.BackendError, match=r"back end 'cpu' cannot serve this call: a tensor is torch\.float64|_C"
    ):
        s1kernels.patch(build(torch.float64), backend="cpu")


def test_a_failing_re_patch_leaves_the_first_patch_in_force():
    model = build()
    s1kernels.patch(model)
    expected = generate(model, frames=8)
    with pytest.raises(ValueError, match="backend must be"):
        s1kernels.patch(model, backend="nobody")
    assert torch.equal(generate(model, frames=8), expected)
    s1kernels.unpatch(model)


def test_wrong_use_of_a_patched_model_is_an_error_and_not_a_crash():
    model = build()
    s1kernels.patch(model)
    model.setup_caches(1, 64, torch.float32)
    tokens = torch.zeros(1, 5, 1, dtype=torch.long)
    tokens[0, 0] = 110
    try:
        with pytest.raises(ValueError, match=r"code in \[0, 40\)"):
            bad = tokens.clone()
            bad[0, 2] = 40
            model.forward_generate(bad, torch.tensor([0]))
        with pytest.raises(ValueError, match=r"token in \[0, 140\)"):
            model.forward_generate(tokens - 200, torch.tensor([0]))
        with pytest.raises(ValueError, match="max_positions=1024"):
            model.forward_generate(tokens, torch.tensor([1024]))
        with pytest.raises(ValueError, match="position"):
            model.forward_generate(tokens, torch.tensor([-1]))
        assert model.forward_generate(tokens, torch.tensor([0])).logits.isfinite().all()
    finally:
        s1kernels.unpatch(model)


def test_caches_in_another_dtype_are_named():
    model = build()
    model.setup_caches(1, 64)  # upstream's default is bfloat16
    s1kernels.patch(model)
    try:
        with pytest.raises(TypeError, match=r"setup_caches: dtype must be torch\.float32"):
            model.forward_generate(torch.zeros(1, 5, 1, dtype=torch.long), torch.tensor([0]))
    finally:
        s1kernels.unpatch(model)


def test_weights_that_turn_bad_while_decoding_are_reported():
    model = build()
    s1kernels.patch(model)
    try:
        model.layers[0].attention_norm.weight.data.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="logits must be finite, got NaN at position"):
            generate(model, frames=8)
    finally:
        s1kernels.unpatch(model)


def assert_untouched(model, before):
    function, state = before
    assert inference.decode_n_tokens is function
    assert not hasattr(type(model).forward_generate, "s1kernels")
    assert all(torch.equal(value, state[key]) or value.isnan().any() for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="must be patched"):
        s1kernels.engine_of(model)
