"""Patched against unpatched on Fish-Speech's 2.0 line, which `stand_in` stands in for."""

import copy
import math

import pytest
import stand_in
import torch
from stand_in import DualARModelArgs, DualARTransformer

import s1kernels
from s1kernels import Engine, Sampling, engine_of
from s1kernels.model.dual_ar import DualAR
from s1kernels.ops import references
from s1kernels.ops.decode_frame import force
from s1kernels.testing import rel_error

BEGIN, CODES, END = 100, 40, 3  # the semantic range is in the middle: 10 text tokens follow it
VOCAB = BEGIN + CODES + 10
FRAMES = 64

CONFIGS = {
    "s2_like": dict(n_fast_layer=2, attention_qk_norm=True, fast_attention_qk_norm=False),
    "untied": dict(tie_word_embeddings=False),
    "biases": dict(attention_qkv_bias=True, attention_o_bias=True, attention_qk_norm=False),
    "fast_qk_norm_and_bias": dict(
        attention_qk_norm=False, fast_attention_qk_norm=True, fast_attention_qkv_bias=True, fast_attention_o_bias=True
    ),
    "projected": dict(fast_dim=32, fast_n_head=4, fast_n_local_heads=1, fast_head_dim=12, fast_intermediate_size=50),
    "projected_before_norm": dict(fast_dim=32, fast_n_head=4, norm_fastlayer_input=False),
    "unscaled_before_norm": dict(scale_codebook_embeddings=False, norm_fastlayer_input=False),
    "more_than_1024_codes": dict(codebook_size=1500, num_codebooks=2),
}


class Tokenizer:
    end_token = END

    def get_token_id(self, token):
        assert token == "<|im_end|>"
        return self.end_token


