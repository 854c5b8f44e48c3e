"""The engine on a GPU, where a frame is one CUDA graph; what needs no GPU runs on the CPU too."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_models import (
    DEVICES, GREEDY, HALVES, LIMIT, MODELS, SAMPLED, build, memory, needs_gpu, needs_two_gpus, prompt, same_bits,
    weights, without,
)  # fmt: skip

from s1kernels import BackendError, Engine
from s1kernels.cache import FIRST_CAPACITY, KVCache
from s1kernels.decoder import HostDecoder
from s1kernels.sampling import WINDOW, remember
from s1kernels.testing import rel_error

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
    graph, by_ops = build(name, device, dtype), build(name, device, dtype, graph=False)
    text, compared = prompt(name, 24, device), 0
    for t in range(few(device, 24)):
        codes = [engine.step(text[:, t : t + 1], t, GREEDY).tolist() for engine in (graph, by_ops)]
        assert rel_error(graph.main_logits, by_ops.main_logits) < 2 * LIMIT[dtype]
        for i in range(graph.fast_logits.shape[1]):
            if codes[0][: i + 2] != codes[1][: i + 2]:
                break
            assert rel_error(graph.fast_logits[:, i], by_ops.fast_logits[:, i]) < 2 * LIMIT[dtype]
            compared += 1
    assert compared > few(device, 24) * graph.fast_logits.shape[1] // 2


# the cache


@pytest.mark.parametrize("name", ["small", "fast_paths"])
def test_replays_follow_the_cache(name, device, captures):
    """As it grows before a frame and while frames are under way, and when it is reset."""
    engine = without(build(name, device))
    roomy = without(build(name, device, cache=KVCache(MODELS[name], weights(name, device).norm, first=1500)))
    long = prompt(name, FIRST_CAPACITY - 5)
    first = engine.generate(prompt(name, 20), 12, SAMPLED, seed=3)
    assert engine.cache.capacity == FIRST_CAPACITY
    count = 600 if device == "cuda" else 12
    expected = roomy.generate(long, count, SAMPLED, seed=3)
    del captures[1:]
    for room, captured in ((len(expected[0]) + len(long[0]), 3), (0, 3)):
        assert torch.equal(engine.generate(long, count, SAMPLED, seed=3), expected)
        assert engine.cache.capacity >= room
        assert device == "cpu" or len(captures) == captured  # 512, 1024 and 1500 positions
    engine.reset()
    assert engine.cache.capacity == FIRST_CAPACITY
    assert torch.equal(engine.generate(prompt(name, 20), 12, SAMPLED, seed=3), first)
