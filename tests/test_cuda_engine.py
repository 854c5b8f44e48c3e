"""The engine on a GPU, where a frame is one CUDA graph; what needs no GPU runs on the CPU too."""

import dataclasses
import threading

import pytest
import torch
from cuda_models import (
    DEVICES,
    GREEDY,
    HALVES,
    LIMIT,
    MODELS,
    SAMPLED,
    build,
    memory,
    needs_gpu,
    needs_two_gpus,
    prompt,
    same_bits,
    weights,
    without,
)

from s1kernels import Engine
from s1kernels.cache import FIRST_CAPACITY, KVCache
from s1kernels.decoder import HostDecoder
from s1kernels.sampling import WINDOW, remember

END = MODELS["small"].end_token


@pytest.fixture(params=DEVICES)
def device(request, exact_float32):
    return request.param


@pytest.fixture
def captures(monkeypatch):
    """One entry for each graph that is captured."""
    counted, original = [], torch.cuda.CUDAGraph.capture_begin

    def begin(self, *args, **kwargs):
        counted.append("captured")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", begin)
    return counted


def few(device, count):
    """So many frames on a GPU; fewer on the CPU, where the reference takes its time."""
    return count if device == "cuda" else 16


def in_a_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


# the same codes


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["small", "fast_paths", "small_2.0", "fast_paths_2.0", "many_tokens"])
def test_float32_codes_are_the_references(name, sampling, device):
    """The reference draws with torch's generator: the same seed must give the same numbers in the graph."""
    count = few(device, 256 if name in ("small", "fast_paths") else 64)
    reference, engine, by_ops = (
        without(build(name, device, **options)) for options in ({"backend": "reference"}, {}, {"graph": False})
    )
    expected = reference.generate(prompt(name, 20), count, sampling, seed=7)
    assert expected.shape == (5, count)
    assert torch.equal(engine.generate(prompt(name, 20), count, sampling, seed=7), expected)
    assert torch.equal(by_ops.generate(prompt(name, 20), count, sampling, seed=7), expected)


@pytest.mark.parametrize("seed", [0, 2**63 + 5, 2**64 - 1])
def test_any_seed_means_the_same(seed, device):
    reference, engine = build("small", device, backend="reference"), build("small", device)
    expected = reference.generate(prompt("small", 20), 6, SAMPLED, seed=seed)
    assert torch.equal(engine.generate(prompt("small", 20), 6, SAMPLED, seed=seed), expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", ["small", "fast_paths", "small_2.0", "fast_paths_2.0", "many_tokens"])
def test_a_replay_has_the_bits_of_the_frame_run_eagerly(name, dtype, device):
    """Codes and logits of 40 frames, with windows; the eager frame takes noise that torch has drawn."""
    config, engines = MODELS[name], [without(build(name, device, dtype)) for _ in range(2)]
    eager, rows = engines[1], engines[1].active_rows
    eager.decoder = HostDecoder(config, rows, eager.cache, eager._program(rows))
    frames, results = [prompt(name, 1, device)] * 2, []
    windows = [torch.zeros(config.codebooks + 1, WINDOW[config.line], dtype=torch.int32, device=device) for _ in "ab"]
    generators = [torch.Generator(device).manual_seed(3) for _ in "ab"]
    for t in range(few(device, 40)):
        results = []
        for i, engine in enumerate(engines):
            codes = engine.step(frames[i], t, SAMPLED, windows[i] if t else None, generators[i])
            windows[i] = remember(config.line, windows[i], codes, t - 1) if t else windows[i]
            frames[i] = codes[:, None]
            results.append((codes, engine.main_logits, engine.fast_logits))
        assert same_bits(*results), t
    assert same_bits(engines[0].cache.k[-1][:, :, : t + 1], eager.cache.k[-1][:, :, : t + 1])


# logits


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", ["small", "fast_paths", "fast_paths_2.0"])
def test_logits_are_no_farther_from_float64_than_the_references(name, dtype, device):
    """40 given frames, as one program and op by op. Halves differ by chance, in where single values round."""
    engines = [build(name, device, dtype, **options) for options in ({}, {"graph": False}, {"backend": "reference"})]
    truth = Engine(MODELS[name], weights(name, device, dtype).to(torch.float64), backend="reference")
    text, count = prompt(name, 40, device), few(device, 40)

    def logits(engine):
        return torch.cat([engine.slow_step(text[:, t : t + 1], t)[0].double() for t in range(count)])

    right = logits(truth)
    *errors, allowed = (float((logits(engine) - right).norm() / right.norm()) for engine in engines)
    assert max(errors) < LIMIT[dtype]
    assert dtype == torch.float32 or max(errors) <= 1.05 * allowed


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", ["small", "fast_paths", "fast_paths_2.0", "s1_mini"])
def test_a_frames_logits_are_those_of_its_ops(name, dtype, device):
    """Given frames; the fast logits are compared as far as the codes before them are the same."""
    engines = [build(name, device, dtype), build(name, device, dtype, graph=False)]
    text, count = prompt(name, 24, device), few(device, 24)
    main, fast = [], []
    for t in range(count):
        codes = [engine.step(text[:, t : t + 1], t, GREEDY).tolist() for engine in engines]
        main.append([engine.main_logits[0].clone() for engine in engines])
        same = next((i for i, (a, b) in enumerate(zip(*codes, strict=True)) if a != b), len(codes[0]))
        fast += zip(*(engine.fast_logits[0, : max(same - 1, 0)].clone() for engine in engines), strict=True)
    assert len(fast) > count * (MODELS[name].codebooks - 1) // 2
    for pairs in (main, fast):
        own, right = (torch.stack(side).double() for side in zip(*pairs, strict=True))
        assert (own - right).norm() / right.norm() < 2 * LIMIT[dtype]


# the cache


@pytest.mark.parametrize("name", ["small", "fast_paths"])
def test_replays_follow_the_cache(name, device, captures):
    """As it grows before a frame and while frames are under way, and when it is reset."""
    roomy = without(build(name, device, cache=KVCache(MODELS[name], weights(name, device).norm, first=1500)))
    engine, short, long = without(build(name, device)), prompt(name, 20), prompt(name, FIRST_CAPACITY - 5)
    first, count = engine.generate(short, 12, SAMPLED, seed=3), 600 if device == "cuda" else 12
    expected = roomy.generate(long, count, SAMPLED, seed=3)
    assert engine.cache.capacity == FIRST_CAPACITY
    captures.clear()
    for _ in range(2):
        assert torch.equal(engine.generate(long, count, SAMPLED, seed=3), expected)
        assert engine.cache.capacity == (1500 if device == "cuda" else 1024)
        assert len(captures) == (2 if device == "cuda" else 0)
    engine.reset()
    assert engine.cache.capacity == FIRST_CAPACITY
    assert torch.equal(engine.generate(short, 12, SAMPLED, seed=3), first)
    assert torch.equal(roomy.generate(short, 12, SAMPLED, seed=3), first)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["fast_paths", "s1_mini"])
