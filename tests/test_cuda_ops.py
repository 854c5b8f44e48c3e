"""What is special to ops on a GPU: graphs, streams, other GPUs, torch.compile, and random numbers that are torch's."""

import dataclasses

import pytest
import torch
from cuda_models import MODELS, needs_gpu, needs_two_gpus, same_bits
from test_properties import CHI_LOGITS, chi_square, kept_distribution

from s1kernels import ops, registry, use_backend
from s1kernels.backends.cuda.sample_token import Window, sampling_launches
from s1kernels.backends.cuda.support import run, tensors_of
from s1kernels.contract import as_tuple
from s1kernels.draws import Draws, torch_grid, torch_offset
from s1kernels.sampling import Rows
from s1kernels.testing import Make, check_op, clone, poison

pytestmark = needs_gpu
HALF = torch.float16  # every GPU has it
SMALLEST = {"decode_frame": "s1_small"}  # of the others: "minimal"
HEAVY = [("embed_frame", "s1"), ("decode_frame", "s1_layers"), ("sample_token", "s1_main_flat")]  # to draw on the host


def pair(op, case, dtype):
    """Two sets of arguments of one case, aligned as models are."""
    return [op.inputs(Make(dtype, "cuda", seed, offset=0), **op.cases[case]) for seed in (0, 1)]


def assign(given, values):
    """Put other values in the place of the arguments'."""
    for target, source in zip(tensors_of(given), tensors_of(values), strict=True):
        target.copy_(source)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("name", registry.OPS)
def test_replays_follow_their_inputs(name, dtype):
    """An op in a CUDA graph, replayed after its inputs have changed in place, gives what a call gives, bit by bit."""
    op = registry.OPS[name]
    for case in [case for case in op.cases if (name, case) not in HEAVY]:
        given, later = pair(op, case, dtype)
        called = clone(later, offset=0)
        with use_backend("cuda"):
            expected = as_tuple(op(*called))
            op(*clone(given, offset=0))
            out = op.empty(op.checked(*given))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                op(*given, out=out)
        for _ in range(2):
            assign(given, later)
            for tensor in as_tuple(out):
                poison(tensor)
            graph.replay()
            assert same_bits(as_tuple(out), expected), case
            assert same_bits(given, called), case  # the caches among them


@pytest.mark.parametrize("name", registry.OPS)
def test_an_op_runs_on_the_current_stream(name):
    op = registry.OPS[name]
    given, later = pair(op, SMALLEST.get(name, list(op.cases)[-2]), HALF)
    called = clone(later, offset=0)
    with use_backend("cuda"):
        expected = as_tuple(op(*called))
        out = op.empty(op.checked(*given))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # on another stream, the op would not wait for its inputs
            assign(given, later)
            op(*given, out=out)
        side.synchronize()
    assert same_bits(as_tuple(out), expected)


@needs_two_gpus
@pytest.mark.parametrize("name", registry.OPS)
def test_an_op_runs_where_its_arguments_are(name):
    op = registry.OPS[name]
    assert torch.cuda.current_device() == 0
    for case in (SMALLEST.get(name, "minimal"), list(op.cases)[-2]):
        outcome = check_op(op, "cuda", case, HALF, "cuda:1")
        assert outcome.complaint is None, outcome


@pytest.mark.parametrize("name", registry.OPS)
def test_opcheck(name):
    """torch's own judgement of schema, autograd registration, fake tensors and dynamic shapes; nothing is skipped."""
    op = registry.OPS[name]
    args = op.inputs(Make(torch.float32, "cuda"), **op.cases[SMALLEST.get(name, "minimal")])
    out = as_tuple(op.empty(op.checked(*args)))
    for tensor in out:
        poison(tensor)
    result = torch.library.opcheck(getattr(torch.ops.s1kernels, name).default, (*args, *out), raise_exception=False)
    assert result == dict.fromkeys(result, "SUCCESS") and len(result) == 4, result


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_ops_stand_in_compiled_functions(dynamic):
    def layer(x, norm_weight, weight, w2):
        qkv = ops.rms_norm_qkv(x, norm_weight, weight, None, 1e-6)
        return ops.linear_residual(qkv, w2, None, x) * 2

    make = Make(torch.float32, "cuda")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with use_backend("cuda"):
        for rows in (1, 3):
            args = make(rows, 8), make(8), make(12, 8), make(8, 12)
            assert torch.equal(compiled(*args), layer(*args))


# random numbers


def torchs_noise(elements, generator, uniform):
    """[1, V] noise as upstream's lines draw it: the S1 line exponential_, the 2.0 line by way of uniform_."""
    noise = torch.empty(1, elements, device="cuda")
    return noise.uniform_(generator=generator).log().neg() if uniform else noise.exponential_(generator=generator)


def scalars(temperature=1.5, top_p=1.0, repetition_penalty=1.0, top_k=0):
    values = dict(temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty)
    tensors = {name: torch.tensor(value, device="cuda") for name, value in values.items()}
    return tensors | {"top_k": torch.tensor(top_k, dtype=torch.int32, device="cuda")}


def draw(logits, out, state, sampling, *, window=None, semantic=(0, -1), **options):
    """A token into `out` [1], with noise that the kernel draws from `state`; with a window, repetition-aware."""
    seen = Window() if window is None else Window(window, window.shape[1], 1, window.shape[1])
    options = {"ids": None, "rng_threads": torch_grid(logits.device, logits.shape[1])} | options
    launches = sampling_launches(
        torch.float32, logits.device, logits=logits, noise=None, ras_noise=None, window=seen, rng=state,
        semantic_begin=semantic[0], semantic_end=semantic[1], out=out, rows=1, vocabulary=logits.shape[1],
        ras=window is not None, **options, **sampling,
    )  # fmt: skip
    run(launches, logits.device)


