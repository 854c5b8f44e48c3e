"""The registry: who serves a call, who says why not, and that catalogue, files, schemas and documents agree."""

import doctest
import importlib
import inspect
import pkgutil
import threading
from pathlib import Path

import pytest
import torch

import s1kernels
from s1kernels import BackendError, Engine, explain, ops, registry, use_backend
from s1kernels.contract import Arguments
from s1kernels.model.config import DualARConfig
from s1kernels.model.weights import Weights
from s1kernels.testing import Make, clone, poison

OPS = list(registry.OPS)
ROOT = Path(__file__).resolve().parents[1]
SMALLEST = {"decode_frame": "s1_small"}  # of the others: "minimal"
X, WEIGHT = torch.tensor([[1.0, 2.0]]), torch.eye(2)
TYPES = {"Tensor | None": "Optional[Tensor]", "list[Tensor]": "List[Tensor]"}  # others have one name in both


@pytest.fixture
def backends(monkeypatch):
    """Three more back ends for linear_residual, ahead of the reference: `broken` is not available, `picky` refuses
    more than one row, `lazy` implements nothing. Yields who served, call by call."""
    served, op = [], registry.OPS["linear_residual"]

    def entering(name):
        def run(x, weight, bias, residual, out):
            served.append(name)
            out.copy_(op.reference(x, weight, bias, residual))

        return run

    def one_row(x, *_):
        return None if len(x) == 1 else f"picky takes one row, got {len(x)}"

    for name, available in (("broken", "no such device"), ("picky", None), ("lazy", None)):
        monkeypatch.setitem(registry.BACKENDS, name, lambda available=available: available)
    monkeypatch.setitem(registry.ORDER, "cpu", ("broken", "lazy", "picky", "reference"))
    monkeypatch.delenv("S1KERNELS_BACKEND", raising=False)
    with monkeypatch.context() as patch:
        for name, supports in (("broken", None), ("picky", one_row), ("reference", None)):
            patch.setitem(op.impls, name, registry.Impl(name, entering(name), supports))
        yield served


def call(x=X):
    return ops.linear_residual(x, WEIGHT, None, None)


def small_arguments(name):
    op = registry.OPS[name]
    args = op.inputs(Make(torch.float32), **op.cases[SMALLEST.get(name, "minimal")])
    out = op.empty(op.checked(*args))
    return op, args, out if isinstance(out, tuple) else (out,)


def small_model():
    """(config, weights) of decode_frame's smallest case."""
    _, args, _ = small_arguments("decode_frame")
    config = DualARConfig.from_json(args[-1])
    return config, Weights.unflatten(config, args[-2])


# choosing


def test_auto_takes_the_first_that_can(backends):
    assert torch.equal(call(), X)
    assert torch.equal(call(X.repeat(2, 1)), X.repeat(2, 1))
    assert backends == ["picky", "reference"]


def test_an_explicit_choice_is_taken_or_raises_the_reason(backends):
    with use_backend("reference"):
        call()
    assert backends == ["reference"]
    for name, x, reason in (
        ("broken", X, "no such device"),
        ("picky", X.repeat(2, 1), "picky takes one row, got 2"),
        ("lazy", X, "it does not implement linear_residual"),
    ):
        message = f"linear_residual: back end {name!r} cannot serve this call: {reason}"
        with use_backend(name), pytest.raises(BackendError, match=f"^{message}$"):
            call(x)
        with pytest.raises(BackendError, match=f"^{message}$"):
            registry.choose("linear_residual", x, WEIGHT, None, None, backend=name)
    assert issubclass(BackendError, RuntimeError) and backends == ["reference"]


def test_nobody_left_raises_the_whole_table(backends, monkeypatch):
    monkeypatch.setitem(registry.ORDER, "cpu", ("broken", "picky"))
    with pytest.raises(BackendError, match=r"no back end serves this call: .*no such device.*picky takes one row"):
        call(X.repeat(2, 1))
    assert backends == []


def test_explain_is_in_the_order_of_auto(backends):
    table = explain("linear_residual", X.repeat(3, 1), WEIGHT, None, None)
    assert table == {"broken": "no such device", "picky": "picky takes one row, got 3", "reference": None}
    assert list(table) == ["broken", "picky", "reference"]
    assert explain("linear_residual", X, WEIGHT, None, None)["picky"] is None


def test_every_back_end_of_this_machine_explains_itself():
    for name in OPS:
        op, args, _ = small_arguments(name)
        table = explain(name, *args)
        assert list(table) == [b for b in registry.ORDER["cpu"] if b in op.impls]
        assert table["reference"] is None
        for backend, reason in table.items():
            assert reason is None or (isinstance(reason, str) and reason), backend
        if not registry.BACKENDS["cpu"]():
            assert table["cpu"] is None
            assert "float64" in explain(name, *clone(args, torch.float64))["cpu"]


