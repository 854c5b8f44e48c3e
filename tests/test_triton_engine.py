"""The engine on Triton kernels: a frame as one CUDA graph on a GPU; its parts in the interpreter without one."""

import importlib

import pytest
import torch
from cuda_models import GREEDY, HALVES, LIMIT, MODELS, SAMPLED, build, needs_gpu, prompt, weights, without

from s1kernels import Engine, frame_graph, ops, registry, use_backend
from s1kernels.backends import triton
from s1kernels.backends.triton import support
from s1kernels.cache import FIRST_CAPACITY, KVCache
from s1kernels.contract import as_tuple
from s1kernels.draws import torch_grid
from s1kernels.sampling import WINDOW, remember
from s1kernels.testing import Make, poison

pytestmark = pytest.mark.skipif(triton.available() is not None, reason=str(triton.available()))
DEVICE = "cpu" if support.INTERPRETED else "cuda"
needs_cuda_kernels = pytest.mark.skipif(
    registry.BACKENDS["cuda"]() is not None, reason=f"CUDA kernels: {registry.BACKENDS['cuda']()}"
)
NAMES = ["small", "fast_paths", "small_2.0", "fast_paths_2.0", "many_tokens"]
MIXES = [
    {"attention_decode": "triton"},
    {"attention_decode": "triton", "sample_token": "triton", "rms_norm_qkv": "triton"},
    dict.fromkeys(registry.OPS, "triton") | {"linear_residual": "cuda"},
    dict.fromkeys(registry.OPS, "cuda"),
]


def decodes_with(engine, kind):
    """The engine, without an end token, if a frame of it is this kind of graph."""
    assert isinstance(engine.decoder, frame_graph.FrameGraph) and type(engine.decoder).__module__ == kind
    return without(engine)


# what the graph's kernels do beyond the ops


