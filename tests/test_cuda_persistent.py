"""The frame as one persistent kernel, on GPUs that can run it, against the graph of the ops' kernels."""

import pytest
import torch
from cuda_models import HALVES, LIMIT, SAMPLED, build, needs_gpu, prompt, without
from frame_phases import Frame

from s1kernels import Engine
from s1kernels.backends.cuda import driver, l2_halves
from s1kernels.ops import references
from s1kernels.testing import rel_error

pytestmark = needs_gpu


NAMES = ["s1_mini", "s1_mini_heads"]


def engine(name, dtype, persistent=True, **options):
    return without(build(name, "cuda", dtype, persistent=persistent, **options))


@pytest.fixture(autouse=True)
def served():
    if reason := engine("s1_mini", HALVES[0]).decoder.frame.persistent:
        pytest.skip(f"the persistent kernel does not serve here: {reason}")


def test_it_needs_cooperative_launches(monkeypatch):
    """Windows' display driver may have none."""
    monkeypatch.setattr(driver, "attribute", lambda index, which: 0)
    served = engine("s1_mini", HALVES[0])
    assert served.decoder.frame.persistent == "driver and GPU have no cooperative launches"
    assert served.generate(prompt("s1_mini", 4, "cuda"), 3, SAMPLED, seed=1).shape[1] == 3


@pytest.mark.parametrize("position", [1, 200, 300, 900, 2300])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_phase_passes_on_what_it_should(dtype, position):
    e, text = build("s1_mini_heads", "cuda", dtype), prompt("s1_mini_heads", position + 1, "cuda")
    e.prefill(text[:, :position])
    codes = e.step(text[:, -1:], position, SAMPLED, None, torch.Generator("cuda").manual_seed(7))
    k, v = ([cache[0] for cache in caches] for caches in (e.cache.k, e.cache.v))
    Frame(
        e.config, e.weights, e.active_rows.head, e.decoder._launches[1], text[:, -1], codes, position, k, v,
        e.main_logits, e.fast_logits[0],
    ).check()  # fmt: skip


@pytest.mark.parametrize("constrained", [False, True], ids=["all", "constrained"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_its_logits_are_those_of_the_ops_kernels(name, dtype, constrained):
    """Frame by frame from the same tokens and windows; positions on both sides of what one step of a block reads, of
    what it attends to in one exchange and of what a group of units holds. Truth is float32's, for which both kinds of
    kernels have to be as near. The fast logits are those of the token that was drawn: where the logits' rounding
    makes a draw another, there is no truth."""
    one, many = (engine(name, dtype, p, constrained=constrained) for p in (True, False))
    assert one.decoder.frame.persistent is None and many.decoder.frame.persistent
    exact = without(Engine(one.config, one.weights.to(torch.float32), constrained=constrained))
    text = prompt(name, 2900, "cuda")
    window = torch.randint(0, 1024, (text.shape[0], 16), dtype=torch.int32, device="cuda")
    others = 0
    for t in (1, 2, 15, 16, 17, 239, 240, 241, 512, 576, 577, 700, 1023, 1024, 1025, 2048, 2049, 2559, 2560, 2899):
        drawn = set()
        for e in (one, many, exact):
            e.prefill(text[:, :t])
            codes = e.step(text[:, t : t + 1], t, SAMPLED, window, torch.Generator("cuda").manual_seed(t))
            drawn.add(int(codes[0]))
        of_one, of_many, truth = (
            (e.main_logits, torch.stack(e.cache.k)[:, 0, :, t], e.fast_logits[:, :1]) for e in (one, many, exact)
        )
        compared = slice(3 if len(drawn) == 1 else 2)
        others += len(drawn) > 1
        for value, other, true in zip(of_one[compared], of_many[compared], truth[compared], strict=True):
            assert rel_error(value, true) < max(LIMIT[dtype], 1.2 * rel_error(other, true)), t
    assert others <= 2
    assert one.decoder.kernels == 3


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_it_draws_what_its_logits_say(name, dtype):
    """The draws, held to sample_token's reference on the frame's own logits and torch's own noise."""
    one = engine(name, dtype)
    text, wrong = prompt(name, 300, "cuda"), 0
    config, none = one.config, torch.tensor(0, dtype=torch.int32)
    scalars = [torch.tensor(x) for x in (SAMPLED.temperature, SAMPLED.top_p, SAMPLED.repetition_penalty)]
    for t in range(1, 40):
        window = torch.randint(0, 1024, (text.shape[0], 16), dtype=torch.int32, device="cuda")
        one.prefill(text[:, :t])
        codes = one.step(text[:, t : t + 1], t, SAMPLED, window, torch.Generator("cuda").manual_seed(t)).tolist()
        noise = torch.Generator("cuda").manual_seed(t)
        rows = [one.main_logits[0], *one.fast_logits[0]]
        windows = [window[:, 0], *window[2:]]
        for i, (logits, said) in enumerate(zip(rows, windows, strict=True)):
            drawn = torch.empty_like(logits).exponential_(generator=noise)
            token = references.sample_token(
                logits[None].cpu(), drawn[None].cpu(), None, said[None].cpu(), None, *scalars, none, 0, 0
            )
            wrong += int(token) != codes[0 if i == 0 else i + 1]
        assert codes[1] == min(max(codes[0] - config.semantic_begin, 0), config.codebook_size - 1)
    assert wrong <= 1  # a draw within float32 rounding of another


@pytest.mark.parametrize("constrained", [False, True], ids=["all", "constrained"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_weights_change_no_bit(name, constrained, monkeypatch):
    """In whatever halves of L2 they are."""
    monkeypatch.setattr(l2_halves, "measure", lambda memory, dtype: l2_halves.Halves.at_random(memory))
    runs = []
    for packed in (False, True):
        one = engine(name, HALVES[0], constrained=constrained, packed=packed)
        runs.append(one.generate(prompt(name, 500, "cuda"), 200, SAMPLED, seed=5))
        assert (one.decoder.frame.unpacked is None) == (one.decoder.frame.packed is not None) == packed
    assert runs[0].shape[1] == 200 and torch.equal(*runs)


def test_halves_of_l2_are_found():
    """An H100's and an H200's: half of the multiprocessors and of the memory at each, the same whenever it is asked."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("of this GPU it is not known whether its L2 has halves")
    memory = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    one, other = (l2_halves.measure(memory, HALVES[0]) for _ in range(2))
    assert one is not None and other is not None
    sides = one.sides[: torch.cuda.get_device_properties(0).multi_processor_count].float()
    assert 0.4 < sides.mean() < 0.6 and 0.4 < one.second.float().mean() < 0.6
    flipped = one.sides[0] != other.sides[0]  # which half is called the first
    assert torch.equal(one.sides[: len(sides)] ^ flipped, other.sides[: len(sides)])
    assert (one.second == other.second ^ flipped).float().mean() > 0.999


@pytest.mark.parametrize("name", NAMES)
def test_thousands_of_frames_have_the_same_bits(name):
    one = engine(name, HALVES[0])
    runs = [one.generate(prompt(name, 20, "cuda"), 1200, SAMPLED, seed=5) for _ in range(3)]
    assert runs[0].shape[1] == 1200
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