def test_unknown_names_are_refused_with_those_that_exist(backends):
    known = r"backend must be 'auto' or one of \[.*'cpu'.*'reference'.*\], got "
    for bad in ("cuda12", "AUTO", "referense", ""):
        for choice in (bad, {"linear_residual": bad}):
            with pytest.raises(ValueError, match=f"^{known}'{bad}'$"), use_backend(choice):
                pass
    unknown = r"op must be one of \[.*'swiglu'\], got 'layer_norm'"
    with pytest.raises(ValueError, match=unknown), use_backend({"layer_norm": "reference"}):
        pass
    with pytest.raises(ValueError, match=r"op must be one of \[.*\], got 'layer_norm'"):
        explain("layer_norm", X)
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        Engine(*small_model(), backend="cuda12")
    with pytest.raises(ValueError, match="op must be one of"):
        Engine(*small_model(), backend={"layer_norm": "reference"})
    call()
    assert backends == ["picky"]


def test_use_backend_nests_and_is_restored(backends):
    with use_backend("reference"):
        with use_backend({"linear_residual": "picky"}):
            assert registry.choice("linear_residual") == "picky"
            assert registry.choice("embed_frame") == "reference"
            with use_backend("auto"):
                assert registry.choice("embed_frame") == "auto"
        assert registry.choice("linear_residual") == "reference"
        with pytest.raises(KeyError), use_backend("picky"):
            raise KeyError
        call()
    call()
    assert backends == ["reference", "picky"]
    assert registry.choice("linear_residual") == "auto"


def test_the_innermost_choice_for_all_ops_wins_over_an_outer_choice_for_one(backends):
    with use_backend({"linear_residual": "picky"}), use_backend("reference"):
        call()
    assert backends == ["reference"]


def test_the_environment_chooses_unless_the_caller_does(backends, monkeypatch):
    monkeypatch.setenv("S1KERNELS_BACKEND", "reference")
    call()
    with use_backend("picky"):
        call()
    with use_backend("auto"):
        call()
    assert backends == ["reference", "picky", "picky"]
    monkeypatch.setenv("S1KERNELS_BACKEND", "broken")
    with pytest.raises(BackendError, match="no such device"):
        call()
    monkeypatch.setenv("S1KERNELS_BACKEND", "cuda12")
    with pytest.raises(ValueError, match="got 'cuda12'"):
        call()
    monkeypatch.setenv("S1KERNELS_BACKEND", "")
    call()
    assert backends[3:] == ["picky"]


def test_the_environment_chooses_for_engines_too(monkeypatch):
    monkeypatch.setenv("S1KERNELS_BACKEND", "reference")
    assert set(Engine(*small_model()).backends.values()) == {"reference"}


def test_an_engine_takes_a_back_end_for_each_op(backends):
    engine = Engine(*small_model(), backend={"linear_residual": "picky"})
    assert engine.backends["linear_residual"] == "picky" and "decode_frame" not in engine.backends
    with pytest.raises(BackendError, match="'lazy' cannot serve this call: it does not implement"):
        Engine(*small_model(), backend="lazy")


def test_choices_stay_in_their_thread(backends):
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(registry.choice("linear_residual")))
        thread.start()
        thread.join()
    assert seen == ["auto"]


# entering


def test_an_implementation_with_other_parameters_is_refused(backends):
    before = dict(registry.OPS["linear_residual"].impls)
    for wrong in (lambda x, weight, bias, out: None, lambda out, x, weight, bias, residual: None, lambda *args: None):
        with pytest.raises(TypeError, match=r"^lazy\.linear_residual takes \[.*its contract says \['x', .*'out'\]$"):
            registry.implement("linear_residual", backend="lazy")(wrong)
    assert registry.OPS["linear_residual"].impls == before
    with pytest.raises(KeyError):
        registry.implement("layer_norm", backend="lazy")(lambda x, out: None)


def test_arguments_name_what_they_hold():
    args = Arguments("op", x=X, bias=None)
    args.tensor("x", "B", 2)
    args.optional("bias", "B")
    assert args["B"] == 1 and args.x is X
    with pytest.raises(AttributeError, match="weight"):
        _ = args.weight


# the catalogue


def test_every_op_has_its_files_and_stands_in_every_list():
    files = {path.stem for path in Path(ops.__file__).parent.glob("[!_]*.py")}
    assert files == set(OPS)
    assert set(ops.__all__) == {*OPS, "references"} and ops.__all__ == sorted(ops.__all__)
    assert set(vars(ops.references)) == set(OPS)
    for name, op in registry.OPS.items():
        module = importlib.import_module(f"s1kernels.ops.{name}")
        assert op.name == name and getattr(module, name) is op is getattr(ops, name)
        assert op.reference is module.reference is getattr(ops.references, name)
        assert op.reference.__module__ == module.__name__
        assert (ROOT / "csrc" / "cpu" / f"{name}.cpp").is_file()
        assert op.cases and module.__doc__.startswith(f"{name}: ")


