"""What goes wrong on a GPU is said, gives no codes, and leaves an engine that works if the GPU still does."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_models import DEVICES, GREEDY, MODELS, SAMPLED, build, needs_gpu, prompt, weights, without

from s1kernels import BackendError, Engine, registry
from s1kernels.backends.cuda.launch import Launch
from s1kernels.model.weights import Weights


def say(engine, frames=6, seed=3):
    return engine.generate(prompt("small", 20), frames, SAMPLED, seed=seed)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def spoiled(row, value, frame=-1):
    tokens = prompt("small", 20)
    tokens[row, frame] = value
    return tokens


BAD_CALLS = {
    "a token past the vocabulary": (lambda e: e.generate(spoiled(0, 160), 4), r"a token in \[0, 160\), got 160"),
    "a negative token": (lambda e: e.generate(spoiled(0, -1), 4), r"a token in \[0, 160\), got -1"),
    "a code past the codebook": (lambda e: e.generate(spoiled(3, 30), 4), r"a code in \[0, 30\), got 30"),
    "a bad token within the prompt": (lambda e: e.generate(spoiled(0, 160, 5), 4), r"a token in \[0, 160\), got 160"),
    "a bad code within the prompt": (lambda e: e.generate(spoiled(1, -2, 5), 4), r"a code in \[0, 30\), got -2"),
    "a position past the last": (
        lambda e: e.step(prompt("small", 1), 1500, SAMPLED), "positions must be at most max_positions=1500, got 1501",
    ),
    "a negative position": (lambda e: e.step(prompt("small", 1), -1, SAMPLED), "position"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CALLS)
def test_what_is_out_of_range_is_refused(what, device):
    call, message = BAD_CALLS[what]
    engine = build("small", device)
    codes = say(engine)
    with pytest.raises(ValueError, match=message):
        call(engine)
    assert torch.equal(say(engine), codes)


def test_a_run_goes_on_to_the_last_position(device):
    """All frames that there is room for come first, then the refusal."""
    engine, text, frames = without(build("small", device)), prompt("small", 1497), []
    engine.prefill(text[:, :-1])
    with pytest.raises(ValueError, match="positions must be at most max_positions=1500, got 1501"):
        for codes in engine.frames(text[:, -1:], 1496, 10, SAMPLED):
            frames.append(codes)
    assert len(frames) == 4


@needs_gpu
def test_what_a_graph_cannot_take_is_refused():
    engine, frame = build("small", "cuda"), prompt("small", 1, "cuda")
    codes = say(engine)
    wide = torch.zeros(5, 17, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match=r"previous must be \[N\+1, W <= 16\], got \[5, 17\]"):
        engine.step(frame, 0, SAMPLED, wide)
    with pytest.raises(ValueError, match=r"generator must be on cuda:0, got cpu; make it by torch\.Generator"):
        engine.step(frame, 0, SAMPLED, None, torch.Generator())
    assert torch.equal(say(engine), codes)


@pytest.mark.parametrize("field", ["norm", "fast_norm"])
def test_weights_that_are_not_finite_raise(field, device):
    own = Weights.unflatten(MODELS["small"], [t.clone() for t in weights("small", device).flat()])
    engine = Engine(MODELS["small"], own)
    codes = say(engine)
    kept = getattr(own, field).clone()
    getattr(own, field)[3] = float("nan")
    with pytest.raises(FloatingPointError, match="logits must be finite, got NaN at position 19"):
        say(engine)
    getattr(own, field).copy_(kept)
    assert torch.equal(say(engine), codes)


def no_memory(*args, **kwargs):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")


@needs_gpu
@pytest.mark.parametrize("where", ["at its begin", "amid its launches", "of a second graph"])
def test_out_of_memory_at_capture(where, monkeypatch):
    engine = build("small", "cuda")
    codes = say(build("small", "cuda"))
    if where == "of a second graph":
        assert torch.equal(say(engine), codes)
        engine.prefill(prompt("small", 600))  # the cache moves
    with monkeypatch.context() as patch:
        if where == "amid its launches":
            launches = engine.decoder._frame_launches
            patch.setattr(engine.decoder, "_frame_launches", lambda: [*launches(), Launch(no_memory, [])])
        else:
            patch.setattr(torch.cuda.CUDAGraph, "capture_begin", no_memory)
        with pytest.raises(torch.cuda.OutOfMemoryError, match="decode_frame: out of GPU memory in the capture"):
            say(engine)
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.equal(say(engine), codes)


@needs_gpu
def test_out_of_memory_as_the_cache_grows():
    """Really: torch may take 16 MB more, and the cache's tensors are to be 51 MB each."""
    config = dataclasses.replace(MODELS["small"], max_positions=400_000)
    engine = Engine(config, dataclasses.replace(weights("small", "cuda"), cos_sin=rotary(config)))
    codes = say(engine)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (16 << 20)) / total)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError, match="decode_frame: out of GPU memory in the replay"):
            engine.step(prompt("small", 1), 399_000, SAMPLED)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.cache.capacity == 512
    assert torch.equal(say(engine), codes)


