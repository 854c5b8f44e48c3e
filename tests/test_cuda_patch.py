"""Patched models of both lines on a GPU, against the same models unpatched there; a few on the CPU too."""

import contextlib
import gc
import threading

import pytest
import stand_in
import test_line_2_0 as line_2
import torch
from cuda_models import HALVES, memory, needs_gpu
from torch.nn.attention import SDPBackend, sdpa_kernel

import s1kernels
from s1kernels.backends import triton
from s1kernels.decoder import HostDecoder
from s1kernels.ops.decode_frame import force

try:
    import upstream_models as line_1
    from fish_speech.models.text2semantic import inference
except ImportError:
    line_1 = inference = None

FRAMES = 80


class S1:
    """Models of the S1 line: upstream's own code."""

    module, greedy, sampled = inference, {"top_p": 1e-6}, {"top_p": 0.9}
    names = (
        "s1_like", "no_qk_norm", "fast_qk_norm_only", "tied", "biases", "fast_bias_only", "scaled_embeddings",
        "projected", "many_query_heads", "plain_heads",
    )  # fmt: skip

    @staticmethod
    def build(name="s1_like", dtype=torch.float32, device="cuda"):
        return line_1.build(dtype, **line_1.CONFIGS[name]).to(device)

    @staticmethod
    def generate(model, frames=FRAMES, top_p=0.9):
        tokens = line_1.prompt(20, codebooks=model.config.num_codebooks).to(model.norm.weight.device)
        torch.manual_seed(5)
        out = inference.generate(
            model=model, prompt=tokens, max_new_tokens=frames, audio_masks=None, audio_parts=None, temperature=0.8,
            top_p=top_p, repetition_penalty=1.2,
        )  # fmt: skip
        return out[:, 20:].clone()

    @staticmethod
    def endless(model, **options):
        """Frames that no end token ends; the tokenizer's is then one that the model has not drawn so far."""
        model.tokenizer.end_token = -1
        codes = S1.generate(model, **options)
        model.drawn = getattr(model, "drawn", set()) | set(codes[0].tolist())
        model.tokenizer.end_token = min(set(range(line_1.SEMANTIC_BEGIN)) - model.drawn)
        return codes

    @staticmethod
    def speech(length, codebooks, device):
        tokens = line_1.prompt(length, seed=3, codebooks=codebooks).to(device)
        tokens[0] = tokens[1] + line_1.SEMANTIC_BEGIN
        return tokens


class S2:
    """Models of the 2.0 line: the stand-in."""

    module, greedy, sampled = stand_in, {"top_k": 1}, {}
    names = tuple(line_2.CONFIGS)

    @staticmethod
    def build(name="s2_like", dtype=torch.float32, device="cuda"):
        return line_2.build(dtype, **line_2.CONFIGS[name]).to(device)

    @staticmethod
    def generate(model, frames=FRAMES, top_k=30):
        device = model.norm.weight.device
        tokens = line_2.prompt(codebooks=model.config.num_codebooks).to(device)
        if not getattr(model, "_cache_setup_done", False):
            with torch.device(device):
                model.setup_caches(1, model.config.max_seq_len, model.norm.weight.dtype)
            model._cache_setup_done = True
        torch.manual_seed(5)
        out = stand_in.generate(
            model=model, prompt=tokens, max_new_tokens=frames, audio_masks=None, audio_parts=None, temperature=0.8,
            top_p=0.9, top_k=top_k,
        )  # fmt: skip
        return out[:, tokens.shape[1] :].clone()

    @staticmethod
    def endless(model, **options):
        """Frames that no end token ends; the tokenizer has none."""
        model.tokenizer.end_token = -1  # patched models keep theirs, which the bias then forbids
        codes = S2.generate(model, **options)
        model.tokenizer.end_token = line_2.END
        return codes

    @staticmethod
    def speech(length, codebooks, device):
        return line_2.speech(length, codebooks).to(device)


LINES = {"s1": S1, "2.0": S2}
needs_upstream = pytest.mark.skipif(line_1 is None, reason="fish-speech is not installed")
BOTH = [pytest.param("s1", marks=needs_upstream), "2.0"]


def cases(*names):
    """(line, model, device): all models on a GPU, or those that are named; one of each line on the CPU."""
    found = []
    for line, models in LINES.items():
        of_line = [needs_upstream] if line == "s1" else []
        runs = [(models.names[0], "cpu", [])]
        runs += [(name, "cuda", [needs_gpu]) for name in models.names if name in names or not names]
        found += [
            pytest.param(line, name, device, marks=[*of_line, *marks], id=f"{line}-{name}-{device}")
            for name, device, marks in runs
        ]
    return found


@pytest.fixture(autouse=True)
def functions_are_left_as_they_were(exact_float32):
    held = [models.module for models in LINES.values() if models.module]
    held = [(holder, name) for holder in held for name in ("decode_n_tokens", "decode_one_token_ar")]
    classes = [stand_in.DualARTransformer] + ([] if inference is None else [inference.DualARTransformer])
    held += [(cls, name) for cls in classes for name in ("forward_generate", "setup_caches")]
    before = [getattr(holder, name) for holder, name in held]
    yield
    gc.collect()
    assert [getattr(holder, name) for holder, name in held] == before


