"""Unmodified upstream code of the S1 line (fish-speech 0.1.0), patched and unpatched, in one process."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from fish_speech.models.text2semantic import inference, llama
from upstream_models import CODES, CONFIGS, SEMANTIC_BEGIN, build, generate, greedy, prompt

import s1kernels
from s1kernels.model.dual_ar import DualAR
from s1kernels.ops import references
from s1kernels.ops.decode_frame import force
from s1kernels.testing import rel_error

FRAMES = 80


@pytest.fixture(autouse=True)
def upstream_is_left_as_it_was():
    functions = inference.decode_n_tokens, inference.decode_one_token_ar
    methods = dict(vars(llama.DualARTransformer))
    yield
    gc.collect()
    assert (inference.decode_n_tokens, inference.decode_one_token_ar) == functions
    assert {k: v for k, v in vars(llama.DualARTransformer).items() if k in methods} == methods


@pytest.fixture
def patched():
    """patch(), undone at the end of the test."""
    models = []

    def patch(model, **options):
        report = s1kernels.patch(model, **options)
        models.append(model)
        return report

    yield patch
    for model in models:
        s1kernels.unpatch(model)


def endless(model, **options):
    """A run of upstream's generate() that no end token stops, and the model's end token set to one that never comes."""
    model.tokenizer.end_token = -1
    codes = generate(model, frames=FRAMES, **options)
    model.tokenizer.end_token = min(set(range(SEMANTIC_BEGIN)) - set(codes[0].tolist()))
    return codes


@pytest.mark.parametrize(("name", "backend"), [*((name, "auto") for name in CONFIGS), ("projected", "reference")])
def test_float32_codes_are_upstreams(name, backend, patched):
    """Greedy codes are identical over 80 frames; so are sampled ones, since the same seed draws the same noise."""
    model = build(**CONFIGS[name])
    expected = [endless(model, top_p=1e-6), endless(model)]
    report = patched(model, backend=backend)
    assert report.line == "s1"
    assert torch.equal(greedy(model, frames=FRAMES), expected[0])
    model.tokenizer.end_token = -1  # not asked again: the engine has its own
    assert torch.equal(generate(model, frames=FRAMES), expected[1])
    assert expected[0].shape == (5, FRAMES)


def test_the_end_token_stops_the_loop(patched):
    model = build()
    model.tokenizer.end_token = -1
    codes = generate(model, frames=FRAMES)
    model.tokenizer.end_token = int(codes[0, 30])
    expected = generate(model, frames=FRAMES)
    patched(model)
    assert torch.equal(generate(model, frames=FRAMES), expected)
    assert 1 < expected.shape[1] <= 31


def test_same_seed_same_codes_twice_and_another_seed_others(patched):
    model = build(torch.bfloat16)
    endless(model)
    patched(model)
    first, again, other = (generate(model, frames=40, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["s1_like", "tied", "biases", "projected", "scaled_embeddings"])
def test_teacher_forced_logits_are_no_farther_from_float64_than_upstreams(name, dtype, patched):
    """Main and fast logits of 32 forced frames, against the float64 reference on the same rounded weights."""
    model = build(dtype, **CONFIGS[name])
    tokens = prompt(32, seed=3)
    tokens[0] = tokens[1] + SEMANTIC_BEGIN
    theirs = [torch.stack(t) for t in zip(*_upstream_logits(model, tokens), strict=True)]
    patched(model)
    engine = s1kernels.engine_of(model)
    ours = [torch.stack(t) for t in zip(*_engine_logits(engine, tokens), strict=True)]
    true_engine = s1kernels.Engine(engine.config, engine.weights.to(torch.float64), backend="reference")
    truth = [torch.stack(t) for t in zip(*_engine_logits(true_engine, tokens), strict=True)]
    for own, upstream, true in zip(ours, theirs, truth, strict=True):
        own_error = (own.double() - true).norm() / true.norm()
        upstream_error = (upstream.double() - true).norm() / true.norm()
        assert own_error <= upstream_error, (own_error, upstream_error)


@torch.inference_mode()
def _upstream_logits(model, tokens):
    """Upstream's own modules, fed given frames one at a time: [Vt] main and [N-1, K'] fast logits a frame."""
    model.setup_caches(1, model.config.max_seq_len, next(model.parameters()).dtype)
    for t in range(tokens.shape[1] - 1):
        result = model.forward_generate(tokens[None, :, t : t + 1], torch.tensor([t]))
        for layer in model.fast_layers:
            layer.attention.kv_cache.k_cache.fill_(0)
            layer.attention.kv_cache.v_cache.fill_(0)
        model.forward_generate_fast(result.hidden_states, torch.tensor([0]))
        fast = []
        for i in range(1, model.config.num_codebooks):
            hidden = model.fast_embeddings(tokens[i, t + 1][None])
            fast.append(model.forward_generate_fast(hidden, torch.tensor([i]))[0, 0, :1024])
        yield result.logits[0, 0].clone(), torch.stack(fast)


def _engine_logits(engine, tokens):
    """The same from an engine whose draws are forced."""
    for t in range(tokens.shape[1] - 1):

        def forced(generator, t=t):
            force(engine.decoder.noise.main, tokens[:1, t + 1])
            force(engine.decoder.noise.fast, tokens[None, 2:, t + 1])

        engine.decoder.noise.draw = forced
        codes = engine.step(
            tokens[:, t : t + 1], t, s1kernels.Sampling(temperature=1.0, top_p=1.0, repetition_penalty=1.0)
        )
        assert codes.tolist() == tokens[:, t + 1].tolist()
        yield engine.main_logits[0].clone(), engine.fast_logits[0].clone()


def test_callers_that_drive_forward_generate_get_the_fused_step(patched):
    """Prefill by upstream, then one token at a time by upstream's original functions: same logits, same caches."""
    model, twin = build(), build()
    patched(model)
    step = inference.decode_one_token_ar.__wrapped__
    for m in (model, twin):
        m.setup_caches(1, 64, torch.float32)
    frames = {m: prompt(12)[None] for m in (model, twin)}
    sampling = [torch.tensor(v) for v in (0.7, 1e-6, 1.0)]
    with torch.inference_mode():
        position = torch.arange(12)
        for _ in range(20):
            for m in frames:
                frames[m] = step(m, frames[m], position, *sampling, None, None)[None]
            assert torch.equal(frames[model], frames[twin])
            results = [m.forward_generate(frames[m], position[-1:] + 1) for m in (model, twin)]
            assert rel_error(results[0].logits, results[1].logits) < 1e-5
            assert rel_error(results[0].hidden_states, results[1].hidden_states) < 1e-5
            assert results[0].logits.shape == results[1].logits.shape and type(results[0]) is type(results[1])
            position = position[-1:] + 1
    ours, theirs = (m.layers[1].attention.kv_cache.k_cache[:, :, : int(position)] for m in (model, twin))
    assert rel_error(ours, theirs) < 1e-5