def rotary(config):
    like = weights("small", "cuda").cos_sin
    return like.repeat(-(-config.max_positions // len(like)), 1, 1)[: config.max_positions].contiguous()


@needs_gpu
def test_a_shape_that_the_kernels_do_not_take_is_served_by_others(monkeypatch):
    monkeypatch.setitem(registry.BACKENDS, "triton", lambda: "left out of this test")
    slow = dataclasses.replace(MODELS["small"].slow, heads=2, kv_heads=1, head_dim=272)
    config = dataclasses.replace(MODELS["small"], slow=slow)
    generator = torch.Generator().manual_seed(0)
    model = Weights.build(config, lambda _, shape: (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).cuda())
    engine, reference = Engine(config, model), Engine(config, model, backend="reference")
    assert engine.backends["attention_decode"] == "reference" and engine.backends["rms_norm_qkv"] == "cuda"
    expected = reference.generate(prompt("small", 20), 12, GREEDY)
    assert torch.equal(engine.generate(prompt("small", 20), 12, GREEDY), expected)
    with pytest.raises(BackendError, match="head_dim is 272; the kernels take 256 at most"):
        Engine(config, model, backend="cuda")


STICKY = """
import json, os, sys, torch
sys.path.insert(0, sys.argv[1])
from cuda_models import SAMPLED, build, prompt, without
from s1kernels.backends.cuda import swiglu

engine, given = without(build("small", "cuda")), prompt("small", 20)
text = given.cuda()
engine.prefill(text[:, :-1])
frames = engine.frames(text[:, -1:], 19, 50, SAMPLED)
said = [["codes", next(frames).tolist()]]

def attempt(call):
    try:
        said.append(["codes", call().tolist()])
    except Exception as error:
        said.append([", ".join(cls.__name__ for cls in type(error).__mro__), str(error)])

swiglu.KERNEL(torch.float32, torch.device("cuda", 0), grid=1, gate=16, up=16, out=16, rows=1, hidden=256)
attempt(torch.cuda.synchronize)
attempt(lambda: next(frames))
attempt(lambda: engine.step(text[:, -1:], 19, SAMPLED))
attempt(lambda: engine.generate(given, 4, SAMPLED))
print(json.dumps(said), flush=True)
os._exit(0)  # what torch's destructors say does not matter
"""


@needs_gpu
def test_an_error_inside_a_kernel_surfaces_at_the_next_call(tmp_path):
    """It cannot be cleared: every call says so, and none gives codes."""
    command = [sys.executable, "-c", STICKY, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    before, fault, frame, step, run = json.loads(done.stdout.splitlines()[-1])
    assert before[0] == "codes" and "illegal memory access" in fault[1]
    for kinds, text in (frame, step, run):
        assert "RuntimeError" in kinds and "CUDA" in text
    for _, text in (frame, step):
        assert text.startswith("decode_frame: the GPU failed in the ") and "restart the process" in text
    assert "replay, position 20: " in frame[1]
