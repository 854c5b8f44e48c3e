"""The engine itself: growth, reset, seeds, static buffers, and what it keeps of a model."""

import pytest
import torch

import s1kernels
from s1kernels.cache import FIRST_CAPACITY, KVCache
from s1kernels.model.config import DualARConfig, StackConfig
from s1kernels.model.weights import Weights
from s1kernels.testing import rel_error

SLOW = StackConfig(layers=3, dim=48, heads=6, kv_heads=2, head_dim=16, intermediate=72, qk_norm=True)
FAST = StackConfig(layers=2, dim=32, heads=4, kv_heads=1, head_dim=10, intermediate=40)
CONFIG = DualARConfig(
    slow=SLOW, fast=FAST, vocab_size=160, codebooks=4, codebook_size=30, max_positions=1500, norm_eps=1e-6,
    rope_base=1e4, tie_embeddings=False, scale_codebook_embeddings=False, norm_fast_input=False, semantic_begin=100,
    semantic_end=129, end_token=2, line="s1",
)  # fmt: skip
SAMPLING = s1kernels.Sampling(temperature=0.9, top_p=0.95)


def weights(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(key, shape):
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)

    return Weights.build(CONFIG, draw).to(dtype)


def prompt(length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [
            torch.randint(100, 130, (1, length), generator=generator),
            torch.randint(0, 30, (4, length), generator=generator),
        ]
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_cache_that_grows_changes_nothing(backend):
    long = prompt(FIRST_CAPACITY - 5)
    engine = s1kernels.Engine(CONFIG, weights(), backend=backend)
    roomy = s1kernels.Engine(CONFIG, weights(), backend=backend, cache=KVCache(CONFIG, weights().norm, first=1500))
    assert engine.cache.capacity == FIRST_CAPACITY
    assert not any(t.any() for t in (*engine.cache.k, *engine.cache.v))
    codes = engine.generate(long, 12, SAMPLING, seed=3)
    assert torch.equal(codes, roomy.generate(long, 12, SAMPLING, seed=3))
    assert engine.cache.capacity == 2 * FIRST_CAPACITY


def test_reset_gives_the_memory_back_and_the_next_prompt_starts_anew():
    engine = s1kernels.Engine(CONFIG, weights())
    first = engine.generate(prompt(20), 12, SAMPLING, seed=3)
    engine.generate(prompt(900), 4, SAMPLING, seed=3)
    assert engine.cache.capacity > FIRST_CAPACITY
    engine.reset()
    assert engine.cache.capacity == FIRST_CAPACITY
    assert torch.equal(engine.generate(prompt(20), 12, SAMPLING, seed=3), first)


def test_the_seed_and_torchs_generator_steer():
    engine = s1kernels.Engine(CONFIG, weights())
    seeded = engine.generate(prompt(20), 12, SAMPLING, seed=3)
    torch.manual_seed(3)
    assert torch.equal(engine.generate(prompt(20), 12, SAMPLING), seeded)
    assert not torch.equal(engine.generate(prompt(20), 12, SAMPLING), seeded)


def test_the_stop_token_ends_and_is_returned():
    engine = s1kernels.Engine(CONFIG, weights())
    codes = engine.generate(prompt(20), 200, SAMPLING, seed=3)
    ends = (codes[0] == CONFIG.end_token).nonzero().flatten().tolist()
    assert ends == [codes.shape[1] - 1] or (not ends and codes.shape[1] == 200)


def test_a_prompt_in_two_parts_is_the_same_prompt():
    whole, parts = (s1kernels.Engine(CONFIG, weights()) for _ in range(2))
    text = prompt(40)
    parts.prefill(text[:, :25])
    assert torch.equal(
        parts.generate(text[:, 25:], 12, SAMPLING, seed=3, start=25), whole.generate(text, 12, SAMPLING, seed=3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_frame_and_ops_agree(dtype):
    """The whole frame in one call against the same ops one by one, and both against the reference in float64."""
    engines = [
        s1kernels.Engine(CONFIG, weights(dtype=dtype), backend=b) for b in ("auto", {"attention_decode": "auto"})
    ]
    truth = s1kernels.Engine(CONFIG, weights(dtype=dtype).to(torch.float64), backend="reference")
    text = prompt(30)
    for engine in (*engines, truth):
        for t in range(30):
            logits, _ = engine.slow_step(text[:, t : t + 1], t)
            engine.last = logits
    assert torch.equal(engines[0].last, engines[1].last)
    assert (
        rel_error(engines[0].last, truth.last)
        < {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[dtype]
    )


def test_outputs_are_ordinary_tensors_even_under_inference_mode():
    with torch.inference_mode():
        engine = s1kernels.Engine(CONFIG, weights())
    codes = engine.generate(prompt(20), 4, SAMPLING, seed=3)
    codes += 1  # would raise for an inference tensor
    assert not engine.main_logits.is_inference()


@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty", "top_k"])
def test_sampling_out_of_range_is_refused(field):
    with pytest.raises(ValueError, match=f"Sampling: {field} must be"):
        s1kernels.Sampling(**{field: -1})
