"""Properties: any small shape, any bad input, and the distribution that sample_token draws from."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from s1kernels import Engine, Sampling, ops, registry, use_backend
from s1kernels.contract import Arguments
from s1kernels.model.config import DualARConfig, StackConfig
from s1kernels.model.weights import Weights
from s1kernels.testing import Make, bands_intact, clone, guarded, poison

OPS = list(registry.OPS)
AVAILABLE = [name for name in registry.ORDER["cpu"] if registry.BACKENDS[name]() is None]
FASTEST = "cpu" if "cpu" in AVAILABLE else "reference"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMIT = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Largest error by the largest value (or 1): one rounding, and float32 sums of up to 70 terms that may cancel."""


def quick(examples):
    """So many examples, the same ones every time."""
    options = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    return settings(max_examples=examples, **options)


def size(high=70, low=1):
    return st.integers(low, high)


@st.composite
def heads(draw, even=False):
    """Sizes of grouped heads over R caches with T rows each."""
    R, T, G, ratio, D = draw(size(3)), draw(size(3)), draw(size(3)), draw(size(5)), draw(size(36))
    return dict(B=R * T, R=R, G=G, H=G * ratio, D=2 * D if even else D, S=draw(size(40, low=T)))


def stacks():
    return st.builds(
        lambda G, ratio, pairs, **rest: StackConfig(heads=G * ratio, kv_heads=G, head_dim=2 * pairs, **rest),
        G=size(2), ratio=size(3), pairs=size(5), layers=size(2), dim=size(20, low=2), intermediate=size(20),
        qkv_bias=st.booleans(), o_bias=st.booleans(), qk_norm=st.booleans(),
    )  # fmt: skip


@st.composite
def frames(draw):
    ras, V = draw(st.booleans()), draw(size(40, low=10))
    sizes = dict(B=draw(size(2)), slow=draw(stacks()), fast=draw(stacks()), N=draw(size(4, low=2)), K=draw(size(2 * V)))
    flags = {name: draw(st.booleans()) for name in ("ids", "tied", "norm_fast_input")}
    return sizes | flags | dict(V=V, start=draw(size(9, low=0)), ras=ras, line="2.0" if ras else "s1")


@st.composite
def windows(draw):
    """Sizes of a signal of whole strides, of which a step or more is kept."""
    taps, dilation = draw(size(6, low=2)), draw(size(5))
    stride = draw(size((taps - 1) * dilation))
    flags = {name: draw(st.booleans()) for name in ("bias", "alpha")}
    rest = dict(T=stride * draw(size(20)), C=draw(size()), turn=draw(size(3, low=0)))
    return flags | rest | dict(taps=taps, dilation=dilation, stride=stride, scale=draw(st.sampled_from([1.0, 300.0])))


SIZES = {
    "attention_decode": heads(),
    "decode_frame": frames(),
    "embed_frame": st.fixed_dictionaries(
        dict(B=size(5), C=size(), N=size(5), K=size(9), Vt=size(20, low=2), scale=st.booleans())
    ),
    "linear_residual": st.fixed_dictionaries(
        dict(B=size(5), J=size(), C=size(), bias=st.booleans(), residual=st.booleans())
    ),
    "qk_norm_rotary_append": st.tuples(heads(even=True), st.booleans()).map(lambda t: t[0] | dict(norm=t[1])),
    "rms_norm": st.fixed_dictionaries(dict(B=size(9), C=size())),
    "rms_norm_logits": st.fixed_dictionaries(dict(B=size(5), C=size(), V=size())),
    "rms_norm_qkv": st.fixed_dictionaries(dict(B=size(5), C=size(), O=size(), bias=st.booleans())),
    "rms_norm_swiglu": st.fixed_dictionaries(dict(B=size(5), C=size(), F=size())),
    "sample_token": st.fixed_dictionaries(
        dict(
            B=size(4), V=size(300), W=size(12, low=0), top_k=size(40, low=0), ids=st.booleans(), ras=st.booleans(),
            temperature=st.floats(0, 2, width=32), top_p=st.floats(2**-10, 1, width=32),
            penalty=st.floats(0.5, 2, width=32), spread=st.sampled_from([0.02, 1, 9]),
        )
    ),
    "snake": windows(),
    "swiglu": st.fixed_dictionaries(dict(B=size(9), F=size())),
}  # fmt: skip