def test_halves_keep_their_logits_as_the_cache_grows(name, dtype, device):
    """Positions are split over blocks by the cache's size, so that values may round elsewhere."""
    config, start = MODELS[name], FIRST_CAPACITY - 3
    roomy = KVCache(config, weights(name, device, dtype).norm, first=1500)
    engines, logits = [build(name, device, dtype), build(name, device, dtype, cache=roomy)], [[], []]
    text = prompt(name, start + 6, device)
    for engine, seen in zip(engines, logits, strict=True):
        engine.prefill(text[:, :start])
        for t in range(start, start + 6):
            engine.step(text[:, t : t + 1], t, GREEDY)
            seen.append(engine.main_logits.double())
    own, right = (torch.cat(seen) for seen in logits)
    assert engines[0].cache.capacity == 2 * FIRST_CAPACITY
    assert (own - right).norm() / right.norm() < 2 * LIMIT[dtype]


@needs_gpu
def test_a_reset_gives_the_memory_back():
    engine = build("small", "cuda")
    engine.generate(prompt("small", 20), 4, SAMPLED, seed=3)
    before = memory()[0]
    engine.generate(prompt("small", 900), 4, SAMPLED, seed=3)
    assert memory()[0] > before
    engine.reset()
    assert memory()[0] <= before


# runs


@pytest.mark.parametrize("name", ["small", "fast_paths_2.0"])
def test_the_end_token_stops_and_leaves_the_generator_where_frame_by_frame_does(name, device):
    """Frames that were under way when it came are dropped, and so are the numbers that they drew."""
    torch.manual_seed(3)
    whole = without(build(name, device)).generate(prompt(name, 20), 40, SAMPLED)
    drawn = whole[0].tolist()
    end = max(set(drawn), key=drawn.index)  # of all tokens the one that comes last for the first time
    stop, config, after = drawn.index(end), dataclasses.replace(MODELS[name], end_token=end), []
    assert stop > 3
    for options in ({}, {"backend": "reference"}):
        engine = without(Engine(config, weights(name, device), **options), END)
        torch.manual_seed(3)
        codes = engine.generate(prompt(name, 20), 200, SAMPLED)
        assert torch.equal(codes, whole[:, : stop + 1])
        after.append(torch.rand(8, device=device))
    assert torch.equal(*after)
    again = engine.generate(prompt(name, 20), 200, SAMPLED)
    assert not torch.equal(again, codes)  # torch's generator has moved on