def test_every_back_end_has_an_order_and_implements_every_op():
    for device, order in registry.ORDER.items():
        assert order[-1] == "reference" and set(order) <= set(registry.BACKENDS), device
    for name, op in registry.OPS.items():
        assert {"reference", "cpu"} <= set(op.impls) <= set(registry.BACKENDS), name
        for backend, impl in op.impls.items():
            assert impl.backend == backend
            if backend != "reference":
                assert list(inspect.signature(impl.run).parameters) == [*op.parameters, "out"]


@pytest.mark.parametrize("name", OPS)
def test_the_schema_is_the_references_signature(name):
    op = registry.OPS[name]
    schema = getattr(torch.ops.s1kernels, name).default._schema
    count = len(op.parameters)
    given, out = schema.arguments[:count], schema.arguments[count:]
    assert tuple(argument.name for argument in given) == op.parameters
    for argument, parameter in zip(given, inspect.signature(op.reference).parameters.values(), strict=True):
        assert str(argument.type) == TYPES.get(parameter.annotation, parameter.annotation), argument.name
    assert out and not schema.returns
    assert all(argument.name.startswith("out") and argument.alias_info.is_write for argument in out)
    written = [a.name for a in given if a.alias_info is not None and a.alias_info.is_write]
    assert all(name.endswith(("_cache", "_caches")) for name in written)
    documented = inspect.getdoc(op.reference)
    assert not [name for name in op.parameters if name not in documented]
    for section in ("Args:", "Returns:", "Raises:", "Numerics:", "Source:"):
        assert section in documented, section


def test_only_the_appending_ops_write_to_caches():
    """attention_decode reads caches, and says so to torch.compile."""
    writes = {
        name: [a.name for a in getattr(torch.ops.s1kernels, name).default._schema.arguments if a.alias_info]
        for name in ("attention_decode", "qk_norm_rotary_append", "decode_frame")
    }
    assert writes["attention_decode"] == ["out"]
    assert writes["qk_norm_rotary_append"] == ["k_cache", "v_cache", "out"]
    assert writes["decode_frame"][:2] == ["k_caches", "v_caches"]


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    """torch's own judgement of schema, autograd registration, fake tensors and dynamic shapes; nothing is skipped."""
    _, args, out = small_arguments(name)
    for tensor in out:
        poison(tensor)
    result = torch.library.opcheck(getattr(torch.ops.s1kernels, name).default, (*args, *out), raise_exception=False)
    assert result == dict.fromkeys(result, "SUCCESS") and len(result) == 4, result


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_ops_stand_in_compiled_functions(backend, dynamic):
    """fullgraph: no op breaks the graph, called through the catalogue or as a torch op with `out`."""

    def layer(x, norm_weight, weight, w2):
        qkv = ops.rms_norm_qkv(x, norm_weight, weight, None, 1e-6)
        out = torch.empty_like(x)
        torch.ops.s1kernels.linear_residual(qkv, w2, None, x, out)
        return out * 2

    make = Make(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=dynamic)
    for rows in (1, 3):
        args = make(rows, 8), make(8), make(12, 8), make(8, 12)
        assert torch.equal(compiled(*args), layer(*args))
    refusal = (
        "rms_norm_qkv: norm_weight must be|Observed exception"  # dynamo may hide the text of an error while it traces
    )
    with pytest.raises(Exception, match=refusal):
        compiled(make(2, 8), make(9), make(12, 8), make(8, 12))


@pytest.mark.parametrize("name", OPS)
def test_every_case_has_plausible_sizes(name):
    """Cases can be drawn, pass the check, and say how many bytes they move: at least those of the results."""
    op = registry.OPS[name]
    for case in (SMALLEST.get(name, "minimal"), *[c for c in op.cases if c.startswith(("odd", "batch", "prompt"))]):
        args = op.inputs(Make(torch.bfloat16), **op.cases[case])
        named = op.checked(*args)
        out = op.empty(named)
        out = out if isinstance(out, tuple) else (out,)
        assert len(out) == op.schema.count("!) out") and op.bytes_moved(named) >= sum(t.nbytes for t in out) // 2 > 0, (
            case
        )


# documents


def modules():
    found = pkgutil.walk_packages(s1kernels.ops.__path__, "s1kernels.ops.")
    return [*(m.name for m in found), "s1kernels.contract", "s1kernels.testing"]


@pytest.mark.parametrize("module", modules())
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(module), extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    if module.rpartition(".")[2] in set(OPS) - {"decode_frame"}:  # its example would be a whole model
        assert result.attempted > 0