def tensors(value):
    return list(value) if isinstance(value, (tuple, list)) else [value]


def caches(op, args):
    named = zip(op.parameters, args, strict=True)
    return [t for name, value in named if name.endswith(("_cache", "_caches")) for t in tensors(value)]


@pytest.mark.parametrize("name", [name for name in OPS if name != "sample_token"])
def test_any_shape_agrees_with_float64(name):
    op = registry.OPS[name]

    @quick(12 if name == "decode_frame" else 40)
    @given(sizes=SIZES[name], dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
    def holds(sizes, dtype, seed):
        # a whole frame adds up rounding errors, its codes are forced: other dtypes are the contract test's
        dtype = torch.float32 if name == "decode_frame" else dtype
        args = op.inputs(Make(dtype, seed=seed), **sizes)
        right = clone(args, torch.float64)
        truth = [*tensors(op.reference(*right)), *caches(op, right)]
        rooms = [guarded(t) for t in tensors(op.empty(op.checked(*args)))]
        out = tuple(t for t, _ in rooms)
        with use_backend(FASTEST):
            op(*args, out=out if len(out) > 1 else out[0])
        assert all(bands_intact(room) for _, room in rooms)
        for value, true in zip([*out, *caches(op, args)], truth, strict=True):
            assert torch.equal(value.isnan(), true.isnan())
            error = (value.double() - true).nan_to_num().abs().max() / true.nan_to_num().abs().max().clamp(min=1)
            factor = 10 if name == "decode_frame" else 1
            assert error <= factor * LIMIT[value.dtype] if value.is_floating_point() else error == 0

    holds()


def test_any_sampling_agrees_with_float64():
    op = registry.OPS["sample_token"]

    @quick(80)
    @given(sizes=SIZES["sample_token"], seed=st.integers(0, 99))
    def holds(sizes, seed):
        args = op.inputs(Make(torch.float32, seed=seed), **sizes)
        truth = op.reference(*clone(args, torch.float64))
        out, room = guarded(truth)
        with use_backend(FASTEST):
            op(*args, out=out)
        assert bands_intact(room)
        assert torch.equal(out, truth) or op.verdict(op.checked(*args), out, truth) is None

    holds()


# bad input

CASE = {name: "s2_biased_batch" if name == "decode_frame" else "odd" for name in OPS}
CASE |= dict.fromkeys(("linear_residual", "rms_norm_qkv"), "odd_bias")
CASE |= {"sample_token": "odd_ras", "embed_frame": "odd_scaled"}
FREE = {
    "attention_decode": set(),
    "decode_frame": {("main_window", 1), ("weights", 0)},
    "embed_frame": {("tokens", 0), ("text_embedding", 0)},
    "linear_residual": set(),
    "qk_norm_rotary_append": {("cos_sin", 0)},
    "rms_norm": {("x", 0)},
    "rms_norm_logits": {("x", 0), ("weight", 0)},
    "rms_norm_qkv": {("x", 0)},
    "rms_norm_swiglu": {("x", 0)},
    "sample_token": {("window", 1)},
    "snake": {("x", 0)},
    "swiglu": set(),
}
"""Dimensions that no other argument of the case shares, so that they may be of any size."""


def arguments(name, dtype=torch.float32):
    op = registry.OPS[name]
    return op, dict(zip(op.parameters, op.inputs(Make(dtype), **op.cases[CASE[name]]), strict=True))


def refused(op, args, error, match):
    """The op must raise and name itself and an argument; neither its result nor its caches may have been written to."""
    good = arguments(op.name)[1].values()
    out = [poison(t) for t in tensors(op.empty(op.checked(*good)))]
    before = clone([*out, *caches(op, args.values())])
    with pytest.raises(error, match=match) as raised:
        op(*args.values(), out=tuple(out) if len(out) > 1 else out[0])
    after = [*out, *caches(op, args.values())]
    for now, then in zip(after, before, strict=True):
        if now.device.type == "cpu":
            assert torch.equal(now.nan_to_num(7.5), then.nan_to_num(7.5))
    return str(raised.value)


def tensor_arguments():
    return [
        pytest.param(name, parameter, id=f"{name}-{parameter}")
        for name in OPS
        for parameter, value in arguments(name)[1].items()
        if isinstance(value, torch.Tensor)
    ]


@pytest.mark.parametrize(("name", "parameter"), tensor_arguments())
def test_a_bad_tensor_is_refused_by_name(name, parameter):
    op, args = arguments(name)
    value = args[parameter]
    wrong = {
        "rank": (ValueError, r"must be \[.*\], got \[1.*; check", value[None]),
        "dtype": (TypeError, r"must be .*, got (int64|float16|bool); convert it with \.to", value.to(torch.int64)),
    }
    if value.is_floating_point():
        wrong["bool"] = (TypeError, "must be .*, got bool", value.bool())
    if value.dim() and value.shape[-1] > 1:
        spread = value.repeat_interleave(2, dim=-1)[..., ::2]
        wrong["strides"] = (ValueError, r"must be contiguous, got strides \(.*\); call \.contiguous\(\)", spread)
    for what, (error, match, bad) in wrong.items():
        message = refused(op, args | {parameter: bad}, error, f"^{name}: {parameter} {match}")
        assert what and "; " in message


@pytest.mark.parametrize(("name", "parameter"), tensor_arguments())
def test_tensors_of_two_devices_or_dtypes_are_refused(name, parameter):
    op, args = arguments(name)
    elsewhere = args | {parameter: args[parameter].to("meta")}
    refused(op, elsewhere, ValueError, rf"^{name}: \w+(\[0\])? must be on \w+, got (cpu|meta); move it with \.to\(\)")
    if args[parameter].is_floating_point():
        mixed = args | {parameter: args[parameter].half()}
        refused(op, mixed, TypeError, rf"^{name}: \w+(\[0\])? must be \w+, got \w+; convert it with \.to\(\)")


@pytest.mark.parametrize("name", OPS)
def test_sizes_that_do_not_fit_are_refused(name):
    """Every dimension of every tensor, one larger: only the free ones are accepted."""
    op, args = arguments(name)
    accepted = set()
    for parameter, value in args.items():
        for d in range(value.dim()) if isinstance(value, torch.Tensor) else ():
            larger = torch.cat([value, value.narrow(d, 0, 1)], dim=d).contiguous()
            changed = args | {parameter: larger}
            try:
                op.checked(*changed.values())
                accepted.add((parameter, d))
            except ValueError:
                refused(op, changed, ValueError, rf"^{name}: ({'|'.join(args)})(\[\d\])? must be .*, got .*; ")
    assert accepted == {(p, d) for p, d in FREE[name] if isinstance(args[p], torch.Tensor)}


@pytest.mark.parametrize("name", OPS)
def test_what_is_no_tensor_is_refused(name):
    op, args = arguments(name)
    for parameter, value in args.items():
        if isinstance(value, torch.Tensor):
            with pytest.raises(TypeError, match=rf"^{name}: {parameter} must be a tensor, got list; pass a torch"):
                op(*(args | {parameter: value.tolist() if value.dim() else [0]}).values())
    with pytest.raises(ValueError):
        op(*list(args.values())[:-1])


@pytest.mark.parametrize("name", OPS)
def test_a_bad_out_is_refused(name):
    """Kernels write by address: a result of another shape, dtype or layout must never reach them."""
    op, args = arguments(name)
    first, *rest = tensors(op.empty(op.checked(*args.values())))
    for bad in (first.new_empty(2, *first.shape), first.to(torch.float64), first.new_empty(*first.shape, 2)[..., 0]):
        out = (bad, *rest)
        with use_backend("reference"), pytest.raises((ValueError, TypeError), match=rf"^{name}: out"):
            op(*args.values(), out=out if rest else bad)


@pytest.mark.parametrize("what", ["too few", "dtype", "shape", "strides"])
@pytest.mark.parametrize("parameter", ["k_caches", "v_caches", "weights"])
def test_bad_lists_of_a_frame_are_refused(parameter, what):
    op, args = arguments("decode_frame")
    first, *rest = args[parameter]
    bad = {
        "too few": rest,
        "dtype": [first.half(), *rest],
        "shape": [first[..., :-1].contiguous(), *rest],
        "strides": [first.repeat_interleave(2, dim=-1)[..., ::2], *rest],
    }[what]
    out = op.empty(op.checked(*args.values()))
    with use_backend("reference"), pytest.raises((ValueError, TypeError), match=r"^decode_frame: \w+"):
        op(*(args | {parameter: bad}).values(), out=out)


def out_of_range():
    ints = {
        "attention_decode": ("length", [0, -1, 8, 2**31 - 1], r"length(\[\d\])? must be in \[1, 7\]"),
        "qk_norm_rotary_append": ("position", [-1, 7, 2**31 - 1], r"position(\[\d\])? must be in \[0, (7\)|6\])"),
    }
    for name, (parameter, values, match) in ints.items():
        for value in values:
            yield name, parameter, (0,), value, match
            yield name, parameter, (-1,), value, match
    for column, value in [(0, -1), (0, 11), (0, 2**31 - 1), (1, 5), (3, -1)]:
        what = "code" if column else "token"
        yield "embed_frame", "tokens", (0, column), value, rf"tokens\[0, {column}\] must be a {what} in"
    for row, column, value in [(0, 0, -1), (1, 0, 210), (1, 1, 20), (0, 2, -1)]:
        yield "decode_frame", "tokens", (row, column), value, rf"tokens\[{row}, {column}\] must be"
    for value in (-1, 10, 14):
        yield "decode_frame", "position", (1,), value, r"position(\[1\])? must be in"


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize(("name", "parameter", "index", "value", "match"), list(out_of_range()))
def test_values_out_of_range_are_refused(name, parameter, index, value, match, backend):
    op, args = arguments(name)
    args[parameter][index] = value
    owner = "(embed_frame|qk_norm_rotary_append|decode_frame)" if name == "decode_frame" else name
    with use_backend(backend):
        message = refused(op, args, ValueError, rf"^{owner}: {match}")
    assert "got " in message and str(value) in message


@pytest.mark.parametrize("backend", AVAILABLE)
def test_codes_of_text_rows_are_not_read(backend):
    """A row whose token is not semantic may carry any codes."""
    table = torch.arange(4.0)[:, None]
    tokens = torch.tensor([[0, 99, -5], [3, 1, 0]], dtype=torch.int32)
    with use_backend(backend):
        out = ops.embed_frame(tokens, table, torch.tensor([[10.0], [20.0], [30.0], [40.0]]), 2, 3, False)
    assert out.tolist() == [[0.0], [53.0]]


@pytest.mark.parametrize("backend", AVAILABLE)
def test_attention_does_not_read_beyond_length(backend):
    q, k, v = torch.ones(1, 1, 2), torch.full((1, 1, 9, 2), math.nan), torch.full((1, 1, 9, 2), math.nan)
    k[:, :, :3], v[:, :, :3] = 0.0, torch.tensor([[1.0, 4.0], [2.0, 5.0], [6.0, 9.0]])
    with use_backend(backend):
        out = ops.attention_decode(q, k, v, torch.tensor([3], dtype=torch.int32))
    assert torch.allclose(out, torch.tensor([[[3.0, 6.0]]]))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_residual_may_write_over_its_residual(dtype, backend):
    x, weight, bias, residual = ops.linear_residual.inputs(Make(dtype), B=3, J=33, C=40, bias=True)
    with use_backend(backend):
        expected = ops.linear_residual(x, weight, bias, residual)
        assert ops.linear_residual(x, weight, bias, residual, out=residual) is residual
    assert torch.equal(residual, expected)


# sample_token


def draw(
    logits, noise=None, *, ras_noise=None, window=None, ids=None, T=1.0, top_p=1.0, penalty=1.0, top_k=0,
    semantic=(0, 99),
):  # fmt: skip
    """sample_token with lists for tensors; without noise it is greedy."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    logits = logits[None] if logits.dim() == 1 else logits
    noise = torch.ones_like(logits) if noise is None else torch.as_tensor(noise, dtype=torch.float32).view_as(logits)
    ras_noise = None if ras_noise is None else torch.as_tensor(ras_noise, dtype=torch.float32).view_as(logits)
    window = None if window is None else torch.tensor(window, dtype=torch.int32).view(len(logits), -1)
    ids = None if ids is None else torch.tensor(ids, dtype=torch.int32)
    scalars = [torch.tensor(v, dtype=torch.float32) for v in (T, top_p, penalty)]
    top_k = torch.tensor(top_k, dtype=torch.int32)
    return ops.sample_token(logits, noise, ras_noise, window, ids, *scalars, top_k, *semantic).tolist()


LN = [math.log(p) for p in (0.4, 0.3, 0.15, 0.15)]
BY_HAND = {
    "the largest is drawn": (dict(logits=[1.0, 3.0, 2.0]), 1),
    "of equals the first": (dict(logits=[1.0, 3.0, 3.0]), 1),
    "noise decides": (dict(logits=[2.0, 1.0], noise=[3.0, 1.0]), 1),  # e^2/3 < e^1
    "a low temperature outweighs it": (dict(logits=[2.0, 1.0], noise=[3.0, 1.0], T=0.5), 0),  # e^4/3 > e^2
    "temperature 0 counts as 1e-5": (dict(logits=[1.0, 1.001], noise=[1e-6, 1.0], T=0.0), 1),
    "top_k keeps the first": (dict(logits=[1.0, 3.0, 2.0], noise=[1e-9, 1, 1e-6], top_k=1), 1),
    "top_k keeps two": (dict(logits=[1.0, 3.0, 2.0], noise=[1e-9, 1, 1e-6], top_k=2), 2),
    "what crosses top_p is not kept": (dict(logits=LN, noise=[1, 1, 1e-6, 1e-9], top_p=0.8), 0),
    "what stays below is": (dict(logits=LN, noise=[1, 1e-3, 1e-6, 1e-9], top_p=0.86), 2),
    "the first always is": (dict(logits=LN, noise=[1, 1e-6, 1e-6, 1e-6], top_p=0.1), 0),
    "the nucleus is untempered": (dict(logits=LN, noise=[1, 1, 1e-9, 1], top_p=0.86, T=1.9), 2),
    "rows stand for ids": (dict(logits=[1.0, 3.0], ids=[70, 80]), 80),
    "minus infinity is never drawn": (dict(logits=[-math.inf, 0.0, -math.inf], noise=[1e-30, 1.0, 1e-30]), 1),
    "penalty divides positive logits": (dict(logits=[2.0, 1.5, -1.0], window=[0, 2], penalty=2.0), 1),
    "penalty multiplies negative ones": (dict(logits=[-1.0, -1.5], window=[0], penalty=2.0), 1),
    "once a token": (dict(logits=[4.0, 1.5], window=[0, 0, 0], penalty=2.0), 0),
    "a penalty below 1 rewards": (dict(logits=[1.0, 1.5], window=[0], penalty=0.5), 0),
    "a penalty of 1 changes nothing": (dict(logits=[2.0, 1.5], window=[0, 1], penalty=1.0), 0),
    "other tokens in the window are ignored": (dict(logits=[2.0, 1.5], window=[7, -3, 2**31 - 1], penalty=9.0), 0),
    "the window holds tokens, not rows": (dict(logits=[2.0, 1.5], ids=[1, 5], window=[0, 1], penalty=2.0), 5),
    "penalty comes before the nucleus": (
        dict(logits=[2.0, 1.9, 1.9], noise=[1e-9, 1, 1], window=[0], penalty=4.0, top_p=0.85), 1,
    ),
    "redrawn from the second noise": (dict(logits=LN, ras_noise=[1, 0.5, 1, 1], window=[0]), 1),
    "redrawn at temperature 1": (dict(logits=LN, ras_noise=[1, 0.5, 1, 1], window=[0], T=1e-5), 1),  # .4 < .6
    "redrawn with top_p 0.9": (dict(logits=LN, ras_noise=[1, 1, 1e-6, 1e-9], window=[0]), 2),
    "redrawn with top_p 0.9 though top_p is less": (
        dict(logits=LN, ras_noise=[1, 1, 1e-6, 1e-9], window=[0], top_p=0.1), 2,
    ),
    "redrawn with the same top_k": (dict(logits=LN, ras_noise=[1, 1e-6, 1e-9, 1], window=[0], top_k=2), 1),
    "only once": (dict(logits=LN, ras_noise=[1, 0.5, 1, 1], window=[0, 1]), 1),
    "not if outside the window": (dict(logits=LN, ras_noise=[1, 1e-6, 1, 1], window=[1, 2, 3]), 0),
    "not if not semantic": (dict(logits=LN, ras_noise=[1, 1e-6, 1, 1], window=[0], semantic=(1, 3)), 0),
    "semantic_end is semantic": (
        dict(logits=LN, ids=[4, 5, 6, 7], ras_noise=[1, 0.1, 1, 1], window=[4], semantic=(1, 4)), 5,
    ),
    "not without a window": (dict(logits=LN, ras_noise=[1, 1e-6, 1, 1]), 0),
    "no penalty with a second noise": (
        dict(logits=[2.0, 1.9], ras_noise=[1.0, 1.0], window=[0], penalty=9.0, semantic=(5, 6)), 0,
    ),
    "a NaN gives -1": (dict(logits=[1.0, math.nan, 2.0]), -1),
    "nothing finite gives -1": (dict(logits=[-math.inf] * 3), -1),
    "a NaN gives -1 with a second noise": (
        dict(logits=[1.0, math.nan], ras_noise=[1.0, 1.0], window=[0], ids=[3, 9]), -1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("example", BY_HAND)
def test_sampling_by_hand(example, backend):
    sampling, token = BY_HAND[example]
    with use_backend(backend):
        assert draw(**sampling) == [token]


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_bad_row_leaves_the_others_alone(backend):
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(1).tolist()
    logits[1, 32] = logits[4, 0] = math.nan
    with use_backend(backend):
        assert draw(logits) == [best[0], -1, best[2], best[3], -1]


@pytest.mark.parametrize("ras_noise", [None, [1.0, 1.0, 1.0]], ids=["first_draw", "second_draw"])
def test_infinite_logits_mean_the_same_everywhere(ras_noise):
    drawn = set()
    for backend in AVAILABLE:
        with use_backend(backend):
            drawn.update(draw([1.0, math.inf, 2.0], ras_noise=ras_noise, window=[1]))
    assert len(drawn) == 1 and drawn <= {1, -1}


DISTRIBUTIONS = [(1.0, 1.0, 0), (0.7, 0.8, 0), (1.5, 0.95, 5), (0.3, 1.0, 3), (2.0, 0.999, 0)]
CHI_LOGITS = [0.3, 2.1, -1.0, 1.4, 1.3, 0.9, 1.9, -0.2, 0.0, 1.0, 0.5, -2.0]


def kept_distribution(temperature, top_p, top_k):
    """The exact probabilities, worked out in plain Python."""
    weights = [math.exp(v) for v in CHI_LOGITS]
    order, kept, mass = sorted(range(len(weights)), key=lambda v: -weights[v]), [], 0.0
    for v in order:
        mass += weights[v] / sum(weights)
        if kept and ((mass > top_p and top_p < 1) or 0 < top_k <= len(kept)):
            break
        kept.append(v)
    tempered = {v: math.exp(CHI_LOGITS[v] / temperature) for v in kept}
    return [tempered.get(v, 0.0) / sum(tempered.values()) for v in range(len(weights))]


def chi_square(drawn, probabilities):
    """(statistic, its 1 - 1e-6 quantile by Wilson and Hilferty); infinite if something impossible was drawn."""
    counts = [drawn.count(v) for v in range(len(probabilities))]
    if any(c for c, p in zip(counts, probabilities, strict=True) if p == 0) or sum(counts) != len(drawn):
        return math.inf, 0.0
    terms = [(c - len(drawn) * p) ** 2 / (len(drawn) * p) for c, p in zip(counts, probabilities, strict=True) if p]
    freedom = max(len(terms) - 1, 1)
    return sum(terms), freedom * (1 - 2 / (9 * freedom) + 4.753 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("second", [False, True], ids=["first_draw", "second_draw"])
@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize(("temperature", "top_p", "top_k"), DISTRIBUTIONS)
def test_draws_follow_the_kept_distribution(temperature, top_p, top_k, backend, second):
    """Chi-square over 20,000 draws (2,000 by the slow reference). Second draws have temperature 1 and top_p 0.9."""
    draws = 20_000 if backend == "cpu" else 2_000
    generator = torch.Generator().manual_seed(1)
    logits = torch.tensor(CHI_LOGITS).repeat(draws, 1)
    noise = torch.empty_like(logits).exponential_(1, generator=generator)
    options = dict(noise=noise, T=temperature, top_p=top_p, top_k=top_k)
    if second:
        first = torch.full_like(noise, 1e9)
        first[:, 1] = 1e-9  # the likeliest is drawn, is in the window, and is drawn again
        options |= dict(noise=first, ras_noise=noise, window=[[1]] * draws)
    with use_backend(backend):
        drawn = draw(logits, **options)
    right = kept_distribution(1.0, 0.9, top_k) if second else kept_distribution(temperature, top_p, top_k)
    statistic, quantile = chi_square(drawn, right)
    assert statistic < quantile
    wrong = kept_distribution(temperature * 3, top_p, top_k) if not second else kept_distribution(1.0, 1.0, top_k + 1)
    assert chi_square(drawn, wrong)[0] > chi_square(drawn, wrong)[1]  # the test can tell


# the engine

STACK = StackConfig(layers=1, dim=8, heads=2, kv_heads=1, head_dim=4, intermediate=6)
CONFIG = DualARConfig(
    slow=STACK, fast=STACK, vocab_size=30, codebooks=3, codebook_size=7, max_positions=24, norm_eps=1e-6, rope_base=1e4,
    tie_embeddings=False, scale_codebook_embeddings=False, norm_fast_input=False, semantic_begin=20, semantic_end=26,
    end_token=2, line="s1",
)  # fmt: skip


def engine(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    make = Make(torch.float32, seed=4)
    weights = Weights.build(config, lambda key, shape: make(*shape, scale=shape[-1] ** -0.5 if len(shape) > 1 else 1.0))
    return Engine(config, weights)


def prompt(length=6):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 7, (3, length), generator=generator)
    return torch.cat([codes[:1] + 20, codes])


def spoiled(row, column, value):
    tokens = prompt()
    tokens[row, column] = value
    return tokens


BAD_PROMPTS = {
    "too long": (prompt(25), 1, r"KVCache: positions must be at most max_positions=24, got 25; use a shorter prompt"),
    "too long with its frames": (prompt(20), 6, r"positions must be at most max_positions=24, got 25"),
    "too few rows": (prompt()[:-1], 4, r"Engine: tokens must be int32 \[N\+1=4, T\], got \[3, "),
    "too many rows": (prompt().repeat(2, 1), 4, r"Engine: tokens must be int32 \[N\+1=4, T\], got \[8, "),
    "a batch": (prompt()[None], 4, r"Engine\.generate: prompt must be \[N\+1, T >= 1\], .* got \[1, 4, 6\]"),
    "floats": (prompt().float(), 4, r"Engine: tokens must be int32 .* torch\.float32"),
    "empty": (prompt()[:, :0], 4, r"Engine\.generate: prompt must be \[N\+1, T >= 1\], .* got \[4, 0\]"),
    "no frames": (prompt(), 0, r"max_frames >= 1, got \[4, 6\], 0"),
    "a negative token": (spoiled(0, 2, -1), 4, r"tokens\[2, 0\] must be .*-1"),
    "a token past the vocabulary": (spoiled(0, 5, 30), 4, r"tokens\[0, 0\] must be .*30"),  # of the last frame
    "a negative code": (spoiled(2, 1, -1), 4, r"tokens\[1, 2\] must be .*-1"),
    "a code past the codebook": (spoiled(3, 0, 7), 4, r"tokens\[0, 3\] must be .*7"),
    "a token that wraps in int32": (spoiled(0, 2, 2**32 + 5), 4, "must be"),
}


@pytest.mark.parametrize("what", BAD_PROMPTS)
def test_bad_prompts_are_refused_and_the_engine_goes_on(what):
    tokens, frames, match = BAD_PROMPTS[what]
    ours, sampling = engine(), Sampling(top_p=0.9)
    expected = ours.generate(prompt(), 8, sampling, seed=1)
    assert expected.shape[0] == 4 and 1 <= expected.shape[1] <= 8 and expected.dtype == torch.int32
    with pytest.raises(ValueError, match=match):
        ours.generate(tokens, frames, sampling, seed=1)
    assert torch.equal(ours.generate(prompt(), 8, sampling, seed=1), expected)


@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integer_prompts_of_any_type(integer):
    ours = engine()
    assert torch.equal(ours.generate(prompt().to(integer), 6, seed=3), engine().generate(prompt(), 6, seed=3))
    assert ours.generate(prompt(19), 6, seed=3).shape[1] <= 6  # 19 + 6 - 1 positions: just fits


@pytest.mark.parametrize("position", [-1, 24, 2**31])
def test_a_step_out_of_range_is_refused(position):
    with pytest.raises((ValueError, OverflowError, RuntimeError), match="position"):
        engine().step(prompt(1), position, Sampling())


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=-0.1), dict(temperature=math.nan), dict(top_p=-0.1), dict(top_p=1.001), dict(top_p=math.nan),
        dict(repetition_penalty=0.0), dict(repetition_penalty=-1.0), dict(top_k=-1),
    ],
    ids=str,
)  # fmt: skip
def test_sampling_bounds(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=rf"^Sampling: {name} must be .*, got {re.escape(str(value))}; choose another"):
        Sampling(**bad)


def test_sampling_bounds_are_included():
    edge = Sampling(temperature=0.0, top_p=0.0, repetition_penalty=1e-3, top_k=0)
    codes = engine().generate(prompt(), 5, edge, seed=0)
    assert torch.equal(codes, engine().generate(prompt(), 5, dataclasses.replace(edge, top_k=1), seed=9))


def test_logits_that_are_not_finite_raise():
    """The text-to-speech loop must not go on with tokens that mean nothing."""
    ours = engine()
    ours.weights.norm[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"^decode_frame: logits must be finite, got NaN at position 5; "):
        ours.generate(prompt(), 4, seed=0)


@quick(60)
@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    expected=st.lists(st.sampled_from(["A", "B", "C", "D"]) | st.integers(2, 3), max_size=4),
    bound=st.dictionaries(st.sampled_from(["A", "B"]), st.integers(0, 4)),
)
def test_checked_shapes_are_those_that_fit(shape, expected, bound):
    """`Arguments.tensor` accepts exactly the ranks and sizes that fit, and binds the symbols that are free."""
    symbols = [d for d in expected if isinstance(d, str)]
    assume(len(symbols) == len(set(symbols)))
    args = Arguments("op", y=torch.empty(list(bound.values())), x=torch.empty(shape))
    args.tensor("y", *bound)
    same_rank = len(shape) == len(expected)
    if same_rank and all(
        bound.get(d, n if isinstance(d, str) else d) == n for d, n in zip(expected, shape, strict=True)
    ):
        args.tensor("x", *expected)
        assert all(args[d] == n for d, n in zip(expected, shape, strict=True) if d in symbols)
    else:
        with pytest.raises(ValueError, match=r"^op: x must be \[.*\], got \[.*\]; check the model's dimensions$"):
            args.tensor("x", *expected)