def test_a_run_may_be_left_and_engines_may_take_turns(device):
    names, runs = ["small", "fast_paths"], []
    engines = [without(build(name, device)) for name in names]

    def start(i):
        text = prompt(names[i], 20, device)
        engines[i].prefill(text[:, :-1])
        return engines[i].frames(text[:, -1:], 19, 24, SAMPLED, torch.Generator(device).manual_seed(i))

    for i in range(2):
        runs.append([codes.tolist() for codes in start(i)])
        left = start(i)
        assert [next(left).tolist() for _ in range(3)] == runs[i][:3]
        del left
    turns = list(zip(start(0), start(1), strict=True))
    assert [[codes.tolist() for codes in run] for run in zip(*turns, strict=True)] == runs
    assert runs[0] != runs[1] and len(runs[0]) == 24


def test_seeds_and_threads(device):
    text = prompt("small", 20)
    engine = without(build("small", device))
    codes = engine.generate(text, 24, SAMPLED, seed=3)
    assert torch.equal(engine.generate(text, 24, SAMPLED, seed=3), codes)
    assert not torch.equal(engine.generate(text, 24, SAMPLED, seed=4), codes)
    assert torch.equal(in_a_thread(lambda: engine.generate(text, 24, SAMPLED, seed=3)), codes)
    fresh = in_a_thread(lambda: without(build("small", device)))
    assert torch.equal(in_a_thread(lambda: fresh.generate(text, 24, SAMPLED, seed=3)), codes)
    assert torch.equal(fresh.generate(text, 24, SAMPLED, seed=3), codes)


@needs_gpu
def test_any_stream(exact_float32):
    text, engine = prompt("small", 20), without(build("small", "cuda"))
    codes = engine.generate(text, 24, SAMPLED, seed=3)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fresh = without(build("small", "cuda"))
        for any_engine in (engine, fresh):
            assert torch.equal(any_engine.generate(text, 24, SAMPLED, seed=3), codes)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(fresh.generate(text, 24, SAMPLED, seed=3), codes)


@needs_two_gpus
def test_another_gpu_than_the_current_one(exact_float32):
    text, engine = prompt("small", 20), without(build("small", "cuda:1"))
    codes = without(build("small", "cuda:0")).generate(text, 24, SAMPLED, seed=3)
    assert torch.cuda.current_device() == 0
    assert torch.equal(engine.generate(text, 24, SAMPLED, seed=3).cpu(), codes.cpu())
    torch.manual_seed(3)
    assert torch.equal(engine.generate(text, 24, SAMPLED).cpu(), codes.cpu())


def test_a_default_device_and_inference_mode_change_nothing(device):
    text = prompt("small", 20)
    codes = build("small", device).generate(text, 6, SAMPLED, seed=3)
    with torch.device(device), torch.inference_mode():
        engine = build("small", device)
        assert torch.equal(engine.generate(text, 6, SAMPLED, seed=3), codes)
    assert not engine.main_logits.is_inference()
    engine.generate(prompt("small", 600), 6, SAMPLED, seed=3)
    assert torch.equal(engine.generate(text, 6, SAMPLED, seed=3), codes)


@pytest.mark.parametrize("name", ["small", "fast_paths"])
def test_constrained_engines_draw_what_may_follow_in_speech(name, device):
    """From the same noise, the same as a run over all rows that gives the others no chance."""
    config, count = MODELS[name], few(device, 60)
    engine, every = build(name, device, constrained=True), build(name, device, backend="reference")
    allowed = [END, *range(config.semantic_begin, config.semantic_end + 1)]
    bias = torch.full((config.vocab_size,), -1e4, device=device)
    bias[allowed] = 0
    every.use_rows(dataclasses.replace(every.all_rows, bias=bias))
    for seed in range(3):
        expected = every.generate(prompt(name, 20), count, SAMPLED, seed=seed)
        assert torch.equal(engine.generate(prompt(name, 20), count, SAMPLED, seed=seed), expected)
        assert set(expected[0].tolist()) <= set(allowed)
    assert engine.main_logits.shape == (1, len(allowed))


@needs_gpu
def test_ten_thousand_replays_neither_leak_nor_drift():
    runs = [(GREEDY, None), (SAMPLED, 3)]
    text, engine, fresh = prompt("small", 20), *(without(build("small", "cuda")) for _ in range(2))
    expected = [fresh.generate(text, 400, sampling, seed=seed).cpu() for sampling, seed in runs]
    engine.generate(text, 400, SAMPLED, seed=3)
    before = memory()
    for i in range(25):
        sampling, seed = runs[i % 2]
        assert torch.equal(engine.generate(text, 400, sampling, seed=seed).cpu(), expected[i % 2])
    after = memory()
    assert after[0] == before[0] and abs(after[1] - before[1]) <= 1 << 20