def build(dtype=torch.float32, seed=0, spread=0.15, **overrides):
    """A small model with lively weights, the norms' and biases' too."""
    config = dict(vocab_size=VOCAB, semantic_begin_id=BEGIN, semantic_end_id=BEGIN + CODES - 1) | overrides
    model = DualARTransformer(DualARModelArgs(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, std = (1.0, 0.2) if parameter.dim() == 1 else (0.0, spread)
            parameter.normal_(mean, std, generator=generator)
    model.tokenizer = Tokenizer()
    return model.to(dtype)


def prompt(length=20, codebooks=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    main = torch.randint(BEGIN, BEGIN + CODES, (1, length), generator=generator)
    main[0, ::3] = torch.randint(0, BEGIN, (len(range(0, length, 3)),), generator=generator)
    return torch.cat([main, torch.randint(0, CODES, (codebooks, length), generator=generator)])


def generate(model, frames=FRAMES, seed=5, temperature=0.8, top_p=0.9, top_k=30, **options):
    torch.manual_seed(seed)
    start = prompt(codebooks=model.config.num_codebooks)
    out = stand_in.generate(
        model=model, prompt=start, max_new_tokens=frames, audio_masks=None, audio_parts=None, temperature=temperature,
        top_p=top_p, top_k=top_k, **options,
    )  # fmt: skip
    return out[:, start.shape[1] :].clone()


def endless(model, **options):
    """A run that no end token stops. Not even a patched model's: its engine keeps END, which the bias then forbids."""
    model.tokenizer.end_token = -1
    codes = generate(model, **options)
    model.tokenizer.end_token = END
    assert codes.shape == (model.config.num_codebooks + 1, options.get("frames", FRAMES))
    return codes


def step(model, tokens, position, *, window=None, bias=None, seed=0, temperature=0.8, top_p=0.9, top_k=30, parts=None):
    """decode_one_token_ar on [N+1, T] tokens whose last stands at `position`: [N+1] codes."""
    dtype = model.norm.weight.dtype
    if bias is None:
        bias = torch.full((1, 1, VOCAB), -math.inf, dtype=dtype)
        bias[..., BEGIN : BEGIN + CODES] = bias[..., END] = 0
    numbers = [torch.tensor(v, dtype=dtype) for v in (temperature, top_p)]
    positions = torch.arange(position - tokens.shape[1] + 1, position + 1)
    torch.manual_seed(seed)
    with torch.inference_mode():
        frame = stand_in.decode_one_token_ar(model, tokens[None], positions, *numbers, top_k, bias, None, parts, window)
    assert frame.shape == (len(tokens), 1) and frame.dtype == torch.int32
    return frame[:, 0].clone()


@pytest.fixture(autouse=True)
def the_stand_in_is_left_as_it_was():
    functions = stand_in.decode_n_tokens, stand_in.decode_one_token_ar
    methods = dict(vars(DualARTransformer))
    yield
    assert (stand_in.decode_n_tokens, stand_in.decode_one_token_ar) == functions
    assert dict(vars(DualARTransformer)) == methods


@pytest.fixture
def patched():
    """patch(), undone at the end of the test."""
    models = []

    def patch(model, **options):
        report = s1kernels.patch(model, **options)
        models.append(model)
        return report

    yield patch
    for model in dict.fromkeys(models):
        s1kernels.unpatch(model)


@pytest.fixture
def redraws(monkeypatch):
    """The main tokens that the stand-in's repetition-aware sampling drew again, as they come."""
    seen, original = [], stand_in.redraw_needed

    def counting(main, window, config):
        again = original(main, window, config)
        seen.extend(main[again].tolist())
        return again

    monkeypatch.setattr(stand_in, "redraw_needed", counting)
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_codes_are_the_stand_ins(name, patched):
    """Greedy codes are identical over 64 frames; so are sampled ones, since the same seed draws the same noise."""
    model = build(**CONFIGS[name])
    runs = [dict(top_k=1), dict()]
    expected = [endless(model, **run) for run in runs]
    assert not torch.equal(expected[0], expected[1])
    assert patched(model).line == "2.0"
    for run, codes in zip(runs, expected, strict=True):
        assert torch.equal(endless(model, **run), codes)


def test_codes_are_the_same_on_the_reference_and_on_mixed_back_ends(patched):
    model = build(**CONFIGS["projected"])
    expected = endless(model, frames=16)
    for backend in ("reference", {"attention_decode": "reference", "decode_frame": "reference"}):
        report = patched(model, backend=backend)
        assert report.backends["attention_decode"] == "reference"
        assert torch.equal(endless(model, frames=16), expected)


def test_the_end_token_stops_the_loop_and_its_frame_is_the_last(patched):
    model = build()
    codes = endless(model)
    model.tokenizer.end_token = int(codes[0, 30])
    expected = generate(model)
    patched(model)
    assert torch.equal(generate(model), expected)
    assert 1 < expected.shape[1] <= 31 and int(expected[0, -1]) == model.tokenizer.end_token


def test_repetition_is_drawn_again(patched, redraws, monkeypatch):
    """A peaked model repeats itself: the second draw happens, changes codes, and is the same patched."""
    model = build(spread=0.3)
    expected = endless(model, temperature=0.4, top_p=0.7)
    assert len(redraws) >= 10
    with monkeypatch.context() as patch:
        patch.setattr(stand_in, "redraw_needed", lambda main, window, config: torch.tensor(False))
        assert not torch.equal(endless(model, temperature=0.4, top_p=0.7), expected)
    patched(model)
    before = len(redraws)
    assert torch.equal(endless(model, temperature=0.4, top_p=0.7), expected)
    assert len(redraws) == before  # the stand-in's own sampling did not run


def test_a_window_makes_the_difference_and_the_first_frame_has_none(patched):
    """One frame from the same seed: without a window, with the drawn token outside, inside, and as a text token."""
    model = build()
    tokens, plain = prompt(), None
    rows = tokens.shape[0]
    model.setup_caches(1, 256, torch.float32)
    windows = {"none": None, "empty": torch.zeros(rows, 10, dtype=torch.int32)}
    for seed in range(50):  # a seed whose two draws differ
        plain = step(model, tokens, 19, seed=seed)
        windows["said"] = windows["empty"].clone()
        windows["said"][0, 4] = plain[0]
        if not torch.equal(step(model, tokens, 19, seed=seed, window=windows["said"]), plain):
            break
    windows["code_rows"] = windows["empty"].clone()
    windows["code_rows"][1:] = plain[0]  # only row 0 counts
    expected = {name: step(model, tokens, 19, seed=seed, window=window) for name, window in windows.items()}
    patched(model)
    for name, window in windows.items():
        assert torch.equal(step(model, tokens, 19, seed=seed, window=window), expected[name]), name
    assert not torch.equal(expected["said"], plain)
    assert all(torch.equal(expected[name], plain) for name in ("none", "empty", "code_rows"))


def test_a_text_token_is_not_drawn_again(patched):
    model = build()
    tokens = prompt()
    model.setup_caches(1, 256, torch.float32)
    bias = torch.full((1, 1, VOCAB), -math.inf)
    bias[..., 20:60] = 0
    plain = step(model, tokens, 19, bias=bias)
    window = plain[:, None].repeat(1, 10)
    assert 20 <= int(plain[0]) < 60 and int(plain[1]) == 0  # below the range: its code is clamped
    assert torch.equal(step(model, tokens, 19, bias=bias, window=window), plain)
    patched(model)
    assert torch.equal(step(model, tokens, 19, bias=bias, window=window), plain)


def test_other_biases_and_allowed_sets(patched):
    """Finite values, other rows, rows past the semantic range (code clamped), and the usual ones again afterwards."""
    model = build()
    model.setup_caches(1, 256, torch.float32)
    generator = torch.Generator().manual_seed(2)
    finite = torch.full((1, 1, VOCAB), -math.inf)
    finite[..., 90:VOCAB:2] = torch.randn(30, generator=generator) * 2
    same_rows = torch.where(finite.isfinite(), 0.0, finite)
    past = torch.full((1, 1, VOCAB), -math.inf)
    past[..., BEGIN + CODES :] = torch.arange(10.0) / 5
    one = torch.full((1, 1, VOCAB), -math.inf)
    one[..., 117] = -4.0
    biases = [None, finite, same_rows, past, one, torch.zeros(1, 1, VOCAB), finite * 0.5, None]
    expected = [step(model, prompt(), 19, bias=bias, seed=i) for i, bias in enumerate(biases) for _ in range(2)]
    assert int(expected[6][1]) == CODES - 1 and int(expected[8][0]) == 117
    patched(model)
    ours = [step(model, prompt(), 19, bias=bias, seed=i) for i, bias in enumerate(biases) for _ in range(2)]
    for own, right in zip(ours, expected, strict=True):
        assert torch.equal(own, right)


def test_the_loop_takes_the_callers_bias(patched):
    """decode_n_tokens with a finite bias: same frames, and input_pos moves on in place as the stand-in moves it."""
    model, results = build(), []
    model.setup_caches(1, 256, torch.float32)
    bias = torch.full((1, 1, VOCAB), -math.inf)
    bias[..., BEGIN : BEGIN + CODES] = torch.linspace(-2, 2, CODES)
    numbers = [torch.tensor(v) for v in (0.9, 0.95)]
    for served in (False, True):
        if served:
            patched(model)
        first = step(model, prompt(), 19, bias=bias)
        position = torch.tensor([20], dtype=torch.int)
        with torch.inference_mode():
            torch.manual_seed(3)
            frames = stand_in.decode_n_tokens(model, first.view(1, -1, 1), position, 30, *numbers, 12, bias, None, None)
        results.append((first, frames, position))
    for own, right in zip(results[1], results[0], strict=True):
        assert torch.equal(own, right) and own.dtype == right.dtype
    assert results[1][2].tolist() == [50]


@pytest.mark.parametrize("top_k", [1, 2, 30, 10_000])
def test_top_k(top_k, patched):
    model = build(spread=0.05)  # flat: the nucleus alone would keep almost all
    expected = endless(model, top_k=top_k, top_p=0.99, frames=24)
    patched(model)
    assert torch.equal(endless(model, top_k=top_k, top_p=0.99, frames=24), expected)
    if top_k == 1:
        assert torch.equal(endless(model, top_k=1, temperature=1.9, seed=9, frames=24), expected)


def test_audio_parts_run_upstreams_own_code(patched):
    """Nobody knows what they mean: the whole call is the caller's, bit for bit."""
    model = build()
    model.setup_caches(1, 256, torch.float32)
    expected = step(model, prompt(), 19, parts=torch.ones(1))
    patched(model)
    engine_of(model).step = engine_of(model).prefill = None  # calling it would raise
    assert torch.equal(step(model, prompt(), 19, parts=torch.ones(1)), expected)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("fast_dim", [None, 32])
def test_forward_generate_of_one_token_is_served(norm_first, fast_dim, patched):
    """A caller with a loop of its own: logits and hidden states are the stand-in's, and so are the caches."""
    options = dict(norm_fastlayer_input=norm_first, fast_dim=fast_dim, fast_n_head=4)
    model, twin = build(**options), build(**options)
    patched(model)
    tokens = prompt(30)[None]
    for m in (model, twin):
        m.setup_caches(1, 64, torch.float32)
    with torch.inference_mode():
        for chunk in [torch.arange(12), *torch.arange(12, 30)[:, None]]:
            own, right = (m.forward_generate(tokens[..., chunk], chunk) for m in (model, twin))
            assert type(own) is type(right) is stand_in.BaseTransformerForwardResult
            for name in ("logits", "hidden_states"):
                a, b = getattr(own, name), getattr(right, name)
                assert a.shape == b.shape and a.dtype == b.dtype
                assert rel_error(a, b) < 1e-5, name
    for layer, other in zip(model.layers, twin.layers, strict=True):
        for name in ("k_cache", "v_cache"):
            a, b = (getattr(m.attention.kv_cache, name)[:, :, :30] for m in (layer, other))
            assert rel_error(a, b) < 1e-5


@torch.inference_mode()
def stand_in_logits(model, tokens):
    """The model's own modules, fed given frames one at a time: [Vt] main and [N-1, K] fast logits a frame."""
    model.setup_caches(1, model.config.max_seq_len, model.norm.weight.dtype)
    for t in range(tokens.shape[1] - 1):
        result = model.forward_generate(tokens[None, :, t : t + 1], torch.tensor([t]))
        model.forward_generate_fast(result.hidden_states, torch.tensor([0]))
        hidden = [model.fast_embeddings(code[None]) for code in tokens[1:-1, t + 1]]
        fast = [model.forward_generate_fast(h, torch.tensor([i + 1]))[0, 0] for i, h in enumerate(hidden)]
        yield result.logits[0, 0], torch.stack(fast)


def engine_logits(engine, tokens):
    """The same from an engine whose draws are forced."""
    ids = engine.active_rows.ids
    for t in range(tokens.shape[1] - 1):

        def forced(generator, t=t):
            force(engine.decoder.noise.main, torch.searchsorted(ids, tokens[:1, t + 1].int()))
            force(engine.decoder.noise.fast, tokens[None, 2:, t + 1])

        engine.decoder.noise.draw = forced
        codes = engine.step(tokens[:, t : t + 1], t, Sampling(temperature=1.0, top_p=1.0))
        assert codes.tolist() == tokens[:, t + 1].tolist()
        yield engine.main_logits[0].clone(), engine.fast_logits[0].clone()


def speech(length, codebooks=4, seed=3):
    """Frames of semantic tokens whose first code is the token's own."""
    tokens = prompt(length, codebooks, seed)
    tokens[0] = tokens[1] + BEGIN
    return tokens


@pytest.mark.parametrize("name", ["s2_like", "untied", "biases", "projected", "unscaled_before_norm"])
def test_our_reference_is_the_stand_in_in_float64(name):
    """DualAR on the ops' references, and the stand-in's modules: the same function to the last digits."""
    model = build(torch.float64, **CONFIGS[name])
    theirs = list(stand_in_logits(model, speech(16)))
    s1kernels.patch(model, backend="reference")
    engine = engine_of(model)
    s1kernels.unpatch(model)
    engine = Engine(engine.config, engine.weights, backend="reference")
    assert isinstance(engine._model, DualAR) and set(engine.backends.values()) == {"reference"}
    ours = list(engine_logits(engine, speech(16)))
    ids = engine.active_rows.ids.long()
    assert len(ids) == CODES + 1 and vars(references).keys() == vars(engine._ops).keys()
    for own, right in zip(ours, theirs, strict=True):
        assert own[0].dtype == torch.float64
        assert rel_error(own[0], right[0][ids]) < 1e-12
        assert rel_error(own[1], right[1]) < 1e-12


def test_float64_models_are_served(patched):
    model = build(torch.float64)
    expected = endless(model, frames=24)
    report = patched(model)
    assert set(report.backends.values()) == {"reference"}
    assert torch.equal(endless(model, frames=24), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["s2_like", "untied", "projected", "unscaled_before_norm"])
def test_teacher_forced_logits_are_no_farther_from_float64_than_the_stand_ins(name, dtype, patched):
    """Main and fast logits of 32 forced frames; truth is the stand-in in float64 on the same rounded weights."""
    model, tokens = build(dtype, **CONFIGS[name]), speech(33)
    twin = copy.deepcopy(model).double()
    theirs = [torch.stack(t) for t in zip(*stand_in_logits(model, tokens), strict=True)]
    truth = [torch.stack(t) for t in zip(*stand_in_logits(twin, tokens), strict=True)]
    patched(model)
    engine = engine_of(model)
    ours = [torch.stack(t) for t in zip(*engine_logits(engine, tokens), strict=True)]
    ids = engine.active_rows.ids.long()
    theirs[0], truth[0] = theirs[0][:, ids], truth[0][:, ids]
    for own, upstream, true in zip(ours, theirs, truth, strict=True):
        own_error, upstream_error = ((t.double() - true).norm() / true.norm() for t in (own, upstream))
        assert 0 < own_error <= upstream_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unpatch_restores_bit_identical_behaviour(dtype):
    model = build(dtype)
    codes, logits = generate(model), [main.clone() for main, _ in stand_in_logits(model, speech(12))]
    keys, state = list(model.state_dict()), {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    room = model.max_seq_len
    s1kernels.patch(model)
    generate(model, frames=8)
    s1kernels.unpatch(model)
    assert model.max_seq_len == room
    assert torch.equal(generate(model), codes)
    for own, right in zip([main for main, _ in stand_in_logits(model, speech(12))], logits, strict=True):
        assert torch.equal(own, right)
    assert list(model.state_dict()) == keys
    for name, tensor in model.named_parameters():
        assert tensor.data_ptr() == state[name][0] and torch.equal(tensor, state[name][1])


def test_a_model_without_tokenizer_is_refused():
    """Upstream's 2.0 loader goes on without a tokenizer; we do not."""
    model = build()
    model.tokenizer = None
    with pytest.raises(ValueError, match=r"patch: model\.tokenizer must be set"):
        s1kernels.patch(model)
