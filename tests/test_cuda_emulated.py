"""The persistent frame kernel, run by the CPU: all its threads, in the emulator of tests/emulator."""

import shutil
from functools import cache

import emulator
import frame_phases
import pytest
import torch
from emulated_frame import Model, config_of, run_frame
from emulator import Build, LaunchFailed

from s1kernels.backends.cuda.persistent_frame import FRAME, Kind, Phases

REASON = emulator.unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

HALVES = [torch.bfloat16, torch.float16]
SIZES = {
    "small": config_of(layers=1, fast_layers=1, codebooks=3, intermediate=1024, positions=720),
    "deep": config_of(layers=2, fast_layers=4, codebooks=3, intermediate=3072, positions=720),  # S1-mini's fast stack
}


@cache
def model(size, dtype, constrained):
    return Model(SIZES[size], dtype, constrained)


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """A library for each dtype, and one that compute-sanitizer's racecheck would see."""
    folder = tmp_path_factory.mktemp("emulator")
    made = {dtype: Build(folder, dtype) for dtype in HALVES}
    made["racecheck"] = Build(folder, torch.bfloat16, racecheck=True)
    return cache(lambda which: made[which].library())


def same_bits(a, b):
    return a.codes == b.codes and all(map(torch.equal, a.results(), b.results()))


def changed(folder, file, line):
    """Builds a copy of the sources without the first such line."""
    sources = folder / "cuda"
    shutil.copytree(emulator.SOURCES, sources)
    text = (sources / file).read_text()
    assert f"\n{line}" in text
    (sources / file).write_text(text.replace(f"\n{line}", "\n", 1))
    return Build(folder, HALVES[0], sources).library()


@pytest.mark.parametrize("position", [0, 17, 128, 700])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_frame_is_right_in_any_order_of_threads(builds, dtype, position):
    """Logits, keys and values no farther from float64 than 1.5 times plain torch; draws as its logits and torch's
    numbers say; the caches' other rows as they were."""
    one = model("small", dtype, constrained=position != 128)
    frames = [run_frame(one, builds(dtype), position, seed=seed) for seed in (1, 2)]
    assert frames[0].faults() == []
    assert same_bits(*frames)


@pytest.mark.parametrize(("dtype", "position", "seed"), [(HALVES[0], 700, 3), (HALVES[1], 17, 0)], ids=str)
def test_a_frame_of_many_layers_is_right(builds, dtype, position, seed):
    assert run_frame(model("deep", dtype, constrained=True), builds(dtype), position, seed=seed).faults() == []


def test_every_phase_passes_on_what_it_should(builds):
    """Both stacks' shapes, in a frame that attends to more positions than a warp takes; and a wrong word is found."""
    one = model("deep", HALVES[0], constrained=True)
    frame = run_frame(one, builds(HALVES[0]), 300)
    k, v = frame.caches.split(one.config.slow.layers)
    phases = frame_phases.Frame(
        one.config, one.weights, one.rows.head, frame.launch, frame.tokens[0], torch.tensor(frame.codes), 300, [*k],
        [*v], frame.main_logits, frame.fast_logits[0],
    )  # fmt: skip
    phases.check()
    swiglu = next(p for p in Phases(one.config, one.weights, one.rows.head).list if p.kind == Kind.SWIGLU)
    frame.launch.tensors[FRAME.pointers.index("words")][swiglu.out + 3] ^= 1 << 14  # an exponent's bit
    with pytest.raises(AssertionError, match="slow 0 SWIGLU"):
        phases.check()


def test_a_frame_of_a_text_token_is_right(builds):
    one = model("small", HALVES[0], constrained=True)
    assert run_frame(one, builds(HALVES[0]), 5, text=True).faults() == []


def test_what_racecheck_sees_computes_the_same(builds):
    one = model("small", HALVES[0], constrained=True)
    frames = [run_frame(one, builds(which), 17, seed=1) for which in (HALVES[0], "racecheck")]
    assert same_bits(*frames)


def test_a_missing_release_is_a_deadlock(tmp_path):
    """Without it nobody tells the warp that streams weights that a slot is free."""
    line = "    each_unit(at, units, [&](const RingCursor<kSlots>& u) { barrier_arrive(s.empty + u.slot); });\n"
    library = changed(tmp_path, "device/frame_projections.cuh", line)
    with pytest.raises(LaunchFailed, match="deadlock") as error:
        run_frame(model("small", HALVES[0], constrained=True), library, 5)
    assert "weight_ring.cuh" in str(error.value) and "mbarrier" in str(error.value)


def test_a_missing_barrier_is_found(tmp_path):
    """Without it warps add up sums of others that are not there yet."""
    library = changed(tmp_path, "device/frame_projections.cuh", "    sync_workers();\n")
    frames = [run_frame(model("small", HALVES[0], constrained=True), library, 5, seed=seed) for seed in (1, 2)]
    assert any(frame.faults() for frame in frames)