def test_a_callers_own_step_function_is_honoured(patched):
    model = build()
    calls = []
    original = inference.decode_one_token_ar

    def counting(**kwargs):
        calls.append(1)
        return original(**kwargs)

    arguments = dict(
        model=model, prompt=prompt(), max_new_tokens=10, audio_masks=None, audio_parts=None,
        decode_one_token=counting,
        temperature=0.8, top_p=1e-6, repetition_penalty=1.2,
    )  # fmt: skip
    expected = inference.generate(**arguments)
    patched(model)
    assert torch.equal(inference.generate(**arguments), expected)
    assert len(calls) == 18


def test_compiled_step_functions_are_served(patched):
    """init_model(compile=True) hands out torch.compile(decode_one_token_ar): a patched model does not need it."""
    model = build()
    expected = endless(model, top_p=1e-6)
    patched(model)
    compiled = torch.compile(inference.decode_one_token_ar, backend="aot_eager", fullgraph=True)
    torch.manual_seed(5)
    out = inference.generate(
        model=model, prompt=prompt(), max_new_tokens=FRAMES, audio_masks=None, audio_parts=None,
        decode_one_token=compiled,
        temperature=0.8, top_p=1e-6, repetition_penalty=1.2,
    )  # fmt: skip
    assert torch.equal(out[:, 20:], expected)


def test_other_models_are_untouched(patched):
    model, other = build(seed=0), build(seed=1)
    expected, expected_other = endless(model), endless(other)
    patched(model)
    assert torch.equal(generate(other, frames=FRAMES), expected_other)
    assert torch.equal(generate(model, frames=FRAMES), expected)
    with pytest.raises(ValueError, match="engine_of: model must be patched"):
        s1kernels.engine_of(other)


def test_unpatch_restores_bit_identical_behaviour():
    model = build(torch.bfloat16)
    expected = endless(model)
    keys, tensors = list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    functions = inference.decode_n_tokens, inference.decode_one_token_ar, llama.DualARTransformer.forward_generate
    s1kernels.patch(model)
    assert list(model.state_dict()) == keys
    assert [p.data_ptr() for p in model.parameters()] == tensors
    generate(model, frames=8)
    s1kernels.unpatch(model)
    assert (
        inference.decode_n_tokens,
        inference.decode_one_token_ar,
        llama.DualARTransformer.forward_generate,
    ) == functions
    assert torch.equal(generate(model, frames=FRAMES), expected)
    assert list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="unpatch: model must be patched"):
        s1kernels.unpatch(model)


def test_patching_again_applies_the_new_back_end(patched):
    model = build()
    expected = endless(model)
    patched(model, backend="auto")
    report = s1kernels.patch(model, backend={"attention_decode": "reference"})
    assert report.backends["attention_decode"] == "reference"
    assert "decode_frame" not in report.backends
    assert torch.equal(generate(model, frames=FRAMES), expected)