def philox(seed, counter, stream):
    """Four words of Philox4x32-10."""
    x, key = [counter & 0xFFFFFFFF, counter >> 32, stream, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(second >> 32) ^ x[1] ^ key[0], second & 0xFFFFFFFF, (first >> 32) ^ x[3] ^ key[1], first & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return x


def test_philox_is_that_of_the_paper():
    """A known answer of Random123's, for the function that the next test relies on."""
    assert philox(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def drawn(logits, state, **options):
    """The token that the kernel draws with numbers of its own, over all rows."""
    from s1kernels.backends.triton import sample_token

    scalars = {name: torch.tensor(1.0, device=DEVICE) for name in ("temperature", "top_p", "repetition_penalty")}
    out = torch.full((1,), -7, dtype=torch.int32, device=DEVICE)
    sample_token.enqueue(
        logits=logits, noise=None, ras_noise=None, window=None, ids=None, **scalars,
        top_k=torch.tensor(0, dtype=torch.int32, device=DEVICE), semantic_begin=0, semantic_end=0, out=out, ras=False,
        rng=state, **options,
    )  # fmt: skip
    return int(out)


@pytest.mark.parametrize("uniform", [False, True], ids=["exponential", "uniform"])
@pytest.mark.parametrize("rows", [700, 9000])
def test_a_draw_takes_torchs_numbers(rows, uniform):
    """Element i is number i // threads of stream i % threads; with flat logits the least noise is drawn."""
    seed, start, offset, threads = 2**63 + 5, 40, 8, 512
    noise = []
    for i in range(rows):
        turn = i // threads
        word = philox(seed, (start + offset) // 4 + turn // 4, i % threads)[turn % 4]
        noise.append(-torch.tensor(word * 2.0**-32 + 2.0**-33, dtype=torch.float64).log())
    state = torch.tensor([seed - 2**64, start], device=DEVICE)
    token = drawn(torch.zeros(1, rows, device=DEVICE), state, offset=offset, threads=threads, uniform=uniform)
    assert token == int(torch.stack(noise).argmin())


@needs_gpu
@pytest.mark.parametrize("rows", [17, 1024, 7001, 155_776])
def test_a_draw_takes_what_torch_would_draw(rows):
    state, flat = torch.tensor([11, 40], device=DEVICE), torch.zeros(1, rows, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(11)
    for offset in (0, 16, 400):
        generator.set_offset(40 + offset)
        noise = torch.empty(rows, device=DEVICE).exponential_(generator=generator)
        assert drawn(flat, state, offset=offset, threads=torch_grid(flat.device, rows)) == int(noise.argmin())


@pytest.mark.parametrize("line", ["s1", "2.0"])
def test_the_state_moves_on_as_on_the_host(line):
    from s1kernels.backends.triton.decode_frame import advance

    N, W, generator = 4, WINDOW[line], torch.Generator().manual_seed(0)
    tokens, codes = (torch.zeros(1, N + 1, dtype=torch.int32, device=DEVICE) for _ in range(2))
    position, index = (torch.full((1,), value, dtype=torch.int32, device=DEVICE) for value in (7, -1))
    window = torch.full((N + 1, W), -1, dtype=torch.int32, device=DEVICE)
    random = torch.tensor([-3, 2**40], device=DEVICE)
    expected = torch.zeros(N + 1, W, dtype=torch.int32)
    for t in range(W + 5):
        frame = torch.randint(0, 99, (N + 1,), generator=generator, dtype=torch.int32)
        codes[0] = frame
        advance(tokens, codes, position, window, index, random, 44, fills_first=line == "s1")
        if t > 0:
            expected = remember(line, expected, frame, t - 1)
        assert torch.equal(window.cpu(), expected), t
        assert tokens[0].tolist() == frame.tolist()
        assert (int(position), int(index), random.tolist()) == (8 + t, t, [-3, 2**40 + 44 * (t + 1)])


# the same codes


@needs_gpu
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_float32_codes_are_the_references(name, sampling, exact_float32):
    """The graph, and op by op; the reference draws with torch's generator."""
    text, count = prompt(name, 20), 256 if name in ("small", "fast_paths") else 64
    expected = without(build(name, "cuda", backend="reference")).generate(text, count, sampling, seed=7)
    assert expected.shape == (5, count)
    graph = build(name, "cuda", backend="triton")
    assert graph.backends == {"decode_frame": "triton"}
    graph = decodes_with(graph, "s1kernels.backends.triton.decode_frame")
    assert torch.equal(graph.generate(text, count, sampling, seed=7), expected)
    by_ops = without(build(name, "cuda", backend="triton", graph=False))
    assert set(by_ops.backends.values()) == {"triton"}
    assert torch.equal(by_ops.generate(text, count, sampling, seed=7), expected)


@needs_gpu
@needs_cuda_kernels
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("name", ["small", "fast_paths_2.0"])
def test_back_ends_may_be_mixed_in_one_graph(name, mix, exact_float32):
    text = prompt(name, 20)
    engine = decodes_with(build(name, "cuda", backend=mix), "s1kernels.frame_graph")
    assert {op: by for op, by in engine.backends.items() if op in mix} == {
        op: by for op, by in mix.items() if op in engine.backends
    }
    by_ops = without(build(name, "cuda", backend=mix, graph=False))
    for seed in (3, 2**64 - 1):
        expected = without(build(name, "cuda")).generate(text, 64, SAMPLED, seed=seed)
        assert torch.equal(engine.generate(text, 64, SAMPLED, seed=seed), expected)
        assert torch.equal(by_ops.generate(text, 64, SAMPLED, seed=seed), expected)


@needs_gpu
@needs_cuda_kernels
@pytest.mark.parametrize("backend", ["triton", {"attention_decode": "triton"}], ids=str)
def test_torchs_generator_is_left_where_frame_by_frame_leaves_it(backend, exact_float32):
    after = []
    for chosen in (backend, "reference"):
        engine = without(build("small", "cuda", backend=chosen))
        torch.manual_seed(3)
        engine.generate(prompt("small", 20), 12, SAMPLED)
        after.append(torch.rand(8, device="cuda"))
    assert torch.equal(*after)


@needs_gpu
def test_where_the_reference_serves_a_frame_is_run_op_by_op(exact_float32):
    own, codes = dict.fromkeys(registry.OPS, "triton"), []
    for op, graph in (("rms_norm", True), ("sample_token", False)):  # a frame has no rms_norm by itself
        engine = without(build("small", "cuda", backend=own | {op: "reference"}))
        assert isinstance(engine.decoder, frame_graph.FrameGraph) == graph
        codes.append(engine.generate(prompt("small", 20), 6, SAMPLED, seed=3))
    assert torch.equal(*codes)


# logits


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", ["small", "fast_paths", "fast_paths_2.0", "s1_mini"])
def test_logits_are_no_farther_from_float64_than_the_references(name, dtype, exact_float32):
    """40 given frames. Halves differ by chance, in where single values round."""
    engines = [build(name, "cuda", dtype, backend=backend) for backend in ("triton", "reference")]
    truth = Engine(MODELS[name], weights(name, "cuda", dtype).to(torch.float64), backend="reference")
    text = prompt(name, 40, "cuda")

    def logits(engine):
        return torch.cat([engine.slow_step(text[:, t : t + 1], t)[0].double() for t in range(40)])

    right = logits(truth)
    error, allowed = (float((logits(engine) - right).norm() / right.norm()) for engine in engines)
    assert error < LIMIT[dtype]
    assert dtype == torch.float32 or error <= 1.05 * allowed


# the cache, and what is compiled


@needs_gpu
@pytest.mark.parametrize("backend", ["triton", {"attention_decode": "triton"}], ids=str)
def test_replays_follow_the_cache(backend, exact_float32):
    """As it grows before a frame and while frames are under way, and when it is reset."""
    cache = KVCache(MODELS["small"], weights("small", "cuda").norm, first=1500)
    roomy, engine = (without(build("small", "cuda", backend=backend, **given)) for given in ({"cache": cache}, {}))
    short, long = prompt("small", 20), prompt("small", FIRST_CAPACITY - 5)
    first = engine.generate(short, 12, SAMPLED, seed=3)
    expected = roomy.generate(long, 600, SAMPLED, seed=3)
    for _ in range(2):
        assert torch.equal(engine.generate(long, 600, SAMPLED, seed=3), expected)
        assert engine.cache.capacity == 1500
    engine.reset()
    assert engine.cache.capacity == FIRST_CAPACITY
    assert torch.equal(engine.generate(short, 12, SAMPLED, seed=3), first)


def variants():
    """How many kernels Triton has compiled for this GPU."""
    from triton.runtime.jit import JITFunction

    names = [*registry.OPS, "attention_output"]
    modules = [importlib.import_module(f"s1kernels.backends.triton.{name}") for name in names]
    kernels = {id(value): value for m in modules for value in vars(m).values() if isinstance(value, JITFunction)}
    return sum(len(held[0]) for kernel in kernels.values() for held in kernel.device_caches.values())


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, HALVES[0]], ids=str)
def test_nothing_is_compiled_again_as_a_sequence_grows(dtype):
    engine = without(build("fast_paths", "cuda", dtype, backend="triton"))
    engine.generate(prompt("fast_paths", 17), 4, SAMPLED, seed=3)
    before = variants()
    assert before >= 10
    engine.generate(prompt("fast_paths", 17), 40, GREEDY, seed=3)
    engine.generate(prompt("fast_paths", FIRST_CAPACITY - 5), 700, SAMPLED, seed=3)
    assert engine.cache.capacity == 1500
    assert variants() == before


# torch's own judgement


@pytest.mark.parametrize("name", registry.OPS)
def test_opcheck(name):
    """Schema, autograd registration, fake tensors and dynamic shapes; nothing is skipped."""
    op = registry.OPS[name]
    case = "s1_small" if name == "decode_frame" else "minimal"
    args = op.inputs(Make(torch.float32, DEVICE), **op.cases[case])
    out = as_tuple(op.empty(op.checked(*args)))
    for tensor in out:
        poison(tensor)
    with use_backend("triton"):
        result = torch.library.opcheck(getattr(torch.ops.s1kernels, name).default, (*args, *out), raise_exception=False)
    assert result == dict.fromkeys(result, "SUCCESS") and len(result) == 4, result


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_callers_own_loop_is_compiled_without_breaks(dynamic):
    def loop(x, norm_weight, weight, w2):
        for _ in range(3):
            qkv = ops.rms_norm_qkv(x, norm_weight, weight, None, 1e-6)
            x = ops.linear_residual(qkv, w2, None, x) * 0.5
        return ops.rms_norm(x, norm_weight, 1e-6)

    make = Make(torch.float32, DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(loop, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with use_backend("triton"):
        for rows in (1, 3):
            args = make(rows, 8), make(8), make(12, 8), make(8, 12)
            assert torch.equal(compiled(*args), loop(*args))
