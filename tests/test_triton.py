"""The Triton back end: natively on a GPU, else in Triton's interpreter, and compiled for GPUs that are not here."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_models import weights
from test_engine import CONFIG, SAMPLING

from s1kernels import BackendError, Engine, Sampling, registry, testing
from s1kernels.backends import triton
from s1kernels.backends.triton import support

usable = pytest.mark.skipif(triton.available() is not None, reason=str(triton.available()))
DEVICE = "cpu" if support.INTERPRETED else "cuda"
OPS = list(registry.OPS.values())
FEW_PROGRAMS = {"snake": 1 << 16, "swiglu": 1 << 16}
"""BLOCK of an op's S1-mini cases in the interpreter, which takes its time for every program, whatever it has to do; the
other cases go by the kernel's own."""


def small(sizes):
    """Whether the interpreter gets through a case in a second or so: its largest tensor is probably a matrix."""
    *_, a, b = sorted([1, 1, *(size for size in sizes.values() if isinstance(size, int))])
    return a * b <= 2_000_000


def dtypes(op):
    """All, but for calls that are the same in each, and in the interpreter for a frame, whose ops have been through."""
    if op.name == "sample_token":
        return testing.DTYPES[:1]
    return testing.DTYPES[:2] if op.name == "decode_frame" and support.INTERPRETED else testing.DTYPES


CASES = [
    pytest.param(op, case, dtype, id=f"{op.name}-{case}-{dtype}")
    for op in OPS
    for case, sizes in op.cases.items()
    if small(sizes) or not support.INTERPRETED
    for dtype in dtypes(op)
]


@pytest.fixture(autouse=True)
def changed_interpreter(monkeypatch):
    if support.INTERPRETED and triton.available() is None:
        import interpreter

        interpreter.change(monkeypatch)


@usable
@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_contract(op, case, dtype, monkeypatch):
    if support.INTERPRETED and op.name in FEW_PROGRAMS and case.startswith("s1_"):
        monkeypatch.setattr(f"s1kernels.backends.triton.{op.name}.BLOCK", FEW_PROGRAMS[op.name])
    outcome = testing.check_op(op, "triton", case, dtype, DEVICE)
    assert outcome.complaint is None, outcome


@usable
def test_every_op_is_there():
    assert [op.name for op in OPS if "triton" not in op.impls] == []


@usable
@pytest.mark.parametrize("backend", ["triton", {"attention_decode": "triton", "sample_token": "triton"}], ids=str)
@pytest.mark.parametrize("sampling", [Sampling(top_k=1), SAMPLING], ids=["greedy", "sampled"])
def test_the_engine_says_what_the_reference_says(backend, sampling):
    given, own = torch.randint(0, 30, (CONFIG.codebooks + 1, 5), dtype=torch.int32), weights("small", DEVICE)
    said = [Engine(CONFIG, own, backend=b).generate(given, 4, sampling, seed=3) for b in (backend, "reference")]
    assert torch.equal(*said)
    served = Engine(CONFIG, own, backend=backend).backends
    chosen = {name for name, by in served.items() if by == "triton"}
    assert chosen == (set(served) if backend == "triton" else set(backend))


@usable
def test_what_the_kernels_cannot_take_is_refused():
    x = torch.ones(1, 4, dtype=torch.float64, device=DEVICE)
    with registry.use_backend("triton"), pytest.raises(BackendError, match=r"a tensor is torch\.float64"):
        registry.OPS["rms_norm"](x, x[0], 1e-6)


UNUSABLE = {
    "missing": (
        "raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')",
        "Triton is not installed; pip",
    ),
    "incomplete": ("import triton_parts", "Triton is broken: No module named 'triton_parts'"),
    "broken": ("raise OSError('libtriton.so: wrong ELF class')", "Triton is broken: OSError: libtriton.so"),
    "too old": ("__version__ = '3.1.0'", "Triton is 3.1.0; the kernels need 3.2 or later"),
    "without a GPU": ("__version__ = '3.9.0'", "there is no CUDA device; TRITON_INTERPRET=1"),
}
ASK = """
import torch
from s1kernels import BackendError, registry
x = torch.ones(1, 4)
registry.OPS["rms_norm"](x, x[0], 1e-6)  # the others go on
try:
    with registry.use_backend("triton"):
        registry.OPS["rms_norm"](x, x[0], 1e-6)
except BackendError as error:
    print(error)
print(registry.BACKENDS["triton"]())
"""


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_triton_that_cannot_serve_says_why(case, tmp_path):
    """Auto goes on without it, an explicit choice raises."""
    if case == "without a GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    text, reason = UNUSABLE[case]
    tmp_path.joinpath("triton.py").write_text(text)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    refused, said = done.stdout.splitlines()
    assert said.startswith(reason)
    assert refused.startswith(f"rms_norm: back end 'triton' cannot serve this call: {reason}")


@usable
@pytest.mark.parametrize(("architecture", "cases"), [(80, 1), (90, 2), (120, 1)])
def test_every_kernel_compiles_for_gpus(architecture, cases, tmp_path):
    """What the interpreter accepts and the compiler does not."""
    if tuple(int(x) for x in importlib.metadata.version("triton").split(".")[:2]) < (3, 6):
        pytest.skip("an older release has other ways to compile for a GPU that is not there")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).parent / "compile_triton.py"
    done = subprocess.run(
        [sys.executable, str(script), str(architecture), str(cases)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    compiled = set(done.stdout.split())
    frames = {"advance_kernel", "attention_output_kernel", "sample_token_survey_kernel", "sample_token_settle_kernel"}
    assert {f"{op.name}_kernel" for op in OPS if op.name != "decode_frame"} | frames <= compiled