def test_weights_are_not_held_twice(patched):
    model = build()
    patched(model)
    held = {t.data_ptr() for t in s1kernels.engine_of(model).weights.flat()}
    own = {p.data_ptr() for p in model.parameters()} | {model.freqs_cis.data_ptr(), model.fast_freqs_cis.data_ptr()}
    tables = {model.freqs_cis.float().data_ptr()}  # a table that upstream keeps in another dtype may be a copy
    assert len(held - own - tables) <= 2


def test_moved_and_changed_weights_are_noticed(patched):
    model = build(seed=0)
    patched(model)
    generate(model, frames=4)
    donor = build(seed=1)
    expected = endless(donor)
    model.load_state_dict(dict(donor.named_parameters()), strict=False)
    model.tokenizer.end_token = donor.tokenizer.end_token
    assert torch.equal(generate(model, frames=FRAMES), expected)
    model.load_state_dict(dict(build(seed=0).named_parameters()), strict=False, assign=True)
    expected = endless(build(seed=0))
    assert torch.equal(generate(model, frames=FRAMES), expected)
    model.to(torch.bfloat16)
    assert generate(model, frames=4).shape[0] == 5


def test_a_weight_that_is_written_makes_a_new_engine(patched):
    """Which may have had a copy of it."""
    model = build()
    patched(model)
    generate(model, frames=2)
    before = s1kernels.engine_of(model)
    with torch.no_grad():
        model.layers[0].feed_forward.w1.weight.mul_(0.5)
    generate(model, frames=2)
    assert s1kernels.engine_of(model) is not before
    again = s1kernels.engine_of(model)
    generate(model, frames=2)
    assert s1kernels.engine_of(model) is again


def test_caches_start_small_grow_and_are_given_back_whole(patched):
    model = build(max_seq_len=2048)
    assert model.max_seq_len == -1
    expected = endless(build(max_seq_len=2048), length=490)
    patched(model)
    model.setup_caches(1, 2048, torch.float32)
    assert model.layers[0].attention.kv_cache.k_cache.shape[2] == model.max_seq_len == 512
    assert torch.equal(generate(model, frames=FRAMES, length=490), expected)
    assert model.layers[0].attention.kv_cache.k_cache.shape[2] == model.max_seq_len == 1024
    s1kernels.unpatch(model)
    assert model.layers[0].attention.kv_cache.k_cache.shape[2] == model.max_seq_len == 2048
    assert torch.equal(generate(model, frames=FRAMES, length=490), expected)
    s1kernels.patch(model)


def test_a_model_made_and_used_in_a_worker_thread():
    expected, results = endless(build()), []

    def work():
        model = build()
        model.tokenizer.end_token = 7
        s1kernels.patch(model)
        results.append(generate(model, frames=FRAMES))
        s1kernels.unpatch(model)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(results[0][:, :40], expected[:, :40])


def test_a_deleted_model_is_forgotten():
    model = build()
    s1kernels.patch(model)
    generate(model, frames=4)
    reference = weakref.ref(model)
    twin = build(seed=1)
    s1kernels.patch(twin)
    del model
    gc.collect()
    assert reference() is None
    s1kernels.unpatch(twin)  # restores upstream's functions although the other was never unpatched


def test_copies_and_pickles_of_a_patched_model_are_unpatched(patched):
    model = build()
    expected = endless(model)
    patched(model)
    clone = copy.deepcopy(model)
    with pytest.raises(ValueError, match="must be patched"):
        s1kernels.engine_of(clone)
    assert torch.equal(generate(clone, frames=FRAMES), expected)
    state = pickle.loads(pickle.dumps(model.state_dict()))
    assert list(state) == list(model.state_dict())


def test_the_report_names_what_was_replaced_and_what_was_left(patched, caplog):
    model = build()
    with caplog.at_level("INFO", logger="s1kernels"):
        report = patched(model)
    text = str(report)
    assert text in caplog.text
    for name in ("decode_n_tokens", "decode_one_token_ar", "forward_generate", "setup_caches"):
        assert any(replaced.endswith(name) for replaced in report.replaced)
    assert any("forward" in left for left in report.left)
    assert "float32" in text and "s1 line" in text


def test_the_reference_model_speaks_as_upstream_does():
    """Our DualAR, from the ops' references alone, against upstream's modules in float64."""
    model = build(torch.float64)
    engine = s1kernels.Engine(*_read(model), backend="reference")
    assert isinstance(engine._model, DualAR) and references.decode_frame
    tokens = prompt(24, seed=3)
    tokens[0] = tokens[1] + SEMANTIC_BEGIN
    ours, theirs = (
        [torch.cat([main, fast.flatten()]) for main, fast in frames]
        for frames in (_engine_logits(engine, tokens), _upstream_logits(model, tokens))
    )
    for own, upstream in zip(ours, theirs, strict=True):
        assert rel_error(own, upstream) < 1e-6  # upstream normalises and rotates in float32 whatever the dtype
    assert model.config.codebook_size == CODES


def _read(model):
    from s1kernels.upstream import read_config, read_weights

    config = read_config(model, "s1")
    return config, read_weights(model, config)
