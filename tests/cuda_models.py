"""Small models for the tests that run on a GPU, and on the CPU where they can: engines' own, without upstream."""

import dataclasses
import gc
from functools import lru_cache

import pytest
import torch
from test_engine import CONFIG

from s1kernels import Engine, Sampling
from s1kernels.backends.cuda.support import tensors_of
from s1kernels.model.config import StackConfig
from s1kernels.model.weights import Weights

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]

LINE_2 = {"line": "2.0", "norm_fast_input": True, "scale_codebook_embeddings": True}
FAST_PATHS = dataclasses.replace(
    CONFIG, vocab_size=700, codebook_size=64, semantic_begin=600, semantic_end=663,
    slow=StackConfig(layers=2, dim=256, heads=4, kv_heads=2, head_dim=128, intermediate=512, qk_norm=True),
    fast=StackConfig(layers=2, dim=256, heads=4, kv_heads=2, head_dim=64, intermediate=512),
)  # fmt: skip
MODELS = {
    "small": CONFIG,
    "fast_paths": FAST_PATHS,  # shapes that the kernels for 16-bit models take
    "small_2.0": dataclasses.replace(CONFIG, **LINE_2),
    "fast_paths_2.0": dataclasses.replace(FAST_PATHS, **LINE_2),
    "many_tokens": dataclasses.replace(CONFIG, vocab_size=7001),  # drawn by more than one block
    "s1_mini": dataclasses.replace(
        CONFIG, vocab_size=5000, codebook_size=1024, semantic_begin=3000, semantic_end=4023, max_positions=3000,
        slow=StackConfig(layers=2, dim=1024, heads=16, kv_heads=8, head_dim=128, intermediate=1024, qk_norm=True),
        fast=StackConfig(layers=1, dim=1024, heads=16, kv_heads=8, head_dim=64, intermediate=1024),
    ),  # S1-mini's widths, few layers
    "s1_mini_heads": dataclasses.replace(
        CONFIG, vocab_size=155_776, codebooks=10, codebook_size=4096, semantic_begin=151_678, semantic_end=155_773,
        max_positions=3000,
        slow=StackConfig(layers=3, dim=1024, heads=16, kv_heads=8, head_dim=128, intermediate=3072, qk_norm=True),
        fast=StackConfig(layers=4, dim=1024, heads=16, kv_heads=8, head_dim=64, intermediate=3072),
    ),  # all of it but most of the slow layers
}  # fmt: skip
OLD = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)  # without bfloat16
HALVES = [torch.float16] if OLD else [torch.bfloat16, torch.float16]
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
"""Relative error of a frame's logits; that of the op decode_frame."""

GREEDY = Sampling(top_k=1)
SAMPLED = Sampling(temperature=0.9, top_p=0.95)


@lru_cache(maxsize=16)
def weights(name, device="cpu", dtype=torch.float32):
    """The weights of one of the models: the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)

    def draw(key, shape):
        values = torch.randn(shape, generator=generator) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
        return values.to(device, dtype)

    return Weights.build(MODELS[name], draw)


def build(name, device="cpu", dtype=torch.float32, **options):
    """An engine for one of the models. Raises unless the whole frame runs on the CUDA kernels where it should."""
    engine = Engine(MODELS[name], weights(name, device, dtype), **options)
    if torch.device(device).type == "cuda" and not options.keys() & {"backend", "graph"}:
        assert engine.backends == {"decode_frame": "cuda"}
    return engine


def without(engine, token=CONFIG.end_token):
    """The engine, which draws this token no more: as a rule the end token, so that nothing ends a run."""
    rows = engine.active_rows
    tokens = torch.arange(len(rows.head), device=rows.head.device) if rows.ids is None else rows.ids
    bias = torch.where(tokens == token, -1e4, 0.0).to(engine.main_logits.dtype)
    engine.use_rows(dataclasses.replace(rows, bias=bias))
    return engine


def prompt(name, length, device="cpu", seed=1):
    """[N+1, T] frames of semantic tokens."""
    config, generator = MODELS[name], torch.Generator().manual_seed(seed)
    main = torch.randint(config.semantic_begin, config.semantic_end + 1, (1, length), generator=generator)
    codes = torch.randint(0, config.codebook_size, (config.codebooks, length), generator=generator)
    return torch.cat([main, codes]).to(device, torch.int32)


def memory():
    """Bytes that torch has allocated on the GPU, and bytes that are free there."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]


def same_bits(a, b):
    """Whether all tensors in two nested lists of arguments are the same, NaN and all."""
    pairs = zip(tensors_of([a]), tensors_of([b]), strict=True)
    return all(x.dtype == y.dtype and torch.equal(raw(x), raw(y)) for x, y in pairs)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)
