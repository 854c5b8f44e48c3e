"""The model in plain torch calls, and its parts as ONNX, against the reference."""

import importlib.util

import pytest
import torch
from test_engine import CONFIG, prompt, weights

from s1kernels import export, registry, testing
from s1kernels.contract import as_tuple
from s1kernels.model import torch_ops
from s1kernels.model.dual_ar import DualAR
from s1kernels.ops import references

needs_onnx = pytest.mark.skipif(
    not (importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime")),
    reason="no onnx and onnxruntime; install s1kernels[onnx]",
)
ONE_SEQUENCE = [
    (name, case)
    for name, op in registry.OPS.items()
    if hasattr(torch_ops, name)
    for case, sizes in op.cases.items()
    if sizes.get("R", 1) == 1 and (name, case) != ("embed_frame", "s1")  # a gigabyte of embeddings
]


@pytest.mark.parametrize(("name", "case"), ONE_SEQUENCE, ids=["-".join(pair) for pair in ONE_SEQUENCE])
def test_torch_ops_keep_the_contracts(name, case):
    """In float64, in which there is nothing to round."""
    op = registry.OPS[name]
    args = testing.clone(op.inputs(testing.Make(torch.float32), **op.cases[case]), torch.float64)
    if name == "attention_decode":  # masks what the kernels do not read, so that it must be finite
        args = tuple(arg.nan_to_num() if arg.dim() == 4 else arg for arg in args)
    theirs, ours = testing.clone(args), testing.clone(args)
    truth, value = (as_tuple(f(*given)) for f, given in ((op.reference, theirs), (getattr(torch_ops, name), ours)))
    for a, b in zip((*value, *ours), (*truth, *theirs), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_every_op_of_a_frame_has_plain_torch_calls():
    the_codecs = {"snake"}
    assert {name for name in registry.OPS if not hasattr(torch_ops, name)} == {"decode_frame", *the_codecs}


def run(session, **inputs):
    names = [output.name for output in session.get_outputs()]
    values = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


@pytest.fixture
def session(tmp_path):
    """A part of the small model -> its session, its caches by name, and the reference in float64."""
    runtime = pytest.importorskip("onnxruntime")

    def make(part, dtype=torch.float32, **options):
        given = weights(dtype=dtype)
        path = export.export(CONFIG, given, part, tmp_path / f"{part}.onnx", **options)
        inputs = export.module(CONFIG, given, part, **options)[1]
        caches = {name: value for name, value in inputs.items() if name[:2] in ("k_", "v_")}
        exact = DualAR(CONFIG, given.to(torch.float64), references)
        return runtime.InferenceSession(path, providers=["CPUExecutionProvider"]), caches, exact

    return make


def exact_caches(caches):
    return [[value.double() for name, value in caches.items() if name[0] == kind] for kind in "kv"]


@needs_onnx
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.float16, 3e-3)], ids=str)
def test_slow_steps_are_the_references(session, dtype, limit):
    slow, caches, exact = session("slow", dtype, capacity=8)
    truth = exact_caches(caches)
    text = prompt(6).int()
    text[0, 2] = 5  # not semantic
    for t in range(6):
        position = torch.tensor([t], dtype=torch.int32)
        out = run(slow, tokens=text[:, t][None], position=position, **caches)
        caches = {name: out[f"{name}_out"] for name in caches}
        hidden = exact.slow_step(text[:, t][None], position, *truth)
        logits, _ = references.rms_norm_logits(hidden, exact.weights.norm, exact.weights.head, CONFIG.norm_eps)
        assert testing.rel_error(out["logits"], logits) < limit and testing.rel_error(out["hidden"], hidden) < limit
    for value, right in zip(caches.values(), [t for pair in zip(*truth, strict=True) for t in pair], strict=True):
        assert testing.rel_error(value, right) < limit


@needs_onnx
def test_fast_steps_are_the_references(session):
    fast, caches, exact = session("fast", capacity=CONFIG.codebooks)
    truth, w = exact_caches(caches), exact.weights
    hidden = torch.randn(1, CONFIG.slow.dim)
    codes = [0, 7, 29, 3]
    for i, code in enumerate(codes):
        position = torch.tensor([i], dtype=torch.int32)
        out = run(fast, hidden=hidden, code=torch.tensor([code], dtype=torch.int32), position=position, **caches)
        caches = {name: out[f"{name}_out"] for name in caches}
        x = references.linear_residual(hidden.double(), w.project_weight, w.project_bias, None)
        x = exact.stack(x if i == 0 else w.fast_embedding[[code]], w.fast, w.fast_cos_sin, position, *truth)
        logits, _ = references.rms_norm_logits(x, w.fast_norm, w.fast_head, CONFIG.norm_eps)
        assert testing.rel_error(out["logits"], logits) < 2e-6


@needs_onnx
def test_a_block_reads_a_sequence_at_once_and_goes_on_from_there(session, tmp_path):
    once, caches, exact = session("block", capacity=8, layers=2, rows=5)
    truth = exact_caches(caches)
    x = torch.randn(6, CONFIG.slow.dim)
    out = run(once, x=x[:5], position=torch.arange(5, dtype=torch.int32), **caches)
    right = exact.stack(
        x[:5].double(), exact.weights.slow[:2], exact.weights.cos_sin, torch.arange(5, dtype=torch.int32), *truth
    )
    assert testing.rel_error(out["y"], right) < 2e-6
    step, _, _ = session("block", capacity=8, layers=2)
    last = torch.tensor([5], dtype=torch.int32)
    y = run(step, x=x[5:], position=last, **{name: out[f"{name}_out"] for name in caches})["y"]
    right = exact.stack(x[5:].double(), exact.weights.slow[:2], exact.weights.cos_sin, last, *truth)
    assert testing.rel_error(y, right) < 2e-6


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"part": "frame"}, ValueError, "part must be 'block', 'slow' or 'fast', got 'frame'"),
        ({"capacity": 0}, ValueError, r"capacity must be in \[1, 1500\], got 0"),
        ({"part": "fast", "capacity": 9}, ValueError, r"capacity must be in \[1, 4\], got 9"),
        ({"part": "block", "layers": 4}, ValueError, r"layers must be in \[1, 3\], got 4"),
        ({"weights": weights(dtype=torch.bfloat16)}, TypeError, "must be float32 or float16, got bfloat16"),
    ],
    ids=["part", "capacity", "fast capacity", "layers", "dtype"],
)
def test_export_refuses(change, kind, message, tmp_path):
    pytest.importorskip("onnx")
    given = {"config": CONFIG, "weights": weights(), "part": "slow", "path": tmp_path / "x.onnx", "capacity": 4}
    with pytest.raises(kind, match=message):
        export.export(**given | change)
    assert not list(tmp_path.iterdir())


def test_without_onnx_the_extra_is_named(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else found(name, *rest))
    with pytest.raises(ImportError, match=r'pip install "s1kernels\[onnx\]"'):
        export.export(CONFIG, weights(), "slow", tmp_path / "x.onnx", capacity=4)