@pytest.fixture
def patched():
    """patch(), undone at the end of the test. It must be served by the kernels of the model's device."""
    served = []

    def patch(model, **options):
        report = s1kernels.patch(model, **options)
        served.append(model)
        if model.norm.weight.is_cuda and not options:
            assert report.backends == {"decode_frame": "cuda"}
        return report

    yield patch
    for model in dict.fromkeys(served):
        with contextlib.suppress(ValueError):  # the test has done it
            s1kernels.unpatch(model)


@pytest.mark.parametrize(("line", "name", "device"), cases())
def test_float32_codes_are_the_unpatched_models(line, name, device, patched):
    """Greedy codes are identical; so are sampled ones, since the kernels draw torch's numbers."""
    models = LINES[line]
    model = models.build(name, device=device)
    expected = [models.endless(model, **options) for options in (models.greedy, models.sampled)]
    assert expected[0].shape == (model.config.num_codebooks + 1, FRAMES)
    assert not torch.equal(*expected)
    assert patched(model).device.startswith(device)
    for options, codes in zip((models.greedy, models.sampled), expected, strict=True):
        assert torch.equal(models.endless(model, **options), codes)


@pytest.mark.parametrize("options", [{"graph": False}, {"backend": "reference"}], ids=["by_ops", "reference"])
@pytest.mark.parametrize(("line", "name", "device"), cases("projected"))
def test_other_ways_give_the_same_codes(line, name, device, options, patched):
    models = LINES[line]
    model = models.build(name, device=device)
    expected = models.endless(model, frames=24)
    patched(model, **options)
    assert torch.equal(models.endless(model, frames=24), expected)


