"""THE contract test: every op, on every back end that can run here, on every device, for every case and dtype."""

import contextlib
import functools
import itertools
from collections import Counter

import pytest
import torch

from s1kernels import registry, testing
from s1kernels.backends import cpu
from s1kernels.backends.cuda import launch, providers, support

RAN: Counter = Counter()
ISAS = cpu._C.isa_available() if cpu.available() is None else []
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PLACES = {"aligned": 0, "unaligned": testing.OFFSET}


def variants(backend, device):
    """In which ways a back end is tried: (suffix of the test's name, arguments of the test)."""
    if device == "cpu":
        for isa in ISAS if backend == "cpu" and ISAS else [None]:
            yield f"-{isa}" if isa else "", (isa, None, testing.OFFSET)
    elif backend == "cuda":
        for provider, (place, offset) in itertools.product(("compiled", "nvrtc"), PLACES.items()):
            yield f"-{provider}-{place}", (None, provider, offset)
    else:
        yield f"-on-{device}", (None, None, testing.OFFSET)


def cases():
    """The machine's contract cases. The CPU back end's come once for every instruction set, the CUDA back end's for
    either provider and for aligned and unaligned inputs. All that is tried on one case stands side by side."""
    for device in DEVICES:
        for op, backend, case, dtype in testing.contract_cases(device):
            for suffix, variant in variants(backend, device):
                name = f"{op.name}-{case}-{str(dtype).removeprefix('torch.')}-{backend}{suffix}"
                yield pytest.param(op, backend, device, case, dtype, *variant, id=name)


ALL = sorted(cases(), key=lambda case: case.id)


@pytest.mark.parametrize(("op", "backend", "device", "case", "dtype", "isa", "provider", "offset"), ALL)
def test_contract(op, backend, device, case, dtype, isa, provider, offset):
    if reason := registry.BACKENDS[backend]():
        pytest.skip(f"back end {backend}: {reason}")
    if provider and (reason := unusable(provider, dtype)):
        pytest.skip(reason)
    with instruction_set(isa), providers.use_provider(provider or "auto"):
        outcome = testing.check_op(op, backend, case, dtype, device, offset=offset)
    RAN[op.name, backend, device] += 1
    assert outcome.complaint is None, outcome


@functools.cache
def unusable(provider, dtype):
    """Why the GPU has no kernels of a dtype by a provider, or None. What must be compiled is compiled side by side."""
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := providers.available(device)[provider]:
        return f"provider {provider}: {reason}"
    if reason := support.supports(torch.empty(0, dtype=dtype, device=device)):
        return reason
    with providers.use_provider(provider):
        providers.prepare(sorted({kernel.source for kernel in launch.KERNELS}), dtype, device)
    return None


@contextlib.contextmanager
def instruction_set(isa):
    best = cpu._C.isa() if isa else None
    try:
        if isa:
            cpu._C.set_isa(isa)
        yield
    finally:
        if isa:
            cpu._C.set_isa(best)


@pytest.mark.skipif(not ISAS, reason=f"no native code: {cpu.available()}")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", registry.OPS)
def test_any_number_of_threads_gives_the_same_bits(name, isa):
    """No sum is split across threads, whatever their number."""
    op, results = registry.OPS[name], []
    case = next(case for case in op.cases if "odd" in case or "batch" in case)
    args = op.inputs(testing.Make(torch.bfloat16), **op.cases[case])
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            with instruction_set(isa), registry.use_backend("cpu"):
                given = testing.clone(args)
                out = op(*given)
            results.append([t.clone() for t in (out if isinstance(out, tuple) else (out,))])
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_pairs_that_ran(request, capsys):
    """Every selected op ran on every back end that is available, on each of its devices; says how many."""
    available = [
        (backend, device)
        for device in DEVICES
        for backend in registry.ORDER[device]
        if registry.BACKENDS[backend]() is None
    ]
    selected = [item.callspec.params for item in request.session.items if item.function is test_contract]
    expected = {
        (p["op"].name, p["backend"], p["device"])
        for p in selected
        if (p["backend"], p["device"]) in available and not (p["provider"] and unusable(p["provider"], p["dtype"]))
    }
    with capsys.disabled():
        names = [f"{backend} on {device}" for backend, device in available]
        print(f"\n{len(RAN)} (op, back end) pairs ran, {sum(RAN.values())} checks; back ends: {names}; ISAs: {ISAS}")
    assert set(RAN) == expected
    assert len(selected) < len(ALL) or len(expected) == len(registry.OPS) * len(available)


def test_a_wrong_result_is_caught(monkeypatch):
    """The contract test itself fails on a result that is off, unwritten, or written outside its place."""
    op, calls = registry.OPS["linear_residual"], itertools.count()

    def check(run):
        monkeypatch.setitem(op.impls, "reference", registry.Impl("reference", run))
        return testing.check_op(op, "reference", "odd_bias", torch.float32).complaint

    def right(*args):
        *given, out = args
        out.copy_(op.reference(*given))

    def off(*args):
        right(*args)
        args[-1].view(-1)[5] *= 1.001

    def unwritten(*args):
        right(*args)
        args[-1].view(-1)[5] = float("nan")

    def outside(*args):
        right(*args)
        out = args[-1]
        torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel()).fill_(0)

    def moody(*args):
        right(*args)
        args[-1].mul_(1 + next(calls) * 1e-6)

    assert check(right) is None
    assert "relative error" in check(off)
    assert "NaN" in check(unwritten)
    assert "outside" in check(outside)
    assert "different bits" in check(moody)