def signed(seed):
    return seed - (1 << 64) if seed >= 1 << 63 else seed


@pytest.mark.parametrize("uniform", [False, True], ids=["exponential", "uniform"])
@pytest.mark.parametrize(("elements", "count"), [(1024, 300), (155_776, 100), (1_200_000, 10)])
def test_the_kernels_draw_torchs_numbers(elements, count, uniform):
    """From flat logits the least noise wins: it must be torch's for the same seed and offset, up to its place."""
    seeds = [(i * 0x9E3779B97F4A7C15) % (1 << 64) for i in range(count)]
    offsets = [4 * (i * 37 % 101) for i in range(count)]
    logits, sampling = torch.zeros(1, elements, device="cuda"), scalars()
    states = torch.tensor([[signed(seed), offset] for seed, offset in zip(seeds, offsets, strict=True)], device="cuda")
    out = torch.full((count,), -7, dtype=torch.int32, device="cuda")
    generator, least = torch.Generator("cuda"), []
    for seed, offset in zip(seeds, offsets, strict=True):
        generator.manual_seed(seed)
        generator.set_offset(offset + 16)
        least.append(torchs_noise(elements, generator, uniform).argmin())
        assert generator.get_offset() == offset + 16 + torch_offset(logits.device, elements)
    torch.cuda.synchronize()
    for i in range(count):
        draw(logits, out[i : i + 1], states[i], sampling, rng_offset=16, rng_uniform=uniform)
    assert out.tolist() == torch.stack(least).tolist()
    assert len(set(out.tolist())) > count // 2


@pytest.mark.parametrize("line", ["s1", "2.0"])
@pytest.mark.parametrize("name", ["small", "many_tokens"])
def test_a_frames_draws_are_in_upstreams_order(name, line):
    """Main token, its second draw in the 2.0 line, then the codes; of a main draw, only the rows that are sampled."""
    config = dataclasses.replace(MODELS[name], line=line)
    generator = torch.Generator("cuda").manual_seed(11)
    generator.set_offset(40)
    main = [torchs_noise(config.vocab_size, generator, line == "2.0") for _ in range(2 if line == "2.0" else 1)]
    fast = [torchs_noise(config.fast_rows, generator, line == "2.0") for _ in range(config.codebooks - 1)]

    every = torch.arange(config.vocab_size, dtype=torch.int32, device="cuda")
    ids = every[every % 8 != 3].contiguous()
    draws = Draws(config, Rows(torch.empty(len(ids), 1, device="cuda"), ids), config.fast_rows)
    assert generator.get_offset() == 40 + draws.numbers
    state = torch.tensor([11, 40], device="cuda")
    random, sampling, semantic = draws.randomness(state), scalars(top_p=0.95), (0, config.vocab_size - 1)
    logits = torch.randn(1, len(ids), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    flat = torch.zeros(1, config.fast_rows, device="cuda")
    noise, given = [n[:, ids.long()] for n in main], (ids, *sampling.values(), *semantic)
    with use_backend("cuda"):
        expected = [ops.sample_token(logits, noise[0], None, None, *given)]
        if line == "2.0":  # what was said is drawn again
            expected.append(ops.sample_token(logits, *noise, expected[0][None], *given))
    expected += [n.argmin()[None].int() for n in fast]

    out = torch.full((len(expected),), -7, dtype=torch.int32, device="cuda")
    common = {"rng_uniform": random.uniform}
    of_main = common | {"rng_threads": random.main_threads, "ids": ids, "ras_rng_offset": random.ras_offset}
    windows, everything = [None, expected[0][None]][: len(main)], scalars()
    torch.cuda.synchronize()
    for i, window in enumerate(windows):
        draw(logits, out[i : i + 1], state, sampling, window=window, semantic=semantic, **of_main)
    for i, offset in enumerate(random.fast_offsets, len(main)):
        of_fast = common | {"rng_threads": random.fast_threads, "rng_offset": offset}
        draw(flat, out[i : i + 1], state, everything, **of_fast)
    assert out.tolist() == torch.cat(expected).tolist()


@pytest.mark.parametrize(("rows", "count"), [(len(CHI_LOGITS), 20_000), (7001, 5_000)], ids=["one_block", "blocks"])
@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.8, 0), (1.5, 0.95, 5)])
def test_draws_follow_the_kept_distribution(rows, count, temperature, top_p, top_k):
    """Chi-square of tokens that the kernel draws with numbers of its own, one offset of the generator after another."""
    logits = torch.full((1, rows), -40.0, device="cuda")
    logits[0, : len(CHI_LOGITS)] = torch.tensor(CHI_LOGITS)
    state, sampling = torch.tensor([5, 0], device="cuda"), scalars(temperature, top_p, 1.0, top_k)
    out = torch.full((count,), -7, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    for i in range(count):
        draw(logits, out[i : i + 1], state, sampling, rng_offset=4 * i)
    statistic, quantile = chi_square(out.tolist(), kept_distribution(temperature, top_p, top_k))
    assert statistic < quantile
    wrong = kept_distribution(3 * temperature, top_p, top_k)
    assert chi_square(out.tolist(), wrong)[0] > chi_square(out.tolist(), wrong)[1]  # the test can tell