@pytest.mark.parametrize("options", [{}, {"backend": "triton"}], ids=["auto", "triton"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("line", "name", "device"), cases("s1_like", "tied", "biases", "s2_like", "projected"))
def test_forced_logits_are_no_farther_from_float64_than_the_unpatched_models(
    line, name, device, dtype, options, patched
):
    """Main and fast logits of 32 given frames, against the float64 reference on the same rounded weights."""
    if options and (device == "cpu" or triton.available()):
        pytest.skip(triton.available() or "Triton's interpreter takes minutes")
    models = LINES[line]
    model = models.build(name, dtype, device)
    text = models.speech(33, model.config.num_codebooks, device)
    theirs = model_logits(model, text, 1024 if line == "s1" else None)
    patched(model, **options)
    engine = s1kernels.engine_of(model)
    right = engine_logits(s1kernels.Engine(engine.config, engine.weights.to(torch.float64), backend="reference"), text)
    rows = slice(None) if engine.active_rows.ids is None else engine.active_rows.ids.long()
    theirs[0] = theirs[0][:, rows]
    allowed = [(upstream - true).norm() for upstream, true in zip(theirs, right, strict=True)]
    for own, true, most in zip(engine_logits(engine, text), right, allowed, strict=True):
        assert 0 < (own - true).norm() <= most
    alone = torch.cat([engine.slow_step(text[:, t : t + 1], t)[0].double() for t in range(text.shape[1] - 1)])
    assert 0 < (alone[:, rows] - right[0]).norm() <= allowed[0]


@torch.inference_mode()
def model_logits(model, text, fast_rows):
    """An unpatched model's own modules, fed given frames: [main [T, Vt], fast [T, N-1, K']] in float64."""
    main, fast = [], []
    with torch.device(text.device), sdpa_kernel(SDPBackend.MATH):  # as upstream's loop has it
        model.setup_caches(1, model.config.max_seq_len, model.norm.weight.dtype)
        for t in range(text.shape[1] - 1):
            result = model.forward_generate(text[None, :, t : t + 1], torch.tensor([t]))
            for layer in model.fast_layers:
                layer.attention.kv_cache.k_cache.zero_()
                layer.attention.kv_cache.v_cache.zero_()
            model.forward_generate_fast(result.hidden_states, torch.tensor([0]))
            hidden = [model.fast_embeddings(code[None]) for code in text[1:-1, t + 1]]
            rows = [model.forward_generate_fast(h, torch.tensor([i + 1]))[0, 0] for i, h in enumerate(hidden)]
            main.append(result.logits[0, 0].double())
            fast.append(torch.stack(rows)[:, :fast_rows].double())
    return [torch.stack(main), torch.stack(fast)]


def engine_logits(engine, text):
    """The same from an engine whose draws are forced; on a GPU, from the launches that the graph is made of."""
    rows, program = engine.active_rows, engine._program(engine.active_rows)
    decoder = HostDecoder(engine.config, rows, engine.cache, program)
    main, fast = [], []
    for t in range(text.shape[1] - 1):
        token = text[:1, t + 1].int()

        def forced(generator, token=token, codes=text[None, 2:, t + 1]):
            force(decoder.noise.main, token if rows.ids is None else torch.searchsorted(rows.ids, token))
            force(decoder.noise.fast, codes)

        decoder.noise.draw = forced
        sampling = s1kernels.Sampling(temperature=1.0, top_p=1.0, repetition_penalty=1.0)
        (codes,) = decoder.decode(text[:, t : t + 1].T.int().contiguous(), t, 1, sampling, None, None)
        assert codes.tolist() == text[:, t + 1].tolist()
        main.append(decoder.main_logits[0].clone().double())
        fast.append(decoder.fast_logits[0].clone().double())
    return [torch.stack(main), torch.stack(fast)]


@pytest.mark.parametrize(("line", "name", "device"), cases("s1_like", "s2_like"))
def test_the_end_token_stops_and_torchs_generator_goes_on_as_unpatched(line, name, device, patched):
    models = LINES[line]
    model = models.build(name, device=device)
    drawn = models.endless(model)[0].tolist()
    for model.tokenizer.end_token in dict.fromkeys(drawn[20:]):  # the first that stops a run on its way
        expected = models.generate(model)
        after = [torch.rand(4, device=device)]
        if 4 < expected.shape[1] < FRAMES - 4:
            break
    assert 4 < expected.shape[1] < FRAMES - 4
    patched(model)
    assert torch.equal(models.generate(model), expected)
    after.append(torch.rand(4, device=device))
    assert torch.equal(*after)


@needs_gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("line", BOTH)
def test_halves_say_the_same_twice(line, dtype, patched):
    model = LINES[line].build(dtype=dtype)
    patched(model)
    first, again = (LINES[line].generate(model) for _ in range(2))
    assert torch.equal(first, again) and first.shape[1] > 1


@needs_upstream
@needs_gpu
def test_constrained_models_speak(patched):
    model = S1.build()
    model.tokenizer.end_token = 3
    speech = {3, *range(line_1.SEMANTIC_BEGIN, line_1.SEMANTIC_BEGIN + line_1.CODES)}
    assert not set(S1.generate(model)[0].tolist()) <= speech
    s1kernels.patch(model, backend="reference", constrained=True)
    expected = S1.generate(model)
    patched(model, constrained=True)
    assert torch.equal(S1.generate(model), expected)
    assert set(expected[0].tolist()) <= speech


@needs_gpu
@pytest.mark.parametrize("line", BOTH)
def test_unpatch_gives_everything_back(line, patched):
    """Memory is back where it was, but for the code of kernels, which is loaded once."""
    models = LINES[line]
    model = models.build()
    expected = models.endless(model, frames=24)
    start, now = memory(), []
    for _ in range(4):
        patched(model)
        assert torch.equal(models.endless(model, frames=24), expected)
        s1kernels.unpatch(model)
        now.append(memory())
    assert [allocated for allocated, _ in now] == [start[0]] * 4
    assert abs(now[-1][1] - now[0][1]) <= 2 << 20
    assert torch.equal(models.endless(model, frames=24), expected)


@needs_gpu
@pytest.mark.parametrize("line", BOTH)
def test_a_model_may_move_while_it_is_patched(line, patched):
    """Patched before its caches are made, on the CPU; then on the GPU."""
    models, unpatched, model = LINES[line], LINES[line].build(), LINES[line].build(device="cpu")
    models.endless(unpatched, frames=24)
    model.tokenizer.end_token = unpatched.tokenizer.end_token
    expected = models.generate(unpatched, frames=24)
    patched(model)
    models.generate(model, frames=4)
    model.cuda()
    assert torch.equal(models.generate(model, frames=24), expected)
    assert s1kernels.engine_of(model).backends == {"decode_frame": "cuda"}


@needs_gpu
@pytest.mark.parametrize("line", BOTH)
def test_a_worker_thread_patches_and_speaks(line, patched):
    models, unpatched, results = LINES[line], LINES[line].build(), []
    models.endless(unpatched, frames=24)
    expected = models.generate(unpatched, frames=24)

    def work():
        model = models.build()
        model.tokenizer.end_token = unpatched.tokenizer.end_token
        patched(model)
        results.append(models.generate(model, frames=24))
        s1kernels.unpatch(model)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


@needs_gpu
@pytest.mark.parametrize("line", BOTH)
def test_out_of_memory_at_capture_leaves_the_model_usable(line, patched, monkeypatch):
    models = LINES[line]
    model = models.build()
    expected = models.endless(model, frames=24)
    patched(model)

    def no_memory(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "capture_begin", no_memory)
        with pytest.raises(torch.cuda.OutOfMemoryError, match="decode_frame: out of GPU memory in the capture"):
            models.endless(model, frames=24)
    assert torch.equal(models.endless(model, frames=24), expected)
    s1kernels.unpatch(model)
    assert torch.equal(models.endless(model, frames=24), expected)
